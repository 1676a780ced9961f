"""Metrics of rendered clips: image quality, temporal consistency, motion, box control, FVD.

    quality = frame_metrics(generated, ground_truth)    # PSNR and SSIM of each frame, by torchmetrics
    flows = optical_flows(generated)
    temporal_metrics(generated, flows, fps=7)           # flicker, warp error, motion; need no ground truth
    box_metrics(flows, requested)                       # do objects follow their boxes?
    load_lpips(), load_i3d()                            # pretrained networks; raise MissingNetwork without weights
    summarize_metrics(clips)                            # a table over all clips, with confidence intervals

Clips are (f, h, w, 3) uint8. Frame 0 is given to the model, so evaluate_svd.py averages over the frames
after it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svd_xtend.data import motion
from svd_xtend.training import validation_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from svd_xtend.data.tracklets import Tracklets

ALEXNET = "alexnet-owt-7be5be79.pth"
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET}"
I3D = "i3d_torchscript.pt"
# the network that the evaluations of StyleGAN-V and Ctrl-V use
I3D_URL = f"https://www.dropbox.com/s/ge9e5ujwgetktms/{I3D}?dl=1"
I3D_SIDE = 224  # pixels; I3D takes squares
I3D_MIN_FRAMES = 9  # I3D halves the number of frames three times and then averages over two

MIN_FLOW_SIDE = (
    256  # pixels; smaller frames are enlarged before flow is computed, to see small objects
)
STATIC_SPEED = 0.5  # of those pixels from frame to frame; what moves less counts as static
MAX_PSNR = 100.0  # dB; the PSNR of equal frames would be infinite
BOX_SUCCESS_IOU = 0.5


@dataclass(frozen=True)
class Metric:
    """A metric's title, and which values of it are better: "higher", "lower", or near those of the "truth"."""

    label: str
    better: str


METRICS = {
    "psnr": Metric("PSNR, dB", "higher"),
    "ssim": Metric("SSIM", "higher"),
    "lpips": Metric("LPIPS", "lower"),
    "first_frame_psnr": Metric("PSNR of frame 0, dB", "higher"),
    "motion": Metric("motion, frame lengths per second", "truth"),
    "flicker": Metric("flicker of static pixels, of 255", "truth"),
    "warp_error": Metric("warp error, of 255", "truth"),
    "box_iou": Metric("boxes: mean IoU", "higher"),
    "box_success": Metric("boxes: IoU of at least 0.5", "higher"),
    "fvd": Metric("FVD", "lower"),
}

# What is measured, with its title and its colour in plots. The names are keys of evaluation.json.
COLUMNS = ("still", "base", "tuned", "truth")
COLUMN_TITLES = {
    "still": "static baseline",  # frame 0, repeated
    "base": "base model",
    "tuned": "tuned model",
    "truth": "ground truth",
}
COLORS = {"still": "#e0a72c", "base": "#8a8f98", "tuned": "#5584e6", "truth": "#e2702c"}


class MissingNetwork(Exception):
    """A metric's package or weights are not installed; the message says how to get them."""


def to_planes(frames: np.ndarray) -> Tensor:
    """Convert (f, h, w, 3) uint8 to (f, 3, h, w) float32 in [0, 1], on the GPU if there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(device)
    return pixels.permute(0, 3, 1, 2).float() / 255


def frame_metrics(generated: np.ndarray, ground_truth: np.ndarray) -> dict[str, np.ndarray]:
    """Return {"psnr": (f,), "ssim": (f,)} of each frame of two clips (f, h, w, 3) uint8.

    PSNR is in decibels, at most MAX_PSNR. SSIM is structural similarity under a Gaussian of 1.5 pixels
    (Wang et al. 2004).
    """
    from torchmetrics.functional import image

    a = to_planes(generated)
    b = to_planes(ground_truth)
    psnr = image.peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim: Any = image.structural_similarity_index_measure(
        a, b, sigma=1.5, data_range=1.0, reduction="none"
    )
    return {
        "psnr": np.minimum(psnr.cpu().numpy(), MAX_PSNR),
        "ssim": ssim.cpu().numpy().reshape(-1),
    }


# ---------------------------------------------------------------------------------------------- temporal consistency


@dataclass
class FlowPair:
    """Optical flow between two consecutive frames, which are enlarged if they are small."""

    first: np.ndarray  # (h, w, 3) uint8
    second: np.ndarray  # (h, w, 3) uint8
    backward: np.ndarray  # (h, w, 2) pixels from the second frame to the first
    forward: np.ndarray  # (h, w, 2) pixels from the first frame to the second


def optical_flows(frames: np.ndarray) -> list[FlowPair]:
    """Compute optical flow between consecutive frames of a clip (f, h, w, 3) uint8.

    By dense inverse search (Kroeger et al. 2016, OpenCV), on frames whose longer side has at least
    MIN_FLOW_SIDE pixels.
    """
    import cv2

    height, width = frames.shape[1:3]
    scale = max(1, math.ceil(MIN_FLOW_SIDE / max(height, width)))
    size = (width * scale, height * scale)
    enlarged = [cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in frames]
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in enlarged]
    estimator: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = []
    for i in range(len(frames) - 1):
        backward = estimator.calc(grey[i + 1], grey[i], None)
        forward = estimator.calc(grey[i], grey[i + 1], None)
        flows.append(FlowPair(enlarged[i], enlarged[i + 1], backward, forward))
    return flows


def warp_first_frame(pair: FlowPair) -> tuple[np.ndarray, np.ndarray]:
    """Warp a pair's first frame onto its second.

    Returns (warped, visible): the frame (h, w, 3) float32, and where it can be compared, (h, w) bool.
    A pixel is visible if forward and backward flow agree (Sundaram et al. 2010, Eq. 5).
    """
    import cv2

    y, x = np.mgrid[: pair.first.shape[0], : pair.first.shape[1]].astype(np.float32)
    source_x = x + pair.backward[..., 0]
    source_y = y + pair.backward[..., 1]

    def sample_first(values: np.ndarray) -> np.ndarray:
        return cv2.remap(
            values.astype(np.float32),
            source_x,
            source_y,
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )

    warped = sample_first(pair.first)
    forward = sample_first(pair.forward)
    tolerance = 0.01 * ((pair.backward**2).sum(-1) + (forward**2).sum(-1)) + 0.5
    visible = ((pair.backward + forward) ** 2).sum(-1) < tolerance
    return warped, visible


def temporal_metrics(
    frames: np.ndarray, flows: Sequence[FlowPair], fps: float
) -> dict[str, float | None]:
    """Return {"flicker", "warp_error", "motion"} of a clip (f, h, w, 3) uint8; None if undefined.

    flicker: mean absolute change of static pixels from frame to frame, of 255.
    warp_error: mean absolute difference between a frame and the one before it warped onto it, of 255,
        without occluded pixels (Lai et al. 2018, Eq. 11, with the absolute difference).
    motion: frame lengths per second, by `motion.motion_score`.
    """
    flicker = []
    warp_error = []
    for pair in flows:
        static = np.linalg.norm(pair.backward, axis=-1) < STATIC_SPEED
        if static.any():
            change = np.abs(pair.first.astype(np.float32) - pair.second)
            flicker.append(change[static].mean())
        warped, visible = warp_first_frame(pair)
        if visible.any():
            warp_error.append(np.abs(warped - pair.second)[visible].mean())
    return {
        "flicker": float(np.mean(flicker)) if flicker else None,
        "warp_error": float(np.mean(warp_error)) if warp_error else None,
        "motion": motion.motion_score(frames, 1 / fps),
    }


# ------------------------------------------------------------------------------------------------------- box control


def fit_box_motion(flow: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit a translation (2,) in pixels and a scale to the flow (n, 2) of pixels at `offsets` (n, 2) from a centre.

    The translation is the median flow. The scale is a least-squares fit to the pixels whose flow is near
    it: the others show the background. At most 10 percent per frame.
    """
    translation = np.median(flow, 0)
    distance = np.linalg.norm(flow - translation, axis=1)
    on_object = distance <= max(2 * np.median(distance), 0.5)
    spread = (offsets[on_object] * (flow[on_object] - translation)).sum()
    scale = 1 + spread / max((offsets[on_object] ** 2).sum(), 1e-9)
    return translation, np.clip(scale, 0.9, 1.1)


def follow_box(flows: Sequence[FlowPair], box: Sequence[float]) -> np.ndarray:
    """Follow the content of `box` (4,) in frame 0 by optical flow: boxes (f, 4), all xyxy in [0, 1].

    Needs no detector and no weights. An object that is hidden is lost, so a low score can mean occlusion
    as well as disobedience.
    """
    boxes = [np.asarray(box, float)]
    for pair in flows:
        size = np.array(pair.first.shape[1::-1], float)
        top_left = boxes[-1][:2]
        bottom_right = boxes[-1][2:]
        center = (top_left + bottom_right) / 2 * size
        half = (bottom_right - top_left) / 2 * size
        # the middle of the box, where little background shows
        x0, y0 = np.maximum(center - 0.8 * half, 0).astype(int)
        x1, y1 = np.minimum(center + 0.8 * half + 1, size).astype(int)
        if x1 - x0 > 1 and y1 - y0 > 1:
            y, x = np.mgrid[y0:y1, x0:x1]
            offsets = np.stack([x, y], -1).reshape(-1, 2) - center
            flow = pair.forward[y0:y1, x0:x1].reshape(-1, 2)
            translation, scale = fit_box_motion(flow, offsets)
            center = center + translation
            half = half * scale
        boxes.append(np.concatenate([center - half, center + half]) / np.tile(size, 2))
    return np.stack(boxes)


def box_metrics(flows: Sequence[FlowPair], requested: Tracklets) -> dict[str, float | None]:
    """Return {"box_iou", "box_success"}: how well the objects follow the requested boxes.

    Counts the boxes after frame 0 of objects that have a box in frame 0. box_iou is the mean IoU of
    requested and followed boxes; box_success the share with an IoU of at least BOX_SUCCESS_IOU. Both are
    None if there are no such boxes.
    """
    from svd_xtend.data.tracklets import box_iou

    overlaps = []
    for n in np.flatnonzero(requested.valid[0]):
        frame_indices = 1 + np.flatnonzero(requested.valid[1:, n])
        followed = follow_box(flows, requested.boxes[0, n])[frame_indices]
        overlaps += box_iou(followed, requested.boxes[frame_indices, n]).tolist()
    if not overlaps:
        return {"box_iou": None, "box_success": None}
    return {
        "box_iou": float(np.mean(overlaps)),
        "box_success": float(np.mean(np.array(overlaps) >= BOX_SUCCESS_IOU)),
    }


# ----------------------------------------------------------------------------------------------- pretrained networks


def load_lpips() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Load LPIPS: a function of two clips that returns the perceptual distance (f,) of their frames.

    AlexNet (Zhang et al. 2018), by torchmetrics.

    Raises:
        MissingNetwork: torchvision or AlexNet's weights are missing.
    """
    import torch

    weights = Path(torch.hub.get_dir(), "checkpoints", ALEXNET)
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise MissingNetwork(
            f"LPIPS is left out ({error}): install torchvision for this torch, "
            f"and download {ALEXNET_URL} to {weights}"
        ) from error
    if not weights.is_file():
        raise MissingNetwork(f"LPIPS is left out: download {ALEXNET_URL} to {weights}")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)

    def distance(generated: np.ndarray, ground_truth: np.ndarray) -> np.ndarray:
        values = []
        for a, b in zip(to_planes(generated).split(1), to_planes(ground_truth).split(1)):
            values.append(float(network.to(a.device)(a, b)))
        network.reset()  # torchmetrics would keep the sum of all frames
        return np.array(values)

    return distance


def load_i3d(num_frames: int = I3D_MIN_FRAMES) -> Callable[[np.ndarray], np.ndarray]:
    """Load I3D: a function of a clip that returns the features (400,) from which FVD is computed.

    As StyleGAN-V does it (Skorokhodov et al. 2022): I3D in TorchScript, on frames that are resized and
    cropped to a square of I3D_SIDE pixels.

    Raises:
        MissingNetwork: the network is missing or damaged, or clips of `num_frames` are too short for it.
    """
    import torch
    from torch.nn.functional import interpolate

    if num_frames < I3D_MIN_FRAMES:
        raise MissingNetwork(
            f"FVD is left out: it needs {I3D_MIN_FRAMES} frames or more, these clips have {num_frames}"
        )
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    file = Path(cache, "svd_xtend", I3D)
    if not file.is_file():
        raise MissingNetwork(f"FVD is left out: download {I3D_URL} to {file}")
    try:
        network = torch.jit.load(str(file)).eval()
    except RuntimeError as error:
        raise MissingNetwork(
            f"FVD is left out: {file} is damaged or not TorchScript; download {I3D_URL} to it"
        ) from error

    def features(frames: np.ndarray) -> np.ndarray:
        pixels = to_planes(frames) * 2 - 1
        scale = I3D_SIDE / min(pixels.shape[-2:])
        # the small number keeps a rounding error from adding a pixel
        height, width = (math.ceil(side * scale - 1e-6) for side in pixels.shape[-2:])
        pixels = interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
        top = (height - I3D_SIDE) // 2
        left = (width - I3D_SIDE) // 2
        square = pixels[:, :, top : top + I3D_SIDE, left : left + I3D_SIDE]
        clip = square.permute(1, 0, 2, 3)[None]
        with torch.no_grad():
            output = network.to(clip.device)(
                clip, rescale=False, resize=False, return_features=True
            )
        return output.double().cpu().numpy().reshape(-1)

    return features


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the squared Frechet distance of normal distributions fitted to samples (n, d) and (m, d); n, m >= 2.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with covariances C_a = A'A and C_b = B'B.
    """
    A = (a - a.mean(0)) / (len(a) - 1) ** 0.5
    B = (b - b.mean(0)) / (len(b) - 1) ** 0.5
    # the trace of the square root of C_a C_b is the sum of the singular values of A B'
    root = np.linalg.svd(A @ B.T, compute_uv=False).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (A**2).sum() + (B**2).sum() - 2 * root)


# ------------------------------------------------------------------------------------------------- over the data set


@dataclass
class ClipMetrics:
    """Everything that was measured of one clip, by column (see COLUMNS)."""

    source: str  # source video, the unit of statistics
    metrics: dict[str, dict[str, Any]]  # {column: {name in METRICS: number or None}}
    features: dict[str, np.ndarray | None]  # {column: features for FVD, or None}


def summarize_metrics(clips: Sequence[ClipMetrics]) -> list[dict[str, Any]]:
    """Return a row for each metric that was measured, as evaluation.json has them.

    A row holds its `name`, `label`, and what is `better`; the mean of each column over the source videos
    (each the mean of its clips), or None; `difference`: (mean, low, high) of tuned - base over the source
    videos; and its `verdict`. Only clips count of which every column has a value. If values near the
    ground truth are better, the difference is of the distances to it.
    """
    rows = []
    for name, metric in METRICS.items():
        row: dict[str, Any] = {"name": name, "label": metric.label, "better": metric.better}
        row |= dict.fromkeys((*COLUMNS, "difference"))
        if name == "fvd":
            row |= fvd_of_columns(clips)
        else:
            row |= means_of_columns(clips, name, metric.better)
        if row["base"] is not None:
            row["verdict"] = judge_difference(row["difference"], metric.better)
            rows.append(row)
    return rows


def means_of_columns(clips: Sequence[ClipMetrics], name: str, better: str) -> dict[str, Any]:
    """Return the mean of each column that has this metric, and the `difference` of tuned and base."""
    values = {}
    for column in clips[0].metrics:
        numbers = [clip.metrics[column].get(name) for clip in clips]
        column_values = np.array(numbers, float)  # None becomes nan
        if np.isfinite(column_values).any():
            values[column] = column_values
    is_complete = np.all([np.isfinite(v) for v in values.values()], 0)
    if not values or not is_complete.any():
        return {}
    sources = np.array([clip.source for clip in clips])[is_complete]
    values = {column: v[is_complete] for column, v in values.items()}
    row: dict[str, Any] = {}
    for column, column_values in values.items():
        by_source = validation_loss.mean_by_source(column_values, sources)
        row[column] = float(by_source.mean())
    if better == "truth":
        if "truth" not in values:
            return row
        values = {column: np.abs(v - values["truth"]) for column, v in values.items()}
    if "base" in values and "tuned" in values:
        differences = validation_loss.mean_by_source(values["tuned"] - values["base"], sources)
        row["difference"] = validation_loss.confidence_interval(differences)
    return row


def fvd_of_columns(clips: Sequence[ClipMetrics]) -> dict[str, float]:
    """Return the FVD of each column to the ground truth; nothing without features, or of one clip."""
    if len(clips) < 2 or clips[0].features["base"] is None:
        return {}
    features = {
        column: np.array([clip.features[column] for clip in clips]) for column in clips[0].features
    }
    truth = features.pop("truth")
    return {column: frechet_distance(values, truth) for column, values in features.items()}


def judge_difference(
    difference: tuple[float, float | None, float | None] | None, better: str
) -> str:
    """Say what the interval (mean, low, high) of tuned - base means: "better", "worse", "equal" or "unclear".

    Returns "" if there is no interval.
    """
    if difference is None:
        return ""
    _, low, high = difference
    if low is None or high is None:
        return ""
    if low > 0:
        return "better" if better == "higher" else "worse"
    if high < 0:
        return "worse" if better == "higher" else "better"
    return "unclear" if low < high else "equal"


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows of `summarize_metrics` for a terminal."""
    columns = [c for c in COLUMNS if any(row[c] is not None for row in rows)]
    has_difference = "tuned" in columns
    header = ["", *(COLUMN_TITLES[column] for column in columns)]
    if has_difference:
        header += ["tuned - base (95 %)", ""]
    lines = [header]
    for row in rows:
        cells = [row["label"]]
        for column in columns:
            cells.append("" if row[column] is None else f"{row[column]:.4g}")
        if has_difference:
            difference = validation_loss.format_interval(row["difference"])
            if difference and row["better"] == "truth":
                difference += " in distance to the ground truth"
            cells += [difference, row["verdict"]]
        lines.append(cells)
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    text = []
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths)]
        text.append("  ".join(padded).rstrip())
    return "\n".join(text)


# --------------------------------------------------------------------------------------------------------------- plots


def plot_metrics(
    file: str | Path, comparison: dict[str, Any] | None, clips: Sequence[ClipMetrics], title: str
) -> None:
    """Draw validation loss by noise level, PSNR by frame, and motion into one image file.

    comparison: answer of `validation_loss.compare_losses`, or None if only the base model was measured.
    """
    from matplotlib.figure import Figure

    if comparison is None:
        figure = Figure((8.8, 4.2), layout="constrained")
        quality_axes, motion_axes = figure.subplots(1, 2)
    else:
        figure = Figure((13, 4.2), layout="constrained")
        loss_axes, quality_axes, motion_axes = figure.subplots(1, 3)
        plot_loss_difference(loss_axes, comparison)
    figure.suptitle(title, parse_math=False)
    columns = [column for column in COLUMNS if column in clips[0].metrics]
    plot_psnr(quality_axes, clips, [column for column in columns if column != "truth"])
    models = [column for column in columns if column not in ("still", "truth")]
    plot_motion_scatter(motion_axes, clips, models)
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(file, dpi=110)


def plot_loss_difference(axes: Axes, comparison: dict[str, Any]) -> None:
    """Plot tuned - base of the validation loss at each noise level, with confidence intervals."""
    sigmas = comparison["sigma"]
    # the interval of one source video has no ends
    mean = np.array([difference[0] for difference in comparison["by_sigma"]])
    low = np.array([d[0] if d[1] is None else d[1] for d in comparison["by_sigma"]])
    high = np.array([d[0] if d[2] is None else d[2] for d in comparison["by_sigma"]])
    axes.axhline(0, color=COLORS["base"], lw=1)
    axes.errorbar(
        sigmas, mean, (mean - low, high - mean), color=COLORS["tuned"], marker="o", capsize=4
    )
    axes.set(xscale="log", xlabel="noise level sigma", ylabel="validation loss, tuned - base")
    axes.set_title("Below 0: tuned is better (bars: 95 %)")
    axes.set_xticks(sigmas, [f"{sigma:.2g}" for sigma in sigmas], minor=False)
    axes.minorticks_off()


def plot_psnr(axes: Axes, clips: Sequence[ClipMetrics], columns: Sequence[str]) -> None:
    """Plot the mean PSNR of each frame after the first."""
    for column in columns:
        curves = np.array([clip.metrics[column]["psnr_by_frame"] for clip in clips])[:, 1:]
        frame_indices = range(1, curves.shape[1] + 1)
        axes.plot(
            frame_indices, curves.mean(0), color=COLORS[column], label=COLUMN_TITLES[column], lw=2
        )
    axes.set(xlabel="frame", ylabel="PSNR, dB", title="Higher: closer to the ground truth")


def plot_motion_scatter(axes: Axes, clips: Sequence[ClipMetrics], models: Sequence[str]) -> None:
    """Plot the motion of each rendered clip against that of its ground truth."""
    scores = {}
    for column in (*models, "truth"):
        scores[column] = [clip.metrics[column]["motion"] for clip in clips]
    highest = max(max(column_scores) for column_scores in scores.values())
    limit = 1.05 * highest or 1
    axes.plot([0, limit], [0, limit], color=COLORS["truth"], lw=1, label="as in the ground truth")
    for column in models:
        axes.scatter(
            scores["truth"],
            scores[column],
            color=COLORS[column],
            label=COLUMN_TITLES[column],
            s=24,
            alpha=0.8,
        )
    axes.set(xlabel="ground truth", ylabel="rendered", title="Motion, frame lengths per second")
