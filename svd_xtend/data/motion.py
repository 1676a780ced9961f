"""Measure how much moves in a clip, and derive its motion_bucket_id.

    score = motion_score(frames, 1 / fps)     # frame lengths per second, by optical flow
    bucket_ids = motion_buckets(scores)       # 1 to 255 by rank; the median of a data set gets 128

The score is the mean speed of the fastest 5 % of the pixels, so that a bird that crosses an
unmoving sky counts as motion. A score of 1 means the longer side of the picture in one second. The
measure behind SVD's own motion_bucket_id was never published.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

logger = logging.getLogger("svd_xtend")

# Flow is computed on small frames, whose longer side has this many pixels: fast, and without grain.
FLOW_SIDE = 128
MIN_FLOW_SIDE = 16  # pixels; optical flow needs some
FASTEST_DIVISOR = 20  # one in so many pixels, the fastest ones, counts
MAX_PAIRS = 8  # pairs of frames that are compared in a clip
MAX_PLACES = 4  # places of a long clip from which the pairs are taken
PAIR_INTERVAL = 1 / 8  # seconds between the frames of a pair, about
COLLAPSE_RATIO = 1 / 3  # of the ground truth's motion, below which motion has collapsed
BLUE = "#5584e6"
ORANGE = "#e2702c"


# ----------------------------------------------------------------------------------------- scores


def shrink_frame(frame: np.ndarray) -> np.ndarray:
    """Resize a frame (h, w, 3) uint8 so that its longer side has FLOW_SIDE pixels."""
    import cv2

    height, width = frame.shape[:2]
    scale = FLOW_SIDE / max(height, width)
    small_width = max(round(width * scale), MIN_FLOW_SIDE)
    small_height = max(round(height * scale), MIN_FLOW_SIDE)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(frame, (small_width, small_height), interpolation=interpolation)


def fastest_motion(before: np.ndarray, after: np.ndarray) -> float:
    """Return how far the fastest 5 % of the pixels move between two grey frames (h, w) uint8.

    The unit is the longer side of the picture. Optical flow: Kroeger et al. 2016, as implemented in
    OpenCV.
    """
    import cv2

    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    flow = estimator.calc(before, after, None)  # type: ignore[call-overload]
    distances = np.linalg.norm(flow, axis=-1).ravel()
    count = max(len(distances) // FASTEST_DIVISOR, 1)
    fastest = np.partition(distances, -count)[-count:]
    return float(fastest.mean() / max(before.shape))


def motion_score(frames: Iterable[np.ndarray | Image.Image], frame_interval: float) -> float:
    """Return the motion of a clip in frame lengths per second.

    frames: (h, w, 3) uint8 arrays or PIL images of one size. frame_interval: seconds from one frame
    to the next. A single frame has no motion.
    """
    import cv2

    grey_frames = []
    for frame in frames:
        small = shrink_frame(np.asarray(frame))
        grey_frames.append(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY))
    if len(grey_frames) < 2:
        return 0.0
    distances = [
        fastest_motion(before, after) for before, after in zip(grey_frames, grey_frames[1:])
    ]
    return float(np.mean(distances)) / frame_interval


def select_frame_runs(
    num_frames: int, rate: float, keyframes: ArrayLike = (0,)
) -> list[np.ndarray]:
    """Select the frames of a clip that are compared: runs of frame indices, evenly spaced in a run.

    rate: frames per second. A short clip gives one run over all of it. A long clip gives runs from
    up to MAX_PLACES places, each beginning at a keyframe so that few other frames must be decoded;
    without keyframes, the places are spread evenly.
    """
    step = min(max(round(rate * PAIR_INTERVAL), 1), max(num_frames - 1, 1))
    if num_frames <= MAX_PAIRS * step + 1:
        return [np.arange(0, num_frames, step)]
    pairs_per_run = MAX_PAIRS // MAX_PLACES
    last_start = num_frames - 1 - pairs_per_run * step
    starts = np.linspace(0, last_start, MAX_PLACES).round().astype(int)
    usable = np.asarray(keyframes)
    usable = usable[usable <= starts[-1]]
    if len(usable):
        starts = usable[np.searchsorted(usable, starts, side="right") - 1]
    return [start + step * np.arange(pairs_per_run + 1) for start in np.unique(starts)]


def clip_motion_score(
    read_frames: Callable[[np.ndarray], Iterable[np.ndarray]],
    num_frames: int,
    rate: float,
    keyframes: ArrayLike = (0,),
) -> float:
    """Return the motion score of a clip, from the frames that `select_frame_runs` selects.

    read_frames(frame_indices): yields these frames, (h, w, 3) uint8. rate: frames per second.
    """
    scores = []
    for run in select_frame_runs(num_frames, rate, keyframes):
        if len(run) > 1:
            frame_interval = (run[1] - run[0]) / rate
            scores.append(motion_score(read_frames(run), frame_interval))
    if not scores:
        return 0.0
    return float(np.mean(scores))


def motion_buckets(scores: ArrayLike) -> np.ndarray:
    """Return the motion_bucket_id of each score, 1 to 255 by its rank; equal scores share a mean
    rank."""
    scores = np.asarray(scores, np.float64)
    ordered = np.sort(scores)
    num_below = np.searchsorted(ordered, scores)
    num_up_to = np.searchsorted(ordered, scores, side="right")
    rank = (num_below + num_up_to) / 2
    return 1 + 254 * rank / max(len(scores), 1)


# ------------------------------------------------------------------------------------------ plots


def draw_motion_histogram(axes: Axes, scores: ArrayLike) -> None:
    """Draw the distribution of motion scores, and the bucket that each score gets, into a plot."""
    scores = np.asarray(scores, np.float64)
    num_bins = min(60, max(10, len(scores) // 5))
    axes.hist(scores, bins=num_bins, color=BLUE)
    axes.set(xlabel="motion, frame lengths per second", ylabel="clips")
    bucket_axes = axes.twinx()
    order = np.argsort(scores)
    bucket_axes.plot(scores[order], motion_buckets(scores)[order], color=ORANGE, lw=2)
    bucket_axes.set_ylabel("motion_bucket_id", color=ORANGE)
    bucket_axes.set(ylim=(0, 256), yticks=[1, 64, 128, 192, 255])


def plot_motion(file: str | os.PathLike, scores: ArrayLike, title: str) -> None:
    """Write a picture of the distribution of motion scores."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3.2), layout="constrained")
    axes = figure.add_subplot(title=title)
    draw_motion_histogram(axes, scores)
    figure.savefig(file, dpi=110)


# ------------------------------------------------------------------------------------- validation


def compare_motion(
    step: int, rows: Sequence[tuple[str, float, float | None]]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Compare the motion of rendered validation clips with the ground truth.

    rows: (name, motion of the rendered clip, motion of the ground truth or None) of each clip, in
    frame lengths per second. Warns if the rendered clips move less than COLLAPSE_RATIO of the
    ground truth.

    Returns the row for <output_dir>/motion.jsonl, and the means to log.
    """
    means = {"motion": float(np.mean([rendered for _, rendered, _ in rows]))}
    clips = {name: {"motion": rendered, "motion_truth": true} for name, rendered, true in rows}
    compared = [(rendered, true) for _, rendered, true in rows if true is not None]
    if compared:
        rendered_motions = [rendered for rendered, _ in compared]
        true_motions = [true for _, true in compared]
        means["motion_truth"] = float(np.mean(true_motions))
        if sum(rendered_motions) < COLLAPSE_RATIO * sum(true_motions):
            logger.warning(
                "step %d: motion collapses: the rendered clips move %.3g frame lengths per "
                "second, the ground truth %.3g. Look at the clips. Lower --learning_rate, and "
                "check fps and motion_bucket_id of the data with prepare_data.py check.",
                step,
                np.mean(rendered_motions),
                means["motion_truth"],
            )
    return {"step": step, **means, "clips": clips}, means
