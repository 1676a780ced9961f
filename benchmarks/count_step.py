"""Arithmetic and memory of a training step of SVD's full-size UNet, by counting: no GPU, no weights, seconds a row.

    python benchmarks/count_step.py --width 512 --height 320 --num_frames 14 --method boxes lora
    python benchmarks/count_step.py --width 1024 --height 576 --num_frames 25 --method lora --policy blocks nested
    python benchmarks/count_step.py --table                              # the memory table of the README, full size

The step runs over tensors that have shapes but no data, in bf16, as the trainer runs it: see svd_xtend/memory.py. Counted are
the operations of matrix products, convolutions and attention, and the bytes that are alive at once: weights, gradients,
activations. Not counted: optimizer state, VAE and CLIP, workspaces and fragmentation. The last line is one JSON document.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch._subclasses.fake_tensor import (
    FakeTensorMode,  # private, but torch's own way to run without data
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from svd_xtend.models import activation_checkpointing, precision
from svd_xtend.training import memory_estimate

aten = torch.ops.aten
ATTENTION = {  # torch counts attention on GPUs only
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}


def stock_model():
    """diffusers' own UNet in bf16, without this project's changes."""
    from diffusers import UNetSpatioTemporalConditionModel

    unet = UNetSpatioTemporalConditionModel()
    for p in unet.parameters():
        p.data = p.data.bfloat16()
    precision.cast_inputs(unet, torch.bfloat16)
    return unet, unet


def count_flops(method, policy, width, height, frames):
    """(forward, step) in floating-point operations; a multiplication with its addition is two. method: one of
    memory.KINDS, or `base`: all of diffusers' own UNet."""
    args = argparse.Namespace(width=width, height=height, num_frames=frames, per_gpu_batch_size=1,
                              mixed_precision="bf16", max_objects=8 * (method == "boxes"))  # fmt: skip
    with FakeTensorMode():
        kind = method.removesuffix("_bf16")
        unet, model = (
            stock_model()
            if method == "base"
            else memory_estimate.make_fake_model(
                memory_estimate.svd_config(), memory_estimate.PREPARE_BY_KIND[kind], args, policy
            )
        )
        x, cond = memory_estimate.make_fake_inputs(unet, args)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops:
            loss = model(*x, **cond).sample.float().square().mean()
            forward = flops.get_total_flops()
            loss.backward()
    return forward, flops.get_total_flops()


def count(method, policy, width, height, frames):
    """{forward and step in TFLOP, weights and peak in GiB}; no bytes of `base`."""
    forward, step = count_flops(method, policy, width, height, frames)
    weights, peak = 0, 0
    if method != "base":
        weights, peak = memory_estimate.count_kind_memory(
            method, policy, False, width, height, frames
        )
    return {"method": method, "policy": policy, "size": f"{width}x{height}x{frames}", "forward_TFLOP": forward / 1e12,
            "step_TFLOP": step / 1e12, "weights_GiB": weights, "peak_GiB": weights + peak}  # fmt: skip


def compare(args):
    """Count each method under each policy, print a table and the same as JSON."""
    rows = []
    print(
        f"{'size':14}{'method':11}{'policy':9}{'forward TF':>12}{'step TF':>10}{'weights GiB':>13}{'peak GiB':>10}"
    )
    for method in args.method:
        for policy in args.policy if method != "base" else ["none"]:
            r = count(method, policy, args.width, args.height, args.num_frames)
            rows.append(r)
            print(f"{r['size']:14}{method:11}{policy:9}{r['forward_TFLOP']:12.2f}{r['step_TFLOP']:10.2f}"
                  f"{r['weights_GiB']:13.2f}{r['peak_GiB']:10.2f}", flush=True)  # fmt: skip
    print(json.dumps(rows))


def readme_table():
    """What each card takes, by method and size, as markdown: the fastest levers that fit."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from estimate_memory import make_job

    sizes = ((512, 320, 14), (512, 320, 25), (1024, 576, 14), (1024, 576, 25))
    cards = (8, 12, 16, 24, 40, 80)
    print("| | " + " | ".join(f"{card} GB" for card in cards) + " |")
    print("|---|" + "---|" * len(cards))
    document = []
    for script, name in (
        ("train_svd_lora.py", "LoRA"),
        ("train_svd_tracklet.py", "boxes"),
        ("train_svd.py", "full"),
    ):
        for w, h, f in sizes:
            argv = [f"--width={w}", f"--height={h}", f"--num_frames={f}", "--mixed_precision=bf16"]
            job, cells = make_job(script, argv, exact=False), []
            for card in cards:
                found = memory_estimate.fit_to_budget(job, card * memory_estimate.USABLE_FRACTION)
                cells.append(abbreviated(found))
                document.append(
                    {"script": script, "size": [w, h, f], "card": card, "flags": found and found[0]}
                )
            print(f"| {name} {w}x{h} x {f} | " + " | ".join(cells) + " |")
    print(json.dumps(document))


def abbreviated(found):
    """A cell: the policy, letters for further levers, GiB."""
    if found is None:
        return "no"
    flags, need = found
    letters = "".join(letter for name, letter in (("optimizer", "b"), ("latent_cache", "c"), ("offload_activations", "o"),
                                                  ("validation_steps", "v")) if name in flags)  # fmt: skip
    return f"{flags.get('gradient_checkpointing', 'none')}{' ' * bool(letters)}{letters} {need.total:.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--method", nargs="+", choices=["base", "full_bf16", *memory_estimate.PREPARE_BY_KIND], default=["lora", "boxes"], help="base: full training of diffusers' own UNet, without this project's changes")
    parser.add_argument("--policy", nargs="+", choices=activation_checkpointing.POLICIES, default=["blocks"])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--num_frames", type=int, default=14)
    parser.add_argument("--table", action="store_true", help="print the README's table instead, from the constants")
    # fmt: on
    args = parser.parse_args()
    readme_table() if args.table else compare(args)
