"""What surrounds a training loop: precision, optimizer, what a run was told, metrics, signals, trackers."""

import atexit
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import Image

from svd_xtend import clips, folders, motion, video

logger = logging.getLogger("svd_xtend")

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------------ precision, optimizer


def fast_bf16():
    """Whether bfloat16 is faster than float32 here: on GPUs that have it, and on CPUs with its instructions."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()  # private, but torch's own answer


def best_precision():
    """bf16 where it is fast, else fp16 where there is a GPU, else no."""
    import torch

    return "bf16" if fast_bf16() else "fp16" if torch.cuda.is_available() else "no"


def check_precision(flag):
    """The precision of --mixed_precision, else of accelerate's configuration, or an error that names what to pass."""
    import torch

    precision = flag or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if not flag and precision == "no" and torch.cuda.is_available():
        # `accelerate launch` without a configuration says "no", too: float32 is for those who ask for it by the flag
        precision = best_precision()
        logger.info("--mixed_precision %s: the best that this GPU has; pass --mixed_precision no for float32", precision)
    if (precision == "fp16" and not torch.cuda.is_available()) or (precision == "bf16" and not fast_bf16()):
        raise ValueError(
            f"--mixed_precision {precision}: not on this machine. Pass --mixed_precision {best_precision()}"
        )
    return precision


# At the common rate gates, which start shut, stay almost shut for hundreds of steps, and all behind them waits.
GATE_RATE = 10


OPTIMIZERS = {  # what trained weights are kept in; bytes a parameter of the optimizer's two averages; default epsilon
    "adamw": ("float32", 8, 1e-8),
    # 8 bit round the second moment of a rare gradient, as dropped conditions make them, to 0: at 1e-8 single weights of
    # conv_in and attn2 then took steps of 200 times the learning rate
    "adamw8bit": ("float32", 2, 1e-6),
    "adamw_bf16_sr": ("bfloat16", 4, 1e-8),
}


def make_optimizer(named, args):
    """AdamW on {name: parameter}: torch's, or torchao's with averages of 8 bit, or in bf16 throughout with stochastic
    rounding. Gates, whose names have `alpha_`, have no weight decay and a higher rate."""
    import torch

    if args.optimizer == "adamw":
        # where fused it sees to overflows itself, and accelerate would not know of the steps that it skipped
        fused = torch.cuda.is_available() and args.mixed_precision != "fp16"
        # foreach, the default on GPUs, would need temporary copies of all trained weights: 5.5 GiB of the full UNet
        optimizer_class, how = torch.optim.AdamW, {"fused": fused, "foreach": False}
    else:
        if not importlib.util.find_spec("torchao"):
            raise ValueError(f"--optimizer {args.optimizer}: needs torchao. Run: pip install torchao")
        from torchao import optim

        optimizer_class, how = optim.AdamW8bit, {}
        if args.optimizer == "adamw_bf16_sr":
            # private, but the only AdamW that rounds so; all public ones build on it
            optimizer_class, how = optim._AdamW, {"bf16_stochastic_round": True}
    gates = {
        "params": [p for name, p in named.items() if "alpha_" in name],
        "lr": GATE_RATE * args.learning_rate,
        "weight_decay": 0.0,
    }
    epsilon = OPTIMIZERS[args.optimizer][2] if args.adam_epsilon is None else args.adam_epsilon
    rest = {"params": [p for name, p in named.items() if "alpha_" not in name]}
    groups = [rest] + [gates] * bool(gates["params"])
    optimizer = optimizer_class(
        groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay, eps=epsilon, **how,
    )  # fmt: skip
    if args.optimizer == "adamw_bf16_sr":
        optimizer.register_step_pre_hook(Rounding(args.seed))
    return optimizer


class Rounding:
    """Before each optimizer step: key the rounding's noise by (seed, step). All processes round alike, and a resumed run as
    one that never stopped."""

    def __init__(self, seed):
        self.seed, self.done = seed, None

    def __call__(self, optimizer, *_):
        import torch

        if self.done is None:  # once: it may be on a GPU
            self.done = max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)
        torch.manual_seed(int(np.random.SeedSequence((self.seed, self.done)).generate_state(1, np.uint64)[0]))
        self.done += 1


def check_optimizer(args):
    """Raise where --optimizer and the precision do not go together."""
    if OPTIMIZERS[args.optimizer][0] == "bfloat16" and args.mixed_precision != "bf16":
        raise ValueError(
            f"--optimizer {args.optimizer}: needs --mixed_precision bf16; this run has {args.mixed_precision}"
        )


def number_or(word):
    """The type of a flag that is a number, or this word."""

    def number(text):
        return text if text == word else float(text)

    number.__name__ = f"number or {word}"  # argparse's error names it
    return number


def wrong_number(args, least):
    """What is wrong with a size, with one of {flag: its least value}, or with a rate, as an error; None where nothing is."""
    for flag in ("width", "height"):
        value = getattr(args, flag)
        if value % 8 or value <= 0:
            return f"--{flag} {value}: must be a multiple of 8; try {round(value / 8) * 8 or 8}"
    for flag, bound in least.items():
        value = getattr(args, flag, None)
        if value is not None and value < bound:
            return f"--{flag} {value}: must be at least {bound}"
    for flag in ("fps", "source_fps"):
        value = getattr(args, flag)
        if value not in (None, "native") and not 0 < value < math.inf:
            return f"--{flag} {value}: must be above 0"


# ------------------------------------------------------------------------------------------------- what a run was told


@contextlib.contextmanager
def writing(output_dir):
    """What goes wrong with files in here becomes one error that names the folder."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"--output_dir {output_dir}: cannot be written ({error.strerror or error}). Make room, or choose another folder"
        ) from error


def write_whole(file, text):
    """Write a file of an --output_dir so that it is there as it was, or as it is to be."""
    partial = file.with_name(f"{file.name}.partial")
    with writing(file.parent):
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)


def record_args(accelerator, args, data):
    """Write the resolved flags to <output_dir>/args.json, and to run.json how this start came about; hand them to the tracker, and
    draw where motion_bucket_id is by motion how that is distributed; the main process does."""
    if not accelerator.is_main_process:
        return
    sys.argv[1:] = without_token(sys.argv[1:])  # wandb reads and uploads them
    told = {name: value for name, value in vars(args).items() if name != "hub_token"}
    out = Path(args.output_dir)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if args.motion_bucket_id == "auto" and len(data.scores):
            motion.plot(out / "motion.png", data.scores, f"motion of {len(data.scores)} clips")
    write_whole(out / "args.json", json.dumps(told, indent=1, default=str))
    write_whole(out / "run.json", json.dumps({"starts": [*starts(out), describe(accelerator, args)]}, indent=1))
    if args.report_to != "none":
        shown = {k: v if isinstance(v, (int, float)) else str(v) for k, v in told.items()}
        accelerator.init_trackers("svd_xtend", shown)


def starts(output_dir):
    """What run.json says of the starts of a run, the last one last; nothing where it is not there, or not what describe wrote."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return list(json.loads(Path(output_dir, "run.json").read_text())["starts"])
    return []


LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")


def describe(accelerator, args):
    """What repeats this start of a run, as far as it is not in args.json: the command, the code, the machine."""
    commit = git("ls-files", "--error-unmatch", "svd_xtend/runs.py") and git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".") if commit else None
    environment = {"python": platform.python_version(), "platform": platform.platform()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            environment[name] = importlib.metadata.version(name)
    return {
        "command": command(accelerator, args), "commit": commit, "changed": None if changes is None else bool(changes),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"), "environment": environment,
        "device": device_name(accelerator.device), "processes": accelerator.num_processes, "seed": args.seed,
    }  # fmt: skip


def git(*words):
    """What git says of the checkout that holds this code; None where this is none, or git is not there."""
    words = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command(accelerator, args):
    """The command of this run for a shell, without the token; with the seed that was drawn and the precision that accelerate was
    configured for. More machines than one need their addresses besides."""
    words = [from_here(sys.argv[0]), *without_token(sys.argv[1:])]
    for flag in ("seed", "mixed_precision"):
        if not any(word.partition("=")[0] == f"--{flag}" for word in words):
            words.append(f"--{flag}={getattr(args, flag)}")
    launcher = ["python"]
    if accelerator.num_processes > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ:  # which accelerate launch sets
        launcher = ["accelerate", "launch", "--num_processes", str(accelerator.num_processes)]
        launcher += ["--cpu"] * (os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true")
        engine = {"FSDP": "fsdp2.yaml", "DEEPSPEED": "deepspeed_zero2.yaml"}.get(accelerator.distributed_type.value)
        launcher += ["--config_file", from_here(ROOT / "configs" / "accelerate" / engine)] if engine else []
    if (
        accelerator.distributed_type.value == "MULTI_CPU"
    ):  # where accelerate launch would run one process, without a word
        launcher = ["ACCELERATE_USE_CPU=true", "torchrun", f"--nproc_per_node={accelerator.num_processes}"]
    return shlex.join([*launcher, *words])


def from_here(path):
    """A path as one would type it in the current folder."""
    whole = Path(path).absolute()
    return str(whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole)


def without_token(words):
    """Arguments of a command, but for --hub_token and its value, however argparse lets one write them."""
    flags = [word.partition("=")[0] for word in words]
    gone = {i for i, flag in enumerate(flags) if len(flag) > len("--hub_") and "--hub_token".startswith(flag)}
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


SHAPED_BY = ("rank", "lora_alpha", "lora_targets", "use_dora", "max_objects", "enhancer")  # must agree on resuming
BELONGS_TO = (
    "pretrained_model_name_or_path", "pretrain_unet", "base_folder", "folder_weights", "fps", "source_fps",
    "motion_bucket_id", "buckets", "image_ratio", "validation_ratio", "validation_folder",
    "validation_clips", "validation_seed", "width", "height", "P_mean", "P_std",
)  # fmt: skip


def compare_args(args):
    """Before resuming: raise where what trains has another shape than in the run in --output_dir, warn where it was told
    something else of what it learns."""
    file = Path(args.output_dir, "args.json")
    before = json.loads(file.read_text()) if file.exists() else {}
    for name in SHAPED_BY + BELONGS_TO:
        old, new = before.get(name), getattr(args, name, None)
        if name in before and str(old) != str(new):
            if name in SHAPED_BY:
                raise ValueError(
                    f"--{name} {new}: the run in {args.output_dir} has {old}; pass that, or another --output_dir"
                )
            logger.warning("--%s was %s in the run that this one goes on from, now it is %s", name, old, new)


# ---------------------------------------------------------------------------------------------------- metrics, signals


@contextlib.contextmanager
def averaged(ema, parameters):
    """Moving averages in the parameters' place, where there are any."""
    if ema:
        ema.store(parameters)
        ema.copy_to(parameters)
    yield
    if ema:
        ema.restore(parameters)


def rows_of(file):
    """Of a file of JSON lines those that are whole; none where it is not there."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def as_rows(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_row(file, row):
    """Add a row to a file of JSON lines, in place of what an earlier start said of the same step."""
    kept = [old for old in rows_of(file) if old["step"] != row["step"]]
    write_whole(file, as_rows(sorted([*kept, row], key=lambda one: one["step"])))


class Metrics:
    """<output_dir>/metrics.jsonl, one row a step; a resumed run drops the rows past its checkpoint, those of validations, too."""

    def __init__(self, output_dir, step):
        self.file = Path(output_dir, "metrics.jsonl")
        for file in (self.file, self.file.with_name("held_out.jsonl"), self.file.with_name("motion.jsonl")):
            if file == self.file or file.exists():
                write_whole(file, as_rows(row for row in rows_of(file) if row["step"] <= step))

    def write(self, step, loss, lr, grad_norm, seconds, peak):
        grad_norm = grad_norm if math.isfinite(grad_norm) else None  # fp16, skipped; JSON knows no infinity
        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "s/step": round(seconds, 4)}
        if peak:
            row["peak_GiB"] = round(peak, 2)
        with writing(self.file.parent), self.file.open("a") as f:
            f.write(json.dumps(row) + "\n")
        return row


def to_device(batch, device):
    """Move a batch, tensors in nested dicts too, and bring frames from uint8 to [-1, 1]. `index` stays: to read it on a
    GPU would wait for the GPU."""
    from accelerate.utils import send_to_device

    moved = send_to_device({k: v for k, v in batch.items() if k != "index"}, device, non_blocking=True)
    return {**moved, "index": batch["index"], "pixel_values": moved["pixel_values"].float() / 127.5 - 1}


def check_step(step, loss, grad_norm, skipped, lr, saved):
    """Stop a run whose loss or gradient is not finite before it is saved; `skipped`: fp16's scaler saw to the gradient."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value) and not (skipped and name == "gradient norm"):
            raise FloatingPointError(
                f"step {step}: the {name} is {value} at learning rate {lr:g}. Lower --learning_rate, raise "
                "--lr_warmup_steps, or pass --mixed_precision bf16 or no. The checkpoint of step "
                f"{saved} is whole; the same command resumes there, with the new rate."
            )


def check_reading(failed, samples):
    """Stop a run that cannot read more than 1 % of its samples."""
    if failed > max(2, 0.01 * samples):
        raise ValueError(
            f"--base_folder: {failed:.0f} of {samples} clips cannot be read, over 1 %; the warnings name those of the main process. "
            "Run prepare_data.py check on the folder: it reads every frame, and what it finds damaged is left out from then on"
        )


class Signals:
    """SIGTERM and Ctrl-C end the run after the step in flight; a second Ctrl-C at once."""

    def __enter__(self):
        self.caught, self.before = False, {}
        atexit.register(end_workers)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self.catch)
        return self

    def catch(self, number, frame):
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = True
        logger.warning("%s: will save a checkpoint after this step and stop", signal.Signals(number).name)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_signals(worker_id):
    """For loader workers: a Ctrl-C or SIGTERM meant for the run reaches them too, and must not take the batch along."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """When Python ends: where an error, or a cycle of frames, has kept the loader until then, Python would wait without end for its
    workers, which ignore the signal that it sends them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take it for a failure of theirs
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# ------------------------------------------------------------------------------------------------ validation, trackers


def settle_validation(args, data, held=None):
    """Choose the picture to animate where none is given, of the clips held out or of all, and into args.validation what each is told
    (`fps`, `motion_bucket_id`), and of those that are frames of a `clip` how it goes on: the numbers of its `frames`, and their `motion`."""
    args.validation = []
    if not args.validation_steps:
        return
    if not args.validation_image:
        first = (held or data)[0]
        args.validation_image = [str(first.path / first.files[0] if first.files else first.path)]
    named = {}
    for path in args.validation_image:
        other = named.setdefault(video.clip_name(path), path)
        if other != path:
            raise ValueError(
                f"--validation_image {path}: its videos would have the names of {other}'s; rename its folder, or it"
            )
    fps = folders.SOURCE_FPS if args.fps == "native" else args.fps
    roots = [*args.base_folder, *(args.validation_folder or [])]
    for path in args.validation_image:
        told = {"fps": fps, "clip": None, "frames": None, "motion": None}
        clip, start = clips.continuation(path, roots, data.source_fps) or (None, 0)
        if clip is not None:
            told.update(clip=str(clip.path), fps=clip.rate if args.fps == "native" else min(clip.rate, args.fps))
            numbers = (start + np.arange(args.num_frames) * clip.rate / told["fps"]).round().astype(int).tolist()
            told.update(
                frames=numbers, motion=true_motion(clip, start, args, told["fps"]) if numbers[-1] < len(clip) else None
            )
        own = {} if clip is None else clip.told
        automatic = own.get("motion_bucket_id", data.bucket_of(told["motion"]))
        told["motion_bucket_id"] = float(automatic if args.motion_bucket_id == "auto" else args.motion_bucket_id)
        args.validation.append(told)


def true_motion(clip, start, args, fps):
    """motion.score of a clip from a frame on, as a validation renders it; None where it cannot be read."""
    try:
        frames = clip.read(clip.numbers(start, args.num_frames, fps), args.width, args.height, args.resize_mode)
        return motion.score(frames, 1 / fps)
    except ValueError as error:
        logger.warning("%s; how much moves in it is not known", error)


def log_validation(accelerator, args, step, rendered, held=None):
    """Measure how much moves in the clips of a validation, and hand them to the trackers as videos. rendered: [(name, image, frames)];
    held: HeldOut.compare's answer."""
    if held:
        write_row(Path(args.output_dir, "held_out.jsonl"), held[0])
        accelerator.log(held[1], step=step)
    rows = []
    for told, (name, _, frames) in zip(args.validation, rendered):
        # where boxes are in view beside it the clean picture is on the left
        width, height = round(frames[0].height * args.width / args.height), frames[0].height
        clean = [frame.crop((0, 0, width, height)) for frame in frames]
        rows.append((name, motion.score(clean, 1 / told["fps"]), told["motion"]))
    if rows:
        row, shown = motion.compare(step, rows)
        write_row(Path(args.output_dir, "motion.jsonl"), row)
        accelerator.log(shown, step=step)
    folder = Path(args.output_dir, "validation")
    log_videos(accelerator, step, {f"validation/{name}": folder / f"step{step:06d}_{name}" for name, *_ in rendered})


def log_videos(accelerator, step, stems):
    """Hand what video.write_clip wrote to the trackers, as videos. stems: {tag: path without its suffix}."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            videos = {tag: wandb.Video(f"{stem}.mp4", caption=stem.name) for tag, stem in stems.items()}
            tracker.log(videos, step=step)
        elif tracker.name == "tensorboard":
            for tag, stem in stems.items():
                # not add_image or add_video, which encode anew: a picture that stands still, or with moviepy
                tracker.writer.file_writer.add_summary(gif_summary(tag, f"{stem}.gif"), step)
            tracker.writer.flush()


def gif_summary(tag, file):
    """A gif as tensorboard's images, among which it plays."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(file) as gif:
        width, height = gif.size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=Path(file).read_bytes())
    return Summary(value=[Summary.Value(tag=tag, image=image)])


if __name__ == "__main__":  # for the .sh files: the precision, or what is wrong with the machine
    import torch

    smi = shutil.which("nvidia-smi")
    if smi and not torch.cuda.is_available() and b"GPU" in subprocess.run([smi, "-L"], capture_output=True).stdout:
        sys.exit("nvidia-smi sees a GPU and torch does not: install a torch that fits the driver, see pytorch.org")
    print(best_precision())
