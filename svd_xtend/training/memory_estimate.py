"""What a run needs of a GPU's memory, before it is launched: a table of constants, and the count that they come from.

    need = Job(args, "lora", trained, all_parameters).need()     # GiB by component; instantly
    python -m svd_xtend.training.memory_estimate                                   # counts the table anew: minutes, no GPU, no weights

Activations are linear in tokens = clips x frames x h/8 x w/8: attention keeps no matrix. The count runs a step over tensors
that have shapes but no data and adds up the bytes that are alive. It does not see a GPU's own: context, the libraries'
workspaces, fragmentation; OVERHEAD allows for them. Next: estimate_memory.py.
"""

import argparse
import contextlib
import inspect
import logging
import re
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from svd_xtend.models import activation_checkpointing, unet_optimizations
from svd_xtend.models.precision import compute_dtype, set_precision
from svd_xtend.training.optimizers import OPTIMIZERS

logger = logging.getLogger("svd_xtend")

GIB = 2**30
CARD_SIZES = (8, 12, 16, 24, 40, 48, 80, 141)  # GB, as they are sold
USABLE_FRACTION = 0.98  # of a card that shows nothing else
CUDA_CONTEXT_GIB = 0.5  # GiB that CUDA takes for itself
OVERHEAD_FRACTION = 0.08  # of all else: workspaces and fragmentation; chosen, not measured
# ----------------------------------------------------------------------------------------------- SVD's own constants

SVD_CHANNELS = (320, 640, 1280, 1280)  # channels: the UNet that the table is of
UNET_PARAMETERS, TRAINABLE_PARAMETERS = (
    1524623082,
    1474233322,
)  # parameters of the UNet, and of those the ones that have an effect
BOX_CONTROL_PARAMETERS, LORA_PARAMETERS_PER_RANK = (
    387615108,
    307328,
)  # of box control; of a LoRA on all attention, for each rank
VAE_PARAMETERS, VAE_ENCODER_PARAMETERS, CLIP_PARAMETERS = 97742847, 34163592, 632076800
ENCODE, DECODE = 1280, 2048  # bytes a pixel of the frames at once, in half precision
TOKENS = (8960, 35840, 64000, 129024, 230400)  # of SIZES
SIZES = ((256, 160, 14), (512, 320, 14), (512, 320, 25), (1024, 576, 14), (1024, 576, 25))
# GiB of gradients and activations where they are most, at TOKENS, computing in half precision
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
SAMPLING = 34.2  # KiB a token, of both clips of guidance
CHUNKED_SAMPLING, BOXES_SAMPLING = 24.0, 8.8  # under `nested`; what boxes add


def look_up_step_memory(kind, policy, offload, tokens, master, precision):
    """GiB of gradients and activations at their peak, from the table; None where it has no such row."""
    row = STEP_GIB.get(
        (kind + "_bf16" * (kind == "full" and master == "bfloat16"), policy, offload)
    )
    if row is None or (master == "bfloat16" and kind == "boxes"):
        return None
    if precision == "no":  # all is float32: twice what it is where all is bf16
        row = STEP_GIB[("full_bf16" if kind == "full" else kind, policy, offload)]
    i = min(
        np.searchsorted(TOKENS[1:-1], tokens), len(TOKENS) - 2
    )  # a straight line beyond both ends
    share = (tokens - TOKENS[i]) / (TOKENS[i + 1] - TOKENS[i])
    return max(row[i] + share * (row[i + 1] - row[i]), 0) * (2 if precision == "no" else 1)


# ----------------------------------------------------------------------------------------------------------------- need


@dataclass
class MemoryNeed:
    """GiB by component. The first three are there all the time; `gradients` are part of `step`, and that, encoding and
    validation have each their own time."""

    weights: float
    optimizer: float
    encoders: float
    gradients: float
    step: float
    encoding: float
    validation: float

    @property
    def peak(self):
        """What torch.cuda.max_memory_allocated will show, over the run."""
        return (
            self.weights
            + self.optimizer
            + self.encoders
            + max(self.step, self.encoding, self.validation)
        )

    @property
    def total(self):
        """What the card must have."""
        return self.peak * (1 + OVERHEAD_FRACTION) + CUDA_CONTEXT_GIB

    def rows(self):
        """[(component, GiB, remark)] of a table."""
        return [
            ("weights", self.weights, "of the UNet and what is added to it"),
            ("optimizer", self.optimizer, "its averages, and those of --use_ema"),
            ("VAE and CLIP", self.encoders, "weights"),
            (
                "gradients",
                min(self.gradients, self.step),
                "that are there when activations are most",
            ),
            ("activations", max(self.step - self.gradients, 0), "of the UNet"),
            (
                "encoding",
                self.encoding,
                "of frames; at another time than gradients and activations",
            ),
            ("validation", self.validation, "sampling and decoding; at another time, too"),
            ("peak allocated", self.peak, "all but what has another time"),
            (
                "needed",
                self.total,
                f"with {CUDA_CONTEXT_GIB} GiB for CUDA and {OVERHEAD_FRACTION:.0%} for workspaces and fragmentation",
            ),
        ]


@dataclass
class TrainingJob:
    """A training, as far as memory goes. kind: full, lora or boxes as the table has them, else None; trained and
    parameters: how many; count: a function (policy, offload, master) -> GiB of gradients and activations, for what is not
    in the table."""

    args: argparse.Namespace
    kind: str | None
    trained: int
    parameters: int
    count: Callable | None = None
    scale: int = 8  # pixels of a latent
    encoders: tuple = (VAE_PARAMETERS, VAE_ENCODER_PARAMETERS, CLIP_PARAMETERS)

    def step(self):
        """GiB of gradients and activations at their peak; None where the table does not know and nothing can count."""
        a, (master, *_) = self.args, OPTIMIZERS[self.args.optimizer]
        tokens = (
            a.per_gpu_batch_size * a.num_frames * (a.width // self.scale) * (a.height // self.scale)
        )
        how = a.gradient_checkpointing, a.offload_activations
        known = self.kind and look_up_step_memory(
            self.kind, *how, tokens, master, a.mixed_precision
        )
        if known is None or self.kind == "full":
            return known if known is not None or self.count is None else self.count(*how, master)
        # an adapter's gradients are float32 in any case, and the table's LoRA has rank 16
        own = (
            {"lora": 16 * LORA_PARAMETERS_PER_RANK, "boxes": BOX_CONTROL_PARAMETERS}[self.kind]
            * 4
            / GIB
        )
        return known - own * (2 if a.mixed_precision == "no" else 1) + self.trained * 4 / GIB

    def need(self, step=None):
        """The Need of it; None where `step` is unknown."""
        a = self.args
        step = self.step() if step is None else step
        if step is None:
            return None
        master, averages, _ = OPTIMIZERS[a.optimizer]
        own = 2 if master == "bfloat16" else 4
        gradients = self.trained * own / GIB
        if a.gradient_accumulation_steps > 1:
            step += gradients  # at most: the second batch's activations are made beside the first one's gradients
        half = 4 if a.mixed_precision == "no" else 2
        vae, vae_encoder, clip = self.encoders
        vae_bytes = 2 if a.mixed_precision == "bf16" else 4  # fp16: SVD's VAE is kept out of it
        at_hand = (vae * vae_bytes + clip * half) / GIB
        resting = vae_encoder * vae_bytes / GIB if a.latent_cache else at_hand
        pixels, latents = (
            a.width * a.height / GIB,
            a.num_frames * (a.width // self.scale) * (a.height // self.scale),
        )
        frames = (
            1 if a.latent_cache else min(a.vae_encode_chunk, a.per_gpu_batch_size * a.num_frames)
        )
        decoding = DECODE * vae_bytes / 2 * min(a.decode_chunk_size, a.num_frames) * pixels
        kib = CHUNKED_SAMPLING if a.gradient_checkpointing == "nested" else SAMPLING
        sampling = (
            (kib + BOXES_SAMPLING * hasattr(a, "max_objects")) * latents * half / 2 * 1024 / GIB
        )
        return MemoryNeed(
            weights=(self.trained * own + (self.parameters - self.trained) * half) / GIB,
            optimizer=self.trained * (averages + 4 * a.use_ema) / GIB,
            encoders=resting, step=step, gradients=gradients,
            encoding=ENCODE * vae_bytes / 2 * frames * pixels,
            validation=(max(decoding, sampling) + at_hand - resting) * bool(a.validation_steps),
        )  # fmt: skip

    def changed(self, **flags):
        """The same job with other flags."""
        return replace(self, args=argparse.Namespace(**{**vars(self.args), **flags}))


def fitting_cards(total):
    """Those of CARDS that hold `total` GiB."""
    return [card for card in CARD_SIZES if total <= card * USABLE_FRACTION]


# --------------------------------------------------------------------------------------------------------------- levers

# arithmetic of a step beside that without recomputing (counted, LoRA at 1024x576x25), and what else a lever costs (judged:
# the cache must be made first, bf16 weights are rounded, copies to the CPU and back take time)
COST = {"none": 1, "level0": 1.18, "level01": 1.3, "blocks": 1.37, "nested": 1.82}
CACHE_COST, BF16_COST, OFFLOAD_COST = 1.08, 1.15, 1.25


def memory_plans(job):
    """Jobs that give the same training with less memory, cheapest first: [(cost, changed flags, job)]. What the flags
    already ask for is not taken back."""
    a, found = job.args, []
    policies = list(activation_checkpointing.POLICIES)
    given = policies.index(a.gradient_checkpointing) if a.gradient_checkpointing in policies else 0
    rounded = [a.optimizer] + ["adamw_bf16_sr"] * (
        a.optimizer == "adamw" and a.mixed_precision == "bf16" and job.kind == "full"
    )
    can_cache = (
        getattr(a, "draw_boxes", None) != "yes"
    )  # frames with boxes drawn in are in no cache
    for policy in policies[given:]:
        for cached in {a.latent_cache, a.latent_cache or "CACHE" * can_cache or None}:
            for optimizer in rounded:
                for offload in {a.offload_activations, policy in ("blocks", "nested")}:
                    told = dict(gradient_checkpointing=policy, latent_cache=cached, optimizer=optimizer, offload_activations=offload)  # fmt: skip
                    flags = {k: v for k, v in told.items() if v != getattr(a, k)}
                    costs = {
                        "latent_cache": CACHE_COST,
                        "optimizer": BF16_COST,
                        "offload_activations": OFFLOAD_COST,
                    }
                    cost = COST[policy] * np.prod([costs.get(name, 1) for name in flags])
                    found.append((cost, flags, job.changed(**told)))
    return sorted(found, key=lambda plan: (plan[0], len(plan[1])))


def fit_to_budget(job, budget):
    """(flags to add, Need) of the cheapest plan that needs at most `budget` GiB, or None. Where validation is what does not
    fit it decodes fewer frames at once; where nothing else helps it is left out."""
    chunks = [
        {},
        *({"decode_chunk_size": n} for n in (8, 4, 2, 1) if n < job.args.decode_chunk_size),
    ]
    for validations in (chunks, [{"validation_steps": 0}]):
        for _, flags, plan in memory_plans(job):
            step = plan.step()
            for smaller in validations if step is not None else []:
                need = plan.changed(**smaller).need(step)
                if need.total <= budget:
                    return {**flags, **smaller}, need
    return None


def format_flags(flags):
    """Flags as they are typed."""
    return " ".join(
        f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()
    )


def reduction_advice(job):
    """What to ask less of, where no lever helps: one sentence."""
    half = " Pass --mixed_precision bf16, or fp16 before Ampere." * (
        job.args.mixed_precision == "no"
    )
    lora = "; or train a LoRA (train_svd_lora.py)" * (not hasattr(job.args, "lora_targets"))
    return f"Lower --num_frames, or --width and --height{lora}.{half}"


def memory_advice(job, budget):
    """What to change so that it fits `budget` GiB: one sentence."""
    found = fit_to_budget(job, budget)
    if found is None:
        return reduction_advice(job)
    flags, need = found
    made = " (made by cache_latents.py)" if "latent_cache" in flags else ""
    return f"Add {format_flags(flags)}{made}: then it needs {need.total:.1f} GiB."


# -------------------------------------------------------------------------------------------------------- in the trainer


def job_of_model(args, unet, prepare_unet, pipe):
    """The Job of a training whose model is at hand, as `prepare_unet` made it of the pipeline's UNet."""
    names = [name for name, p in unet.named_parameters() if p.requires_grad]
    live = [name for name, _ in unet.named_parameters() if unet_optimizations.has_effect(name)]
    kind = None
    if tuple(pipe.unet.config.block_out_channels) == SVD_CHANNELS:
        if (
            all(".lora_" in name for name in names)
            and args.lora_targets == ["attention"]
            and not args.use_dora
        ):
            kind = "lora"
        elif all(name.startswith("adapter.") for name in names) and (
            args.enhancer,
            args.max_objects,
        ) == ("carry", 8):
            kind = "boxes"
        elif names == live:
            kind = "full"
    vae = pipe.vae
    sizes = [
        sum(p.numel() for p in module.parameters())
        for module in (vae, vae.encoder, pipe.image_encoder)
    ]
    parameters, scale = dict(unet.named_parameters()), 2 ** (len(vae.config.block_out_channels) - 1)
    return TrainingJob(
        args, kind, sum(parameters[name].numel() for name in names), sum(p.numel() for p in parameters.values()),
        cache(lambda *how: count_step_memory(pipe.unet.config, prepare_unet, args, *how, scale)[1]), scale, tuple(sizes),
    )  # fmt: skip


def free_memory(device):
    """GiB that are free on a device."""
    import psutil
    import torch

    return (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    ) / GIB


def choose_policy(job, device):
    """The first of the checkpointing policies, which go from the fastest to the smallest, that fits the free memory."""
    free = free_memory(device)
    for policy in activation_checkpointing.POLICIES:
        need = job.changed(gradient_checkpointing=policy).need()
        if need.total <= free:
            break
    logger.info(
        "--gradient_checkpointing auto: %s, which needs %.2f of %.1f GiB", policy, need.total, free
    )
    if need.total > free:
        logger.warning("that is too much; going on. %s", memory_advice(job, free))
    return policy


class MemoryMonitor:
    """The memory of a run: predicted at its start, measured, explained where there is not enough.

    Resolves `--gradient_checkpointing auto` in args. From then on an uncaught out-of-memory error ends with one message."""

    def __init__(self, args, unet, prepare_unet, pipe, device):
        self.job, self.device, self.steps, self.between = (
            job_of_model(args, unet, prepare_unet, pipe),
            device,
            0.0,
            0.0,
        )
        if args.gradient_checkpointing == "auto":
            args.gradient_checkpointing = choose_policy(self.job, device)
        logger.info(
            "training %.2f M of %.2f M parameters",
            self.job.trained / 1e6,
            self.job.parameters / 1e6,
        )
        self.need = replace(
            self.job, count=None
        ).need()  # the table alone: to count would hold the run up
        if self.need:
            fitting = fitting_cards(self.need.total)
            logger.info("memory: %.1f GiB predicted at the peak, %.1f with a GPU's overhead; %s", self.need.peak,
                        self.need.total, f"fits {fitting[0]} GB" if fitting else "fits no single card")  # fmt: skip
        elif device.type == "cuda":
            logger.info(
                "memory: no instant prediction for this model and these flags; estimate_memory.py counts it"
            )
        before = sys.excepthook
        sys.excepthook = lambda kind, error, trace: (
            before(kind, error, trace) or self.explain(error)
        )

    def peak(self):
        """GiB allocated at most since this was last asked; 0 on a CPU."""
        import torch

        if self.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated(self.device) / GIB
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def begin_step(self):
        """The time; what was at most until here, in validation for one, is not this step's."""
        self.between = max(self.between, self.peak())
        return time.perf_counter()

    def end_step(self):
        """GiB that the step had at most."""
        peak = self.peak()
        self.steps = max(self.steps, peak)
        return peak

    def report(self):
        """Log what was measured, on a GPU."""
        self.between = max(self.between, self.peak())
        if self.steps:
            told = f"; {self.need.peak:.1f} were predicted" if self.need else ""
            logger.info(
                "memory: at most %.1f GiB in a step, %.1f beside steps%s",
                self.steps,
                self.between,
                told,
            )

    def explain(self, error):
        """Where memory ran out, one message as the last: what was there, what was predicted, which flags need less."""
        import torch
        from tqdm import tqdm

        # the CPU's allocator raises a plain RuntimeError
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            for bar in list(
                getattr(tqdm, "_instances", [])
            ):  # private; or they are drawn below the message
                bar.close()
            logger.error(self.out_of_memory(str(error)))

    def out_of_memory(self, error):
        """That message."""
        import torch

        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", error)
        need = self.need or self.job.need()
        budget = 0.97 * need.total  # less than was asked for, and not more than there is
        told = [f"Out of memory on {self.device}" + (f", for {asked[1]} more" if asked else "")]
        if self.device.type == "cuda":
            allocated, reserved = (
                torch.cuda.memory_allocated(self.device),
                torch.cuda.memory_reserved(self.device),
            )
            told.append(f"{allocated / GIB:.1f} GiB were allocated, {reserved / GIB:.1f} reserved")
            budget = min(budget, USABLE_FRACTION * torch.cuda.mem_get_info(self.device)[1] / GIB)
        told.append(
            f"a peak of {need.peak:.1f} GiB is predicted, {need.total:.1f} with a GPU's overhead"
        )
        return (
            "; ".join(told) + f". {memory_advice(self.job, budget)} The last checkpoint is whole."
        )


# ------------------------------------------------------------------------------------------------------------ the count


def LiveBytes():
    """A TorchDispatchMode that knows the bytes of all storages that are alive, `now` and at their `peak`, rounded up to the
    512 of CUDA's allocator."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LiveBytes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.now, self.peak, self.known = 0, 0, {}

        def watch(self, tensor):
            """Count a tensor's storage until it is freed."""
            storage = tensor.untyped_storage()
            key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
            if key not in self.known:
                self.known[key] = weakref.ref(storage, lambda _: self.forget(key)), size
                self.now += size
                self.peak = max(self.peak, self.now)

        def forget(self, key):
            _, size = self.known.pop(key, (None, 0))
            self.now -= size

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if hasattr(leaf, "untyped_storage"):
                    self.watch(leaf)
            return out

    return LiveBytes()


def make_fake_model(config, prepare, args, policy, master="float32"):
    """(UNet, model) as a trainer has them, of tensors without data; inside a FakeTensorMode."""
    from unittest.mock import patch

    import torch
    from diffusers import UNetSpatioTemporalConditionModel

    # files hold data; random numbers are never drawn
    told = argparse.Namespace(**{**vars(args), "tracklet_weights": None, "lora": None, "seed": 0})
    unet = unet_optimizations.speed_up(
        UNetSpatioTemporalConditionModel.from_config(config).requires_grad_(False)
    )
    with patch.object(
        torch.nn.Module, "to", lambda module, *_, **__: module
    ):  # peft; nothing has to move
        model = prepare(unet, told)
    activation_checkpointing.checkpoint_activations(model, policy)
    set_precision(model, unet, compute_dtype(args.mixed_precision), getattr(torch, master))
    return unet, model.train()


def make_fake_inputs(unet, args, scale=8):
    """(positional, keyword) arguments of a UNet, `cond` of box control where it has that."""
    import torch

    b, f, h, w = args.per_gpu_batch_size, args.num_frames, args.height // scale, args.width // scale
    x = [
        torch.randn(shape)
        for shape in ((b, f, 8, h, w), (b,), (b, 1, unet.config.cross_attention_dim), (b, 3))
    ]
    slots = getattr(args, "max_objects", 0)
    valid = torch.zeros(b, f, slots)
    boxes = {
        "boxes": torch.rand(b, f, slots, 4),
        "valid": valid,
        "hard": valid.clone(),
        "colors": torch.rand(b, slots, 3),
    }
    return x, boxes if slots else {}


def count_step_memory(config, prepare, args, policy, offload=False, master="float32", scale=8):
    """(GiB of weights, GiB of gradients and activations where they are most) of a training step of a UNet of this
    configuration; args as a trainer has them. Takes seconds, and no memory to speak of."""
    from torch._subclasses.fake_tensor import (
        FakeTensorMode,  # private, but torch's own way to run without data
    )

    with FakeTensorMode():
        unet, model = make_fake_model(config, prepare, args, policy, master)
        x, cond = make_fake_inputs(unet, args, scale)
        live = LiveBytes()
        for tensor in [*model.parameters(), *model.buffers(), *x, *cond.values()]:
            live.watch(tensor)
        weights = live.now
        with live:
            with offload_uncounted(live, model) if offload else contextlib.nullcontext():
                loss = model(*x, **cond).sample.float().square().mean()
            loss.backward()
    return weights / GIB, (live.peak - weights) / GIB


def offload_uncounted(live, model):
    """fast_unet.offloaded for the count, which then leaves out what is on the CPU."""
    import torch

    pack, unpack = activation_checkpointing.offload_hooks(model)

    def pack_uncounted(tensor):
        peak, kept = live.peak, pack(tensor)
        if kept[1] is not None:
            live.forget(kept[0].untyped_storage()._cdata)
            live.peak = peak
        return kept

    return torch.autograd.graph.saved_tensors_hooks(pack_uncounted, unpack)


def prepare_full(unet, args):
    for name, p in unet.named_parameters():
        p.requires_grad_(unet_optimizations.has_effect(name))
    return unet


def prepare_lora(unet, args):
    from svd_xtend.models.lora import inject_lora

    return inject_lora(unet, 16, 16, ["attention"])


def prepare_boxes(unet, args):
    from svd_xtend.models.box_control import ControlledUNet, new_box_control

    return ControlledUNet(unet, new_box_control(unet))


PREPARE_BY_KIND = {"full": prepare_full, "lora": prepare_lora, "boxes": prepare_boxes}


def svd_config():
    """The configuration of SVD's UNet: diffusers' defaults."""
    from diffusers import UNetSpatioTemporalConditionModel

    told = inspect.signature(UNetSpatioTemporalConditionModel.__init__).parameters
    return {name: p.default for name, p in told.items() if name != "self"}


def count_kind_memory(kind, policy, offload, width, height, frames, clips=1, precision="bf16"):
    """count_step of SVD's own UNet; kind: one of KINDS, or full_bf16."""
    args = argparse.Namespace(width=width, height=height, num_frames=frames, per_gpu_batch_size=clips,
                              mixed_precision=precision, max_objects=8 * (kind == "boxes"))  # fmt: skip
    master = "bfloat16" if kind == "full_bf16" else "float32"
    return count_step_memory(
        svd_config(), PREPARE_BY_KIND[kind.removesuffix("_bf16")], args, policy, offload, master
    )


def main():
    """Print STEP, counted anew."""
    for kind in ("full", "full_bf16", "lora", "boxes"):
        for policy in activation_checkpointing.POLICIES:
            for offload in (False, True) if policy in ("blocks", "nested") else (False,):
                row = [
                    f"{count_kind_memory(kind, policy, offload, *size)[1]:.3f}" for size in SIZES
                ]
                print(f'    ("{kind}", "{policy}", {offload}): ({", ".join(row)}),', flush=True)


if __name__ == "__main__":
    main()
