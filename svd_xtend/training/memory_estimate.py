"""Predict the GPU memory of a training run before it is launched, and measure it in the run.

    job = TrainingJob(args, "lora", num_trained, num_parameters)
    need = job.estimate()                            # GiB by component; need.total is for the GPU
    print(memory_advice(job, budget=24))             # flags to add so that the run fits 24 GiB

Predictions come from a table of counted figures (`memory_count.py` counts it anew), so they take no
time and import no torch. Attention keeps no matrix of tokens by tokens, so activations are linear
in the number of tokens = clips x frames x (height / 8) x (width / 8), and the table is interpolated
in it.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from svd_xtend.models import activation_checkpointing, unet_optimizations
from svd_xtend.training.flag_types import replace_args
from svd_xtend.training.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("svd_xtend")

GIB = 2**30
CARD_SIZES = (8, 12, 16, 24, 40, 48, 80, 141)  # GB, as they are sold
USABLE_FRACTION = 0.98  # of the memory of a GPU that drives no display
CUDA_CONTEXT_GIB = 0.5  # GiB that CUDA takes for itself
# Workspaces of libraries and fragmentation, as a fraction of everything else. Chosen, not measured.
# On an NVIDIA H100 the measured peak (torch.cuda.max_memory_allocated) was 0.8 to 3.9 % above the
# prediction: docs/results.md.
OVERHEAD_FRACTION = 0.08

# ----------------------------------------------------- constants of Stable Video Diffusion, counted

SVD_CHANNELS = (320, 640, 1280, 1280)  # block_out_channels of the UNet that the table is of
UNET_PARAMETERS = 1524623082
TRAINABLE_PARAMETERS = 1474233322  # of the UNet, those that have an effect
BOX_CONTROL_PARAMETERS = 387615108
LORA_PARAMETERS_PER_RANK = 307328  # of a LoRA on all attention layers
VAE_PARAMETERS = 97742847
VAE_ENCODER_PARAMETERS = 34163592
CLIP_PARAMETERS = 632076800
ENCODE_BYTES_PER_PIXEL = 1280  # of each frame that the VAE encodes at once, in half precision
DECODE_BYTES_PER_PIXEL = 2048  # of each frame that the VAE decodes at once, in half precision
# Validation's sampling runs both halves of classifier-free guidance in one batch. KiB per token of
# a clip:
SAMPLING_KIB_PER_TOKEN = 34.2
CHUNKED_SAMPLING_KIB_PER_TOKEN = 24.0  # with --gradient_checkpointing nested, which runs in chunks
BOXES_SAMPLING_KIB_PER_TOKEN = 8.8  # what box control adds

# (width, height, frames) of the columns of STEP_GIB, and their tokens
TABLE_SIZES = ((256, 160, 14), (512, 320, 14), (512, 320, 25), (1024, 576, 14), (1024, 576, 25))
TABLE_TOKENS = (8960, 35840, 64000, 129024, 230400)
TABLE_LORA_RANK = 16
# GiB of gradients and activations at their peak, computed in half precision.
# Key: (what is trained, --gradient_checkpointing, --offload_activations)
STEP_GIB = {  # (what trains, policy, offload_activations)
    ("full", "none", False): (6.821, 19.413, 32.621, 63.105, 110.643),
    ("full", "level0", False): (5.894, 11.801, 19.061, 35.850, 62.034),
    ("full", "level01", False): (5.894, 7.259, 10.690, 19.314, 32.766),
    ("full", "blocks", False): (5.786, 6.893, 8.053, 10.730, 18.263),
    ("full", "blocks", True): (5.740, 6.631, 7.589, 9.799, 13.246),
    ("full", "nested", False): (5.680, 6.381, 6.785, 7.863, 9.312),
    ("full", "nested", True): (5.669, 6.310, 6.664, 7.536, 8.869),
    ("full_bf16", "none", False): (4.219, 16.811, 30.018, 60.503, 108.041),
    ("full_bf16", "level0", False): (3.162, 9.261, 16.537, 33.327, 59.511),
    ("full_bf16", "level01", False): (3.162, 4.759, 8.497, 17.122, 30.574),
    ("full_bf16", "blocks", False): (3.071, 4.178, 5.338, 10.089, 18.015),
    ("full_bf16", "blocks", True): (3.015, 3.922, 4.880, 7.090, 10.537),
    ("full_bf16", "nested", False): (2.954, 3.667, 4.072, 5.269, 6.786),
    ("full_bf16", "nested", True): (2.945, 3.603, 3.957, 4.829, 6.162),
    ("lora", "none", False): (3.204, 12.750, 22.762, 45.878, 81.918),
    ("lora", "level0", False): (1.836, 7.281, 12.996, 26.192, 46.765),
    ("lora", "level01", False): (0.986, 3.889, 6.940, 13.985, 24.970),
    ("lora", "blocks", False): (0.487, 1.946, 3.474, 7.003, 12.506),
    ("lora", "blocks", True): (0.280, 1.069, 1.896, 3.805, 6.781),
    ("lora", "nested", False): (0.350, 1.356, 2.104, 3.847, 6.532),
    ("lora", "nested", True): (0.232, 0.835, 1.160, 2.001, 3.091),
    ("boxes", "none", False): (5.996, 21.616, 38.021, 75.807, 134.754),
    ("boxes", "level0", False): (3.768, 12.756, 22.224, 43.991, 77.980),
    ("boxes", "level01", False): (2.193, 6.893, 11.861, 23.263, 41.081),
    ("boxes", "blocks", False): (1.776, 2.883, 5.138, 10.342, 18.450),
    ("boxes", "blocks", True): (1.753, 2.716, 3.727, 7.163, 12.745),
    ("boxes", "nested", False): (1.682, 2.395, 2.926, 5.571, 9.890),
    ("boxes", "nested", True): (1.671, 2.351, 2.724, 3.636, 6.331),
}


def look_up_step_memory(
    kind: str, policy: str, offload: bool, tokens: int, master: str, precision: str
) -> float | None:
    """Return GiB of gradients and activations at their peak, or None if the table has no such row.

    kind: full, lora or boxes. master: dtype of trained weights. precision: of --mixed_precision.
    """
    table_kind = kind
    if kind == "full" and master == "bfloat16":
        table_kind = "full_bf16"
    row = STEP_GIB.get((table_kind, policy, offload))
    if row is None:
        return None
    if kind == "boxes" and master == "bfloat16":
        return None
    float32_factor = 1
    if precision == "no":  # everything is float32: twice the memory of a step that is all in bf16
        table_kind = "full_bf16" if kind == "full" else kind
        row = STEP_GIB[(table_kind, policy, offload)]
        float32_factor = 2
    # linear interpolation; the first and the last segment extend beyond the table
    i = min(int(np.searchsorted(TABLE_TOKENS[1:-1], tokens)), len(TABLE_TOKENS) - 2)
    fraction = (tokens - TABLE_TOKENS[i]) / (TABLE_TOKENS[i + 1] - TABLE_TOKENS[i])
    return max(row[i] + fraction * (row[i + 1] - row[i]), 0) * float32_factor


# --------------------------------------------------------------------------------------- prediction


@dataclass
class MemoryNeed:
    """GiB of a training run, by component.

    Weights, optimizer and encoders are there all the time. `step` (which includes the gradients),
    `encoding` and `validation` follow one another, so only the largest of them counts.
    """

    weights: float
    optimizer: float
    encoders: float
    gradients: float
    step: float
    encoding: float
    validation: float

    @property
    def peak(self) -> float:
        """Return the prediction of torch.cuda.max_memory_allocated over the run, in GiB."""
        permanent = self.weights + self.optimizer + self.encoders
        return permanent + max(self.step, self.encoding, self.validation)

    @property
    def total(self) -> float:
        """Return the GiB that a GPU must have, with CUDA's context and its libraries' overhead."""
        return self.peak * (1 + OVERHEAD_FRACTION) + CUDA_CONTEXT_GIB

    def rows(self) -> list[tuple[str, float, str]]:
        """Return (component, GiB, remark) for each row of a table."""
        gradients = min(self.gradients, self.step)
        activations = max(self.step - self.gradients, 0)
        overhead = f"{OVERHEAD_FRACTION:.0%} for workspaces and fragmentation"
        return [
            ("weights", self.weights, "of the UNet and its adapters"),
            ("optimizer", self.optimizer, "Adam moments, and EMA weights with --use_ema"),
            ("VAE and CLIP", self.encoders, "weights"),
            ("gradients", gradients, "at the moment when activations are largest"),
            ("activations", activations, "of the UNet"),
            ("encoding", self.encoding, "of frames; not at the time of the activations"),
            (
                "validation",
                self.validation,
                "sampling and decoding; between steps",
            ),
            (
                "peak allocated",
                self.peak,
                "the largest that is there at one time",
            ),
            ("needed", self.total, f"with {CUDA_CONTEXT_GIB} GiB for CUDA and {overhead}"),
        ]


class EncoderSizes(NamedTuple):
    """Numbers of parameters of the frozen models beside the UNet."""

    vae: int
    vae_encoder: int  # the part of the VAE that a latent cache still needs
    clip: int


SVD_ENCODERS = EncoderSizes(VAE_PARAMETERS, VAE_ENCODER_PARAMETERS, CLIP_PARAMETERS)


@dataclass
class TrainingJob:
    """A training run, as far as its memory is concerned.

    args: the flags of a trainer. kind: full, lora or boxes if the table has it, else None.
    num_trained and num_parameters: of the UNet with its adapters. count_step: a function (policy,
    offload, master) -> GiB of gradients and activations, for what the table does not have.
    vae_scale: pixels per latent pixel.
    """

    args: argparse.Namespace
    kind: str | None
    num_trained: int
    num_parameters: int
    count_step: Callable[[str, bool, str], float] | None = None
    vae_scale: int = 8
    encoders: EncoderSizes = SVD_ENCODERS

    def with_flags(self, **flags: Any) -> TrainingJob:
        """Return the same job with some flags changed."""
        return replace(self, args=replace_args(self.args, **flags))

    def tokens_per_clip(self) -> int:
        """Return the number of latent pixels of one clip."""
        width = self.args.width // self.vae_scale
        height = self.args.height // self.vae_scale
        return self.args.num_frames * width * height

    def estimate_step(self) -> float | None:
        """Return GiB of gradients and activations at their peak.

        Return None if the table does not have this job and there is no `count_step`.
        """
        args = self.args
        policy = args.gradient_checkpointing
        offload = args.offload_activations
        master = OPTIMIZERS[args.optimizer].weight_dtype
        table_gib = None
        if self.kind is not None:
            tokens = args.per_gpu_batch_size * self.tokens_per_clip()
            precision = args.mixed_precision
            table_gib = look_up_step_memory(self.kind, policy, offload, tokens, master, precision)
        if table_gib is None:
            return None if self.count_step is None else self.count_step(policy, offload, master)
        if self.kind == "full":
            return table_gib
        # Replace the gradients of the table's adapter by this one's. They are float32 in any
        # precision, and look_up_step_memory has doubled the table's for float32.
        table_trained = BOX_CONTROL_PARAMETERS
        if self.kind == "lora":
            table_trained = TABLE_LORA_RANK * LORA_PARAMETERS_PER_RANK
        table_gradients = table_trained * 4 / GIB
        float32_factor = 2 if args.mixed_precision == "no" else 1
        return table_gib - table_gradients * float32_factor + self.num_trained * 4 / GIB

    def estimate(self) -> MemoryNeed | None:
        """Return the memory of this job, or None if that of a step is unknown."""
        step = self.estimate_step()
        return None if step is None else self.add_to_step(step)

    def add_to_step(self, step: float) -> MemoryNeed:
        """Return the memory of this job. step: GiB of gradients and activations at their peak."""
        args = self.args
        optimizer = OPTIMIZERS[args.optimizer]
        trained_bytes = 2 if optimizer.weight_dtype == "bfloat16" else 4
        frozen_bytes = 4 if args.mixed_precision == "no" else 2
        vae_bytes = 2 if args.mixed_precision == "bf16" else 4  # SVD's VAE overflows in fp16

        gradients = self.num_trained * trained_bytes / GIB
        if args.gradient_accumulation_steps > 1:
            # an upper bound: the second batch's activations are made beside the first one's
            # gradients
            step += gradients
        optimizer_bytes = optimizer.moment_bytes
        if args.use_ema:
            optimizer_bytes += 4

        encoders_on_gpu = (
            self.encoders.vae * vae_bytes + self.encoders.clip * frozen_bytes
        ) / GIB  # in validation, and in a step without a latent cache
        encoders = encoders_on_gpu
        frames_at_once = min(args.vae_encode_chunk, args.per_gpu_batch_size * args.num_frames)
        if args.latent_cache:
            encoders = self.encoders.vae_encoder * vae_bytes / GIB
            frames_at_once = 1
        gib_pixels = args.width * args.height / GIB  # pixels of a frame, in units of 2^30
        encoding = ENCODE_BYTES_PER_PIXEL * vae_bytes / 2 * frames_at_once * gib_pixels

        validation = 0.0
        if args.validation_steps:
            frames_decoded = min(args.decode_chunk_size, args.num_frames)
            decoding = DECODE_BYTES_PER_PIXEL * vae_bytes / 2 * frames_decoded * gib_pixels
            kib_per_token = SAMPLING_KIB_PER_TOKEN
            if args.gradient_checkpointing == "nested":
                kib_per_token = CHUNKED_SAMPLING_KIB_PER_TOKEN
            if hasattr(args, "max_objects"):
                kib_per_token += BOXES_SAMPLING_KIB_PER_TOKEN
            sampling = kib_per_token * self.tokens_per_clip() * frozen_bytes / 2 * 1024 / GIB
            validation = max(decoding, sampling) + encoders_on_gpu - encoders

        num_frozen = self.num_parameters - self.num_trained
        return MemoryNeed(
            weights=(self.num_trained * trained_bytes + num_frozen * frozen_bytes) / GIB,
            optimizer=self.num_trained * optimizer_bytes / GIB,
            encoders=encoders,
            gradients=gradients,
            step=step,
            encoding=encoding,
            validation=validation,
        )


def fitting_cards(total: float) -> list[int]:
    """Return those of CARD_SIZES that hold `total` GiB."""
    return [card for card in CARD_SIZES if total <= card * USABLE_FRACTION]


# --------------------------------------------------------------------------- flags that save memory

# Arithmetic of a step relative to one that recomputes nothing: counted for a LoRA at 1024x576x25.
POLICY_COST = {"none": 1, "level0": 1.18, "level01": 1.3, "blocks": 1.37, "nested": 1.82}
# Other flags, judged: the cache has to be made first, bf16 weights are rounded, copies to the CPU
# and back take time.
FLAG_COST = {"latent_cache": 1.08, "optimizer": 1.15, "offload_activations": 1.25}
DECODE_CHUNK_SIZES = (8, 4, 2, 1)


@dataclass
class MemoryPlan:
    """Flags that give the same training with less memory."""

    cost: float  # relative to the flags of the fastest step
    flags: dict[str, Any]  # those that differ from the job's own
    job: TrainingJob  # with these flags


@dataclass
class FittingPlan:
    """Flags to add so that a run fits, and what it then needs."""

    flags: dict[str, Any]
    need: MemoryNeed


def memory_plans(job: TrainingJob) -> list[MemoryPlan]:
    """Return the ways to run this job with as much or less memory, cheapest first.

    They only add to the given flags. A latent cache is not proposed if boxes are drawn into the
    frames, because a cache holds frames without boxes.
    """
    args = job.args
    policies = list(activation_checkpointing.POLICIES)
    if args.gradient_checkpointing in policies:
        policies = policies[policies.index(args.gradient_checkpointing) :]

    caches = [args.latent_cache]
    can_cache = getattr(args, "draw_boxes", None) != "yes"
    if not args.latent_cache and can_cache:
        caches.append("CACHE")

    optimizers = [args.optimizer]
    if args.optimizer == "adamw" and args.mixed_precision == "bf16" and job.kind == "full":
        optimizers.append("adamw_bf16_sr")

    plans = []
    for policy in policies:
        offloads = [args.offload_activations]
        if policy in ("blocks", "nested") and not args.offload_activations:
            offloads.append(True)
        for cache in caches:
            for optimizer in optimizers:
                for offload in offloads:
                    flags = {
                        "gradient_checkpointing": policy,
                        "latent_cache": cache,
                        "optimizer": optimizer,
                        "offload_activations": offload,
                    }
                    plans.append(make_plan(job, flags))
    return sorted(plans, key=lambda plan: (plan.cost, len(plan.flags)))


def make_plan(job: TrainingJob, flags: dict[str, Any]) -> MemoryPlan:
    """Return the plan that sets these flags."""
    changed = {name: value for name, value in flags.items() if value != getattr(job.args, name)}
    flag_cost = math.prod(FLAG_COST.get(name, 1) for name in changed)
    cost = POLICY_COST[flags["gradient_checkpointing"]] * flag_cost
    return MemoryPlan(cost, changed, job.with_flags(**flags))


def fit_to_budget(job: TrainingJob, budget: float) -> FittingPlan | None:
    """Return the cheapest plan that needs at most `budget` GiB, or None.

    If validation is what does not fit, it decodes fewer frames at once; if no plan helps, it is
    left out.
    """
    smaller_chunks = [size for size in DECODE_CHUNK_SIZES if size < job.args.decode_chunk_size]
    with_validation: list[dict[str, int]] = [{}]
    with_validation += [{"decode_chunk_size": size} for size in smaller_chunks]
    without_validation = [{"validation_steps": 0}]
    plans = memory_plans(job)
    for validation_choices in (with_validation, without_validation):
        for plan in plans:
            step = plan.job.estimate_step()
            if step is None:
                continue
            for validation_flags in validation_choices:
                need = plan.job.with_flags(**validation_flags).add_to_step(step)
                if need.total <= budget:
                    return FittingPlan({**plan.flags, **validation_flags}, need)
    return None


def format_flags(flags: dict[str, Any]) -> str:
    """Return flags as one types them in a shell."""
    words = []
    for name, value in flags.items():
        words.append(f"--{name}" if value is True else f"--{name}={value}")
    return " ".join(words)


def reduction_advice(job: TrainingJob) -> str:
    """Return what to reduce if no flag that keeps the training the same helps."""
    advice = "Lower --num_frames, or --width and --height"
    if not hasattr(job.args, "lora_targets"):
        advice += "; or train a LoRA (train_svd_lora.py)"
    advice += "."
    if job.args.mixed_precision == "no":
        advice += " Pass --mixed_precision bf16, or fp16 on GPUs older than Ampere."
    return advice


def memory_advice(job: TrainingJob, budget: float) -> str:
    """Return one sentence that says which flags to add so that the job fits `budget` GiB."""
    plan = fit_to_budget(job, budget)
    if plan is None:
        return reduction_advice(job)
    made_by = " (made by cache_latents.py)" if "latent_cache" in plan.flags else ""
    return f"Add {format_flags(plan.flags)}{made_by}: then it needs {plan.need.total:.1f} GiB."


# -------------------------------------------------------------------------------- in a training run


def job_of_model(
    args: argparse.Namespace, unet: Any, prepare_unet: Callable[..., Any], pipe: Any
) -> TrainingJob:
    """Return the job of a model that is loaded.

    unet: the model that is trained, which `prepare_unet` made of `pipe.unet`.
    """
    from svd_xtend.training.memory_count import step_counter

    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    trained = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    vae_scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    return TrainingJob(
        args,
        kind_of_model(args, pipe.unet, list(sizes), trained),
        num_trained=sum(sizes[name] for name in trained),
        num_parameters=sum(sizes.values()),
        count_step=step_counter(pipe.unet.config, prepare_unet, args, vae_scale),
        vae_scale=vae_scale,
        encoders=EncoderSizes(
            vae=count_parameters(pipe.vae),
            vae_encoder=count_parameters(pipe.vae.encoder),
            clip=count_parameters(pipe.image_encoder),
        ),
    )


def kind_of_model(
    args: argparse.Namespace, stock_unet: Any, names: list[str], trained: list[str]
) -> str | None:
    """Return the kind of the table that trains exactly these parameters, or None.

    names: of all parameters. trained: names of those that are trained.
    """
    if tuple(stock_unet.config.block_out_channels) != SVD_CHANNELS:
        return None
    if all(".lora_" in name for name in trained):
        if args.lora_targets == ["attention"] and not args.use_dora:
            return "lora"
    if all(name.startswith("adapter.") for name in trained):
        if args.enhancer == "carry" and args.max_objects == 8:
            return "boxes"
    if trained == [name for name in names if unet_optimizations.has_effect(name)]:
        return "full"
    return None


def count_parameters(module: torch.nn.Module, trained_only: bool = False) -> int:
    """Return the number of parameters of a module, or of those that are trained."""
    total = 0
    for parameter in module.parameters():
        if parameter.requires_grad or not trained_only:
            total += parameter.numel()
    return total


def free_memory(device: torch.device) -> float:
    """Return the GiB that are free on a GPU, or in the machine if the device is a CPU."""
    import psutil
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    return free / GIB


def choose_policy(job: TrainingJob, device: torch.device) -> str:
    """Return the fastest policy of --gradient_checkpointing that fits the free memory.

    If none fits, log a warning and return the one that needs least.
    """
    free = free_memory(device)
    for policy in activation_checkpointing.POLICIES:  # from the fastest to the smallest
        need = job.with_flags(gradient_checkpointing=policy).estimate()
        assert need is not None  # a job of a loaded model counts what the table does not have
        needed = need.total
        if needed <= free:
            break
    logger.info(
        "--gradient_checkpointing auto: chose %s, which needs %.2f of %.1f GiB of free memory",
        policy,
        needed,
        free,
    )
    if needed > free:
        advice = memory_advice(job, free)
        logger.warning("this is more than is free; training starts anyway. %s", advice)
    return policy


class MemoryMonitor:
    """Predict the memory of a run at its start, measure it, and explain an out-of-memory error.

    policy: of --gradient_checkpointing, with `auto` resolved. From the creation of this object on,
    an uncaught out-of-memory error ends with one message that says which flags to add.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        unet: Any,
        prepare_unet: Callable[..., Any],
        pipe: Any,
        device: torch.device,
    ) -> None:
        self.job = job_of_model(args, unet, prepare_unet, pipe)
        self.device = device
        self.step_peak = 0.0  # GiB, largest of all steps
        self.other_peak = 0.0  # GiB, largest outside of steps, for example in validation
        self.policy = args.gradient_checkpointing
        if self.policy == "auto":
            self.policy = choose_policy(self.job, device)
            self.job = self.job.with_flags(gradient_checkpointing=self.policy)
        # from the table alone, because counting would delay the run
        self.need = replace(self.job, count_step=None).estimate()
        self.log_prediction()
        self.previous_excepthook = sys.excepthook
        sys.excepthook = self.handle_exception

    def log_prediction(self) -> None:
        """Log the numbers of parameters and the predicted memory."""
        num_trained, num_parameters = self.job.num_trained, self.job.num_parameters
        logger.info("training %.2f M of %.2f M parameters", num_trained / 1e6, num_parameters / 1e6)
        if self.need:
            cards = fitting_cards(self.need.total)
            fits = f"fits {cards[0]} GB" if cards else "fits no single GPU"
            logger.info(
                "memory: %.1f GiB predicted at the peak, %.1f with a GPU's overhead; %s",
                self.need.peak,
                self.need.total,
                fits,
            )
        elif self.device.type == "cuda":
            logger.info("memory: run estimate_memory.py for a prediction for this model and flags")

    def take_peak(self) -> float:
        """Return the largest GiB allocated since the last call, 0 on a CPU."""
        import torch

        if self.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated(self.device) / GIB
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def begin_step(self) -> float:
        """Return the time at which a step begins, and separate its memory from what came before."""
        self.other_peak = max(self.other_peak, self.take_peak())
        return time.perf_counter()

    def end_step(self) -> float:
        """Return the largest GiB allocated in the step, 0 on a CPU."""
        peak = self.take_peak()
        self.step_peak = max(self.step_peak, peak)
        return peak

    def report(self) -> None:
        """Log what was measured beside the prediction, if the run is on a GPU."""
        self.other_peak = max(self.other_peak, self.take_peak())
        if not self.step_peak:
            return
        predicted = f"; {self.need.peak:.1f} were predicted" if self.need else ""
        logger.info(
            "memory: at most %.1f GiB in a step, %.1f outside of steps%s",
            self.step_peak,
            self.other_peak,
            predicted,
        )

    def handle_exception(self, kind: Any, error: BaseException, trace: Any) -> None:
        """Print an uncaught exception, and explain it if memory ran out; a `sys.excepthook`."""
        import torch

        self.previous_excepthook(kind, error, trace)
        # the CPU's allocator raises a plain RuntimeError
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            close_progress_bars()
            logger.error(self.out_of_memory_message(str(error)))

    def out_of_memory_message(self, error: str) -> str:
        """Return what was asked for, what was there, what was predicted, and which flags to add."""
        import torch

        need = self.need or self.job.estimate()
        assert need is not None  # a job of a loaded model counts what the table does not have
        budget = 0.97 * need.total  # less than this job, which did not fit
        message = f"Out of memory on {self.device}"
        request = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", error)
        if request:
            message += f", when {request[1]} more were requested"
        if self.device.type == "cuda":
            allocated = torch.cuda.memory_allocated(self.device) / GIB
            reserved = torch.cuda.memory_reserved(self.device) / GIB
            message += f"; {allocated:.1f} GiB were allocated and {reserved:.1f} GiB reserved"
            _, on_device = torch.cuda.mem_get_info(self.device)
            budget = min(budget, USABLE_FRACTION * on_device / GIB)
        message += f". The predicted peak is {need.peak:.1f} GiB, {need.total:.1f} with overhead."
        return f"{message} {memory_advice(self.job, budget)} The last checkpoint is complete."


def close_progress_bars() -> None:
    """Close tqdm's bars, which would be drawn again below the last message."""
    from tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", [])):  # private
        bar.close()
