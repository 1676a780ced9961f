"""Measure the seconds of a training step by phase, and its memory, with each optimization.

    python benchmarks/bench_step.py                                # the embedded SVD, on any machine
    python benchmarks/bench_step.py --model half --method lora     # random weights, half of SVD's width
    python benchmarks/bench_step.py --model full --width 1024 --height 576 --num_frames 25 \\
        --method lora --precision bf16

Phases: VAE (all frames, and the noised first one), CLIP, the UNet's forward and backward, the
optimizer. `data` is the time that the loader takes for the batch, from JPEG of 1280x720 or from the
cache and one frame. Its processes work beside the step, so it is not part of s/step.

What to expect: a step does about three forwards of arithmetic (one forward, two in backward), four
if activations are recomputed; with adapters alone two and three. Everything but attention and
matrix products waits for memory. MFU is the arithmetic of a step that recomputes nothing, divided
by what the GPU could do in the measured time.

`original` is the public code's way: half-precision weights under autocast, diffusers' own
checkpointing, frames encoded 8 at a time in each step. On a CPU the variants run in turn, round
after round, so that ratios hold even if seconds vary; on a GPU they run one after the other, each
with the GPU to itself. Ratios are medians of each round's ratio. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import bench_loader
import torch
from count_step import count_flops
from full_size_weights import make_models
from torch import nn

import train_svd
from estimate_memory import make_job
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.models import activation_checkpointing, loading, precision, unet_optimizations
from svd_xtend.models.lora import inject_lora
from svd_xtend.training.memory_count import PREPARE_BY_KIND
from svd_xtend.training.memory_estimate import GIB
from svd_xtend.training.optimizers import OPTIMIZERS, make_optimizer

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF_WIDTH = dict(
    block_out_channels=(160, 320, 640, 640),
    num_attention_heads=(5, 10, 20, 20),
    addition_time_embed_dim=256,
)
# dense, in half precision, from the vendors' data sheets
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "4090": 165, "L40S": 362, "L4": 121}
SCRIPTS = {"lora": "train_svd_lora.py", "full": "train_svd.py", "boxes": "train_svd_tracklet.py"}
PHASES = ("VAE", "VAE, first frame", "CLIP", "forward", "backward", "optimizer")
OUT_OF_MEMORY = "out of memory"
ORIGINAL_VAE_CHUNK = 8  # frames that the original code encodes at once
STEP_TFLOP_FILE = Path(__file__).with_name("step_tflop.json")


@dataclass(frozen=True)
class Variant:
    """One way to run a training step.

    fast: with the exact shortcuts of unet_optimizations. policy: of --gradient_checkpointing, or
    "diffusers" for its own. autocast: half precision by torch.autocast. encode: "live", or "cached"
    for VAE moments and CLIP embeddings from a cache.
    """

    fast: bool = False
    policy: str = "none"
    autocast: bool = True
    encode: str = "cached"
    compile: bool = False
    offload: bool = False
    optimizer: str = "adamw"

    def missing(self, args: argparse.Namespace, device: torch.device) -> str | None:
        """Return what this variant needs and this measurement does not have, or None."""
        if self.offload and device.type != "cuda":
            return "a GPU"
        if self.compile and not args.compile:
            return "--compile"
        if self.optimizer == "adamw_bf16_sr":
            if args.method != "full" or args.precision != "bf16":
                return "--method full --precision bf16"
            if not importlib.util.find_spec("torchao"):
                return "torchao"
        return None


DIFFUSERS = Variant()
OURS = Variant(fast=True, autocast=False)
VARIANTS = {  # the others are compared with the first
    "original": replace(DIFFUSERS, policy="diffusers", encode="live"),
    "diffusers": DIFFUSERS,
    "diffusers, its checkpointing": replace(DIFFUSERS, policy="diffusers"),
    "ours": OURS,
    "ours, encoding live": replace(OURS, encode="live"),
    "ours, level0": replace(OURS, policy="level0"),
    "ours, level01": replace(OURS, policy="level01"),
    "ours, blocks": replace(OURS, policy="blocks"),
    "ours, nested": replace(OURS, policy="nested"),
    "ours, nested, offload": replace(OURS, policy="nested", offload=True),
    "ours, adamw_bf16_sr": replace(OURS, optimizer="adamw_bf16_sr"),
    "ours, compile": replace(OURS, compile=True),
    "ours, blocks, compile": replace(OURS, policy="blocks", compile=True),
}


# ----------------------------------------------------------------------------------------- models


def make_pipe(args: argparse.Namespace, device: torch.device) -> Any:
    """Return the models to measure: the embedded SVD, or random weights in SVD's layout."""
    if args.model == "tiny":
        return loading.load_svd(str(TINY_SVD), torch.float32)
    unet_config = HALF_WIDTH if args.model == "half" else {}
    return make_models(device, **unet_config)


def make_unet(
    stock: Any, variant: Variant, args: argparse.Namespace, device: torch.device
) -> nn.Module:
    """Return a copy of the stock UNet that is set up to train as the variant does.

    It shares the weights of the stock UNet if the variant leaves them as they are.
    """
    half = DTYPES[args.precision]
    is_stock_weights = args.precision == "no" and variant.optimizer == "adamw"
    shared = {}
    if args.method != "full" or is_stock_weights:
        shared = {id(p): p for p in stock.parameters()}  # deepcopy takes these as copied already
    unet = copy.deepcopy(stock, shared).to(device).requires_grad_(False)
    if variant.fast:
        unet_optimizations.speed_up(unet)
    model = unet
    if args.method == "boxes":
        model = PREPARE_BY_KIND["boxes"](unet, args)
    elif args.method == "lora":
        inject_lora(unet, 16, 16, ["attention"])
        if not variant.fast:
            restore_peft_forward(unet)
    else:
        train_svd.select_parameters(unet, argparse.Namespace(train_params=[]))

    model.to(device)
    master = getattr(torch, OPTIMIZERS[variant.optimizer].weight_dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(master if parameter.requires_grad else half)
    if variant.compile:
        unet_optimizations.compile_blocks(unet)
    if variant.policy == "diffusers":
        unet.enable_gradient_checkpointing()
    else:
        activation_checkpointing.checkpoint_activations(model, variant.policy)
    if not variant.autocast and half != torch.float32:
        precision.cast_inputs(unet, half)
        precision.compute_in(model, half)
    return model.train()


def restore_peft_forward(unet: nn.Module) -> None:
    """Undo the faster forward that `inject_lora` gives to LoRA layers."""
    for module in unet.modules():
        if hasattr(module, "lora_A"):
            module.__dict__.pop("forward", None)


def make_shared_optimizer(
    model: nn.Module, variant: Variant, args: argparse.Namespace, made: dict[Any, Any]
) -> torch.optim.Optimizer:
    """Return the optimizer of a variant, from `made` if one trains the same weights already."""
    trained = loading.trainable_parameters(model)
    key = (id(next(iter(trained.values()))), variant.optimizer)
    if key not in made:
        options = argparse.Namespace(
            optimizer=variant.optimizer,
            mixed_precision=args.precision,
            learning_rate=1e-6,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_weight_decay=0.01,
            adam_epsilon=None,
            seed=0,
        )
        made[key] = make_optimizer(trained, options)
    return made[key]


def make_batch(
    pipe: Any, args: argparse.Namespace, device: torch.device, vae_scale: int
) -> dict[str, Any]:
    """Return a batch of random frames with everything that a latent cache holds of them."""
    clips, frames, height, width = args.batch_size, args.num_frames, args.height, args.width
    control = {}
    if args.method == "boxes":
        corner = torch.rand(clips, 1, 8, 2, device=device) / 2
        boxes = torch.cat([corner, corner + 0.3], -1).expand(clips, frames, 8, 4)
        valid = torch.ones(clips, frames, 8, device=device)
        colors = torch.rand(clips, 8, 3, device=device)
        control = {"boxes": boxes, "valid": valid, "hard": valid, "colors": colors}
    moments_shape = (clips, 2, frames, 4, height // vae_scale, width // vae_scale)
    embed_dim = pipe.image_encoder.config.projection_dim
    return {
        "control": control,
        "pixel_values": torch.rand(clips, frames, 3, height, width, device=device) * 2 - 1,
        "moments": torch.rand(moments_shape, device=device),
        "image_embeds": torch.randn(clips, 1, embed_dim, device=device),
        "fps": torch.full((clips,), 7, device=device),
        "motion_bucket_id": torch.full((clips,), 127, device=device),
        "index": torch.arange(clips),
    }


# ---------------------------------------------------------------------------------------- measure


class PhaseTimer:
    """Measure the seconds between calls, by name. It waits for the GPU at each call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last_time = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def end_phase(self, name: str) -> None:
        """Record the seconds since the last call as this phase's."""
        now = self.now()
        self.seconds[name] = now - self.last_time
        self.last_time = now


@dataclass
class Measurement:
    """The seconds by phase of each round of a variant, and its peak memory."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    peak_gib: float | None = None  # on a GPU
    is_out_of_memory: bool = False


class Trainee:
    """A variant with its UNet and optimizer, ready to take steps."""

    def __init__(self, variant: Variant, unet: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.variant = variant
        self.unet = unet
        self.optimizer = optimizer

    def step(
        self,
        pipe: Any,
        batch: dict[str, Any],
        noise: train_svd.SampleNoise,
        args: argparse.Namespace,
        device: torch.device,
    ) -> tuple[dict[str, float], float | None]:
        """Take one training step; return {phase: seconds}, and the peak in GiB on a GPU."""
        variant = self.variant
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        timer = PhaseTimer(device)
        pixel_values = batch["pixel_values"]
        moments = batch["moments"]
        image_embeds = batch["image_embeds"]
        if variant.encode == "live":
            chunk = ORIGINAL_VAE_CHUNK if variant.policy == "diffusers" else 1
            moments = train_svd.vae_posterior(pipe.vae, pixel_values, chunk)
        latents = train_svd.encode_video(pipe.vae, pixel_values, noise, moments=moments)
        timer.end_phase("VAE")
        if variant.encode == "live":
            image_embeds = train_svd.embed_image(pipe, pixel_values[:, 0])
        timer.end_phase("CLIP")
        batch = {**batch, "image_embeds": image_embeds}
        conditioning = train_svd.encode_conditioning(pipe, batch, noise)
        timer.end_phase("VAE, first frame")

        image_latents = conditioning.image_latents[:, None].expand_as(latents)
        inputs = torch.cat([latents, image_latents], dim=2)
        forward: Callable[..., Any] = self.unet
        if variant.offload:
            forward = activation_checkpointing.offload_activations(self.unet, self.unet)
        is_autocast = variant.autocast and args.precision != "no"
        with torch.autocast(device.type, DTYPES[args.precision], enabled=is_autocast):
            output = forward(
                inputs,
                noise.normal(),
                conditioning.image_embeds,
                conditioning.added_time_ids,
                **conditioning.control,
            )
            loss = (output.sample.float() - latents).square().mean()
        timer.end_phase("forward")
        loss.backward()
        timer.end_phase("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        timer.end_phase("optimizer")

        peak_gib = None
        if device.type == "cuda":
            peak_gib = torch.cuda.max_memory_allocated() / GIB
        return timer.seconds, peak_gib


def measure_variants(
    names: Sequence[str],
    pipe: Any,
    stock: nn.Module,
    args: argparse.Namespace,
    device: torch.device,
    batch: dict[str, Any],
) -> dict[str, Measurement]:
    """Run the variants in turn, --rounds times after one round that warms up."""
    noise = train_svd.SampleNoise(0, batch["index"], device)
    optimizers: dict[Any, Any] = {}
    trainees = {}
    for name in names:
        unet = make_unet(stock, VARIANTS[name], args, device)
        optimizer = make_shared_optimizer(unet, VARIANTS[name], args, optimizers)
        trainees[name] = Trainee(VARIANTS[name], unet, optimizer)
    measurements = {name: Measurement() for name in names}
    for round_index in range(args.rounds + 1):
        for name, trainee in trainees.items():
            measurement = measurements[name]
            if measurement.is_out_of_memory:
                continue
            try:
                seconds, peak_gib = trainee.step(pipe, batch, noise, args, device)
            except torch.OutOfMemoryError:
                measurement.is_out_of_memory = True
                continue
            if round_index > 0:
                measurement.rounds.append(seconds)
                measurement.peak_gib = peak_gib
    return measurements


def choose_variants(args: argparse.Namespace, device: torch.device) -> list[str]:
    """Return the names of the variants that can run here; print which cannot, and why."""
    names = []
    for name, variant in VARIANTS.items():
        if args.only and name not in args.only:
            continue
        missing = variant.missing(args, device)
        if missing:
            print(f"left out: {name}, which needs {missing}", file=sys.stderr)
        else:
            names.append(name)
    return names


def measure_loading(args: argparse.Namespace) -> dict[str, float | None]:
    """Return {"live", "cached": seconds} that one process takes to load a batch."""
    seconds_of: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        frames = Path(folder, "frames")
        bench_loader.write_frames(frames, "jpeg", args.num_frames)
        readers = bench_loader.make_readers(
            frames, Path(folder, "cache"), args.width, args.height, args.num_frames
        )
        for encode, read in (("live", readers["ours"]), ("cached", readers["cached"])):
            read()  # warms up
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                read()
                seconds.append(time.perf_counter() - start)
            seconds_of[encode] = args.batch_size * statistics.median(seconds)
    return seconds_of


# ------------------------------------------------------------------------------------- expectation


def step_tflop(args: argparse.Namespace) -> float | None:
    """Return TFLOP of a step that recomputes nothing, for a UNet of SVD's own size, else None.

    Counting takes a minute, so earlier counts are kept in step_tflop.json.
    """
    if args.model != "full":
        return None
    counts = json.loads(STEP_TFLOP_FILE.read_text()) if STEP_TFLOP_FILE.exists() else {}
    key = f"{args.method} {args.width}x{args.height}x{args.num_frames}"
    if key not in counts:
        _, step = count_flops(args.method, "none", args.width, args.height, args.num_frames)
        counts[key] = step / 1e12
        STEP_TFLOP_FILE.write_text(json.dumps(counts, indent=1) + "\n")
    return args.batch_size * counts[key]


def predicted_peak(variant: Variant, args: argparse.Namespace) -> float | None:
    """Return the predicted peak in GiB for a UNet of SVD's own size, else None."""
    if args.model != "full" or not variant.fast:
        return None
    flags = [
        f"--width={args.width}",
        f"--height={args.height}",
        f"--num_frames={args.num_frames}",
        f"--per_gpu_batch_size={args.batch_size}",
        f"--mixed_precision={args.precision}",
        f"--gradient_checkpointing={variant.policy}",
        f"--optimizer={variant.optimizer}",
        "--validation_steps=0",
    ]
    if variant.offload:
        flags.append("--offload_activations")
    need = make_job(SCRIPTS[args.method], flags, exact=False).estimate()
    return need.peak if need else None


# ------------------------------------------------------------------------------------------ report


class Report:
    """Print a table row by row as it is measured, and write the same as a JSON document."""

    def __init__(self, device: torch.device, args: argparse.Namespace) -> None:
        self.args = args
        self.device_name = f"CPU, {torch.get_num_threads()} threads"
        if device.type == "cuda":
            self.device_name = torch.cuda.get_device_name()
        size = f"{args.width}x{args.height}x{args.num_frames} batch {args.batch_size}"
        print(f"{args.model} {args.method} {size}, {args.precision}, {self.device_name}")
        self.tflop = step_tflop(args)
        self.loading: dict[str, float | None] = {"live": None, "cached": None}
        if not args.skip_loading:
            self.loading = measure_loading(args)
        phases = "".join(f"{phase[:9]:>10}" for phase in (*PHASES, "data"))
        memory = f"{'peak GiB':>10}{'predicted':>10}{'MFU':>7}"
        print(f"{'':30}{'s/step':>8}{'x faster':>9}{phases}{memory}", flush=True)
        self.document = {
            "device": self.device_name,
            "torch": torch.__version__,
            **vars(args),
            "tflop": self.tflop,
            "variants": {},
        }

    def add(self, name: str, measurement: Measurement, first: Measurement) -> None:
        """Print and write the row of a variant. first: the variant that it is compared with."""
        variant = VARIANTS[name]
        row: dict[str, Any] = {
            "peak_GiB": OUT_OF_MEMORY if measurement.is_out_of_memory else measurement.peak_gib,
            "predicted_GiB": predicted_peak(variant, self.args),
        }
        if measurement.rounds:
            row |= self.summarize(measurement, first)
            row["data"] = self.loading[variant.encode]
        self.document["variants"][name] = row
        print(self.format_row(name, row), flush=True)
        if self.args.output:
            Path(self.args.output).write_text(json.dumps(self.document))

    def summarize(self, measurement: Measurement, first: Measurement) -> dict[str, float | None]:
        """Return the medians over the rounds: seconds, by phase, how many times faster, MFU."""
        totals = [sum(seconds.values()) for seconds in measurement.rounds]
        first_totals = [sum(seconds.values()) for seconds in first.rounds]
        row: dict[str, float | None] = {"seconds": statistics.median(totals)}
        for phase in PHASES:
            row[phase] = statistics.median(seconds[phase] for seconds in measurement.rounds)
        row["x_faster"] = None
        if first_totals:
            row["x_faster"] = statistics.median(a / b for a, b in zip(first_totals, totals))
        row["mfu"] = None
        for card, peak_tflops in PEAK_TFLOPS.items():
            if self.tflop and card in self.device_name:
                row["mfu"] = self.tflop / statistics.median(totals) / peak_tflops
                break
        return row

    def format_row(self, name: str, row: dict[str, Any]) -> str:
        """Return a row as text."""
        predicted = format_cell(row["predicted_GiB"], "10.2f")
        if "seconds" not in row:
            return f"{name:30}{row['peak_GiB']}{predicted} predicted"
        cells = [
            f"{name:30}",
            format_cell(row["seconds"], "8.3f"),
            format_cell(row["x_faster"], "9.2f"),
            *(format_cell(row[phase], "10.3f") for phase in (*PHASES, "data")),
            format_cell(row["peak_GiB"], "10.2f"),
            predicted,
            format_cell(row["mfu"], "7.1%"),
        ]
        return "".join(cells).rstrip()


def format_cell(value: float | str | None, layout: str) -> str:
    """Return a number in this layout, and anything else in as many characters."""
    if isinstance(value, float):
        return format(value, layout)
    width = int(layout.partition(".")[0])
    return f"{value or '':>{width}}"


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    pipe = make_pipe(args, device)
    half = DTYPES[args.precision]
    if args.method == "full":
        # each variant has weights of its own; the stock ones on the GPU would be part of every peak
        stock = pipe.unet.to("cpu")
    else:
        stock = pipe.unet.to(device, half)
    stock.requires_grad_(False)
    del pipe.unet
    for module in (pipe.vae, pipe.image_encoder):
        module.requires_grad_(False).to(device, half)
    batch = make_batch(pipe, args, device, vae_scale=4 if args.model == "tiny" else 8)

    names = choose_variants(args, device)
    groups = [names]
    if device.type == "cuda":
        groups = [[name] for name in names]
    report = Report(device, args)
    first = None
    for group in groups:
        measurements = measure_variants(group, pipe, stock, args, device, batch)
        first = first or measurements[names[0]]
        for name, measurement in measurements.items():
            report.add(name, measurement, first)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(report.document))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--model", choices=["tiny", "half", "full"], default="tiny", help="the embedded SVD, or random weights in SVD's layout, at half its width or whole")
    parser.add_argument("--method", choices=["full", "lora", "boxes"], default="full", help="what is trained; default: %(default)s")
    parser.add_argument("--precision", choices=DTYPES, default="no", help="as --mixed_precision; default: %(default)s")
    parser.add_argument("--width", type=int, default=64, help="pixels; default: %(default)s")
    parser.add_argument("--height", type=int, default=48, help="pixels; default: %(default)s")
    parser.add_argument("--num_frames", type=int, default=8, help="frames of a clip; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=1, help="clips of a step; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each variant, after one that warms up; default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="measure the compiled variants, too: takes minutes more")
    parser.add_argument("--skip_loading", action="store_true", help="do not measure the loader")
    parser.add_argument("--output", help="write the JSON document to this file, too, after each row")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="measure these variants alone, by their names in the table")
    # fmt: on
    return parser


if __name__ == "__main__":
    main(build_parser().parse_args())
