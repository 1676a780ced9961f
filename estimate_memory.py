"""Will this run fit? What a training needs of a GPU's memory, before it is launched; without weights, without a GPU.

    python estimate_memory.py train_svd_lora.py --width=1024 --height=576 --num_frames=25 --mixed_precision=bf16
    python estimate_memory.py train_svd.py --width=1024 --height=576 --num_frames=25 --mixed_precision=bf16 --fit 24GB
    python estimate_memory.py train_svd.py --pretrained_model_name_or_path=/path/to/weight --train_params attn1

The trainer's name, then the flags that it would be given. --fit picks the levers for a card and prints the command.
Predicted by svd_xtend/memory.py, from a table where it knows the training, else by counting it over tensors without data.
"""

import argparse
import json
import logging
import os
import re
import shlex
from functools import cache
from pathlib import Path

import train_svd
import train_svd_lora
import train_svd_tracklet
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.training import memory_estimate, optimizers

logger = logging.getLogger("svd_xtend")

TRAINERS = {  # script: how it reads its flags, what it trains
    "train_svd.py": (
        lambda argv: train_svd.parse(train_svd.build_parser(), argv),
        train_svd.select_parameters,
    ),
    "train_svd_lora.py": (
        lambda argv: train_svd.parse(train_svd_lora.script_parser(), argv),
        train_svd_lora.add_lora,
    ),
    "train_svd_tracklet.py": (train_svd_tracklet.script_parse, train_svd_tracklet.add_boxes),
}


def read_config(args):
    """(the UNet's configuration, its folder). Of the embedded SVD, which is the default, and of names on the Hub: SVD's own,
    None, None."""
    path = args.pretrained_model_name_or_path
    folder = Path(path)
    if path == str(TINY_SVD) or not folder.is_dir():
        if path != str(TINY_SVD) and (path[:1] in "/.~" or path.count("/") > 1):
            raise ValueError(f"--pretrained_model_name_or_path {path}: no such folder")
        return None, None
    file = folder / "unet" / "config.json"
    if not file.is_file():
        raise ValueError(f"--pretrained_model_name_or_path {folder}: no unet/config.json in it")
    return json.loads(file.read_text()), folder


def kind_of(script, args):
    """The table's name for what trains, or None."""
    if script == "train_svd.py":
        return None if args.train_params else "full"
    if script == "train_svd_lora.py":
        return "lora" if args.lora_targets == ["attention"] and not args.use_dora else None
    known = (args.enhancer, args.max_objects, args.lora) == (
        "carry",
        8,
        None,
    ) and not args.train_params
    return "boxes" if known else None


def job_by_counting(args, config, folder, prepare):
    """The Job of what is not in the table: everything about it is counted."""
    from diffusers import AutoencoderKLTemporalDecoder
    from torch._subclasses.fake_tensor import (
        FakeTensorMode,  # private, but torch's own way to run without data
    )
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    def size(module, trained=False):
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)

    encoders, scale = (
        (
            memory_estimate.VAE_PARAMETERS,
            memory_estimate.VAE_ENCODER_PARAMETERS,
            memory_estimate.CLIP_PARAMETERS,
        ),
        8,
    )
    with FakeTensorMode():
        _, model = memory_estimate.make_fake_model(
            config or memory_estimate.svd_config(), prepare, args, "none"
        )
        if config:
            vae = AutoencoderKLTemporalDecoder.from_config(
                json.loads((folder / "vae" / "config.json").read_text())
            )
            clip = CLIPVisionModelWithProjection(
                CLIPVisionConfig.from_pretrained(folder / "image_encoder")
            )
            encoders, scale = (
                (size(vae), size(vae.encoder), size(clip)),
                2 ** (len(vae.config.block_out_channels) - 1),
            )
    return memory_estimate.TrainingJob(
        args, None, size(model, trained=True), size(model),
        cache(lambda *how: memory_estimate.count_step_memory(config or memory_estimate.svd_config(), prepare, args, *how, scale)[1]), scale,
        encoders,
    )  # fmt: skip


def make_job(script, argv, exact):
    """The Job that the flags describe."""
    parse, prepare = TRAINERS[script]
    args = parse(argv)
    config, folder = read_config(args)
    args.num_frames = args.num_frames or (config or {}).get("num_frames", 25)
    if config and tuple(config["block_out_channels"]) == memory_estimate.SVD_CHANNELS:
        config = None
    if args.gradient_checkpointing == "auto":
        args.gradient_checkpointing = (
            "none"  # where it starts from; what a card needs more is told card by card
        )
    args.mixed_precision = args.mixed_precision or os.environ.get(
        "ACCELERATE_MIXED_PRECISION", "no"
    )
    optimizers.check_optimizer(args)
    kind = kind_of(script, args)
    if config or exact or not kind:
        logger.info("counting, some seconds for each way to recompute ...")
        return job_by_counting(args, config, folder, prepare)
    trained = {
        "full": memory_estimate.TRAINABLE_PARAMETERS,
        "lora": memory_estimate.LORA_PARAMETERS_PER_RANK * getattr(args, "rank", 0),
        "boxes": memory_estimate.BOX_CONTROL_PARAMETERS,
    }[kind]
    job = memory_estimate.TrainingJob(
        args, kind, trained, memory_estimate.UNET_PARAMETERS + trained * (kind != "full")
    )
    if job.changed(gradient_checkpointing="none", offload_activations=False).step() is None:
        return job_by_counting(args, config, folder, prepare)
    return job


def report(script, job):
    """The table by component, and what each card needs."""
    a, need = job.args, job.need()
    print(f"{script} {a.width}x{a.height} x {a.num_frames} frames x {a.per_gpu_batch_size}, precision {a.mixed_precision}: "
          f"{job.trained / 1e6:.1f} of {job.parameters / 1e6:.1f} M parameters train. Predicted, not measured.\n")  # fmt: skip
    if a.mixed_precision == "no":
        print(
            "All of it in float32; --mixed_precision bf16, or fp16 before Ampere, takes about half.\n"
        )
    for component, gib, remark in need.rows():
        print(f"{component:16}{gib:8.2f} GiB   {remark}")
    print("\non a card of     it fits")
    for card in memory_estimate.CARD_SIZES:
        found = memory_estimate.fit_to_budget(job, card * memory_estimate.USABLE_FRACTION)
        told = "no, with no lever" if found is None else "as it is"
        if found and found[0]:
            told = f"with {memory_estimate.format_flags(found[0])}: {found[1].total:.1f} GiB"
        print(f"{card:>12} GB   {told}")
        if found and not found[0]:
            break


def cache_flags(argv, job, card):
    """Flags of cache_latents.py that make the cache of this job, on the same card."""
    shared = (
        "pretrained_model_name_or_path",
        "revision",
        "base_folder",
        "width",
        "height",
        "resize_mode",
        "mixed_precision",
    )
    given = [arg.split("=")[0].removeprefix("--") for arg in argv]
    flags = {name: getattr(job.args, name) for name in shared if name in given}
    if "/path/to/weight" in argv[0]:
        flags["pretrained_model_name_or_path"] = "/path/to/weight"
    one = job.changed(latent_cache=None, per_gpu_batch_size=8, vae_encode_chunk=1).need(0.0)
    room = (card * memory_estimate.USABLE_FRACTION - memory_estimate.CUDA_CONTEXT_GIB) / (
        1 + memory_estimate.OVERHEAD_FRACTION
    ) - one.encoders
    flags["vae_encode_chunk"] = max([n for n in (8, 4, 2) if n * one.encoding <= room], default=1)
    return shlex.join(memory_estimate.format_flags(flags).split())


def command_that_fits(script, argv, job, card):
    """Print what to launch on a card of so many GB."""
    found = memory_estimate.fit_to_budget(job, card * memory_estimate.USABLE_FRACTION)
    if found is None:
        raise ValueError(
            f"--fit {card:g}GB: no lever makes it fit. {memory_estimate.reduction_advice(job)}"
        )
    flags, need = found
    if job.args.pretrained_model_name_or_path == str(
        TINY_SVD
    ):  # the default, which is not what was asked about
        argv = ["--pretrained_model_name_or_path=/path/to/weight", *argv]
    if "latent_cache" in flags:
        print(
            f"accelerate launch cache_latents.py {cache_flags(argv, job, card)} --latent_cache=CACHE"
        )
    print(
        f"accelerate launch {script} {shlex.join(argv)} {memory_estimate.format_flags(flags)}".rstrip()
    )
    print(f"needs {need.total:.1f} GiB (predicted)")


def main(own, argv):
    """Predict, print."""
    own.trainer = Path(own.trainer).name
    if own.trainer not in TRAINERS:
        raise ValueError(
            f"{own.trainer}: name the trainer first, one of {', '.join(TRAINERS)}; then its flags"
        )
    job = make_job(own.trainer, argv, own.exact)
    if own.fit is not None:
        command_that_fits(own.trainer, argv, job, own.fit)
    else:
        report(own.trainer, job)


def card_size(text):
    """24GB, 24G or 24 -> 24.0."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G)?", text, re.I)
    if not number or float(number[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a card's memory, 24GB for one")
    return float(number[1])


def build_parser():
    """Its own flags; all others are the trainer's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    parser.add_argument("trainer", help=f"{', '.join(TRAINERS)}; then its flags, as for a launch")
    parser.add_argument("--fit", type=card_size, metavar="24GB", help="pick the flags that make it fit a card of so much memory, the fastest that do, and print the command")
    parser.add_argument("--exact", action="store_true", help="count everything anew instead of looking it up")
    # fmt: on
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = build_parser()
    try:
        main(*parser.parse_known_args())
    except ValueError as error:  # an answer, not a crash
        parser.exit(2, f"{error}\n")
