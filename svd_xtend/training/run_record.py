"""The files in which a training run records its flags, its launches and its metrics.

    record_run(accelerator, args, clips)              # args.json, run.json, motion.png
    metrics = MetricsWriter(output_dir, step=0)       # metrics.jsonl
    metrics.write(1, loss=0.1, lr=1e-5, grad_norm=0.5, seconds=0.7, peak_gib=12.0)
    rows = read_rows(output_dir / "held_out.jsonl")

args.json holds the resolved flags. run.json holds one entry per launch of the run: the command, the
commit, the library versions and the machine. The *.jsonl files hold one JSON object per line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svd_xtend.data import motion

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from svd_xtend.data.sampler import ClipCollection

logger = logging.getLogger("svd_xtend")

ROOT = Path(__file__).parents[2]
RECORDED_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")

# Flags that give the trained weights their shape or meaning: a run can resume only with the same
# values.
MUST_AGREE_ON_RESUME = (
    "rank", "lora_alpha", "lora_targets", "use_dora", "max_objects", "enhancer",
)  # fmt: skip
# Flags that change what is learned: a run may resume with other values, and warns.
SHOULD_AGREE_ON_RESUME = (
    "pretrained_model_name_or_path", "pretrain_unet", "base_folder", "folder_weights", "fps",
    "source_fps", "motion_bucket_id", "buckets", "image_ratio", "validation_ratio",
    "validation_folder", "validation_clips", "validation_seed", "width", "height", "P_mean",
    "P_std",
)  # fmt: skip


# ----------------------------------------------------------------------------------- files of a run


@contextlib.contextmanager
def output_errors(output_dir: str | Path) -> Iterator[None]:
    """Turn every OSError raised in this context into one that names --output_dir."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"--output_dir {output_dir}: cannot be written ({error.strerror or error}). "
            "Free some space, or choose another folder"
        ) from error


def to_json(value: object) -> object:
    """Return a flag's value as JSON can hold it: a dataclass as an object, anything else as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def write_atomically(file: Path, text: str) -> None:
    """Write a file of an --output_dir so that a kill leaves either the old or the new content."""
    partial = file.with_name(f"{file.name}.partial")
    with output_errors(file.parent):
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)


# --------------------------------------------------------------------------- args.json and run.json


def record_run(accelerator: Accelerator, args: argparse.Namespace, clips: ClipCollection) -> None:
    """Write args.json and run.json, plot the clips' motion, and start the tracker of --report_to.

    Only the main process does anything. motion.png shows the distribution of motion scores, if
    --motion_bucket_id auto derives the buckets from them.
    """
    if not accelerator.is_main_process:
        return
    flags = vars(args)
    output_dir = Path(args.output_dir)
    with output_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        if args.motion_bucket_id == "auto" and len(clips.scores):
            title = f"motion of {len(clips.scores)} clips"
            motion.plot_motion(output_dir / "motion.png", clips.scores, title)
    write_atomically(output_dir / "args.json", json.dumps(flags, indent=1, default=to_json))
    starts = [*read_starts(output_dir), describe_start(accelerator, args)]
    write_atomically(output_dir / "run.json", json.dumps({"starts": starts}, indent=1))
    if args.report_to != "none":
        accelerator.init_trackers("svd_xtend", tracker_config(flags))


def tracker_config(flags: dict[str, Any]) -> dict[str, int | float | str]:
    """Return the flags as trackers take them: numbers stay numbers, all else becomes text."""
    config: dict[str, int | float | str] = {}
    for name, value in flags.items():
        config[name] = value if isinstance(value, int | float) else str(value)
    return config


def read_starts(output_dir: str | Path) -> list[dict[str, Any]]:
    """Return the launches of a run from run.json, oldest first; [] if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return list(json.loads(Path(output_dir, "run.json").read_text())["starts"])
    return []


def describe_start(accelerator: Accelerator, args: argparse.Namespace) -> dict[str, Any]:
    """Return what is needed to repeat this launch beside args.json: command, code, machine.

    `commit` and `changed` are None if the code does not lie in a git checkout of its own.
    """
    commit = None
    changed = None
    if run_git("ls-files", "--error-unmatch", "svd_xtend/training/run_record.py"):
        commit = run_git("rev-parse", "HEAD")
    if commit:
        changes = run_git("status", "--porcelain", "--untracked-files=no", "--", ".")
        changed = None if changes is None else bool(changes)
    environment = {"python": platform.python_version(), "platform": platform.platform()}
    for library in RECORDED_LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            environment[library] = importlib.metadata.version(library)
    return {
        "command": launch_command(accelerator, args),
        "commit": commit,
        "changed": changed,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "environment": environment,
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "seed": args.seed,
    }


def run_git(*words: str) -> str | None:
    """Return the output of a git command in the folder of this code, or None if it fails."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def launch_command(accelerator: Accelerator, args: argparse.Namespace) -> str:
    """Return the shell command that repeats this run.

    It has the seed that was drawn and the precision that accelerate was configured for, even if the
    user did not pass them. A run on several machines needs their addresses in addition.
    """
    words = [relative_path(sys.argv[0]), *sys.argv[1:]]
    for flag in ("seed", "mixed_precision"):
        is_given = any(word.partition("=")[0] == f"--{flag}" for word in words)
        if not is_given:
            words.append(f"--{flag}={getattr(args, flag)}")
    return shlex.join([*launcher_words(accelerator), *words])


def launcher_words(accelerator: Accelerator) -> list[str]:
    """Return the words before the script: python, accelerate launch or torchrun with options."""
    num_processes = accelerator.num_processes
    engine = accelerator.distributed_type.value
    if engine == "MULTI_CPU":  # accelerate launch would silently run a single process
        return ["ACCELERATE_USE_CPU=true", "torchrun", f"--nproc_per_node={num_processes}"]
    # accelerate launch sets this variable
    is_launched = num_processes > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ
    if not is_launched:
        return ["python"]
    launcher = ["accelerate", "launch", "--num_processes", str(num_processes)]
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        launcher.append("--cpu")
    config_files = {"FSDP": "fsdp2.yaml", "DEEPSPEED": "deepspeed_zero2.yaml"}
    if engine in config_files:
        config_file = ROOT / "configs" / "accelerate" / config_files[engine]
        launcher += ["--config_file", relative_path(config_file)]
    return launcher


def relative_path(path: str | Path) -> str:
    """Return a path relative to the current folder, or absolute if it is outside of it."""
    absolute = Path(path).absolute()
    if absolute.is_relative_to(Path.cwd()):
        return str(absolute.relative_to(Path.cwd()))
    return str(absolute)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor if the device is a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")  # Linux only
    if cpu_info.exists():
        model = re.search(r"^model name\s*: (.+)$", cpu_info.read_text(), re.M)
        if model:
            return model[1]
    return platform.processor() or platform.machine()


def check_resumed_args(args: argparse.Namespace) -> None:
    """Compare the flags with args.json of the run in --output_dir that is about to resume.

    Raise ValueError if the trained weights would have another shape; warn if the run would learn
    something else.
    """
    file = Path(args.output_dir, "args.json")
    earlier_flags = json.loads(file.read_text()) if file.exists() else {}
    for name in MUST_AGREE_ON_RESUME + SHOULD_AGREE_ON_RESUME:
        if name not in earlier_flags:
            continue
        earlier = earlier_flags[name]
        value = getattr(args, name, None)
        if str(earlier) == str(value):
            continue
        if name in MUST_AGREE_ON_RESUME:
            raise ValueError(
                f"--{name} {value}: the run in {args.output_dir} was trained with {earlier}. "
                f"Pass {earlier} to resume it, or another --output_dir to start a new run"
            )
        logger.warning("--%s was %s when this run started, and is %s now", name, earlier, value)


# --------------------------------------------------------------------------------------- JSON lines


def read_rows(file: str | Path) -> list[dict[str, Any]]:
    """Return the complete rows of a file of JSON lines, or [] if there is no file.

    A kill may have cut off the last row.
    """
    file = Path(file)
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def format_rows(rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_row(file: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of JSON lines, in place of an earlier row of the same step."""
    rows = [earlier for earlier in read_rows(file) if earlier["step"] != row["step"]]
    rows.append(row)
    rows.sort(key=lambda row: row["step"])
    write_atomically(file, format_rows(rows))


class MetricsWriter:
    """Append one row per step to <output_dir>/metrics.jsonl.

    When a run resumes, it first removes the rows after `step`, the step of its checkpoint, from
    metrics.jsonl and from the files that validation writes.
    """

    def __init__(self, output_dir: str | Path, step: int) -> None:
        self.file = Path(output_dir, "metrics.jsonl")
        validation_files = [
            self.file.with_name(name) for name in ("held_out.jsonl", "motion.jsonl")
        ]
        for file in [self.file, *validation_files]:
            if file == self.file or file.exists():
                rows = [row for row in read_rows(file) if row["step"] <= step]
                write_atomically(file, format_rows(rows))

    def write(
        self, step: int, loss: float, lr: float, grad_norm: float, seconds: float, peak_gib: float
    ) -> dict[str, Any]:
        """Append the row of one step and return it. peak_gib: GPU memory, 0 if unknown."""
        row = {
            "step": step,
            "loss": loss,
            "lr": lr,
            # a step that fp16's gradient scaler skips has an infinite norm, which JSON cannot hold
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "s/step": round(seconds, 4),
        }
        if peak_gib:
            row["peak_GiB"] = round(peak_gib, 2)
        with output_errors(self.file.parent), self.file.open("a") as f:
            f.write(json.dumps(row) + "\n")
        return row
