"""Checkpoints of a training run: write them, find the latest whole one, resume from it.

    manager = CheckpointManager(accelerator, output_dir, limit, unet, optimizer, schedule, ema)
    with manager:
        manager.resume(checkpoint)
        ...
        manager.save({"step": step, "samples": samples, "seed": seed})

The layout on disk:

    <output_dir>/checkpoint-1000/
        trained.safetensors   the parameters that train, by name, in float32
        ema.safetensors       their EMA weights, with --use_ema
        state.pt              optimizer state by parameter name, schedule, fp16's gradient scaler
        progress.json         step, samples, seed; size and digest of the other files

The files do not depend on the engine or the number of processes. The main process writes them, in
the background. A killed process never leaves an incomplete checkpoint under the name checkpoint-*.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from svd_xtend.models.loading import trainable_parameters
from svd_xtend.training import distributed

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from torch import nn

logger = logging.getLogger("svd_xtend")

TRAINED_FILE = "trained.safetensors"
EMA_FILE = "ema.safetensors"
STATE_FILE = "state.pt"
PROGRESS_FILE = "progress.json"
DIGEST_BYTES = 16
READ_BYTES = 2**24  # read at once for a digest


# -------------------------------------------------------------------------------- weights in a file


def load_trained(model: nn.Module, file: str | Path) -> list[str]:
    """Copy the parameters in `file` into `model`, by name. Return the names.

    Raises:
        ValueError: `model` has no parameter of that name and shape.
    """
    from safetensors.torch import load_file

    tensors = load_file(file)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters:
            raise ValueError(f"{file}: holds {name}, which this model does not have")
        parameter = parameters[name]
        if parameter.shape != tensor.shape:
            raise ValueError(
                f"{file}: holds {name} of shape {tuple(tensor.shape)}; in this model it has shape "
                f"{tuple(parameter.shape)}"
            )
        parameter.data.copy_(distributed.scatter_tensor(tensor, parameter))
    return list(tensors)


def save_tensors(tensors: dict[str, torch.Tensor], file: str | Path) -> None:
    """Write {name: tensor} as contiguous float32 safetensors."""
    from safetensors.torch import save_file

    contiguous = {
        name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()
    }
    save_file(contiguous, file)


# -------------------------------------------------------------------------------- find a checkpoint


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name, checkpoint-<step>."""
    return int(checkpoint.name.split("-")[1])


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first.

    A folder without progress.json is not a checkpoint. Incomplete checkpoints have another name.
    """
    checkpoints = [
        folder
        for folder in Path(output_dir).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", folder.name) and (folder / PROGRESS_FILE).exists()
    ]
    return sorted(checkpoints, key=step_of)


def pick_checkpoint(choice: str, output_dir: str | Path) -> Path | None:
    """Return the checkpoint that --resume_from_checkpoint selects, or None to start a new run.

    `choice` is "latest", "none", or a folder, which may be relative to `output_dir`. "latest" skips
    damaged checkpoints with a warning.

    Raises:
        ValueError: all checkpoints are damaged, the chosen one is damaged or missing, or the choice
            is "none" and the folder has checkpoints.
    """
    if choice == "latest":
        return pick_latest(output_dir)
    if choice == "none":
        existing = find_checkpoints(output_dir)
        if existing:
            raise ValueError(
                f"--resume_from_checkpoint none: {output_dir} holds {existing[-1].name} of an "
                "earlier run. Choose another --output_dir, or delete the checkpoints."
            )
        return None
    for folder in (Path(choice), Path(output_dir, choice)):
        if (folder / PROGRESS_FILE).exists():
            damage = find_damage(folder)
            if damage:
                raise ValueError(f"--resume_from_checkpoint {folder}: {damage}")
            return folder
    raise ValueError(
        f"--resume_from_checkpoint {choice}: no checkpoint there (a folder with {PROGRESS_FILE})"
    )


def pick_latest(output_dir: str | Path) -> Path | None:
    """Return the latest checkpoint that is whole, or None if there are no checkpoints.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    checkpoints = find_checkpoints(output_dir)
    for folder in reversed(checkpoints):
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning("%s is skipped: %s", folder, damage)
    if checkpoints:
        raise ValueError(
            f"--output_dir {output_dir}: all checkpoints in it are damaged, see the warnings. "
            "Delete them to start a new run."
        )
    return None


def read_progress(folder: str | Path) -> dict[str, int]:
    """Return {"step", "samples", "seed"} of a checkpoint."""
    progress = json.loads(Path(folder, PROGRESS_FILE).read_text())
    return {key: progress[key] for key in ("step", "samples", "seed")}


def find_damage(folder: str | Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is as it was written."""
    try:
        read_progress(folder)  # raises KeyError if one of its entries is missing
        files = json.loads(Path(folder, PROGRESS_FILE).read_text())["files"]
        for name, (size, digest) in files.items():
            size_on_disk = Path(folder, name).stat().st_size
            if size_on_disk != size:
                return f"{name} is truncated or was changed: {size_on_disk} of {size} bytes"
            if file_digest(Path(folder, name)) != digest:
                return f"{name} is corrupt: its content is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{PROGRESS_FILE} cannot be read ({error!r})"
    return None


def file_digest(file: str | Path) -> str:
    """Return the BLAKE2 digest of a file, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with open(file, "rb") as opened:
        while part := opened.read(READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------- save and resume


class CheckpointManager:
    """Write the checkpoints of a training run, and resume from one.

    `save` waits only for a copy in CPU memory. The main process then writes the copy in a thread;
    leaving the context waits for that thread. `step` is the step of the last checkpoint that is
    completely on disk, 0 without one. `limit` is the number of checkpoints to keep, None for all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | Path,
        limit: int | None,
        unet: nn.Module,
        optimizer: Any,
        schedule: Any,
        ema: EMAModel | None,
    ) -> None:
        self.accelerator = accelerator
        self.output_dir = Path(output_dir)
        self.limit = limit
        self.unet = unet
        self.optimizer = optimizer
        self.schedule = schedule
        self.ema = ema
        self.step = 0
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error_type is None:
            self.finish()
        else:
            self.join()

    def join(self) -> None:
        """Wait for the thread that writes."""
        if self.thread:
            self.thread.join()

    def finish(self) -> None:
        """Wait, on all processes, until the last checkpoint is on disk.

        Raises:
            OSError: it could not be written.
        """
        self.join()
        self.check()
        self.accelerator.wait_for_everyone()

    def check(self) -> None:
        """Raise if the last checkpoint could not be written. Earlier checkpoints are not affected.

        Raises:
            OSError: the disk is full, read-only, ...
        """
        if not self.error:
            return
        if self.step:
            remaining = f"the same command resumes from the checkpoint of step {self.step}."
        else:
            remaining = "there is no earlier checkpoint to resume from."
        raise OSError(
            f"--output_dir {self.output_dir}: a checkpoint could not be written ({self.error}). "
            f"Free some space, or choose another folder; {remaining}"
        ) from self.error

    # ----------------------------------------------------------------------------------------- save

    def save(self, progress: dict[str, int]) -> None:
        """Start to write checkpoint-<step>. All processes must call this.

        `progress` is {"step", "samples", "seed"}. Waits for the checkpoint before this one.

        Raises:
            OSError: the checkpoint before this one could not be written.
        """
        self.join()
        self.check()
        files = self.snapshot()
        if self.accelerator.is_main_process:
            self.thread = threading.Thread(
                target=self.write, args=(files, progress), name=distributed.CHECKPOINT_THREAD
            )
            self.thread.start()

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return {file name: content} in CPU memory; only the main process keeps the tensors."""
        keep = self.accelerator.is_main_process
        parameters = trainable_parameters(self.unet)
        trained = {name: distributed.gather_tensor(p, keep) for name, p in parameters.items()}
        scaler = self.accelerator.scaler
        state = {
            "schedule": self.schedule.state_dict(),
            "optimizer": distributed.optimizer_states(self.optimizer, parameters, keep),
            "scaler": scaler.state_dict() if scaler else None,
        }
        files = {TRAINED_FILE: trained}
        if self.ema:
            # The key's name is that of older checkpoints: the EMA's count of steps.
            state["averaged_steps"] = self.ema.optimization_step
            files[EMA_FILE] = {
                name: distributed.gather_tensor(ema_weight, keep)
                for name, ema_weight in zip(parameters, self.ema.shadow_params)
            }
        files[STATE_FILE] = state
        return files

    def write(self, files: dict[str, dict[str, Any]], progress: dict[str, int]) -> None:
        """Write a checkpoint, so that a killed process leaves the checkpoint before it untouched.

        All files are written under a temporary name, flushed to disk and then renamed. Checkpoints
        beyond `limit` are deleted last.
        """
        final = self.output_dir / f"checkpoint-{progress['step']}"
        partial = final.with_name(f"partial-{final.name}")
        try:
            for leftover in self.output_dir.glob("partial-*"):  # of killed processes
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
            self.write_files(files, progress, partial)
            if final.exists():
                # A folder without progress.json: `resume` has set whole checkpoints aside.
                delete_checkpoint(final)
            partial.rename(final)
            flush_to_disk(self.output_dir)
            self.step = progress["step"]
            self.delete_old_checkpoints(final)
        except Exception as error:  # any error: `check` raises it in the main thread
            self.error = root_os_error(error)
            shutil.rmtree(partial, ignore_errors=True)

    def write_files(
        self, files: dict[str, dict[str, Any]], progress: dict[str, int], folder: Path
    ) -> None:
        """Write the files of a checkpoint into `folder`, progress.json last, and flush them."""
        for name, content in files.items():
            if name == STATE_FILE:
                save_state(content, folder / name)
            else:
                save_tensors(content, folder / name)
        sizes_and_digests = {
            name: [(folder / name).stat().st_size, file_digest(folder / name)] for name in files
        }
        progress_text = json.dumps({**progress, "files": sizes_and_digests})
        (folder / PROGRESS_FILE).write_text(progress_text)
        flush_to_disk(*folder.iterdir(), folder)

    def delete_old_checkpoints(self, newest: Path) -> None:
        """Delete the oldest checkpoints, so that `limit` are left; never `newest`."""
        if not self.limit:
            return
        for checkpoint in find_checkpoints(self.output_dir)[: -self.limit]:
            if checkpoint != newest:
                delete_checkpoint(checkpoint)

    # --------------------------------------------------------------------------------------- resume

    def resume(self, folder: Path) -> dict[str, int]:
        """Load weights, optimizer, schedule and EMA weights of a checkpoint. Return its progress.

        Learning rate, schedule and Adam's options stay those of this run, which may differ from the
        ones of the run that wrote the checkpoint. Later checkpoints are renamed to abandoned-*.

        Raises:
            ValueError: the checkpoint does not hold what this run trains.
        """
        import torch

        parameters = trainable_parameters(self.unet)
        state = torch.load(folder / STATE_FILE, map_location="cpu", mmap=True, weights_only=True)
        loaded_names = load_trained(self.unet, folder / TRAINED_FILE)
        has_ema = (folder / EMA_FILE).exists()
        if set(loaded_names) != parameters.keys() or has_ema != bool(self.ema):
            raise ValueError(
                f"--resume_from_checkpoint {folder}: does not hold what this run trains. "
                "Pass the flags of the original run, or another --output_dir."
            )
        distributed.load_optimizer_states(self.optimizer, parameters, state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.optimization_step = state["averaged_steps"]
            self.load_ema_weights(folder / EMA_FILE, list(parameters))
        self.resume_schedule(state["schedule"])
        progress = read_progress(folder)
        self.step = progress["step"]
        if self.accelerator.is_main_process:
            self.set_aside_later_checkpoints()
        return progress

    def load_ema_weights(self, file: Path, names: list[str]) -> None:
        """Copy the EMA weights in `file` into self.ema. `names` are in the order of its weights."""
        from safetensors.torch import load_file

        assert self.ema is not None
        tensors = load_file(file)
        for name, ema_weight in zip(names, self.ema.shadow_params):
            ema_weight.data.copy_(distributed.scatter_tensor(tensors[name], ema_weight))

    def resume_schedule(self, schedule_state: dict[str, Any]) -> None:
        """Set the schedule to the step of the checkpoint, with this run's base learning rates."""
        import torch

        base_rates = self.schedule.base_lrs
        self.schedule.load_state_dict(schedule_state)
        self.schedule.base_lrs = base_rates
        groups = distributed.torch_optimizer(self.optimizer).param_groups
        for group, base_rate, factor in zip(groups, base_rates, self.schedule.lr_lambdas):
            rate = base_rate * factor(self.schedule.last_epoch)
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(rate)  # torchao needs the rate to stay a tensor
            else:
                group["lr"] = rate
        self.schedule._last_lr = [group["lr"] for group in groups]

    def set_aside_later_checkpoints(self) -> None:
        """Rename checkpoints of later steps than self.step to abandoned-checkpoint-<step>."""
        for checkpoint in find_checkpoints(self.output_dir):
            if step_of(checkpoint) > self.step:
                aside = checkpoint.with_name(f"abandoned-{checkpoint.name}")
                shutil.rmtree(aside, ignore_errors=True)  # of an earlier step back
                checkpoint.rename(aside)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. Killed in the middle, the process leaves nothing that looks like one."""
    partial = folder.with_name(f"partial-discarded-{folder.name}")
    folder.rename(partial)
    shutil.rmtree(partial)


def save_state(state: dict[str, Any], file: Path) -> None:
    """Write the state of optimizer, schedule and scaler with torch.save."""
    import torch

    # Given a path, torch.save does not name the cause of an error, such as a full disk.
    with open(file, "wb") as opened:
        torch.save(state, opened)


def root_os_error(error: BaseException) -> BaseException:
    """Return the OSError that caused `error`, or `error` itself if none did.

    torch.save raises an error of its own if it cannot write.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def flush_to_disk(*paths: Path) -> None:
    """Wait until files, and the names in folders, are on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
