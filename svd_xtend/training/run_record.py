"""What surrounds a training loop: precision, optimizer, what a run was told, metrics, signals, trackers."""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from svd_xtend.data import motion

logger = logging.getLogger("svd_xtend")

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------------- what a run was told


@contextlib.contextmanager
def output_errors(output_dir):
    """What goes wrong with files in here becomes one error that names the folder."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"--output_dir {output_dir}: cannot be written ({error.strerror or error}). Make room, or choose another folder"
        ) from error


def write_atomically(file, text):
    """Write a file of an --output_dir so that it is there as it was, or as it is to be."""
    partial = file.with_name(f"{file.name}.partial")
    with output_errors(file.parent):
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)


def record_run(accelerator, args, data):
    """Write the resolved flags to <output_dir>/args.json, and to run.json how this start came about; hand them to the tracker, and
    draw where motion_bucket_id is by motion how that is distributed; the main process does."""
    if not accelerator.is_main_process:
        return
    sys.argv[1:] = without_token(sys.argv[1:])  # wandb reads and uploads them
    told = {name: value for name, value in vars(args).items() if name != "hub_token"}
    out = Path(args.output_dir)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if args.motion_bucket_id == "auto" and len(data.scores):
            motion.plot_motion(
                out / "motion.png", data.scores, f"motion of {len(data.scores)} clips"
            )
    write_atomically(out / "args.json", json.dumps(told, indent=1, default=str))
    write_atomically(
        out / "run.json",
        json.dumps({"starts": [*read_starts(out), describe_start(accelerator, args)]}, indent=1),
    )
    if args.report_to != "none":
        shown = {k: v if isinstance(v, (int, float)) else str(v) for k, v in told.items()}
        accelerator.init_trackers("svd_xtend", shown)


def read_starts(output_dir):
    """What run.json says of the starts of a run, the last one last; nothing where it is not there, or not what describe wrote."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return list(json.loads(Path(output_dir, "run.json").read_text())["starts"])
    return []


RECORDED_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")


def describe_start(accelerator, args):
    """What repeats this start of a run, as far as it is not in args.json: the command, the code, the machine."""
    commit = run_git("ls-files", "--error-unmatch", "svd_xtend/training/run_record.py") and run_git(
        "rev-parse", "HEAD"
    )
    changes = (
        run_git("status", "--porcelain", "--untracked-files=no", "--", ".") if commit else None
    )
    environment = {"python": platform.python_version(), "platform": platform.platform()}
    for name in RECORDED_LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            environment[name] = importlib.metadata.version(name)
    return {
        "command": launch_command(accelerator, args), "commit": commit, "changed": None if changes is None else bool(changes),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"), "environment": environment,
        "device": device_name(accelerator.device), "processes": accelerator.num_processes, "seed": args.seed,
    }  # fmt: skip


def run_git(*words):
    """What git says of the checkout that holds this code; None where this is none, or git is not there."""
    words = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def launch_command(accelerator, args):
    """The command of this run for a shell, without the token; with the seed that was drawn and the precision that accelerate was
    configured for. More machines than one need their addresses besides."""
    words = [relative_path(sys.argv[0]), *without_token(sys.argv[1:])]
    for flag in ("seed", "mixed_precision"):
        if not any(word.partition("=")[0] == f"--{flag}" for word in words):
            words.append(f"--{flag}={getattr(args, flag)}")
    launcher = ["python"]
    if (
        accelerator.num_processes > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ
    ):  # which accelerate launch sets
        launcher = ["accelerate", "launch", "--num_processes", str(accelerator.num_processes)]
        launcher += ["--cpu"] * (os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true")
        engine = {"FSDP": "fsdp2.yaml", "DEEPSPEED": "deepspeed_zero2.yaml"}.get(
            accelerator.distributed_type.value
        )
        launcher += (
            ["--config_file", relative_path(ROOT / "configs" / "accelerate" / engine)]
            if engine
            else []
        )
    if (
        accelerator.distributed_type.value == "MULTI_CPU"
    ):  # where accelerate launch would run one process, without a word
        launcher = [
            "ACCELERATE_USE_CPU=true",
            "torchrun",
            f"--nproc_per_node={accelerator.num_processes}",
        ]
    return shlex.join([*launcher, *words])


def relative_path(path):
    """A path as one would type it in the current folder."""
    whole = Path(path).absolute()
    return str(whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole)


def without_token(words):
    """Arguments of a command, but for --hub_token and its value, however argparse lets one write them."""
    flags = [word.partition("=")[0] for word in words]
    gone = {
        i
        for i, flag in enumerate(flags)
        if len(flag) > len("--hub_") and "--hub_token".startswith(flag)
    }
    gone |= {i + 1 for i in gone if "=" not in words[i]}
    return [word for i, word in enumerate(words) if i not in gone]


def device_name(device):
    """The name of a GPU or of the CPU, for people."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    table = Path("/proc/cpuinfo")  # Linux; elsewhere Python knows the kind at most
    named = re.search(r"^model name\s*: (.+)$", table.read_text(), re.M) if table.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


MUST_AGREE_ON_RESUME = (
    "rank",
    "lora_alpha",
    "lora_targets",
    "use_dora",
    "max_objects",
    "enhancer",
)  # must agree on resuming
SHOULD_AGREE_ON_RESUME = (
    "pretrained_model_name_or_path", "pretrain_unet", "base_folder", "folder_weights", "fps", "source_fps",
    "motion_bucket_id", "buckets", "image_ratio", "validation_ratio", "validation_folder",
    "validation_clips", "validation_seed", "width", "height", "P_mean", "P_std",
)  # fmt: skip


def check_resumed_args(args):
    """Before resuming: raise where what trains has another shape than in the run in --output_dir, warn where it was told
    something else of what it learns."""
    file = Path(args.output_dir, "args.json")
    before = json.loads(file.read_text()) if file.exists() else {}
    for name in MUST_AGREE_ON_RESUME + SHOULD_AGREE_ON_RESUME:
        old, new = before.get(name), getattr(args, name, None)
        if name in before and str(old) != str(new):
            if name in MUST_AGREE_ON_RESUME:
                raise ValueError(
                    f"--{name} {new}: the run in {args.output_dir} has {old}; pass that, or another --output_dir"
                )
            logger.warning(
                "--%s was %s in the run that this one goes on from, now it is %s", name, old, new
            )


def read_rows(file):
    """Of a file of JSON lines those that are whole; none where it is not there."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def format_rows(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_row(file, row):
    """Add a row to a file of JSON lines, in place of what an earlier start said of the same step."""
    kept = [old for old in read_rows(file) if old["step"] != row["step"]]
    write_atomically(file, format_rows(sorted([*kept, row], key=lambda one: one["step"])))


class MetricsWriter:
    """<output_dir>/metrics.jsonl, one row a step; a resumed run drops the rows past its checkpoint, those of validations, too."""

    def __init__(self, output_dir, step):
        self.file = Path(output_dir, "metrics.jsonl")
        for file in (
            self.file,
            self.file.with_name("held_out.jsonl"),
            self.file.with_name("motion.jsonl"),
        ):
            if file == self.file or file.exists():
                write_atomically(
                    file, format_rows(row for row in read_rows(file) if row["step"] <= step)
                )

    def write(self, step, loss, lr, grad_norm, seconds, peak):
        grad_norm = (
            grad_norm if math.isfinite(grad_norm) else None
        )  # fp16, skipped; JSON knows no infinity
        row = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "s/step": round(seconds, 4),
        }
        if peak:
            row["peak_GiB"] = round(peak, 2)
        with output_errors(self.file.parent), self.file.open("a") as f:
            f.write(json.dumps(row) + "\n")
        return row
