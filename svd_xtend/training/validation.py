"""Choose what a validation renders, and log what it rendered.

args = choose_validation_inputs(args, training_set, validation_set)
for validation_input in args.validation: ...            # image, fps, motion_bucket_id
log_validation(accelerator, args, step, clips, comparison)
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from svd_xtend.data import folder_index, images, motion
from svd_xtend.data.clip import Clip, find_continuation
from svd_xtend.data.sampler import ClipCollection
from svd_xtend.training.flag_types import replace_args
from svd_xtend.training.run_record import write_row
from svd_xtend.training.trackers import log_videos

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

logger = logging.getLogger("svd_xtend")


@dataclass(frozen=True)
class ValidationInput:
    """A picture to animate, and the conditioning that it is animated with.

    clip, frames, motion: if the picture is a frame of a video, the path of that video, the frames of
    the ground truth (None if the clip cannot be compared), and their motion score.
    """

    image: str
    fps: float
    motion_bucket_id: float
    clip: str | None = None
    frames: list[int] | None = None
    motion: float | None = None


@dataclass(frozen=True)
class RenderedClip:
    """An animated validation image: its name, the image, and the frames of the clip."""

    name: str
    first_frame: Image.Image
    frames: list[Image.Image]


def choose_validation_inputs(
    args: argparse.Namespace, training_set, validation_set=None
) -> argparse.Namespace:
    """Return the flags with `validation`, a ValidationInput for each --validation_image.

    Without --validation_image the first clip of the validation set is animated, or of the training
    set if there is no validation set. Raise ValueError if two images would write the same files.
    """
    if not args.validation_steps:
        return replace_args(args, validation=[])
    paths = args.validation_image
    if not paths:
        first = (validation_set or training_set).clips[0]
        paths = [str(first.path / first.files[0] if first.files else first.path)]
    check_distinct_names(paths)
    folders = [*args.base_folder, *(args.validation_folder or [])]
    inputs = [describe_input(path, folders, training_set.clips, args) for path in paths]
    return replace_args(args, validation_image=paths, validation=inputs)


def check_distinct_names(paths: list[str]) -> None:
    """Raise ValueError if the clips of two validation images would have the same file name."""
    path_of_name: dict[str, str] = {}
    for path in paths:
        other = path_of_name.setdefault(images.clip_name(path), path)
        if other != path:
            raise ValueError(
                f"--validation_image {path}: its clips would be written under the same name as those "
                f"of {other}. Rename the file or its folder."
            )


def describe_input(
    path: str, folders: list[str], training_clips: ClipCollection, args: argparse.Namespace
) -> ValidationInput:
    """Return a validation image with its conditioning, which is that of its video if it has one."""
    fps = folder_index.DEFAULT_SOURCE_FPS if args.fps == "native" else args.fps
    clip, start = find_continuation(path, folders, training_clips.source_fps) or (None, 0)
    frames = None
    true_motion = None
    metadata = {}
    if clip is not None:
        metadata = clip.metadata
        fps = clip.rate if args.fps == "native" else min(clip.rate, args.fps)
        times = start + np.arange(args.num_frames) * clip.rate / fps
        frames = times.round().astype(int).tolist()
        if frames[-1] < len(clip):
            true_motion = ground_truth_motion(clip, start, args, fps)
    motion_bucket_id = args.motion_bucket_id
    if motion_bucket_id == "auto":
        by_motion = training_clips.motion_bucket_of(true_motion)
        motion_bucket_id = metadata.get("motion_bucket_id", by_motion)
    return ValidationInput(
        image=str(path),
        fps=fps,
        motion_bucket_id=float(motion_bucket_id),
        clip=None if clip is None else str(clip.path),
        frames=frames,
        motion=true_motion,
    )


def ground_truth_motion(
    clip: Clip, start: int, args: argparse.Namespace, fps: float
) -> float | None:
    """Return the motion score of a clip from frame `start` on, or None if it cannot be read."""
    try:
        frame_indices = clip.frame_indices(start, args.num_frames, fps)
        frames = clip.read(frame_indices, args.width, args.height, args.resize_mode)
    except ValueError as error:
        logger.warning("%s; its motion is unknown", error)
        return None
    return motion.motion_score(frames, 1 / fps)


def log_validation(
    accelerator: Accelerator,
    args: argparse.Namespace,
    step: int,
    clips: list[RenderedClip],
    comparison: tuple[dict, dict[str, float]] | None = None,
) -> None:
    """Write validation loss and motion of a validation to the run's folder, and to the trackers.

    comparison: what ValidationLoss.compare returns.
    """
    if comparison:
        row, curves = comparison
        write_row(Path(args.output_dir, "held_out.jsonl"), row)
        accelerator.log(curves, step=step)
    motions = []
    for validation_input, clip in zip(args.validation, clips):
        score = motion.motion_score(clean_frames(clip, args), 1 / validation_input.fps)
        motions.append((clip.name, score, validation_input.motion))
    if motions:
        row, curves = motion.compare_motion(step, motions)
        write_row(Path(args.output_dir, "motion.jsonl"), row)
        accelerator.log(curves, step=step)
    folder = Path(args.output_dir, "validation")
    videos = {f"validation/{clip.name}": folder / f"step{step:06d}_{clip.name}" for clip in clips}
    log_videos(accelerator, step, videos)


def clean_frames(clip: RenderedClip, args: argparse.Namespace) -> list[Image.Image]:
    """Return the frames without the copy that shows the boxes, which stands to their right."""
    height = clip.frames[0].height
    width = round(height * args.width / args.height)
    return [frame.crop((0, 0, width, height)) for frame in clip.frames]
