"""Predict the GPU memory of a training run before you launch it. Needs no weights and no GPU.

    python estimate_memory.py train_svd_lora.py --width=1024 --height=576 --num_frames=25 \\
        --mixed_precision=bf16
    python estimate_memory.py train_svd.py --width=1024 --height=576 --num_frames=25 \\
        --mixed_precision=bf16 --fit 24GB
    python estimate_memory.py train_svd.py --pretrained_model_name_or_path=/path/to/weight \\
        --train_params attn1

Pass the name of the trainer, then the flags that you would give to it. --fit chooses the flags for
a GPU of that size and prints the command. Figures come from the table of
svd_xtend/training/memory_estimate.py if it has this kind of training; if not, they are counted on
tensors without data, which takes seconds to minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train_svd
import train_svd_lora
import train_svd_tracklet
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.training import memory_estimate, optimizers
from svd_xtend.training.memory_estimate import TrainingJob

logger = logging.getLogger("svd_xtend")

DEFAULT_NUM_FRAMES = 25  # of SVD-XT, whose configuration of the UNet is diffusers' default
CACHE_FLAGS = (  # flags of a trainer that cache_latents.py needs, too
    "pretrained_model_name_or_path", "revision", "base_folder", "width", "height", "resize_mode",
    "mixed_precision",
)  # fmt: skip


def parse_full(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of train_svd.py."""
    return train_svd.parse(train_svd.build_parser(), argv)


def parse_lora(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of train_svd_lora.py."""
    return train_svd.parse(train_svd_lora.script_parser(), argv)


# {script: (parse its flags, mark what it trains)}
TRAINERS: dict[str, tuple[Callable[..., argparse.Namespace], Callable[..., Any]]] = {
    "train_svd.py": (parse_full, train_svd.select_parameters),
    "train_svd_lora.py": (parse_lora, train_svd_lora.add_lora),
    "train_svd_tracklet.py": (train_svd_tracklet.script_parse, train_svd_tracklet.add_boxes),
}


@dataclass
class ModelFolder:
    """A Stable Video Diffusion on disk, and the configuration of its UNet."""

    path: Path
    unet_config: dict[str, Any]


def read_model_folder(args: argparse.Namespace) -> ModelFolder | None:
    """Read the configuration of --pretrained_model_name_or_path if it is a folder.

    Return None for names on the Hub, which are taken for SVD itself, and for the embedded SVD: it
    is the default, so the user asks about the real one. Raise ValueError if there is no such
    folder, or no UNet in it.
    """
    name = args.pretrained_model_name_or_path
    if name == str(TINY_SVD):
        return None
    folder = Path(name)
    if not folder.is_dir():
        looks_like_path = name[:1] in "/.~" or name.count("/") > 1
        if looks_like_path:
            raise ValueError(f"--pretrained_model_name_or_path {name}: there is no such folder")
        return None
    file = folder / "unet" / "config.json"
    if not file.is_file():
        raise ValueError(f"--pretrained_model_name_or_path {folder}: it has no unet/config.json")
    return ModelFolder(folder, json.loads(file.read_text()))


def find_table_kind(script: str, args: argparse.Namespace) -> str | None:
    """Return the kind of training as the table names it, or None if the table does not have it."""
    if script == "train_svd.py":
        return None if args.train_params else "full"
    if script == "train_svd_lora.py":
        is_known = args.lora_targets == ["attention"] and not args.use_dora
        return "lora" if is_known else None
    is_default_control = args.enhancer == "carry" and args.max_objects == 8
    is_known = is_default_control and args.lora is None and not args.train_params
    return "boxes" if is_known else None


def count_job(
    args: argparse.Namespace, model_folder: ModelFolder | None, prepare: Callable[..., Any]
) -> TrainingJob:
    """Return a job that the table does not have, with parameters and memory that are counted.

    model_folder: None for SVD itself.
    """
    from diffusers import AutoencoderKLTemporalDecoder
    from torch._subclasses.fake_tensor import FakeTensorMode  # private, but torch's own way
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from svd_xtend.training import memory_count

    count_parameters = memory_estimate.count_parameters
    unet_config = memory_count.svd_config()
    if model_folder:
        unet_config = model_folder.unet_config
    encoders = memory_estimate.SVD_ENCODERS
    vae_scale = 8
    with FakeTensorMode():
        _, model = memory_count.make_fake_model(unet_config, prepare, args, "none")
        if model_folder:
            vae_config = json.loads((model_folder.path / "vae" / "config.json").read_text())
            vae = AutoencoderKLTemporalDecoder.from_config(vae_config)
            clip_config = CLIPVisionConfig.from_pretrained(model_folder.path / "image_encoder")
            encoders = memory_estimate.EncoderSizes(
                vae=count_parameters(vae),
                vae_encoder=count_parameters(vae.encoder),
                clip=count_parameters(CLIPVisionModelWithProjection(clip_config)),
            )
            vae_scale = 2 ** (len(vae.config.block_out_channels) - 1)
    return TrainingJob(
        args,
        kind=None,
        num_trained=count_parameters(model, trained_only=True),
        num_parameters=count_parameters(model),
        count_step=memory_count.step_counter(unet_config, prepare, args, vae_scale),
        vae_scale=vae_scale,
        encoders=encoders,
    )


def make_job(script: str, argv: list[str], exact: bool) -> TrainingJob:
    """Return the job that the flags of a trainer describe.

    exact: count it even if the table has it. Raise ValueError if the flags do not fit together.
    """
    parse, prepare = TRAINERS[script]
    args = parse(argv)
    model_folder = read_model_folder(args)
    if args.num_frames is None:
        args.num_frames = DEFAULT_NUM_FRAMES
        if model_folder:
            args.num_frames = model_folder.unet_config.get("num_frames", DEFAULT_NUM_FRAMES)
    if model_folder:
        channels = tuple(model_folder.unet_config["block_out_channels"])
        if channels == memory_estimate.SVD_CHANNELS:
            model_folder = None
    if args.gradient_checkpointing == "auto":
        args.gradient_checkpointing = "none"  # the report proposes policies for each GPU
    if args.mixed_precision is None:
        args.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    optimizers.check_optimizer(args)

    kind = find_table_kind(script, args)
    if model_folder or exact or kind is None:
        logger.info("counting; this takes some seconds for each policy of --gradient_checkpointing")
        return count_job(args, model_folder, prepare)
    job = make_table_job(args, kind)
    fastest = job.with_flags(gradient_checkpointing="none", offload_activations=False)
    if fastest.estimate_step() is None:
        return count_job(args, model_folder, prepare)
    return job


def make_table_job(args: argparse.Namespace, kind: str) -> TrainingJob:
    """Return a job of a kind that the table has."""
    if kind == "full":
        num_trained = memory_estimate.TRAINABLE_PARAMETERS
        num_parameters = memory_estimate.UNET_PARAMETERS
    elif kind == "lora":
        num_trained = memory_estimate.LORA_PARAMETERS_PER_RANK * args.rank
        num_parameters = memory_estimate.UNET_PARAMETERS + num_trained
    else:
        num_trained = memory_estimate.BOX_CONTROL_PARAMETERS
        num_parameters = memory_estimate.UNET_PARAMETERS + num_trained
    return TrainingJob(args, kind, num_trained, num_parameters)


def report(script: str, job: TrainingJob) -> None:
    """Print the memory by component, and for each size of GPU the flags that make the job fit."""
    args = job.args
    need = job.estimate()
    assert need is not None  # make_job sees to it that the table has the job, or counts it
    size = f"{args.width}x{args.height} x {args.num_frames} frames x {args.per_gpu_batch_size}"
    parameters = f"{job.num_trained / 1e6:.1f} of {job.num_parameters / 1e6:.1f} M parameters"
    print(f"{script} {size}, precision {args.mixed_precision}: trains {parameters}.")
    print("Predicted, not measured.\n")
    if args.mixed_precision == "no":
        print("This is for float32. With --mixed_precision bf16 or fp16 it is about half.\n")
    for component, gib, remark in need.rows():
        print(f"{component:16}{gib:8.2f} GiB   {remark}")

    print(f"\n{'GPU':>15}   fits")
    for card in memory_estimate.CARD_SIZES:
        plan = memory_estimate.fit_to_budget(job, card * memory_estimate.USABLE_FRACTION)
        if plan is None:
            print(f"{card:>12} GB   no, whatever the flags")
        elif plan.flags:
            flags = memory_estimate.format_flags(plan.flags)
            print(f"{card:>12} GB   with {flags}: {plan.need.total:.1f} GiB")
        else:
            print(f"{card:>12} GB   as it is")
            break


def print_fitting_command(script: str, argv: list[str], job: TrainingJob, card: float) -> None:
    """Print the command that runs this job on a GPU of `card` GB. Raise ValueError if none does."""
    plan = memory_estimate.fit_to_budget(job, card * memory_estimate.USABLE_FRACTION)
    if plan is None:
        advice = memory_estimate.reduction_advice(job)
        raise ValueError(f"--fit {card:g}GB: the run does not fit, whatever the flags. {advice}")
    if job.args.pretrained_model_name_or_path == str(TINY_SVD):
        # the embedded SVD is the default, but the figures are for the real one
        argv = ["--pretrained_model_name_or_path=/path/to/weight", *argv]
    if "latent_cache" in plan.flags:
        flags = cache_flags(argv, job, card)
        print(f"accelerate launch cache_latents.py {flags} --latent_cache=CACHE")
    added_flags = memory_estimate.format_flags(plan.flags)
    print(f"accelerate launch {script} {shlex.join(argv)} {added_flags}".rstrip())
    print(f"needs {plan.need.total:.1f} GiB (predicted)")


def cache_flags(argv: list[str], job: TrainingJob, card: float) -> str:
    """Return the flags with which cache_latents.py makes the cache of this job on the same GPU."""
    given = [arg.split("=")[0].removeprefix("--") for arg in argv]
    flags = {name: getattr(job.args, name) for name in CACHE_FLAGS if name in given}
    if "/path/to/weight" in argv[0]:
        flags["pretrained_model_name_or_path"] = "/path/to/weight"
    # GiB of one frame, and what is left for frames beside the encoders' weights
    one_frame = job.with_flags(latent_cache=None, vae_encode_chunk=1)
    need = one_frame.add_to_step(0.0)
    card_gib = card * memory_estimate.USABLE_FRACTION - memory_estimate.CUDA_CONTEXT_GIB
    free = card_gib / (1 + memory_estimate.OVERHEAD_FRACTION) - need.encoders
    fitting_chunks = [chunk for chunk in (8, 4, 2) if chunk * need.encoding <= free]
    flags["vae_encode_chunk"] = max(fitting_chunks, default=1)
    return shlex.join(memory_estimate.format_flags(flags).split())


def main(own_args: argparse.Namespace, trainer_argv: list[str]) -> None:
    """Print the prediction, or with --fit the command. Raise ValueError if a flag is wrong."""
    script = Path(own_args.trainer).name
    if script not in TRAINERS:
        raise ValueError(
            f"{script}: expected the name of a trainer as the first argument, "
            f"one of {', '.join(TRAINERS)}, and then its flags"
        )
    job = make_job(script, trainer_argv, own_args.exact)
    if own_args.fit is not None:
        print_fitting_command(script, trainer_argv, job, own_args.fit)
    else:
        report(script, job)


def card_size(text: str) -> float:
    """Parse the memory of a GPU in GB: 24GB, 24G or 24."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G)?", text, re.I)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"expected the memory of a GPU, for example 24GB; got {text}"
        )
    return float(match[1])


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script's own flags; all others are the trainer's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "trainer",
        help=f"{', '.join(TRAINERS)}; its own flags follow, as for a launch",
    )
    parser.add_argument(
        "--fit",
        type=card_size,
        metavar="24GB",
        help="choose the fastest flags that fit a GPU with this much memory, and print the command",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="count everything on tensors without data instead of using the table; takes a minute",
    )
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = build_parser()
    own_args, trainer_argv = parser.parse_known_args()
    try:
        main(own_args, trainer_argv)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
