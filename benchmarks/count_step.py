"""Count arithmetic and memory of a training step of SVD's full-size UNet, without a GPU or weights.

    python benchmarks/count_step.py --width 512 --height 320 --num_frames 14 --method boxes lora
    python benchmarks/count_step.py --width 1024 --height 576 --num_frames 25 --method lora \\
        --policy blocks nested
    python benchmarks/count_step.py --table          # the table of docs/memory.md, at full size

The step runs on tensors that have shapes but no data, in bf16, as the trainer runs it: see
svd_xtend/training/memory_count.py. Counted are the operations of matrix products, convolutions and
attention, and the bytes that are alive at the same time: weights, gradients, activations. Not
counted: optimizer state, VAE and CLIP, workspaces and fragmentation. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

# private, but torch's own way to run a model without data
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from estimate_memory import make_job
from svd_xtend.models import activation_checkpointing, precision
from svd_xtend.training import memory_count
from svd_xtend.training.memory_estimate import USABLE_FRACTION, FittingPlan, fit_to_budget

# the rows and columns of --table
TABLE_SIZES = ((512, 320, 14), (512, 320, 25), (1024, 576, 14), (1024, 576, 25))
TABLE_CARDS = (8, 12, 16, 24, 40, 80)  # GB
TABLE_SCRIPTS = {
    "LoRA": "train_svd_lora.py",
    "boxes": "train_svd_tracklet.py",
    "full": "train_svd.py",
}
FLAG_LETTERS = {
    "optimizer": "b",
    "latent_cache": "c",
    "offload_activations": "o",
    "validation_steps": "v",
}


def attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Count the forward of attention on a CPU."""
    return sdpa_flop_count(q, k, v)


def attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Count the backward of attention on a CPU."""
    return sdpa_backward_flop_count(grad, q, k, v)


aten = torch.ops.aten
ATTENTION_FLOPS = {  # torch itself counts attention on GPUs only
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


class Flops(NamedTuple):
    """Floating-point operations; a multiplication with its addition is two."""

    forward: int
    step: int  # forward and backward


def make_stock_model() -> tuple[Any, Any]:
    """Return diffusers' own UNet in bf16, unchanged, as (UNet, trained model)."""
    from diffusers import UNetSpatioTemporalConditionModel

    unet = UNetSpatioTemporalConditionModel()
    for parameter in unet.parameters():
        parameter.data = parameter.data.bfloat16()
    precision.cast_inputs(unet, torch.bfloat16)
    return unet, unet


def count_flops(method: str, policy: str, width: int, height: int, frames: int) -> Flops:
    """Count the operations of one training step.

    method: full, lora, boxes or full_bf16, or `base` for full training of diffusers' own UNet.
    """
    args = argparse.Namespace(
        width=width,
        height=height,
        num_frames=frames,
        per_gpu_batch_size=1,
        mixed_precision="bf16",
        max_objects=8 if method == "boxes" else 0,
    )
    with FakeTensorMode():
        if method == "base":
            unet, model = make_stock_model()
        else:
            prepare = memory_count.PREPARE_BY_KIND[method.removesuffix("_bf16")]
            config = memory_count.svd_config()
            unet, model = memory_count.make_fake_model(config, prepare, args, policy)
        inputs, control = memory_count.make_fake_inputs(unet, args)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
            loss = model(*inputs, **control).sample.float().square().mean()
            forward = counter.get_total_flops()
            loss.backward()
    return Flops(forward, counter.get_total_flops())


def count_row(method: str, policy: str, width: int, height: int, frames: int) -> dict[str, Any]:
    """Return TFLOP and GiB of a step. The bytes of `base` are not counted."""
    flops = count_flops(method, policy, width, height, frames)
    memory = memory_count.CountedMemory(weights=0, step=0)
    if method != "base":
        memory = memory_count.count_kind_memory(method, policy, False, width, height, frames)
    return {
        "method": method,
        "policy": policy,
        "size": f"{width}x{height}x{frames}",
        "forward_TFLOP": flops.forward / 1e12,
        "step_TFLOP": flops.step / 1e12,
        "weights_GiB": memory.weights,
        "peak_GiB": memory.weights + memory.step,
    }


def count_all(args: argparse.Namespace) -> None:
    """Count each method under each policy; print a table, and the same as JSON."""
    rows = []
    heads = f"{'forward TF':>12}{'step TF':>10}{'weights GiB':>13}{'peak GiB':>10}"
    print(f"{'size':14}{'method':11}{'policy':9}{heads}")
    for method in args.method:
        policies = ["none"] if method == "base" else args.policy
        for policy in policies:
            row = count_row(method, policy, args.width, args.height, args.num_frames)
            rows.append(row)
            tflop = f"{row['forward_TFLOP']:12.2f}{row['step_TFLOP']:10.2f}"
            gib = f"{row['weights_GiB']:13.2f}{row['peak_GiB']:10.2f}"
            print(f"{row['size']:14}{method:11}{policy:9}{tflop}{gib}", flush=True)
    print(json.dumps(rows))


def print_memory_table() -> None:
    """Print in Markdown the fastest flags with which each method and size fits each GPU."""
    print("| | " + " | ".join(f"{card} GB" for card in TABLE_CARDS) + " |")
    print("|---|" + "---|" * len(TABLE_CARDS))
    document = []
    for name, script in TABLE_SCRIPTS.items():
        for width, height, frames in TABLE_SIZES:
            size_flags = [f"--width={width}", f"--height={height}", f"--num_frames={frames}"]
            job = make_job(script, [*size_flags, "--mixed_precision=bf16"], exact=False)
            cells = []
            for card in TABLE_CARDS:
                plan = fit_to_budget(job, card * USABLE_FRACTION)
                cells.append(format_plan(plan))
                document.append(
                    {
                        "script": script,
                        "size": [width, height, frames],
                        "card": card,
                        "flags": plan.flags if plan else None,
                    }
                )
            print(f"| {name} {width}x{height} x {frames} | " + " | ".join(cells) + " |")
    print(json.dumps(document))


def format_plan(plan: FittingPlan | None) -> str:
    """Return a cell of the table: the policy, letters for further flags, GiB."""
    if plan is None:
        return "no"
    words = [plan.flags.get("gradient_checkpointing", "none")]
    letters = "".join(letter for flag, letter in FLAG_LETTERS.items() if flag in plan.flags)
    if letters:
        words.append(letters)
    words.append(f"{plan.need.total:.1f}")
    return " ".join(words)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = ["base", "full_bf16", *memory_count.PREPARE_BY_KIND]
    # fmt: off
    parser.add_argument("--method", nargs="+", choices=methods, default=["lora", "boxes"], help="what is trained; base: all of diffusers' own UNet, without this project's changes")
    parser.add_argument("--policy", nargs="+", choices=activation_checkpointing.POLICIES, default=["blocks"], help="of --gradient_checkpointing; default: blocks")
    parser.add_argument("--width", type=int, default=512, help="pixels; default: %(default)s")
    parser.add_argument("--height", type=int, default=320, help="pixels; default: %(default)s")
    parser.add_argument("--num_frames", type=int, default=14, help="frames of a clip; default: %(default)s")
    parser.add_argument("--table", action="store_true", help="print the table of docs/memory.md instead, from the constants")
    # fmt: on
    return parser


if __name__ == "__main__":
    args = build_parser().parse_args()
    if args.table:
        print_memory_table()
    else:
        count_all(args)
