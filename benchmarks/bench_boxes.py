"""Measure what box control adds to a training step, on the embedded SVD.

    python benchmarks/bench_boxes.py

The benchmark measures the seconds of a forward and a backward pass of five models: the whole UNet in
training, LoRA of rank 16 on all attention layers, and the frozen UNet with each kind of box
control. A step of a frozen UNet computes no gradients of weights, but it must still go back through
all activations.

The models run in turn, round after round, in one process. Ratios are medians over the rounds, so
they are more reliable than the seconds. The last line is one JSON document. For the full-size UNet,
see count_step.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

from svd_xtend.demo.synthetic_clips import make_clip
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.models import precision, unet_optimizations
from svd_xtend.models.box_control import ControlledUNet, new_box_control
from svd_xtend.models.loading import load_svd
from svd_xtend.models.lora import inject_lora

NUM_CLIPS = 8
SLOTS = 8
LORA_RANK = 16


@dataclass
class Variant:
    """A model to measure, its boxes, and the seconds of each round."""

    name: str
    model: nn.Module
    cond: dict[str, Tensor]
    seconds: list[float] = field(default_factory=list)

    def step(self, inputs: list[Tensor]) -> float:
        """Return the seconds of a forward and a backward pass."""
        start = time.perf_counter()
        loss = self.model(*inputs, **self.cond).sample.float().square().mean()
        loss.backward()
        self.model.zero_grad()
        return time.perf_counter() - start


def make_boxes() -> dict[str, Tensor]:
    """Return the boxes of NUM_CLIPS equal clips, as keyword arguments of ControlledUNet."""
    tracklets = make_clip((1, 1), "roam").tracklets().pad(SLOTS)
    boxes = {}
    for name, array in tracklets.cond().items():
        boxes[name] = torch.stack([torch.from_numpy(array)] * NUM_CLIPS)
    return boxes


def make_variants(use_bf16: bool) -> list[Variant]:
    """Return the models, all from the same weights. They compute in float32 or in bf16."""
    pipe = load_svd(str(TINY_SVD), torch.float32)
    base = unet_optimizations.speed_up(pipe.unet).requires_grad_(False)

    full = copy.deepcopy(base)
    for name, parameter in full.named_parameters():
        parameter.requires_grad_(unet_optimizations.has_effect(name))
    lora = inject_lora(copy.deepcopy(base), LORA_RANK, LORA_RANK, ["attention"])
    variants = [Variant("full UNet", full, {}), Variant("LoRA", lora, {})]

    boxes = make_boxes()
    for enhancer in ("carry", "tokens", "none"):
        unet = copy.deepcopy(base)
        controlled = ControlledUNet(unet, new_box_control(unet, enhancer=enhancer))
        variants.append(Variant(f"boxes, enhancer {enhancer}", controlled, boxes))

    if use_bf16:
        for variant in variants:
            model = variant.model
            unet = model.unet if isinstance(model, ControlledUNet) else model
            precision.set_precision(model, unet, torch.bfloat16, torch.float32)
    return variants


def median_ratio(a: Variant, b: Variant) -> float:
    """Return the median over the rounds of the seconds of `a` divided by those of `b`."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds))


def main(args: argparse.Namespace) -> None:
    """Measure all variants and print a table."""
    generator = torch.Generator().manual_seed(0)
    # sample, timestep, image_embeds, added_time_ids
    shapes = [(NUM_CLIPS, 8, 8, 12, 16), (NUM_CLIPS,), (NUM_CLIPS, 1, 64), (NUM_CLIPS, 3)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    variants = make_variants(args.precision == "bf16")

    for variant in variants:
        variant.step(inputs)  # warm-up
    for _ in range(args.rounds):
        for variant in variants:
            variant.seconds.append(variant.step(inputs))

    print(
        f"embedded SVD, {NUM_CLIPS} clips of 64x48x8, {args.precision}, "
        f"{torch.get_num_threads()} CPU threads, fast bf16: {precision.fast_bf16()}"
    )
    full, lora = variants[:2]
    table = {}
    for variant in variants:
        row = {
            "seconds": statistics.median(variant.seconds),
            "x_full": median_ratio(variant, full),
            "x_lora": median_ratio(variant, lora),
        }
        table[variant.name] = row
        print(
            f"{variant.name:26}{row['seconds']:8.3f} s"
            f"{row['x_full']:8.2f} x full{row['x_lora']:8.2f} x LoRA"
        )
    print(json.dumps(table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--precision",
        choices=["no", "bf16"],
        default="no",
        help="no is float32; default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    main(parser.parse_args())
