"""Weights in and out: load any SVD, write checkpoints that are whole or not there, find the last one.

<output_dir>/checkpoint-1000/
    trained.safetensors   the trained parameters by name (float32), and nothing else
    ema.safetensors       their moving averages, with --use_ema
    state.pt              optimizer by parameter name, schedule, fp16's scaler
    progress.json         step, samples, seed; size and digest of the files beside it

The same files whatever engine ran on however many processes; written in the background, by the main process.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from pathlib import Path

from svd_xtend import fast_unet, processes

logger = logging.getLogger("svd_xtend")

TRAINED, EMA, STATE, PROGRESS = "trained.safetensors", "ema.safetensors", "state.pt", "progress.json"
BOXES = "tracklet_weights.safetensors"  # of svd_xtend/boxes.py, whose import takes seconds


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


def pixel_step(path, revision=None):
    """Pixels of which an SVD takes whole multiples, by its configuration alone: 64 for Stability's."""
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel

    vae = AutoencoderKLTemporalDecoder.load_config(path, subfolder="vae", revision=revision)
    unet = UNetSpatioTemporalConditionModel.load_config(path, subfolder="unet", revision=revision)
    return 2 ** (len(vae["block_out_channels"]) - 1 + len(unet["down_block_types"]) - 1)


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
    where `precision` is fp16 or bf16. Returns {name: parameter} of what trains."""
    import torch

    half = fast_unet.dtype_of(precision)
    fast_unet.train_in(unet, pipe.unet, half, getattr(torch, master))
    for tensor in [*unet.parameters(), *unet.buffers()]:
        tensor.data = tensor.data.to(device)
    place_encoders(pipe, half, device, encoders)
    return trainable_parameters(unet)


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
        own[name].data.copy_(processes.spread(tensor, own[name]))
    return list(tensors)


def save_tensors(tensors, file):
    """Write {name: tensor} as contiguous float32 safetensors."""
    from safetensors.torch import save_file

    save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, file)


# ---------------------------------------------------------------------------------------------------- find a checkpoint


def find_checkpoints(output_dir):
    """Checkpoints, oldest first. Half-written ones have another name; a folder without its progress is not one."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if (p / PROGRESS).exists()), key=lambda p: int(p.name.split("-")[1]))


def pick_checkpoint(choice, output_dir):
    """The folder that --resume_from_checkpoint means: `latest` (None where there is none), `none`, or a path. Whole ones
    only: `latest` goes past others, and says so; a path to one is an error."""
    if choice == "latest":
        wrong = None
        for folder in reversed(find_checkpoints(output_dir)):
            if not (wrong := damage(folder)):
                return folder
            logger.warning("%s is passed over: %s", folder, wrong)
        if wrong:
            raise ValueError(
                f"--output_dir {output_dir}: no checkpoint in it is whole, see above. Delete them to start anew"
            )
        return None
    if choice == "none":
        if whole := find_checkpoints(output_dir):
            raise ValueError(
                f"--resume_from_checkpoint none: {output_dir} holds {whole[-1].name} of an earlier run. Choose another "
                "--output_dir, or delete the checkpoints."
            )
        return None
    for folder in (Path(choice), Path(output_dir, choice)):
        if (folder / PROGRESS).exists():
            if wrong := damage(folder):
                raise ValueError(f"--resume_from_checkpoint {folder}: {wrong}")
            return folder
    raise ValueError(f"--resume_from_checkpoint {choice}: no whole checkpoint there (a folder with {PROGRESS})")


def read_progress(folder):
    """{"step", "samples", "seed"} of a checkpoint."""
    told = json.loads(Path(folder, PROGRESS).read_text())
    return {key: told[key] for key in ("step", "samples", "seed")}


def damage(folder):
    """What is wrong with a checkpoint, beginning with the file; None where it is as it was written."""
    try:
        told = json.loads(Path(folder, PROGRESS).read_text())
        told["step"], told["samples"], told["seed"]
        for name, (size, digest) in told["files"].items():
            found = Path(folder, name).stat().st_size
            if found != size:
                return f"{name} is cut short or was changed: {found} of {size} bytes"
            if digest_of(Path(folder, name)) != digest:
                return f"{name} is corrupt: it is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{PROGRESS} cannot be read ({error!r})"


def digest_of(file):
    """What tells a file from a corrupt one."""
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as f:
        while part := f.read(2**24):
            digest.update(part)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ save and resume


class Saver:
    """Saves and resumes one run.

    `save` waits only for a copy in the CPU's memory; the main process then writes it in a thread. Leaving the context
    waits for that. `step` is that of the last checkpoint that is whole on disk."""

    def __init__(self, accelerator, output_dir, limit, unet, optimizer, schedule, ema):
        self.accelerator, self.output_dir, self.limit = accelerator, Path(output_dir), limit
        self.unet, self.optimizer, self.schedule, self.ema = unet, optimizer, schedule, ema
        self.step, self.thread, self.error = 0, None, None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.finish()
        else:
            self.join()

    def join(self):
        """Wait for the thread."""
        if self.thread:
            self.thread.join()

    def finish(self):
        """Wait until what was saved is on disk; all processes do."""
        self.join()
        self.check()
        self.accelerator.wait_for_everyone()

    def check(self):
        """Raise where the last checkpoint could not be written; what was whole before still is."""
        if self.error:
            raise OSError(
                f"--output_dir {self.output_dir}: a checkpoint could not be written ({self.error}). Make room, or choose "
                "another folder; the same command goes on from the last checkpoint, "
                + (f"that of step {self.step}." if self.step else "of which there is none yet.")
            ) from self.error

    def save(self, progress):
        """Begin to write checkpoint-<step>. All processes call it; it waits for the one before."""
        self.join()
        self.check()
        files = self.snapshot()
        if self.accelerator.is_main_process:
            self.thread = threading.Thread(target=self.write, args=(files, progress), name="checkpoint")
            self.thread.start()

    def snapshot(self):
        """{file name: what goes into it}, copies in the CPU's memory; on other processes nothing of any size."""
        keep, named = self.accelerator.is_main_process, trainable_parameters(self.unet)
        files = {TRAINED: {name: processes.collect(p, keep) for name, p in named.items()}}
        scaler, state = self.accelerator.scaler, {"schedule": self.schedule.state_dict()}
        state["optimizer"] = processes.optimizer_states(self.optimizer, named, keep)
        state["scaler"] = scaler.state_dict() if scaler else None
        if self.ema:
            state["averaged_steps"] = self.ema.optimization_step
            files[EMA] = {name: processes.collect(p, keep) for name, p in zip(named, self.ema.shadow_params)}
        return {**files, STATE: state}

    def write(self, files, progress):
        """Write all under a temporary name, flush it to disk, rename it, then delete what `limit` no longer keeps. A run
        killed in here leaves the checkpoint before untouched."""
        final = self.output_dir / f"checkpoint-{progress['step']}"
        partial = final.with_name(f"partial-{final.name}")
        try:
            for leftover in self.output_dir.glob("partial-*"):  # of saves that were killed
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
            for name, content in files.items():
                save_state(content, partial / name) if name == STATE else save_tensors(content, partial / name)
            told = {name: [(partial / name).stat().st_size, digest_of(partial / name)] for name in files}
            (partial / PROGRESS).write_text(json.dumps({**progress, "files": told}))
            flush(*partial.iterdir(), partial)
            if final.exists():  # one without its progress; others were set aside on resuming
                discard(final)
            partial.rename(final)
            flush(self.output_dir)
            self.step = progress["step"]
            for old in find_checkpoints(self.output_dir)[: -self.limit if self.limit else 0]:
                if old != final:
                    discard(old)
        except Exception as error:  # whatever it is, it is the loop's to raise
            self.error = reason(error)
            shutil.rmtree(partial, ignore_errors=True)

    def resume(self, folder):
        """Load a checkpoint's state; returns its progress. Learning rate, schedule and Adam's flags are this run's, which
        may differ from those that it was saved under. Checkpoints of later steps are set aside."""
        import torch
        from safetensors.torch import load_file

        named, state = trainable_parameters(self.unet), torch.load(folder / STATE, map_location="cpu", mmap=True, weights_only=True)
        if set(load_trained(self.unet, folder / TRAINED)) != named.keys() or bool(self.ema) != (folder / EMA).exists():
            raise ValueError(
                f"--resume_from_checkpoint {folder}: does not hold what this run trains. Give the flags that it was "
                "trained with, or another --output_dir."
            )
        processes.load_optimizer_states(self.optimizer, named, state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.optimization_step = state["averaged_steps"]
            for shadow, average in zip(self.ema.shadow_params, map(load_file(folder / EMA).get, named)):
                shadow.data.copy_(processes.spread(average, shadow))
        own_rates = self.schedule.base_lrs
        self.schedule.load_state_dict(state["schedule"])
        self.schedule.base_lrs = own_rates
        groups = processes.torch_optimizer(self.optimizer).param_groups
        for group, base, factor in zip(groups, own_rates, self.schedule.lr_lambdas):
            rate = base * factor(self.schedule.last_epoch)
            # torchao insists on tensors
            group["lr"] = group["lr"].fill_(rate) if torch.is_tensor(group["lr"]) else rate
        self.schedule._last_lr = [group["lr"] for group in groups]
        progress = read_progress(folder)
        self.step = progress["step"]
        if self.accelerator.is_main_process:
            for later in find_checkpoints(self.output_dir):
                if int(later.name.split("-")[1]) > self.step:
                    aside = later.with_name(f"abandoned-{later.name}")
                    shutil.rmtree(aside, ignore_errors=True)  # of a step back before this one
                    later.rename(aside)
        return progress


def discard(folder):
    """Delete a checkpoint; killed in the middle of it, what is left does not pass for one."""
    partial = folder.with_name(f"partial-discarded-{folder.name}")
    folder.rename(partial)
    shutil.rmtree(partial)


def save_state(state, file):
    """Write what is not weights."""
    import torch

    with open(file, "wb") as f:  # torch, given a name, does not tell that a disk is full; see `reason`
        torch.save(state, f)


def reason(error):
    """The OSError behind an error, where there is one: torch ends in one of its own when it cannot write."""
    inner = error
    while inner and not isinstance(inner, OSError):
        inner = inner.__context__
    return inner or error


def flush(*paths):
    """Have files, and folders' lists of names, on disk before going on."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
