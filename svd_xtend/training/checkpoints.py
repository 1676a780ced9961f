"""Weights in and out: load any SVD, write checkpoints that are whole or not there, find the last one.

<output_dir>/checkpoint-1000/
    trained.safetensors   the trained parameters by name (float32), and nothing else
    ema.safetensors       their moving averages, with --use_ema
    state.pt              optimizer by parameter name, schedule, fp16's scaler
    progress.json         step, samples, seed; size and digest of the files beside it

The same files whatever engine ran on however many processes; written in the background, by the main process.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from pathlib import Path

from svd_xtend.models.loading import trainable_parameters
from svd_xtend.training import distributed

logger = logging.getLogger("svd_xtend")

TRAINED_FILE, EMA_FILE, STATE_FILE, PROGRESS_FILE = (
    "trained.safetensors",
    "ema.safetensors",
    "state.pt",
    "progress.json",
)


def load_trained(model, file):
    """Copy parameters by name into `model`; every name in `file` must be there, with its shape. Returns the names."""
    from safetensors.torch import load_file

    tensors, own = load_file(file), dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            found = f"of shape {tuple(own[name].shape)}" if name in own else "not there"
            raise ValueError(
                f"{file}: holds {name} {tuple(tensor.shape)}, which in this model is {found}"
            )
        own[name].data.copy_(distributed.scatter_tensor(tensor, own[name]))
    return list(tensors)


def save_tensors(tensors, file):
    """Write {name: tensor} as contiguous float32 safetensors."""
    from safetensors.torch import save_file

    save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, file)


# ---------------------------------------------------------------------------------------------------- find a checkpoint


def find_checkpoints(output_dir):
    """Checkpoints, oldest first. Half-written ones have another name; a folder without its progress is not one."""
    found = [
        p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)
    ]
    return sorted(
        (p for p in found if (p / PROGRESS_FILE).exists()), key=lambda p: int(p.name.split("-")[1])
    )


def pick_checkpoint(choice, output_dir):
    """The folder that --resume_from_checkpoint means: `latest` (None where there is none), `none`, or a path. Whole ones
    only: `latest` goes past others, and says so; a path to one is an error."""
    if choice == "latest":
        wrong = None
        for folder in reversed(find_checkpoints(output_dir)):
            if not (wrong := find_damage(folder)):
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
        if (folder / PROGRESS_FILE).exists():
            if wrong := find_damage(folder):
                raise ValueError(f"--resume_from_checkpoint {folder}: {wrong}")
            return folder
    raise ValueError(
        f"--resume_from_checkpoint {choice}: no whole checkpoint there (a folder with {PROGRESS_FILE})"
    )


def read_progress(folder):
    """{"step", "samples", "seed"} of a checkpoint."""
    told = json.loads(Path(folder, PROGRESS_FILE).read_text())
    return {key: told[key] for key in ("step", "samples", "seed")}


def find_damage(folder):
    """What is wrong with a checkpoint, beginning with the file; None where it is as it was written."""
    try:
        told = json.loads(Path(folder, PROGRESS_FILE).read_text())
        told["step"], told["samples"], told["seed"]
        for name, (size, digest) in told["files"].items():
            found = Path(folder, name).stat().st_size
            if found != size:
                return f"{name} is cut short or was changed: {found} of {size} bytes"
            if file_digest(Path(folder, name)) != digest:
                return f"{name} is corrupt: it is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{PROGRESS_FILE} cannot be read ({error!r})"


def file_digest(file):
    """What tells a file from a corrupt one."""
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as f:
        while part := f.read(2**24):
            digest.update(part)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ save and resume


class CheckpointManager:
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
            self.thread = threading.Thread(
                target=self.write, args=(files, progress), name="checkpoint"
            )
            self.thread.start()

    def snapshot(self):
        """{file name: what goes into it}, copies in the CPU's memory; on other processes nothing of any size."""
        keep, named = self.accelerator.is_main_process, trainable_parameters(self.unet)
        files = {
            TRAINED_FILE: {name: distributed.gather_tensor(p, keep) for name, p in named.items()}
        }
        scaler, state = self.accelerator.scaler, {"schedule": self.schedule.state_dict()}
        state["optimizer"] = distributed.optimizer_states(self.optimizer, named, keep)
        state["scaler"] = scaler.state_dict() if scaler else None
        if self.ema:
            state["averaged_steps"] = self.ema.optimization_step
            files[EMA_FILE] = {
                name: distributed.gather_tensor(p, keep)
                for name, p in zip(named, self.ema.shadow_params)
            }
        return {**files, STATE_FILE: state}

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
                save_state(content, partial / name) if name == STATE_FILE else save_tensors(
                    content, partial / name
                )
            told = {
                name: [(partial / name).stat().st_size, file_digest(partial / name)]
                for name in files
            }
            (partial / PROGRESS_FILE).write_text(json.dumps({**progress, "files": told}))
            flush_to_disk(*partial.iterdir(), partial)
            if final.exists():  # one without its progress; others were set aside on resuming
                delete_checkpoint(final)
            partial.rename(final)
            flush_to_disk(self.output_dir)
            self.step = progress["step"]
            for old in find_checkpoints(self.output_dir)[: -self.limit if self.limit else 0]:
                if old != final:
                    delete_checkpoint(old)
        except Exception as error:  # whatever it is, it is the loop's to raise
            self.error = root_os_error(error)
            shutil.rmtree(partial, ignore_errors=True)

    def resume(self, folder):
        """Load a checkpoint's state; returns its progress. Learning rate, schedule and Adam's flags are this run's, which
        may differ from those that it was saved under. Checkpoints of later steps are set aside."""
        import torch
        from safetensors.torch import load_file

        named, state = (
            trainable_parameters(self.unet),
            torch.load(folder / STATE_FILE, map_location="cpu", mmap=True, weights_only=True),
        )
        if (
            set(load_trained(self.unet, folder / TRAINED_FILE)) != named.keys()
            or bool(self.ema) != (folder / EMA_FILE).exists()
        ):
            raise ValueError(
                f"--resume_from_checkpoint {folder}: does not hold what this run trains. Give the flags that it was "
                "trained with, or another --output_dir."
            )
        distributed.load_optimizer_states(self.optimizer, named, state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.optimization_step = state["averaged_steps"]
            for shadow, average in zip(
                self.ema.shadow_params, map(load_file(folder / EMA_FILE).get, named)
            ):
                shadow.data.copy_(distributed.scatter_tensor(average, shadow))
        own_rates = self.schedule.base_lrs
        self.schedule.load_state_dict(state["schedule"])
        self.schedule.base_lrs = own_rates
        groups = distributed.torch_optimizer(self.optimizer).param_groups
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


def delete_checkpoint(folder):
    """Delete a checkpoint; killed in the middle of it, what is left does not pass for one."""
    partial = folder.with_name(f"partial-discarded-{folder.name}")
    folder.rename(partial)
    shutil.rmtree(partial)


def save_state(state, file):
    """Write what is not weights."""
    import torch

    with open(
        file, "wb"
    ) as f:  # torch, given a name, does not tell that a disk is full; see `reason`
        torch.save(state, f)


def root_os_error(error):
    """The OSError behind an error, where there is one: torch ends in one of its own when it cannot write."""
    inner = error
    while inner and not isinstance(inner, OSError):
        inner = inner.__context__
    return inner or error


def flush_to_disk(*paths):
    """Have files, and folders' lists of names, on disk before going on."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
