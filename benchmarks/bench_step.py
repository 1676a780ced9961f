"""Seconds and memory of a UNet training step, diffusers' own beside ours, and of the phases around it.

    python benchmarks/bench_step.py                                          # the embedded SVD, on any machine
    python benchmarks/bench_step.py --model full --width 1024 --height 576 --num_frames 25 --method lora --precision bf16

Physics: a training step does about three forwards of arithmetic (one forward, two in backward), four when activations are
recomputed; with adapters only, two and three. What is neither attention nor a matrix product is bound by memory traffic.

Variants run in turn, round after round in one process: what else the machine does hits all of them, and ratios of the
medians hold where seconds do not. The last line is one JSON document.
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

from svd_xtend import fast_unet
from svd_xtend.checkpoints import load_svd
from svd_xtend.lora import inject_lora
from svd_xtend.tiny import TINY_SVD

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF_WIDTH = dict(
    block_out_channels=(160, 320, 640, 640), num_attention_heads=(5, 10, 20, 20), addition_time_embed_dim=256
)


def make_unet(args, device):
    """The UNet to measure: the embedded one, or random weights in SVD's layout, whole or at half its width."""
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    if args.model == "tiny":
        unet = load_svd(str(TINY_SVD), torch.float32).unet
    else:
        with torch.device(device):
            unet = UNetSpatioTemporalConditionModel(**(HALF_WIDTH if args.model == "half" else {}))
    unet.requires_grad_(args.method == "full")
    if args.method == "lora":
        unet.to(DTYPES[args.precision])
        inject_lora(unet, 16, 16, ["attention"])
        for name, p in unet.named_parameters():
            if ".lora_" in name:
                p.data = p.data.float()
    return unet.to(device).train()


def variants(args):
    """{name: what it does to a UNet}: the stock one first, what the others are compared with."""
    chosen = {"diffusers": lambda unet: unet, "ours": fast_unet.speed_up}
    chosen["diffusers, its checkpointing"] = lambda unet: (unet.enable_gradient_checkpointing(), unet)[1]
    for policy in list(fast_unet.POLICIES)[1:]:
        chosen[f"ours, {policy}"] = lambda unet, policy=policy: fast_unet.checkpoint(fast_unet.speed_up(unet), policy)
    return {name: make for name, make in chosen.items() if not args.only or name in args.only}


def one_step(unet, inputs, args, device):
    """{forward, backward: seconds} and peak GiB on a GPU."""

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = now()
    with torch.autocast(device.type, DTYPES[args.precision], enabled=args.precision != "no"):
        loss = unet(*inputs).sample.float().square().mean()
    middle = now()
    loss.backward()
    seconds = {"forward": middle - began, "backward": now() - middle}
    unet.zero_grad()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return seconds, peak


def main(args):
    """Measure and print."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale, dim = (4, 64) if args.model == "tiny" else (8, 1024)
    b, f, h, w = args.batch_size, args.num_frames, args.height // scale, args.width // scale
    g = torch.Generator().manual_seed(0)
    shapes = (b, f, 8, h, w), (b,), (b, 1, dim), (b, 3)
    inputs = [torch.randn(shape, generator=g).to(device) for shape in shapes]
    rows = {name: {"seconds": [], "forward": [], "peak": None} for name in variants(args)}
    unet = make_unet(args, device)
    shared = {id(p): p for p in unet.parameters()}  # one set of weights for all variants
    rounds = {name: make(copy.deepcopy(unet, dict(shared))) for name, make in variants(args).items()}
    for i in range(args.rounds + 1):
        for name, unet in rounds.items():
            try:
                seconds, peak = one_step(unet, inputs, args, device)
            except torch.cuda.OutOfMemoryError:
                rows[name]["peak"] = "out of memory"
                continue
            if i:  # the first one warms up
                rows[name]["seconds"].append(sum(seconds.values()))
                rows[name]["forward"].append(seconds["forward"])
                rows[name]["peak"] = peak
    first = next(iter(rows))
    report(rows, first, device, args)


def report(rows, first, device, args):
    """A table, then the same as one JSON line. Ratios are medians of the rounds' own ratios."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model} {args.method} {args.width}x{args.height}x{args.num_frames} batch {args.batch_size}, {args.precision}, {name}")  # fmt: skip
    print(f"{'':32}{'s/step':>9}{'forward':>9}{'x ' + first:>14}{'peak GiB':>10}")
    document = {"device": name, **vars(args), "variants": {}}
    for variant, row in rows.items():
        if not row["seconds"]:
            print(f"{variant:32}{row['peak']}")
            continue
        median, forward = statistics.median(row["seconds"]), statistics.median(row["forward"])
        base = rows[first]["seconds"]
        ratio = statistics.median(b / a for a, b in zip(row["seconds"], base)) if base else None
        peak = f"{row['peak']:10.2f}" if row["peak"] else ""
        print(f"{variant:32}{median:9.3f}{forward:9.3f}{ratio if ratio else float('nan'):14.2f}{peak}")
        document["variants"][variant] = {
            "seconds": median,
            "forward": forward,
            "speedup": ratio,
            "peak_gib": row["peak"],
        }
    print(json.dumps(document))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--model", choices=["tiny", "half", "full"], default="tiny", help="the embedded UNet, or SVD's with random weights, at half its width or whole")
    parser.add_argument("--method", choices=["full", "lora"], default="full")
    parser.add_argument("--precision", choices=DTYPES, default="no")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--height", type=int, default=48)
    parser.add_argument("--num_frames", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="these variants, by their names in the table")
    # fmt: on
    main(parser.parse_args())
