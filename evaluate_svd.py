"""Evaluate a fine-tuned SVD beside its base model on a validation set, or check that training agrees with inference.

    python evaluate_svd.py --tuned outputs/lora      # with the validation set, size and precision of that run
    python evaluate_svd.py --parity                  # compare the trainer with the stock pipeline, tensor by tensor

    python evaluate_svd.py --tuned outputs/svd/checkpoint-1000 --ema --validation_folder data/validation
    python evaluate_svd.py --tuned outputs/tracklet/stage3 --protocol ctrl-v --validation_folder data/kitti_test
    python evaluate_svd.py --parity --pretrained_model_name_or_path /path/to/weight

--tuned takes what any trainer writes: a full SVD, a LoRA, box control, or a checkpoint of one of these. It
writes evaluation.json, plots and a comparison of the videos into --output_dir, and prints a table. With
`accelerate launch`, several processes share the clips.

Run --parity first for a base model or a version of diffusers that you have not used before.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import train_svd
import train_svd_tracklet
from svd_xtend.data import images, split, tracklets
from svd_xtend.data.clip import Clip
from svd_xtend.demo import synthetic_clips
from svd_xtend.evaluation import metrics, parity, report
from svd_xtend.inference import video_writer
from svd_xtend.inference.pipeline import load_checkpoint
from svd_xtend.models import loading, precision, unet_optimizations
from svd_xtend.models.lora import LORA_FILE, load_lora
from svd_xtend.training import checkpoints, distributed, flag_types, run_record, validation_loss

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from diffusers import StableVideoDiffusionPipeline
    from PIL import Image
    from torch import Tensor, nn

    from svd_xtend.data.tracklets import Tracklets

logger = logging.getLogger("svd_xtend")


@dataclass(frozen=True)
class Protocol:
    """A published evaluation."""

    options: dict[str, Any]  # flags
    comparison_size: tuple[int, int]  # (width, height) at which frames are compared; frame 0 counts


PROTOCOLS = {
    "ctrl-v": Protocol(  # arXiv 2406.05630
        options={
            "num_clips": 200,
            "num_frames": 25,
            "width": 512,
            "height": 320,
            "num_inference_steps": 30,
            "fps": 7.0,
            "motion_bucket_id": 127.0,
            "buckets": False,
        },
        comparison_size=(410, 256),
    )
}
PARITY_SIZE = {"width": 128, "height": 64}  # pixels; parity does not depend on the size
# Evaluate clips and boxes unchanged, unless the run says otherwise.
NO_BOX_AUGMENTATION = {"draw_boxes": "no", "soft_boxes": 0.0, "box_dropout": 0.0}
NUM_COMPARISON_CLIPS = 4  # rows of comparison.gif
MIN_FRAMES = 2  # frame 0 is given


# ------------------------------------------------------------------------------------------------------------ options


def resolve_args(flags: argparse.Namespace) -> argparse.Namespace:
    """Return all options of the evaluation, those of a trainer included.

    Each of these overrides the ones before it: the trainers' defaults, the flags of the run that wrote
    --tuned, --protocol, the command line.

    Raises:
        ValueError: an option has an impossible value, or a path does not exist.
    """
    if flags.tuned and not Path(flags.tuned).exists():
        raise ValueError(f"--tuned {flags.tuned}: no such file or folder")
    run = read_run_args(flags.tuned)
    options = merge_options(flags, run)
    options["box_control"] = has_box_control(flags.tuned, run)
    options["mixed_precision"] = choose_precision(flags.mixed_precision, run.get("mixed_precision"))
    P_mean, P_std = train_svd.default_P(options["width"], options["height"])
    if options["P_mean"] is None:
        options["P_mean"] = P_mean
    if options["P_std"] is None:
        options["P_std"] = P_std
    options |= choose_clip_options(options, flags, run)
    if not flags.output_dir:
        options["output_dir"] = str(default_output_dir(flags.tuned, flags.ema))
    args = argparse.Namespace(**options)
    check_args(args)
    return args


def read_run_args(tuned: str | None) -> dict[str, Any]:
    """Return the flags of the run that wrote --tuned, an output folder, a file or a checkpoint in it.

    Returns {} without --tuned, or if there is no args.json. Raises ValueError if it is damaged.
    """
    if not tuned:
        return {}
    for folder in (Path(tuned), Path(tuned).absolute().parent):
        file = folder / "args.json"
        if file.is_file():
            try:
                return dict(json.loads(file.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"--tuned {tuned}: {file} is damaged ({error})") from error
    return {}


def merge_options(flags: argparse.Namespace, run: dict[str, Any]) -> dict[str, Any]:
    """Merge the trainers' defaults, a run's flags, the protocol and the command line, in this order."""
    options = vars(train_svd_tracklet.script_parser().parse_args([])) | NO_BOX_AUGMENTATION
    for name, value in run.items():
        if name not in ("output_dir", "validation_image"):
            options[name] = value
    options["num_clips"] = options["validation_clips"]
    if flags.protocol:
        options |= PROTOCOLS[flags.protocol].options
    elif flags.parity:
        options |= PARITY_SIZE
    for name, value in vars(flags).items():
        if value is not None or name not in options:
            options[name] = value
    return options


def has_box_control(tuned: str | None, run: dict[str, Any]) -> bool:
    """Return whether --tuned was trained by train_svd_tracklet.py, the only trainer with --stage."""
    if "stage" in run:
        return True
    return tuned is not None and Path(tuned, loading.BOX_CONTROL_FILE).is_file()


def choose_precision(requested: str | None, trained: str | None) -> str:
    """Return the requested precision, or that of the run if this machine has it, or the best it has.

    Raises ValueError if this machine does not have the requested one.
    """
    if requested:
        return precision.check_precision(requested)
    try:
        return precision.check_precision(trained or precision.best_precision())
    except ValueError:
        return precision.best_precision()


def choose_clip_options(
    options: dict[str, Any], flags: argparse.Namespace, run: dict[str, Any]
) -> dict[str, Any]:
    """Return the options that decide which clips are evaluated, and which training clips they are compared with.

    The training clips are needed to exclude them from the validation set, and to rank its motion as the
    run did. If they are unknown or deleted, the validation set is ranked by itself.
    """
    chosen: dict[str, Any] = {
        "validation_clips": options["num_clips"],
        "validation_steps": 1,  # anything but 0: there is a validation set
        "trained_with": (run.get("num_frames"), run.get("fps")),
        # what a run does to its training clips does not concern the validation set
        "latent_cache": None,
        "folder_weights": None,
        "image_ratio": 0.0,
        "per_gpu_batch_size": 1,
    }
    if flags.validation_folder:
        chosen["validation_ratio"] = 0.0
    missing = [folder for folder in options["base_folder"] if not Path(folder).is_dir()]
    if options["validation_folder"] and (missing or not run):
        chosen["base_folder"] = options["validation_folder"]
        chosen["trained_with"] = (None, None)
        if missing and run and options["motion_bucket_id"] == "auto":
            logger.warning(
                "--base_folder %s of the run does not exist: motion_bucket_id is the rank of a clip's "
                "motion in the validation set, not among the training clips",
                missing[0],
            )
    return chosen


def default_output_dir(tuned: str | None, ema: bool) -> Path:
    """Return evaluation/ in the folder of the run, where report.html finds it.

    The evaluation of a checkpoint goes into a folder of its own, evaluation/checkpoint-1000 or
    evaluation/checkpoint-1000-ema, that --checkpoints_total_limit does not delete.
    """
    folder = Path(tuned or "outputs")
    if (folder / checkpoints.TRAINED_FILE).is_file():
        name = folder.absolute().name
        if ema:
            name += "-ema"
        return folder.absolute().parent / "evaluation" / name
    if folder.is_file():
        folder = folder.parent
    return folder / "evaluation"


def read_trained_step(tuned: str | None) -> int | None:
    """Return the number of optimizer steps of a checkpoint or of a finished run; None if unknown."""
    if not tuned:
        return None
    if Path(tuned, checkpoints.TRAINED_FILE).is_file():
        return checkpoints.read_progress(tuned)["step"]
    rows = run_record.read_rows(Path(tuned, "metrics.jsonl"))
    return rows[-1]["step"] if rows else None


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError if options do not fit together, or a folder of clips does not exist."""
    if args.num_frames is not None and args.num_frames < MIN_FRAMES:
        raise ValueError(
            f"--num_frames {args.num_frames}: expected {MIN_FRAMES} or more, since frame 0 is given"
        )
    if args.ema and not Path(args.tuned or "", checkpoints.TRAINED_FILE).is_file():
        raise ValueError(
            "--ema: only checkpoints have EMA weights; pass --tuned .../checkpoint-..."
        )
    if args.parity:
        return
    if not args.validation_folder and not args.validation_ratio:
        raise ValueError("--validation_folder: pass a folder of clips that were not trained on")
    for folder in args.validation_folder or args.base_folder:
        if Path(folder).is_dir():
            continue
        message = f"--validation_folder {folder}: no such folder"
        if not args.validation_folder:
            message += f"; the validation set of --tuned {args.tuned} is a part of it"
        raise ValueError(f"{message}. Pass a folder of clips that were not trained on")


# ------------------------------------------------------------------------------------------------------------- models


def load_model(
    args: argparse.Namespace, tuned: bool, device: torch.device
) -> tuple[StableVideoDiffusionPipeline, nn.Module]:
    """Load the base model, or the tuned model, in the precision of the evaluation.

    Returns (pipeline, model). The model is the pipeline's UNet, or a ControlledUNet around it.
    """
    import torch

    is_full_export = tuned and Path(args.tuned, "unet").is_dir()
    unet_path = args.tuned if is_full_export else args.pretrain_unet
    pipe = loading.load_svd(
        args.pretrained_model_name_or_path, torch.float32, args.revision, unet_path
    )
    unet_optimizations.speed_up(pipe.unet)
    model = pipe.unet
    if tuned and not is_full_export:
        model = load_tuned_weights(pipe.unet, args)
    model.requires_grad_(False)
    loading.move_models(pipe, model, args.mixed_precision, device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, model


def load_tuned_weights(unet: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Load --tuned, anything but a full export, into the base model's `unet`.

    Returns `unet`, or a ControlledUNet around it if --tuned is box control. Raises ValueError if the
    folder holds no weights.
    """
    folder = Path(args.tuned)
    is_checkpoint = (folder / checkpoints.TRAINED_FILE).is_file()
    model = unet
    if args.box_control:
        from svd_xtend.models.box_control import ControlledUNet, load_box_control, new_box_control

        if args.lora:
            load_lora(unet, args.lora)
        if not is_checkpoint:
            return ControlledUNet(unet, load_box_control(unet, folder))
        adapter = new_box_control(unet, args.max_objects, enhancer=args.enhancer)
        model = ControlledUNet(unet, adapter)
    if is_checkpoint:
        load_checkpoint(model, folder, args.ema, flag="--tuned")
        return model
    if folder.suffix == ".safetensors" or (folder / LORA_FILE).is_file():
        load_lora(model, folder)
        return model
    message = f"--tuned {folder}: no trained weights in it"
    saved = sorted(folder.glob("checkpoint-*"), key=images.natural_key)
    if saved:
        message += f"; pass {saved[-1]}"
    else:
        message += f". Expected unet/, {LORA_FILE}, {loading.BOX_CONTROL_FILE}, or a checkpoint"
    raise ValueError(message)


# -------------------------------------------------------------------------------------------------------------- clips


def load_validation_set(args: argparse.Namespace, process: Any) -> Any:
    """Return the validation set, with boxes if there are any.

    Each clip has the motion bucket that it would have among the training clips.
    """
    make_dataset: Any = train_svd.DummyDataset
    if args.box_control or args.tracklets:
        make_dataset = partial(train_svd_tracklet.TrackletDataset, args=args)
    spec = train_svd.clip_spec(args)
    num_frames, fps = args.trained_with
    training_spec = replace(spec, num_frames=num_frames or spec.num_frames, fps=fps or spec.fps)
    with process.main_process_first():  # it lists the folders, the others read its list
        train_svd.ensure_demo(args.base_folder)
        training_set = train_svd.load_training_set(args, train_svd.DummyDataset, training_spec)
        validation_set = train_svd.load_validation_set(
            args,
            make_dataset,
            spec,
            training_set.clips,
            # without the training clips of the run, the validation folder stands in for them
            check_overlap=args.base_folder is not args.validation_folder,
        )
    distributed.check_same_on_all_processes("--validation_folder", validation_set.clips.digest())
    return validation_set


def choose_windows(data: Any, count: int) -> list[tuple[Clip, int]]:
    """Return up to `count` windows of a dataset to render: (clip, its first frame).

    The first window of each clip of the validation loss. If there are fewer clips than `count`, all
    windows that do not overlap, or `count` of them spread evenly.
    """
    windows = []
    if count <= len(data):
        for i in range(count):
            windows.append((data.clips[next(data.sampler.choices(i))], 0))
        return windows
    length = data.spec.num_frames
    for clip_index in range(len(data)):
        clip = data.clips[clip_index]
        fps = clip.metadata["fps"]
        start = 0
        while start < clip.num_starts(length, fps):
            windows.append((clip, start))
            last_frame = clip.frame_indices(start, length, fps)[-1]
            start = int(last_frame) + 1
    spread = np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)
    return [windows[i] for i in np.unique(spread)]


def find_boxes(
    data: Any, clip: Clip, frame_indices: np.ndarray, args: argparse.Namespace
) -> Tracklets | None:
    """Return the boxes of these frames as a training sample has them; None if the dataset has no boxes."""
    if not hasattr(data, "boxes_of"):
        return None
    boxes, picture_size = data.boxes_of(clip)
    width, height = clip.size or (args.width, args.height)
    return tracklets.fit_to_picture(
        boxes,
        picture_size,
        width,
        height,
        args.resize_mode,
        frame_indices,
        args.max_objects,
        args.min_box_size,
    )


# --------------------------------------------------------------------------------------------------------- measurement


@dataclass
class EvaluatedClip(metrics.ClipMetrics):
    """A clip of the validation set, rendered and measured."""

    clip_index: int  # among the windows; seeds its noise
    name: str
    fps: float
    boxes: Tracklets | None
    frames: dict[str, np.ndarray]  # {column: (f, h, w, 3) uint8} of clips in comparison.gif


def load_networks(
    num_frames: int, process: Accelerator
) -> tuple[dict[str, Callable[..., np.ndarray]], dict[str, str]]:
    """Load the pretrained networks of metrics.

    Returns ({metric: function}, {metric: how to get its network}): those that are installed, and those
    that are not. Prints the latter at once, because rendering may take hours.
    """
    loaders: dict[str, Callable] = {
        "lpips": metrics.load_lpips,
        "fvd": partial(metrics.load_i3d, num_frames),
    }
    networks = {}
    left_out = {}
    for name, load in loaders.items():
        try:
            networks[name] = load()
        except metrics.MissingNetwork as error:
            left_out[name] = str(error)
            if process.is_main_process:
                print(error, flush=True)
    return networks, left_out


def measure_clip(
    frames: np.ndarray,
    ground_truth: np.ndarray | None,
    fps: float,
    boxes: Tracklets | None,
    networks: dict[str, Callable[..., np.ndarray]],
    comparison_size: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Measure a clip (f, h, w, 3) uint8: (values by metric, features for FVD or None).

    ground_truth: the clip to compare with, or None to measure the ground truth itself.
    comparison_size: (width, height) at which a protocol compares frames. Its means include frame 0;
        otherwise frame 0 does not count, because it is given.
    """
    flows = metrics.optical_flows(frames)
    values: dict[str, Any] = metrics.temporal_metrics(frames, flows, fps)
    if boxes:
        values |= metrics.box_metrics(flows, boxes)
    if comparison_size:
        frames = resize_clip(frames, comparison_size)
        if ground_truth is not None:
            ground_truth = resize_clip(ground_truth, comparison_size)
    if ground_truth is not None:
        by_frame = metrics.frame_metrics(frames, ground_truth)
        if "lpips" in networks:
            by_frame["lpips"] = networks["lpips"](frames, ground_truth)
        first_counted = 0 if comparison_size else 1
        for name, frame_values in by_frame.items():
            values[name] = float(frame_values[first_counted:].mean())
        values["first_frame_psnr"] = float(by_frame["psnr"][0])
        values["psnr_by_frame"] = by_frame["psnr"].tolist()
    features = networks["fvd"](frames) if "fvd" in networks else None
    return values, features


def resize_clip(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a clip (f, h, w, 3) to (width, height), ignoring the aspect ratio."""
    width, height = size
    return np.stack([images.resize_frame(frame, width, height, "stretch") for frame in frames])


def render_clips(
    column: str,
    pipe: StableVideoDiffusionPipeline,
    model: Any,
    data: Any,
    args: argparse.Namespace,
    networks: dict[str, Callable[..., np.ndarray]],
    process: Accelerator,
) -> list[EvaluatedClip]:
    """Render and measure this process's share of the validation set with one model.

    column: "base" or "tuned". model: a UNet, or a ControlledUNet, which has an `adapter` for boxes. With the base model, the ground truth and the static baseline are measured
    as well. Clips that cannot be read are left out with a warning.
    """
    from PIL import Image

    comparison_size = PROTOCOLS[args.protocol].comparison_size if args.protocol else None
    windows = list(enumerate(choose_windows(data, args.num_clips)))
    share = windows[process.process_index :: process.num_processes]
    sample = with_progress_bar(train_svd.sample, len(share), f"{column}: clips", process)
    rendered = []
    for clip_index, (clip, start) in share:
        fps = clip.metadata["fps"]
        frame_indices = clip.frame_indices(start, args.num_frames, fps)
        try:
            width, height = clip.size or (args.width, args.height)
            ground_truth = clip.read(frame_indices, width, height, args.resize_mode)
            boxes = find_boxes(data, clip, frame_indices, args)
        except ValueError as error:
            logger.warning("%s; it is left out", error)
            continue
        if boxes is not None and hasattr(model, "adapter"):
            model.adapter.set(boxes.grow_soft_boxes())
        first_frame = Image.fromarray(ground_truth[0])
        seed = args.validation_seed + clip_index
        generated = sample(
            pipe,
            first_frame,
            args,
            fps=clip.metadata["fps"],
            motion_bucket_id=clip.metadata["motion_bucket_id"],
            seed=seed,
        )
        columns = {column: np.stack([np.asarray(frame) for frame in generated])}
        if column == "base":
            columns["truth"] = ground_truth
            columns["still"] = np.repeat(ground_truth[:1], len(ground_truth), 0)
        row = EvaluatedClip(
            source=split.source_video(clip.path),
            metrics={},
            features={},
            clip_index=clip_index,
            name=f"{clip.path} from frame {start}",
            fps=fps,
            boxes=boxes,
            frames=columns if clip_index < NUM_COMPARISON_CLIPS else {},
        )
        for name, frames in columns.items():
            reference = None if name == "truth" else ground_truth
            row.metrics[name], row.features[name] = measure_clip(
                frames, reference, fps, boxes, networks, comparison_size
            )
        rendered.append(row)
    return rendered


def with_progress_bar(
    function: Callable, total: int, description: str, process: Accelerator
) -> Callable:
    """Return `function` with a progress bar on the main process that counts its calls."""
    from tqdm import tqdm

    bar = tqdm(total=total, desc=description, disable=not process.is_main_process)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        bar.update()
        if bar.n == total:
            bar.close()
        return result

    return call


def make_validation_loss(
    data: Any, args: argparse.Namespace, pipe: Any, process: Any
) -> validation_loss.ValidationLoss:
    """Return the validation loss, under the loss that the run of --tuned was trained with."""
    recipe = train_svd.Recipe()
    if args.box_control:
        recipe = train_svd_tracklet.make_recipe(args)
    share = len(range(process.process_index, min(args.num_clips, len(data)), process.num_processes))
    return validation_loss.ValidationLoss(
        data,
        args,
        pipe,
        process,
        loss_at_sigma=train_svd.loss_at_sigma,
        add_encodings=with_progress_bar(
            train_svd.add_encodings, share, "validation clips", process
        ),
        prepare_batch=recipe.prepare_batch,
    )


def measure_losses(
    column: str, model: Any, losses: validation_loss.ValidationLoss, process: Any
) -> np.ndarray:
    """Return the losses (clips, sigmas) of a model. Only a model with box control gets the boxes."""

    def call(*inputs: Any, **control: Any) -> Any:
        return model(*inputs, **(control if hasattr(model, "adapter") else {}))

    count = len(losses.clip_indices) * len(losses.sigmas)
    return losses.losses(with_progress_bar(call, count, f"{column}: loss", process))


def evaluate_models(args: argparse.Namespace) -> None:
    """Measure the base model and --tuned on the validation set, and write the results."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import gather_object

    # a process may wait for hours until the others have rendered their clips
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    process = Accelerator(mixed_precision="no", kwargs_handlers=[patience])
    if process.num_processes > 1:
        distributed.fail_together(process.process_index)
    precision.set_tf32(args.allow_tf32, args.mixed_precision)
    if process.is_main_process:
        print(
            f"precision {args.mixed_precision}, {process.device}, "
            f"{process.num_processes} process(es)",
            flush=True,
        )
    data: Any = None
    validation: Any = None
    losses = {}
    clips: dict[int, EvaluatedClip] = {}
    # the tuned model first: if its weights do not load, the user learns it at once
    columns = ["tuned", "base"] if args.tuned else ["base"]
    for column in columns:
        pipe, model = load_model(args, column == "tuned", process.device)
        args.num_frames = args.num_frames or pipe.unet.config.num_frames
        if data is None:
            data = load_validation_set(args, process)
            networks, left_out = load_networks(args.num_frames, process)
        with run_record.output_errors(args.output_dir):
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        if validation is None:
            validation = make_validation_loss(data, args, pipe, process)
        validation.pipe = pipe
        losses[column] = measure_losses(column, model, validation, process)
        rendered = render_clips(column, pipe, model, data, args, networks, process)
        merge_columns(clips, gather_object(rendered))
        # free the memory before the next model is loaded
        validation.pipe = None
        del pipe, model
    if process.is_main_process:
        measured = []
        for clip_index in sorted(clips):
            if losses.keys() <= clips[clip_index].metrics.keys():
                measured.append(clips[clip_index])
        write_results(args, validation, losses, measured, left_out)
    process.end_training()


def merge_columns(clips: dict[int, EvaluatedClip], rendered: Iterable[EvaluatedClip]) -> None:
    """Add to each clip in `clips`, by index, the columns that were rendered of it."""
    for row in rendered:
        clip = clips.setdefault(row.clip_index, row)
        clip.metrics |= row.metrics
        clip.features |= row.features
        clip.frames |= row.frames


# ------------------------------------------------------------------------------------------------------------- results


def write_results(
    args: argparse.Namespace,
    validation: Any,
    losses: dict[str, np.ndarray],
    clips: list[EvaluatedClip],
    left_out: dict[str, str],
) -> None:
    """Write evaluation.json, figures.png, comparison.gif and comparison.png; print the table.

    validation: ValidationLoss. losses: {"base", "tuned"}, each (clips, noise levels). Raises ValueError if no clip could be read.
    """
    if not clips:
        folders = args.validation_folder or args.base_folder
        raise ValueError(f"--validation_folder {folders}: no clip can be read")
    out = Path(args.output_dir)
    table = metrics.summarize_metrics(clips)
    comparison = None
    if "tuned" in losses:
        comparison = validation_loss.compare_losses(
            validation.sigmas, losses["base"], losses["tuned"], validation.sources
        )
    deviations = deviations_from_protocol(args, len(clips))
    num_sources = len({clip.source for clip in clips})
    evaluation = {
        "base": args.pretrained_model_name_or_path,
        "tuned": args.tuned,
        "ema": args.ema,
        "protocol": args.protocol,
        "otherwise_than_protocol": deviations,
        "step": read_trained_step(args.tuned),
        "clips": len(clips),
        "films": num_sources,
        "num_frames": args.num_frames,
        "size": [args.width, args.height],
        "held_out": comparison,
        "base_loss": losses["base"].mean(0).tolist(),
        "sigma": validation.sigmas,
        "metrics": table,
        "left_out": left_out,
        "by_clip": [{"clip": clip.name, **clip.metrics} for clip in clips],
        "args": vars(args),
    }
    run_record.write_atomically(
        out / "evaluation.json", json.dumps(evaluation, indent=1, default=str)
    )
    count = validation_loss.count_in_words(len(clips), num_sources)
    summary = f"validation set: {count}, {args.num_frames} frames of {args.width}x{args.height}"
    model_name = Path(args.tuned or args.pretrained_model_name_or_path).name
    with run_record.output_errors(out):
        metrics.plot_metrics(out / "figures.png", comparison, clips, f"{model_name}, {summary}")
        videos = [comparison_videos(clip) for clip in clips if clip.frames]
        if videos:
            video_writer.write_comparison(out / "comparison", videos, clips[0].fps)
    is_evaluation_of_run = args.tuned and out.name == "evaluation"
    if is_evaluation_of_run and (out.parent / "report.html").is_file():
        report.write_report(out.parent)

    print(describe_protocol(args.protocol, deviations))
    print(summary)
    print(metrics.format_table(table))
    if comparison is None:
        print(f"\nvalidation loss {losses['base'].mean():.4g}")
    else:
        print(
            f"\nvalidation loss {validation_loss.format_comparison(comparison, 'the base model')}"
        )
    for message in left_out.values():
        print(message)
    print(f"wrote {out}/evaluation.json, figures.png, comparison.gif, comparison.png")


def deviations_from_protocol(args: argparse.Namespace, num_clips: int) -> dict[str, Any]:
    """Return the options of --protocol that were not kept, with the values used instead."""
    if not args.protocol:
        return {}
    used = {**vars(args), "num_clips": num_clips}
    deviations = {}
    for name, value in PROTOCOLS[args.protocol].options.items():
        if used[name] != value:
            deviations[name] = used[name]
    return deviations


def describe_protocol(protocol: str | None, deviations: dict[str, Any]) -> str:
    """Return a line that names the protocol and what deviates from it; an empty line without one."""
    if not protocol:
        return ""
    line = f"\nprotocol {protocol}"
    if deviations:
        line += ", but " + ", ".join(f"{name} {value}" for name, value in deviations.items())
    return line


def comparison_videos(clip: EvaluatedClip) -> dict[str, list[Image.Image]]:
    """Return {title: frames} of a clip for comparison.gif, with its boxes drawn in if it has some."""
    from PIL import Image

    videos = {}
    for column in ("base", "tuned", "truth"):
        if column not in clip.frames:
            continue
        frames = [Image.fromarray(frame) for frame in clip.frames[column]]
        if clip.boxes:
            frames = tracklets.render_boxes(frames, clip.boxes)
        videos[metrics.COLUMN_TITLES[column]] = frames
    return videos


# -------------------------------------------------------------------------------------------------------------- parity


def trainer_tensors(
    pipe: StableVideoDiffusionPipeline, batch: dict, sigma: float, args: argparse.Namespace
) -> dict[str, Tensor]:
    """Return the tensors of `parity.pipeline_tensors` as train_svd.training_loss makes them."""
    import torch

    calls = []

    def recording_unet(*inputs: Tensor) -> Any:
        output = pipe.unet(*inputs)
        calls.append((*inputs, output.sample))
        return output

    def loss_with_dropout(probability: float) -> Tensor:
        options = train_svd.LossOptions(
            seed=parity.SEED,
            P_mean=float(np.log(sigma)),
            P_std=0.0,
            dropout=(0.0, 0.0, probability),
            vae_encode_chunk=args.vae_encode_chunk,
        )
        noise: Any = parity.FixedNoise(pipe.device)
        with torch.no_grad():
            return train_svd.training_loss(recording_unet, pipe, batch, options, noise)

    loss = loss_with_dropout(0.0)
    loss_with_dropout(1.0)
    sample, c_noise, embeds, added_time_ids, F_x = calls[0]
    dropped_sample, _, dropped_embeds, _, dropped_F_x = calls[1]
    c_skip, c_out, c_in, _ = train_svd.scalings(torch.tensor(sigma))
    noisy_latents = sample[:, :, :4]
    guided = dropped_F_x + parity.GUIDANCE_SCALE * (F_x - dropped_F_x)
    denoised = c_skip / c_in * noisy_latents + c_out * guided
    return {
        "image_embeds": embeds[0],
        "image_latents": sample[0, :, 4:],
        "added_time_ids": added_time_ids[0],
        "dropped image_embeds": dropped_embeds[0],
        "dropped image_latents": dropped_sample[0, :, 4:],
        "c_noise": c_noise,
        "noisy_latents": noisy_latents[0],
        "F_x": F_x[0],
        "dropped F_x": dropped_F_x[0],
        "denoised": denoised[0],
        "loss": loss,
    }


def run_parity_check(args: argparse.Namespace) -> str | None:
    """Compare the trainer with the stock pipeline on one clip in float32, and print the result.

    Returns the name of the first tensor that differs, or None.
    """
    import diffusers
    import torch
    from tqdm import tqdm

    precision.set_tf32(False, "no")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = args.pretrained_model_name_or_path
    pipe = loading.load_svd(path, torch.float32, args.revision, args.pretrain_unet).to(device)
    pipe.set_progress_bar_config(disable=True)
    frames = synthetic_clips.make_clip(parity.SEED).frames
    num_frames = args.num_frames or pipe.unet.config.num_frames
    batch = parity.make_batch(frames, args.width, args.height, num_frames, device)
    # the trainer draws the strength of the noise on the first frame; the pipeline gets the same
    noise: Any = parity.FixedNoise(device)
    conditioning = train_svd.encode_conditioning(pipe, batch, noise)
    noise_aug_strength = conditioning.added_time_ids[0, 2].item()
    stock = []
    for sigma in tqdm(parity.SIGMAS, desc="pipeline"):
        loss_weight: Any = train_svd.loss_weight(sigma)
        stock.append(parity.pipeline_tensors(pipe, batch, sigma, noise_aug_strength, loss_weight))
    unet_optimizations.speed_up(pipe.unet)  # the trainers use the optimized UNet
    trainer = []
    for sigma in tqdm(parity.SIGMAS, desc="trainer"):
        trainer.append(trainer_tensors(pipe, batch, sigma, args))
    rows = parity.compare_tensors(stock, trainer)
    print(f"{path}, diffusers {diffusers.__version__}, torch {torch.__version__}, {device}\n")
    print(parity.format_parity_table(rows))
    return parity.first_difference(rows)


# --------------------------------------------------------------------------------------------------------------- flags


def build_parser() -> argparse.ArgumentParser:
    """Build the parser. Trainer's flags have no default here: the run's or the trainer's holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--tuned", metavar="PATH", help="--output_dir of a training run, a checkpoint in it, or a LoRA file; without it, only the base model is measured")
    parser.add_argument("--ema", action="store_true", help="use the EMA weights of the checkpoint")
    parser.add_argument("--parity", action="store_true", help="only compare the trainer with the stock pipeline and scheduler on one clip, tensor by tensor; exit status 1 if they differ")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="evaluate as published; ctrl-v (arXiv 2406.05630): 200 clips of 25 frames of 512x320, compared at 410x256, including frame 0. Flags on the command line override it, and the results say so")
    parser.add_argument("--num_clips", type=flag_types.positive_int, help="number of clips to render and measure; default: --validation_clips of the run, or 16")
    parser.add_argument("--output_dir", help="default: evaluation/ in --tuned, where report.html finds it; evaluation/checkpoint-1000 beside a checkpoint; outputs/evaluation without --tuned")
    g = parser.add_argument_group("as in training; default: the value of the run that wrote --tuned, else that of train_svd.py")
    g.add_argument("--pretrained_model_name_or_path", metavar="PATH", help="base model")
    g.add_argument("--revision", help="its revision on the Hub")
    g.add_argument("--validation_folder", nargs="+", metavar="FOLDER", help="clips that were not trained on")
    g.add_argument("--tracklets", help="annotation file, or a folder of them, to measure how well objects follow their boxes; default for box control: the annotations in the folders of the clips")
    g.add_argument("--width", type=flag_types.multiple_of_8, help="pixels, a multiple of 8")
    g.add_argument("--height", type=flag_types.multiple_of_8, help="pixels, a multiple of 8")
    g.add_argument("--num_frames", type=flag_types.positive_int, help="frames of a clip, 2 or more")
    g.add_argument("--fps", type=flag_types.number_or_word("native", flag_types.positive_float), help="frames per second at which clips are sampled, and which the model is conditioned on")
    g.add_argument("--source_fps", type=flag_types.positive_float, help="frames per second of frame folders without clip.json")
    g.add_argument("--motion_bucket_id", type=flag_types.number_or_word("auto"), help="auto: from the motion of each clip; or a number, 1 to 255")
    g.add_argument("--resize_mode", choices=["crop", "stretch"], help="crop: cover and crop the centre; stretch: ignore the aspect ratio")
    g.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of all models; default: that of the run if this machine has it, else the best it has")
    g.add_argument("--num_inference_steps", type=flag_types.positive_int, help="sampling steps")
    g.add_argument("--noise_aug_strength", type=float, help="noise on the first frame")
    g.add_argument("--decode_chunk_size", type=flag_types.positive_int, help="frames that the VAE decodes at once; lower it on out-of-memory")
    g.add_argument("--vae_encode_chunk", type=flag_types.positive_int, help="frames that the VAE encodes at once")
    g.add_argument("--validation_seed", type=int, help="seed of the noise in losses and clips; both models get the same noise")
    # fmt: on
    return parser


def name_own_flag(error: Exception, flags: argparse.Namespace) -> str:
    """Return an error's message under the flag of this script that the user passed.

    The modules that raise errors name the flag that a trainer or infer_svd.py has for the same path.
    """
    message = str(error)
    if isinstance(error, OSError) and error.filename:
        message = f"{error.filename}: {error.strerror}"
    flag, _, rest = message.partition(" ")
    own_paths = {"--tuned": [flags.tuned], "--validation_folder": flags.validation_folder or []}
    if not flag.startswith("--") or flag in own_paths:
        return message
    for name, paths in own_paths.items():
        if any(path and rest.startswith(path) for path in paths):
            return f"{name} {rest}"
    return message


def main(flags: argparse.Namespace) -> int:
    """Run the evaluation or the parity check; returns the exit status."""
    args = resolve_args(flags)
    if args.parity:
        return 0 if run_parity_check(args) is None else 1
    evaluate_models(args)
    return 0


if __name__ == "__main__":
    parser = build_parser()
    flags = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        sys.exit(main(flags))
    except (ValueError, OSError) as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise  # ends the other processes, too
        parser.exit(2, f"{name_own_flag(error, flags)}\n")
