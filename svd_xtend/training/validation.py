"""TODO training.validation."""

import logging
from pathlib import Path

import numpy as np

from svd_xtend.data import folder_index, images, motion
from svd_xtend.data.clip import find_continuation
from svd_xtend.training.run_record import write_row
from svd_xtend.training.trackers import log_videos

logger = logging.getLogger("svd_xtend")


# ------------------------------------------------------------------------------------------------ validation, trackers


def choose_validation_inputs(args, data, held=None):
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
        other = named.setdefault(images.clip_name(path), path)
        if other != path:
            raise ValueError(
                f"--validation_image {path}: its videos would have the names of {other}'s; rename its folder, or it"
            )
    fps = folder_index.DEFAULT_SOURCE_FPS if args.fps == "native" else args.fps
    roots = [*args.base_folder, *(args.validation_folder or [])]
    for path in args.validation_image:
        told = {"fps": fps, "clip": None, "frames": None, "motion": None}
        clip, start = find_continuation(path, roots, data.source_fps) or (None, 0)
        if clip is not None:
            told.update(
                clip=str(clip.path),
                fps=clip.rate if args.fps == "native" else min(clip.rate, args.fps),
            )
            numbers = (
                (start + np.arange(args.num_frames) * clip.rate / told["fps"])
                .round()
                .astype(int)
                .tolist()
            )
            told.update(
                frames=numbers,
                motion=ground_truth_motion(clip, start, args, told["fps"])
                if numbers[-1] < len(clip)
                else None,
            )
        own = {} if clip is None else clip.metadata
        automatic = own.get("motion_bucket_id", data.bucket_of(told["motion"]))
        told["motion_bucket_id"] = float(
            automatic if args.motion_bucket_id == "auto" else args.motion_bucket_id
        )
        args.validation.append(told)


def ground_truth_motion(clip, start, args, fps):
    """motion.score of a clip from a frame on, as a validation renders it; None where it cannot be read."""
    try:
        frames = clip.read(
            clip.frame_indices(start, args.num_frames, fps), args.width, args.height, args.resize_mode
        )
        return motion.motion_score(frames, 1 / fps)
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
        rows.append((name, motion.motion_score(clean, 1 / told["fps"]), told["motion"]))
    if rows:
        row, shown = motion.compare_motion(step, rows)
        write_row(Path(args.output_dir, "motion.jsonl"), row)
        accelerator.log(shown, step=step)
    folder = Path(args.output_dir, "validation")
    log_videos(
        accelerator,
        step,
        {f"validation/{name}": folder / f"step{step:06d}_{name}" for name, *_ in rendered},
    )
