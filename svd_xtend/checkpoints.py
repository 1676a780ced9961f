"""Weights in and out: load any SVD, write checkpoints that are whole or not there, find the last one.

<output_dir>/checkpoint-1000/
    trained.safetensors   the trained parameters by name (float32), and nothing else
    ema.safetensors       their moving averages, with --use_ema
    progress.json         step, samples, seed
    ...                   optimizer, scheduler, scaler: accelerate's own files
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from svd_xtend import fast_unet

TRAINED, EMA, PROGRESS = "trained.safetensors", "ema.safetensors", "progress.json"


# ----------------------------------------------------------------------------------------------------------- load SVD


def load_svd(path, dtype, revision=None, unet_path=None, unet=True):
    """A StableVideoDiffusionPipeline from a Hub name or a folder, on the CPU, all its modules in `dtype`.

    Takes files of the fp16 variant and plain ones, whichever are there (for float32, plain ones first).
    `unet_path`: another folder whose UNet (itself, or in its unet/) replaces the pipeline's. unet=False: without one.
    """
    import diffusers
    import transformers
    from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel

    for library in (diffusers, transformers):  # they warn of choices made here on purpose
        library.utils.logging.set_verbosity_error()
    extra = {} if unet else {"unet": None}
    if unet_path:
        inside = "unet" if Path(unet_path, "unet").is_dir() else None
        extra["unet"] = load_any_variant(
            UNetSpatioTemporalConditionModel, unet_path, "--pretrain_unet", dtype, subfolder=inside
        )
    if Path(path).is_dir() and not Path(path, "model_index.json").exists():
        raise ValueError(
            f"--pretrained_model_name_or_path {path}: no model_index.json in this folder. Expected a diffusers SVD, with "
            "unet/, vae/, image_encoder/, feature_extractor/ and scheduler/ beside it."
        )
    pipe = load_any_variant(
        StableVideoDiffusionPipeline, path, "--pretrained_model_name_or_path", dtype, revision=revision, **extra
    )  # fmt: skip
    pipe.set_progress_bar_config(leave=False, desc="sampling")
    return pipe


def load_any_variant(cls, path, flag, dtype, **kwargs):
    """cls.from_pretrained with the fp16 variant's files or the plain ones; one error that names the flag."""
    import torch

    errors = {}
    variants = [None, "fp16"] if dtype == torch.float32 else ["fp16", None]  # training starts from unrounded weights
    if Path(path).is_dir():  # no network to ask: take what is there
        files = [p.name for p in Path(path, kwargs.get("subfolder") or "").rglob("*.safetensors")]
        there = {"fp16": any(".fp16." in name for name in files), None: any(".fp16." not in name for name in files)}
        variants = [v for v in variants if there[v]] or variants
    for variant in variants:
        try:
            return cls.from_pretrained(path, variant=variant, dtype=dtype, **kwargs)
        except (OSError, ValueError) as error:
            errors[variant or "plain"] = str(error).strip().splitlines()[0]
    where = "folder" if Path(path).exists() else "folder or reachable Hub name"
    found = "; ".join(f"{name} files: {text}" for name, text in errors.items())
    raise ValueError(f"{flag} {path}: not a {where} with usable weights. {found}")


# -------------------------------------------------------------------------------------------------- trained parameters


def trainable_parameters(model):
    """{name: parameter} of what trains. Names are the base UNet's, or those of the modules a trainer inserted."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def place(pipe, unet, precision, device, encoders=True, master="float32"):
    """Move all to `device`: trained parameters in `master` precision; what is frozen, and all that is computed, in half
    where `precision` is fp16 or bf16. Returns the trained parameters."""
    import torch

    half = fast_unet.dtype_of(precision)
    fast_unet.train_in(unet, pipe.unet, half, getattr(torch, master))
    for tensor in [*unet.parameters(), *unet.buffers()]:
        tensor.data = tensor.data.to(device)
    place_encoders(pipe, half, device, encoders)
    return list(trainable_parameters(unet).values())


def place_encoders(pipe, half, device, whole=True):
    """Move VAE and CLIP to `device`, frozen, in `half` precision; where not `whole`, CLIP and the VAE's decoder stay on the CPU
    until they are needed (see at_hand)."""
    import torch

    pipe.image_encoder.requires_grad_(False).to(dtype=half)
    # the pipeline, too, takes SVD's VAE out of fp16, which it is not made for
    pipe.vae.requires_grad_(False).to(
        dtype=torch.float32 if half == torch.float16 and pipe.vae.config.force_upcast else half
    )
    for module in (pipe.image_encoder, pipe.vae) if whole else (pipe.vae.encoder, pipe.vae.quant_conv):
        module.to(device)


@contextlib.contextmanager
def at_hand(pipe, device):
    """Modules that `place` left on the CPU come to `device`, and go back."""
    away = [m for m in (pipe.image_encoder, pipe.vae.decoder) if next(m.parameters()).device.type != device.type]
    for module in away:
        module.to(device)
    try:
        yield
    finally:
        for module in away:
            module.to("cpu")


def load_trained(model, file):
    """Copy parameters by name into `model`; every name in `file` must be there, with its shape. Returns the names."""
    from safetensors.torch import load_file

    tensors, own = load_file(file), dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            found = f"of shape {tuple(own[name].shape)}" if name in own else "not there"
            raise ValueError(f"{file}: holds {name} {tuple(tensor.shape)}, which in this model is {found}")
        own[name].data.copy_(tensor)
    return list(tensors)


def save_tensors(tensors, file):
    """Write {name: tensor} as contiguous float32 safetensors."""
    from safetensors.torch import save_file

    save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, file)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def find_checkpoints(output_dir):
    """Whole checkpoints, oldest first. Half-written ones have another name; a folder without its progress is not one."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if (p / PROGRESS).exists()), key=lambda p: int(p.name.split("-")[1]))


def pick_checkpoint(choice, output_dir):
    """The folder that --resume_from_checkpoint means: `latest` (None where there is none), `none`, or a path."""
    whole = find_checkpoints(output_dir)
    if choice == "latest":
        return whole[-1] if whole else None
    if choice == "none":
        if whole:
            raise ValueError(
                f"--resume_from_checkpoint none: {output_dir} holds {whole[-1].name} of an earlier run. Choose another "
                "--output_dir, or delete the checkpoints."
            )
        return None
    for folder in (Path(choice), Path(output_dir, choice)):
        if (folder / PROGRESS).exists():
            return folder
    raise ValueError(f"--resume_from_checkpoint {choice}: no whole checkpoint there (a folder with {PROGRESS})")


def read_progress(folder):
    """{"step", "samples", "seed"} of a checkpoint."""
    return json.loads(Path(folder, PROGRESS).read_text())


class AveragedSteps:
    """What accelerate keeps of an EMAModel: its count of steps. The averages themselves are in ema.safetensors."""

    def __init__(self, ema):
        self.ema = ema

    def state_dict(self):
        return {"optimization_step": self.ema.optimization_step}

    def load_state_dict(self, state):
        self.ema.optimization_step = state["optimization_step"]


def add_hooks(accelerator, schedule, ema):
    """Have accelerate's save_state and load_state keep the trained parameters by name instead of the whole model."""
    from safetensors.torch import load_file

    def save(models, weights, folder):
        weights.clear()  # accelerate then writes no model file
        if accelerator.is_main_process:
            named = trainable_parameters(accelerator.unwrap_model(models[0]))
            save_tensors(named, Path(folder, TRAINED))
            if ema:
                save_tensors(dict(zip(named, ema.shadow_params)), Path(folder, EMA))

    def load(models, folder):
        model = accelerator.unwrap_model(models.pop())
        if set(load_trained(model, Path(folder, TRAINED))) != trainable_parameters(model).keys():
            raise ValueError(
                f"--resume_from_checkpoint {folder}: does not hold what this run trains. Give the flags that it was "
                "trained with, or another --output_dir."
            )
        if ema:
            averages = load_file(Path(folder, EMA))
            for name, shadow in zip(trainable_parameters(model), ema.shadow_params):
                shadow.data.copy_(averages[name])

    accelerator.register_for_checkpointing(schedule, *([AveragedSteps(ema)] if ema else []))
    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def resume(accelerator, folder, output_dir, optimizer, schedule):
    """Load a checkpoint's state; returns its progress. Learning rate, schedule and Adam's flags are this run's, which may
    differ from those that the checkpoint was saved under. Checkpoints of later steps are set aside."""
    flags = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    accelerator.load_state(str(folder))
    accelerator.step = 0  # of gradient accumulation, whose length may have changed
    schedule.base_lrs = [own["initial_lr"] for own in flags]
    for group, own, factor in zip(optimizer.param_groups, flags, schedule.lr_lambdas):
        group.update(own, lr=own["initial_lr"] * factor(schedule.last_epoch))
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    progress = read_progress(folder)
    if accelerator.is_main_process:
        for later in find_checkpoints(output_dir):
            if read_progress(later)["step"] > progress["step"]:
                later.rename(later.with_name(f"abandoned-{later.name}"))
    return progress


def save_checkpoint(accelerator, output_dir, progress, limit=None):
    """Write checkpoint-<step> under a temporary name, flush it to disk, rename it, then delete what `limit` no longer
    keeps. All processes call it. A run killed in here leaves the checkpoint before untouched."""
    final = Path(output_dir, f"checkpoint-{progress['step']}")
    partial = final.with_name(f"partial-{final.name}")
    if accelerator.is_main_process:
        for leftover in Path(output_dir).glob("partial-*"):  # of saves that were killed
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / PROGRESS).write_text(json.dumps(progress))
        for file in [*partial.iterdir(), partial]:
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        if final.exists():  # a resumed run reaches the same step again
            final.rename(final.with_name(f"partial-replaced-{final.name}"))
        partial.rename(final)
        shutil.rmtree(final.with_name(f"partial-replaced-{final.name}"), ignore_errors=True)
        for old in find_checkpoints(output_dir)[: -limit if limit else 0]:
            if old != final:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final
