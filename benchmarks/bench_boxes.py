"""What box control adds to a training step: seconds of forward and backward on the embedded SVD, paired, in one process.

    python benchmarks/bench_boxes.py

Beside the frozen UNet with an adapter: training all of the UNet, and LoRA of rank 16 on all attention. A step of a frozen UNet
has no weight gradients, but must still go back through all activations. Variants run in turn, round after round; ratios
are medians of the rounds' own. The last line is one JSON document. The full-size UNet: see count_step.py.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from svd_xtend.demo.synthetic_clips import make_clip
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.models import precision, unet_optimizations
from svd_xtend.models.box_control import ControlledUNet, new_box_control
from svd_xtend.models.loading import load_svd
from svd_xtend.models.lora import inject_lora


def variants(half):
    """{name: (UNet, keyword arguments of its boxes)}; all from the same weights, computing in bf16 where `half`."""
    base = unet_optimizations.speed_up(load_svd(str(TINY_SVD), torch.float32).unet).requires_grad_(
        False
    )
    clip = {k: torch.from_numpy(v)[None].repeat(8, *[1] * v.ndim) for k, v in make_clip((1, 1), "roam").tracklets().pad(8).cond().items()}  # fmt: skip
    full, lora = copy.deepcopy(base), inject_lora(copy.deepcopy(base), 16, 16, ["attention"])
    for name, p in full.named_parameters():
        p.requires_grad_(unet_optimizations.has_effect(name))
    made = {"full UNet": (full, {}), "LoRA": (lora, {})}
    for enhancer in ("carry", "tokens", "none"):
        unet = copy.deepcopy(base)
        made[f"boxes, enhancer {enhancer}"] = (
            ControlledUNet(unet, new_box_control(unet, enhancer=enhancer)),
            clip,
        )
    for model, _ in made.values() if half else []:
        precision.set_precision(model, getattr(model, "unet", model), torch.bfloat16, torch.float32)
    return made


def main(args):
    """Measure and print."""
    g = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=g) for shape in ((8, 8, 8, 12, 16), (8,), (8, 1, 64), (8, 3))
    ]
    made = variants(args.precision == "bf16")
    seconds = {name: [] for name in made}
    for i in range(args.rounds + 1):
        for name, (model, cond) in made.items():
            began = time.perf_counter()
            loss = model(*inputs, **cond).sample.float().square().mean()
            loss.backward()
            model.zero_grad()
            if i:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    print(
        f"embedded SVD, 8 clips of 64x48x8, {args.precision}, {torch.get_num_threads()} CPU threads, bf16 fast here: {precision.fast_bf16()}"
    )
    table = {}
    for name, own in seconds.items():
        ratios = [
            statistics.median(a / b for a, b in zip(own, seconds[other]))
            for other in ("full UNet", "LoRA")
        ]
        table[name] = {"seconds": statistics.median(own), "x_full": ratios[0], "x_lora": ratios[1]}
        print(
            f"{name:26}{table[name]['seconds']:8.3f} s{ratios[0]:8.2f} x full{ratios[1]:8.2f} x LoRA"
        )
    print(json.dumps(table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args())
