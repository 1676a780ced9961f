"""How good clips are beside the true ones: frames, their order, where objects are, and whether they look like the data's.

    frame_figures(made, true)         PSNR and SSIM of each frame, by torchmetrics
    ways = flows(frames)              optical flow, for
    order_figures(frames, ways, fps)  flicker, warp error, motion: of any clip, the true one too
    control_figures(ways, asked)      do objects go where their boxes go?
    lpips(), i3d()                    by published networks whose weights the user has; else Missing says how to get them
    table_of(rows), draw(...)         all of it over a data set, and by how much a tuned model differs from its base

Frames are (f, h, w, 3) uint8. Frame 0 was given: where a figure is of all frames, evaluate_svd.py leaves it out.
"""

import math
import os
from pathlib import Path

import numpy as np

from svd_xtend.data import motion
from svd_xtend.training import validation_loss

ALEXNET = "alexnet-owt-7be5be79.pth"
ALEXNET_SOURCE = f"https://download.pytorch.org/models/{ALEXNET}"
I3D = "i3d_torchscript.pt"
# the network of StyleGAN-V's and Ctrl-V's evaluations
I3D_SOURCE = f"https://www.dropbox.com/s/ge9e5ujwgetktms/{I3D}?dl=1"
LONGER = 256  # pixels of the longer side at which flow is computed, at least
I3D_FRAMES = 9  # at least: it halves time thrice, and then takes means of two
STILL = 0.5  # of these pixels: what moves less, from frame to frame, stands still
METRICS = {  # title; where it should go: higher, lower, or to what the true clips have
    "psnr": ("PSNR, dB", "higher"),
    "ssim": ("SSIM", "higher"),
    "lpips": ("LPIPS", "lower"),
    "first_frame_psnr": ("PSNR of frame 0, dB", "higher"),
    "motion": ("motion, picture lengths a second", "truth"),
    "flicker": ("flicker of what stands still, of 255", "truth"),
    "warp_error": ("warp error, of 255", "truth"),
    "box_iou": ("boxes: mean IoU", "higher"),
    "box_success": ("boxes: IoU of at least 0.5", "higher"),
    "fvd": ("FVD", "lower"),
}
COLORS = {"still": "#e0a72c", "base": "#8a8f98", "tuned": "#5584e6", "truth": "#e2702c"}
COLUMNS = ("still", "base", "tuned", "truth")  # still: frame 0 in place of all frames


class Missing(Exception):
    """A metric whose package or weights are not at hand, and how to get them."""


def planes(frames):
    """(f, h, w, 3) uint8 -> (f, 3, h, w) float32 in [0, 1], on the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (
        torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(0, 3, 1, 2).float() / 255
    )


def frame_figures(made, true):
    """{psnr, ssim}: (f,) decibels, at most 100, and structural similarity under a Gaussian of 1.5 pixels (Wang et al. 2004)."""
    from torchmetrics.functional import image

    a, b = planes(made), planes(true)
    ratio = image.peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = image.structural_similarity_index_measure(
        a, b, sigma=1.5, data_range=1.0, reduction="none"
    )
    return {"psnr": np.minimum(ratio.cpu().numpy(), 100.0), "ssim": ssim.cpu().numpy().reshape(-1)}


# ------------------------------------------------------------------------------------------------------------- in time


def flows(frames):
    """[(two frames that follow each other, (h, w, 3) uint8, the way of each pixel of the second one back to the first and of the
    first one forth, both (h, w, 2) in pixels)]: dense inverse search (Kroeger et al. 2016, by OpenCV), at a scale at which
    it sees small things."""
    import cv2

    h, w = frames.shape[1:3]
    k = max(1, -(-LONGER // max(h, w)))
    shown = [cv2.resize(frame, (w * k, h * k), interpolation=cv2.INTER_CUBIC) for frame in frames]
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in shown]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pairs = range(len(frames) - 1)
    return [
        (
            *shown[i : i + 2],
            dis.calc(grey[i + 1], grey[i], None),
            dis.calc(grey[i], grey[i + 1], None),
        )
        for i in pairs
    ]


def order_figures(frames, ways, fps):
    """{flicker, warp_error, motion} of a clip; None where nothing can be told. flicker: mean change from frame to frame, of 255,
    of the pixels that stand still. warp_error: the same of all pixels once flow has brought them together, those that are
    hidden in one of both left out (Lai et al. 2018, Eq. 11, with the mean absolute difference). motion: motion.score."""
    import cv2

    flicker, warped = [], []
    for before, after, back, forth in ways:
        y, x = np.mgrid[: before.shape[0], : before.shape[1]].astype(np.float32)
        there = x + back[..., 0], y + back[..., 1]
        matched, returned = (
            cv2.remap(
                found.astype(np.float32), *there, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
            for found in (before, forth)
        )
        most = 0.01 * ((back**2).sum(-1) + (returned**2).sum(-1)) + 0.5
        seen = ((back + returned) ** 2).sum(-1) < most  # Sundaram et al. 2010, Eq. 5
        still = np.linalg.norm(back, axis=-1) < STILL
        for found, frame, where in (
            (warped, matched, seen),
            (flicker, before.astype(np.float32), still),
        ):
            found += [np.abs(frame - after)[where].mean()] if where.any() else []
    told = {"flicker": flicker, "warp_error": warped}
    means = {name: float(np.mean(found)) if found else None for name, found in told.items()}
    return {**means, "motion": motion.motion_score(frames, 1 / fps)}


# --------------------------------------------------------------------------------------------------------------- boxes


def follow(ways, box):
    """Where what `box` (4,) holds in frame 0 goes: boxes (f, 4), all xyxy in [0, 1].

    From frame to frame the box goes as far as the median pixel in its middle, and grows as the others spread from there. Needs
    no detector, and no weights; it loses what is hidden, and so does not tell what was lost from what disobeys."""
    found = [np.asarray(box, float)]
    for before, _, _, forth in ways:
        size = np.array(before.shape[1::-1], float)
        center, half = (
            (found[-1][:2] + found[-1][2:]) / 2 * size,
            (found[-1][2:] - found[-1][:2]) / 2 * size,
        )
        x0, y0 = np.maximum(center - 0.8 * half, 0).astype(int)
        x1, y1 = np.minimum(center + 0.8 * half + 1, size).astype(int)
        if x1 - x0 > 1 and y1 - y0 > 1:
            y, x = np.mgrid[y0:y1, x0:x1]
            way, arm = (
                forth[y0:y1, x0:x1].reshape(-1, 2),
                np.stack([x, y], -1).reshape(-1, 2) - center,
            )
            step = np.median(way, 0)
            off = np.linalg.norm(way - step, axis=1)
            near = off <= max(2 * np.median(off), 0.5)  # the object, not what shows beside it
            grown = 1 + (arm[near] * (way[near] - step)).sum() / max((arm[near] ** 2).sum(), 1e-9)
            center, half = center + step, half * np.clip(grown, 0.9, 1.1)
        found.append(np.concatenate([center - half, center + half]) / np.tile(size, 2))
    return np.stack(found)


def control_figures(ways, asked):
    """{box_iou, box_success}: how far what was in each box of frame 0 follows it, over the boxes of frames 1 on whose object was
    there from the start; success: IoU of at least 0.5. None where there are none. asked: Tracklets."""
    from svd_xtend.data.tracklets import box_iou

    overlaps = []
    for n in np.flatnonzero(asked.valid[0]):
        later = 1 + np.flatnonzero(asked.valid[1:, n])
        overlaps += box_iou(follow(ways, asked.boxes[0, n])[later], asked.boxes[later, n]).tolist()
    if not overlaps:
        return {"box_iou": None, "box_success": None}
    return {
        "box_iou": float(np.mean(overlaps)),
        "box_success": float(np.mean(np.array(overlaps) >= 0.5)),
    }


# ------------------------------------------------------------------------------------------------ by published networks


def lpips():
    """A function of two clips: (f,) learned perceptual distance of their frames (Zhang et al. 2018, AlexNet), by torchmetrics. Raises
    Missing where it cannot."""
    import torch

    file = Path(torch.hub.get_dir(), "checkpoints", ALEXNET)
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: of another torch
        raise Missing(
            f"LPIPS is left out ({error}): pip install torchvision, one of this torch, and download {ALEXNET_SOURCE} to {file}"
        ) from error
    if not file.is_file():
        raise Missing(f"LPIPS is left out: download {ALEXNET_SOURCE} to {file}")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)

    def distance(made, true):
        pairs = zip(planes(made).split(1), planes(true).split(1))
        values = np.array([float(network.to(a.device)(a, b)) for a, b in pairs])
        network.reset()  # it keeps what it is shown
        return values

    return distance


def i3d(num_frames=I3D_FRAMES):
    """A function of a clip: the features (400,) of which FVD is made, as StyleGAN-V has them (Skorokhodov et al. 2022): I3D in
    TorchScript, a short side of 224, cropped to a square. Raises Missing where the network is not at hand, or clips of that many
    frames are too short for it."""
    import torch
    from torch.nn.functional import interpolate

    if num_frames < I3D_FRAMES:
        raise Missing(
            f"FVD is left out: it takes {I3D_FRAMES} frames or more, these clips have {num_frames}"
        )
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "svd_xtend", I3D)
    if not file.is_file():
        raise Missing(f"FVD is left out: download {I3D_SOURCE} to {file}")
    try:
        network = torch.jit.load(str(file)).eval()
    except RuntimeError as error:
        raise Missing(
            f"FVD is left out: {file} is damaged or no TorchScript; download {I3D_SOURCE} to it"
        ) from error

    def features(frames):
        pixels = planes(frames) * 2 - 1
        scale = 224 / min(pixels.shape[-2:])
        height, width = (math.ceil(side * scale - 1e-6) for side in pixels.shape[-2:])
        pixels = interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
        top, left = (height - 224) // 2, (width - 224) // 2
        clip = pixels[:, :, top : top + 224, left : left + 224].permute(1, 0, 2, 3)[None]
        with torch.no_grad():
            found = network.to(clip.device)(clip, rescale=False, resize=False, return_features=True)
        return found.double().cpu().numpy().reshape(-1)

    return features


def frechet(a, b):
    """Squared Frechet distance of two normal distributions fitted to samples (n, d) and (m, d), of at least two each."""
    A, B = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))  # covariances A'A and B'B
    # the trace of their product's square root is the sum of the singular values of A B'
    root = np.linalg.svd(A @ B.T, compute_uv=False).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (A**2).sum() + (B**2).sum() - 2 * root)


# --------------------------------------------------------------------------------------------------------- over a data set


def table_of(rows):
    """[{name, label, better, still, base, tuned, truth, difference, verdict}] of each metric that was measured: means over the
    films (each the mean of its clips) of which all of these are known, None of what there is not. difference: (mean, low, high) of
    tuned - base over the films, and where nearer to the truth is better of how far they are from it. rows: of each clip its
    `film`, `figures` {column: {name: figure}} and `features` {column: i3d's answer, or None}."""
    table = []
    for name, (label, better) in METRICS.items():
        line = {
            "name": name,
            "label": label,
            "better": better,
            **dict.fromkeys((*COLUMNS, "difference")),
        }
        values = {
            c: np.array([row["figures"][c].get(name) for row in rows], float)
            for c in rows[0]["figures"]
        }
        values = {c: v for c, v in values.items() if np.isfinite(v).any()}
        told = np.all([np.isfinite(v) for v in values.values()], 0)
        if values and told.any():
            films, values = (
                np.array([row["film"] for row in rows])[told],
                {c: v[told] for c, v in values.items()},
            )
            line |= {
                c: float(validation_loss.mean_by_source(v, films).mean()) for c, v in values.items()
            }
            if better == "truth":
                values = {
                    c: np.abs(v - values["truth"]) for c, v in values.items() if "truth" in values
                }
            if {"base", "tuned"} <= values.keys():
                away = validation_loss.mean_by_source(values["tuned"] - values["base"], films)
                line["difference"] = validation_loss.confidence_interval(away)
        elif name == "fvd" and len(rows) > 1 and rows[0]["features"]["base"] is not None:
            features = {
                c: np.array([row["features"][c] for row in rows]) for c in rows[0]["features"]
            }
            line |= {c: frechet(f, features["truth"]) for c, f in features.items() if c != "truth"}
        if line["base"] is not None:
            table.append({**line, "verdict": verdict(line)})
    return table


def verdict(line):
    """What a line's interval says of tuned: better or worse than base, equal to it, or unclear."""
    mean, low, high = line["difference"] or (None, None, None)
    if low is None:
        return ""
    rose, fell = ("better", "worse") if line["better"] == "higher" else ("worse", "better")
    return rose if low > 0 else fell if high < 0 else "unclear" if low < high else "equal"


def in_words(table):
    """The table for a terminal."""
    columns = [c for c in COLUMNS if any(line[c] is not None for line in table)]
    last = ["tuned - base (95 %)", ""] if "tuned" in columns else []
    lines = [("", *columns, *last)]
    for line in table:
        cells = ["" if line[c] is None else f"{line[c]:.4g}" for c in columns]
        told = validation_loss.format_interval(line["difference"])
        told += " in distance to the truth" * bool(told and line["better"] == "truth")
        lines.append((line["label"], *cells, *[told, line["verdict"]][: len(last)]))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def draw(file, row, rows, what):
    """A picture of it: the loss at each noise level, how good each frame is, how much moves."""
    from matplotlib.figure import Figure

    figure = Figure((13, 4.2) if row else (8.8, 4.2), layout="constrained")
    figure.suptitle(what, parse_math=False)
    axes, columns = (
        list(figure.subplots(1, 3 if row else 2)),
        [c for c in COLUMNS if c in rows[0]["figures"]],
    )
    if row:
        ax = axes.pop(0)
        mean, low, high = np.array(
            [[m if v is None else v for v in (m, *ends)] for m, *ends in row["by_sigma"]]
        ).T
        ax.axhline(0, color=COLORS["base"], lw=1)
        ax.errorbar(
            row["sigma"],
            mean,
            (mean - low, high - mean),
            color=COLORS["tuned"],
            marker="o",
            capsize=4,
        )
        ax.set(xscale="log", xlabel="noise level sigma", ylabel="held-out loss, tuned - base")
        ax.set_title("Below 0: tuned is better (bars: 95 %)")
        ax.set_xticks(row["sigma"], [f"{sigma:.2g}" for sigma in row["sigma"]], minor=False)
        ax.minorticks_off()
    for name in columns[:-1]:
        curves = np.array([r["figures"][name]["psnr_by_frame"] for r in rows])[:, 1:]
        label = {"still": "frame 0, standing still"}.get(name, name)
        axes[0].plot(
            range(1, curves.shape[1] + 1), curves.mean(0), color=COLORS[name], label=label, lw=2
        )
    axes[0].set(xlabel="frame", ylabel="PSNR, dB", title="Higher: more like the true frames")
    moved = {c: [r["figures"][c]["motion"] for r in rows] for c in columns}
    most = 1.05 * max(map(max, moved.values())) or 1
    axes[1].plot([0, most], [0, most], color=COLORS["truth"], lw=1, label="as in the true clip")
    for name in columns[1:-1]:
        axes[1].scatter(
            moved["truth"], moved[name], color=COLORS[name], label=name, s=24, alpha=0.8
        )
    axes[1].set(
        xlabel="in the true clip", ylabel="in the model's", title="Motion, picture lengths a second"
    )
    for ax in axes:
        ax.legend()
    figure.savefig(file, dpi=110)
