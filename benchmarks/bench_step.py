"""Seconds of a training step by phase, and its memory: each lever beside the original's way of doing it.

    python benchmarks/bench_step.py                                          # the embedded SVD, on any machine
    python benchmarks/bench_step.py --model half --method lora               # SVD at half its width, random weights
    python benchmarks/bench_step.py --model full --width 1024 --height 576 --num_frames 25 --method lora --precision bf16

Phases: VAE (the frames, and the noised first one), CLIP, the UNet's forward and backward, the optimizer. `data` is what the
loader takes for the batch, from JPEG of 1280x720 or from the cache and one frame; its processes do that beside the step, so
it is not in s/step. Physics: a step does about three forwards of arithmetic (one forward, two in backward), four when
activations are recomputed; with adapters only, two and three. What is neither attention nor a matrix product waits for
memory. MFU: arithmetic of a step that recomputes nothing, beside what the GPU could do in that time.

`original` is the public code's way: half-precision weights under autocast, diffusers' own checkpointing, frames encoded 8 at
a time in each step. On a CPU variants run in turn, round after round, so that ratios hold where seconds do not; on a GPU one
after the other, each with the GPU to itself. Ratios are medians of the rounds' own. The last line is one JSON document.
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import train_svd
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.models import activation_checkpointing, loading, precision, unet_optimizations
from svd_xtend.models.loading import load_svd
from svd_xtend.models.lora import inject_lora
from svd_xtend.training import memory_estimate
from svd_xtend.training.optimizers import OPTIMIZERS, make_optimizer

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF_WIDTH = dict(
    block_out_channels=(160, 320, 640, 640),
    num_attention_heads=(5, 10, 20, 20),
    addition_time_embed_dim=256,
)
PEAK_TFLOPS = {
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "4090": 165,
    "L40S": 362,
    "L4": 121,
}  # dense, half precision; vendors'
DIFFUSERS = dict(
    fast=False,
    policy="none",
    autocast=True,
    encode="cached",
    compile=False,
    offload=False,
    optimizer="adamw",
)
OURS = DIFFUSERS | dict(fast=True, autocast=False)
VARIANTS = {  # the first is what the others are compared with
    "original": DIFFUSERS | dict(policy="diffusers", encode="live"),
    "diffusers": DIFFUSERS,
    "diffusers, its checkpointing": DIFFUSERS | dict(policy="diffusers"),
    "ours": OURS,
    "ours, encoding live": OURS | dict(encode="live"),
    **{
        f"ours, {policy}": OURS | dict(policy=policy)
        for policy in list(activation_checkpointing.POLICIES)[1:]
    },
    "ours, nested, offload": OURS | dict(policy="nested", offload=True),
    "ours, adamw_bf16_sr": OURS | dict(optimizer="adamw_bf16_sr"),
    "ours, compile": OURS | dict(compile=True),
    "ours, blocks, compile": OURS | dict(policy="blocks", compile=True),
}
NEEDS = {"ours, nested, offload": "a GPU", "ours, adamw_bf16_sr": "torchao", "ours, compile": "--compile", "ours, blocks, compile": "--compile"}  # fmt: skip


def make_pipe(args, device):
    """(VAE, CLIP, UNet, ...) to measure: the embedded SVD, or random weights in SVD's layout, whole or at half its width."""
    if args.model == "tiny":
        return load_svd(str(TINY_SVD), torch.float32)
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    blocks = dict(
        down_block_types=["DownEncoderBlock2D"] * 4, block_out_channels=[128, 256, 512, 512]
    )
    huge = CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, projection_dim=1024, num_hidden_layers=32,
                            num_attention_heads=16, patch_size=14, hidden_act="gelu")  # fmt: skip
    with torch.device(device):
        return SimpleNamespace(
            unet=UNetSpatioTemporalConditionModel(**(HALF_WIDTH if args.model == "half" else {})),
            vae=AutoencoderKLTemporalDecoder(layers_per_block=2, force_upcast=True, **blocks),
            image_encoder=CLIPVisionModelWithProjection(huge),
            feature_extractor=CLIPImageProcessor(),
        )


def make_unet(stock, how, args, optimizers, device):
    """A copy of the stock UNet, on the same weights where a variant leaves them as they are, made to train as it does; and its
    optimizer, which those on the same trained weights share."""
    half = DTYPES[args.precision]
    shared = args.method != "full" or (args.precision == "no" and how["optimizer"] == "adamw")
    unet = copy.deepcopy(stock, {id(p): p for p in stock.parameters()} if shared else {}).to(device)
    unet.requires_grad_(False)
    if how["fast"]:
        unet_optimizations.speed_up(unet)
    model = unet
    if args.method == "boxes":
        model = memory_estimate.PREPARE_BY_KIND["boxes"](unet, args)
    elif args.method == "lora":
        inject_lora(unet, 16, 16, ["attention"])
        for module in unet.modules() if not how["fast"] else []:
            if hasattr(module, "lora_A"):
                module.__dict__.pop("forward", None)  # PEFT's own
    else:
        train_svd.select_parameters(unet, SimpleNamespace(train_params=[]))
    master = getattr(torch, OPTIMIZERS[how["optimizer"]][0])
    model.to(device)
    for p in model.parameters():
        p.data = p.data.to(master if p.requires_grad else half)
    if how["compile"]:
        unet_optimizations.compile_blocks(unet)
    if how["policy"] == "diffusers":
        unet.enable_gradient_checkpointing()
    else:
        activation_checkpointing.checkpoint_activations(model, how["policy"])
    if not how["autocast"] and half != torch.float32:
        precision.cast_inputs(unet, half)
        precision.compute_in(model, half)
    trained = loading.trainable_parameters(model)
    told = SimpleNamespace(optimizer=how["optimizer"], mixed_precision=args.precision, learning_rate=1e-6, adam_beta1=0.9, adam_beta2=0.999,
                           adam_weight_decay=0.01, adam_epsilon=None, seed=0)  # fmt: skip
    key = id(next(iter(trained.values()))), how["optimizer"]
    optimizers[key] = optimizers.get(key) or make_optimizer(trained, told)
    return model.train(), optimizers[key]


class Clock:
    """Seconds between calls, by name; waits for the GPU."""

    def __init__(self, device):
        self.device, self.seconds = device, {}
        self.lap(None)

    def lap(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if name:
            self.seconds[name] = now - self.before
        self.before = now


def one_step(variant, pipe, batch, args, device):
    """{phase: seconds} of one training step, and its peak in GiB on a GPU."""
    unet, optimizer, how = variant
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock, pixels, noise = Clock(device), batch["pixel_values"], batch["noise"]
    live = how["encode"] == "live"
    chunk = 8 if how["policy"] == "diffusers" else 1
    latents = train_svd.encode_video(
        pipe.vae, pixels, noise, chunk, None if live else batch["moments"]
    )
    clock.lap("VAE")
    embeds = train_svd.embed_image(pipe, pixels[:, 0]) if live else batch["image_embeds"]
    clock.lap("CLIP")
    _, image_latents, ids = train_svd.condition(pipe, pixels[:, 0], *batch["told"], noise, embeds)
    clock.lap("VAE, first frame")
    inputs = torch.cat([latents, image_latents[:, None].expand_as(latents)], dim=2)
    with torch.autocast(
        device.type, DTYPES[args.precision], enabled=how["autocast"] and args.precision != "no"
    ):
        forward = (
            activation_checkpointing.offload_activations(unet, unet) if how["offload"] else unet
        )
        loss = (
            (forward(inputs, noise.normal(), embeds, ids, **batch["cond"]).sample.float() - latents)
            .square()
            .mean()
        )
    clock.lap("forward")
    loss.backward()
    clock.lap("backward")
    optimizer.step()
    optimizer.zero_grad()
    clock.lap("optimizer")
    return (
        clock.seconds,
        torch.cuda.max_memory_allocated() / memory_estimate.GIB if device.type == "cuda" else None,
    )


def make_batch(pipe, args, device, scale):
    """Random frames with what a cache holds of them."""
    b, f, h, w = args.batch_size, args.num_frames, args.height, args.width
    cond = {}
    if args.method == "boxes":
        corner = torch.rand(b, 1, 8, 2, device=device) / 2
        boxes = torch.cat([corner, corner + 0.3], -1).expand(b, f, 8, 4)
        there = torch.ones(b, f, 8, device=device)
        cond = {
            "boxes": boxes,
            "valid": there,
            "hard": there,
            "colors": torch.rand(b, 8, 3, device=device),
        }
    pixels = torch.rand(b, f, 3, h, w, device=device) * 2 - 1
    return {
        "cond": cond, "pixel_values": pixels, "noise": train_svd.SampleNoise(0, torch.arange(b), device),
        "moments": torch.rand(b, 2, f, 4, h // scale, w // scale, device=device),
        "image_embeds": torch.randn(b, 1, pipe.image_encoder.config.projection_dim, device=device),
        "told": (torch.full((b,), 7, device=device), torch.full((b,), 127, device=device)),
    }  # fmt: skip


def measure(names, pipe, stock, args, device, batch):
    """{variant: {phases: medians of seconds, seconds: of each round, peak}} of variants that run in turn."""
    optimizers = {}
    made = {
        name: (*make_unet(stock, VARIANTS[name], args, optimizers, device), VARIANTS[name])
        for name in names
    }
    rows = {name: {"rounds": [], "peak_GiB": None} for name in names}
    for i in range(args.rounds + 1):
        for name, variant in made.items():
            if rows[name]["peak_GiB"] == "out of memory":
                continue
            try:
                seconds, peak = one_step(variant, pipe, batch, args, device)
            except torch.OutOfMemoryError:
                rows[name]["peak_GiB"] = "out of memory"
                continue
            if i:  # the first one warms up
                rows[name]["rounds"].append(seconds)
                rows[name]["peak_GiB"] = peak
    return rows


def chosen(args, device):
    """Names of the variants that can run here; says which cannot, and why."""
    import importlib.util

    there = {"a GPU": device.type == "cuda", "torchao": bool(importlib.util.find_spec("torchao")) and args.method == "full"
             and args.precision == "bf16", "--compile": args.compile}  # fmt: skip
    names = [name for name in VARIANTS if not args.only or name in args.only]
    left = [name for name in names if not there.get(NEEDS.get(name), True)]
    for name in left:
        print(f"left out: {name}, which needs {NEEDS[name]}", file=sys.stderr)
    return [name for name in names if name not in left]


def main(args):
    """Measure and print."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    pipe = make_pipe(args, device)
    half = DTYPES[args.precision]
    # where each variant has weights of its own the stock ones wait on the CPU: they would be in every peak
    place, dtype = (device, half) if args.method != "full" else ("cpu", None)
    stock = pipe.unet.to(place, dtype).requires_grad_(False)
    del pipe.unet
    for module in (pipe.vae, pipe.image_encoder):
        module.requires_grad_(False).to(device, half)
    batch = make_batch(pipe, args, device, 4 if args.model == "tiny" else 8)
    names, rows = chosen(args, device), {}
    report = Report(device, args)
    for group in [[name] for name in names] if device.type == "cuda" else [names]:
        measured = measure(group, pipe, stock, args, device, batch)
        rows |= measured
        for name in measured:
            report.add(name, measured[name], rows[names[0]])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(report.document))


def data_seconds(args):
    """{live, cached: seconds} that one process takes to load a batch."""
    import tempfile

    sys.path.insert(0, str(Path(__file__).parent))
    import bench_loader

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "frames")
        bench_loader.write_frames(base, "jpeg", args.num_frames)
        reads = bench_loader.variants(
            base, Path(folder, "cache"), args.width, args.height, args.num_frames
        )
        told = {}
        for name, variant in (("live", "ours"), ("cached", "cached")):
            seconds = []
            for _ in range(4):
                began = time.perf_counter()
                reads[variant]()
                seconds.append(time.perf_counter() - began)
            told[name] = args.batch_size * statistics.median(seconds[1:])
    return told


def model_tflop(args):
    """TFLOP of a step that recomputes nothing, of SVD's own size; None of others. Counting takes a minute: counts of before are
    in step_tflop.json."""
    sys.path.insert(0, str(Path(__file__).parent))
    from count_step import count_flops

    if args.model != "full":
        return None
    file = Path(__file__).with_name("step_tflop.json")
    known = json.loads(file.read_text()) if file.exists() else {}
    key = f"{args.method} {args.width}x{args.height}x{args.num_frames}"
    if key not in known:
        known[key] = (
            count_flops(args.method, "none", args.width, args.height, args.num_frames)[1] / 1e12
        )
        file.write_text(json.dumps(known, indent=1) + "\n")
    return args.batch_size * known[key]


def predicted_peak(name, args):
    """GiB that estimate_memory.py says torch will have allocated at most, of a variant of SVD's own size, or None."""
    from estimate_memory import make_job

    how = VARIANTS[name]
    if args.model != "full" or not how["fast"]:
        return None
    script = {
        "lora": "train_svd_lora.py",
        "full": "train_svd.py",
        "boxes": "train_svd_tracklet.py",
    }[args.method]
    flags = [f"--{flag}={getattr(args, flag)}" for flag in ("width", "height", "num_frames")]
    flags += [f"--mixed_precision={args.precision}", f"--gradient_checkpointing={how['policy']}", "--validation_steps=0",
              f"--optimizer={how['optimizer']}", f"--per_gpu_batch_size={args.batch_size}"]  # fmt: skip
    if how["offload"]:
        flags.append("--offload_activations")
    need = make_job(script, flags, exact=False).need()
    return need.peak if need else None


class Report:
    """A table whose rows are printed as they are measured, and the same as a JSON document, written with each row."""

    PHASES = ("VAE", "VAE, first frame", "CLIP", "forward", "backward", "optimizer")

    def __init__(self, device, args):
        name = (
            torch.cuda.get_device_name()
            if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads"
        )
        title = f"{args.model} {args.method} {args.width}x{args.height}x{args.num_frames} batch {args.batch_size}"
        print(f"{title}, {args.precision}, {name}")
        self.args, self.tflop, self.data = args, model_tflop(args), {"live": None, "cached": None}
        if not args.skip_loading:
            self.data = data_seconds(args)
        self.peak_tflops = next((t for card, t in PEAK_TFLOPS.items() if card in name), None)
        columns = "".join(f"{p[:9]:>10}" for p in (*self.PHASES, "data"))
        print(
            f"{'':30}{'s/step':>8}{'x faster':>9}{columns}{'peak GiB':>10}{'predicted':>10}{'MFU':>7}",
            flush=True,
        )
        self.document = {
            "device": name,
            "torch": torch.__version__,
            **vars(args),
            "tflop": self.tflop,
            "variants": {},
        }

    def add(self, variant, row, first):
        """Print and keep a variant's row; `first`: the row that it is compared with."""
        document = {
            "peak_GiB": row["peak_GiB"],
            "predicted_GiB": predicted_peak(variant, self.args),
        }
        self.document["variants"][variant] = document
        predicted = f"{document['predicted_GiB']:10.2f}" if document["predicted_GiB"] else " " * 10
        if not row["rounds"]:
            print(f"{variant:30}{row['peak_GiB']}{predicted} predicted", flush=True)
        else:
            totals = [sum(seconds.values()) for seconds in row["rounds"]]
            base = [sum(seconds.values()) for seconds in first["rounds"]]
            document["seconds"] = statistics.median(totals)
            document |= {
                phase: statistics.median(s[phase] for s in row["rounds"]) for phase in self.PHASES
            }
            document["data"] = self.data[VARIANTS[variant]["encode"]]
            document["x_faster"] = (
                statistics.median(b / a for a, b in zip(totals, base)) if base else None
            )
            mfu = None
            if self.tflop and self.peak_tflops:
                mfu = self.tflop / document["seconds"] / self.peak_tflops
            document["mfu"] = mfu
            cells = "".join(f"{document[p]:10.3f}" for p in self.PHASES)
            cells += f"{document['data']:10.3f}" if document["data"] else " " * 10
            peak = f"{row['peak_GiB']:10.2f}" if row["peak_GiB"] else " " * 10
            faster = document["x_faster"] or float("nan")
            print(f"{variant:30}{document['seconds']:8.3f}{faster:9.2f}{cells}{peak}{predicted}"
                  + (f"{mfu:7.1%}" if mfu else ""), flush=True)  # fmt: skip
        if self.args.output:
            Path(self.args.output).write_text(json.dumps(self.document))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--model", choices=["tiny", "half", "full"], default="tiny", help="the embedded SVD, or SVD's layout with random weights, at half its width or whole")
    parser.add_argument("--method", choices=["full", "lora", "boxes"], default="full")
    parser.add_argument("--precision", choices=DTYPES, default="no")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--height", type=int, default=48)
    parser.add_argument("--num_frames", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure the compiled variants, too: minutes more")
    parser.add_argument("--skip_loading", action="store_true", help="do not measure what the loader takes")
    parser.add_argument("--output", help="write the JSON document to this file, too, with each row as it is measured")
    parser.add_argument("--only", nargs="+", help="these variants, by their names in the table")
    # fmt: on
    main(parser.parse_args())
