"""How good clips are beside the true ones: frames, their order, where objects are, and whether they look like the data's.

    frame_figures(made, true)         PSNR and SSIM of each frame, by torchmetrics
    order_figures(frames)             flicker, warp error, motion: of any clip, the true one too
    follow(frames, box)               where what a box holds in frame 0 goes: boxes, by optical flow
    lpips(), i3d()                    by published networks whose weights the user has; else Missing says how to get them

Frames are (f, h, w, 3) uint8. Frame 0 was given: where a figure is of all frames, evaluate_svd.py leaves it out.
"""

import math
import os
from pathlib import Path

import numpy as np

from svd_xtend import motion

ALEXNET = "alexnet-owt-7be5be79.pth"
I3D = "i3d_torchscript.pt"
I3D_SOURCE = f"https://www.dropbox.com/s/ge9e5ujwgetktms/{I3D}"  # the network of StyleGAN-V's and Ctrl-V's evaluations
LONGER = 256  # pixels of the longer side at which flow is computed, at least
STILL = 0.5  # of these pixels: what moves less, from frame to frame, stands still


class Missing(Exception):
    """A metric whose package or weights are not at hand, and how to get them."""


def planes(frames):
    """(f, h, w, 3) uint8 -> (f, 3, h, w) float32 in [0, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255


def frame_figures(made, true):
    """{psnr, ssim}: (f,) decibels, at most 100, and structural similarity under a Gaussian of 1.5 pixels (Wang et al. 2004)."""
    from torchmetrics.functional import image

    a, b = planes(made), planes(true)
    ratio = image.peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = image.structural_similarity_index_measure(a, b, sigma=1.5, data_range=1.0, reduction="none")
    return {"psnr": np.minimum(ratio.numpy(), 100.0), "ssim": ssim.numpy().reshape(-1)}


# ------------------------------------------------------------------------------------------------------------- in time


def flows(frames):
    """Yields (two frames as float32 (h, w, 3), the way of each pixel of the second one back to the first and there again, both
    (h, w, 2) in pixels): dense inverse search (Kroeger et al. 2016, by OpenCV), at a scale at which it sees small things."""
    import cv2

    h, w = frames.shape[1:3]
    k = max(1, -(-LONGER // max(h, w)))
    shown = [cv2.resize(frame, (w * k, h * k), interpolation=cv2.INTER_CUBIC) for frame in frames]
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in shown]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    for i in range(len(frames) - 1):
        yield shown[i], shown[i + 1], dis.calc(grey[i + 1], grey[i], None), dis.calc(grey[i], grey[i + 1], None)


def order_figures(frames, fps):
    """{flicker, warp_error, motion} of a clip. flicker: mean change from frame to frame, of 255, of the pixels that stand still.
    warp_error: the same of all pixels once flow has brought them together, those that are hidden in one of both left out (Lai
    et al. 2018, Eq. 11, with the mean absolute difference). motion: motion.score, picture lengths a second."""
    import cv2

    flicker, warped = [], []
    for before, after, back, forth in flows(frames):
        y, x = np.mgrid[: before.shape[0], : before.shape[1]].astype(np.float32)
        there = x + back[..., 0], y + back[..., 1]
        change = np.abs(
            cv2.remap(before, *there, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).astype(float) - after
        )
        error = back + cv2.remap(forth, *there, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        most = 0.01 * ((back**2).sum(-1) + (forth**2).sum(-1)) + 0.5  # Sundaram et al. 2010, Eq. 5
        seen, still = (error**2).sum(-1) < most, np.hypot(*back.transpose(2, 0, 1)) < STILL
        warped.append(change[seen].mean() if seen.any() else np.nan)
        unmoved = np.abs(before.astype(float) - after)
        flicker.append(unmoved[still].mean() if still.any() else np.nan)
    mean = [float(np.nanmean(v)) if np.isfinite(v).any() else None for v in (flicker, warped)]
    return {"flicker": mean[0], "warp_error": mean[1], "motion": motion.score(frames, 1 / fps)}


# --------------------------------------------------------------------------------------------------------------- boxes


def follow(frames, box):
    """Where what `box` (4,) holds in frame 0 goes: boxes (f, 4), all xyxy in [0, 1].

    From frame to frame the box goes as far as the median pixel in its middle, and grows as the others spread from there. Needs
    no detector, and no weights; it loses what is hidden, and so does not tell what was lost from what disobeys."""
    h, w = frames.shape[1:3]
    found, size = [np.asarray(box, float)], None
    for before, _, _, forth in flows(frames):
        size = np.array(before.shape[1::-1], float)
        center, half = (found[-1][:2] + found[-1][2:]) / 2 * size, (found[-1][2:] - found[-1][:2]) / 2 * size
        x0, y0 = np.maximum(center - 0.8 * half, 0).astype(int)
        x1, y1 = np.minimum(center + 0.8 * half + 1, size).astype(int)
        if x1 - x0 > 1 and y1 - y0 > 1:
            y, x = np.mgrid[y0:y1, x0:x1]
            way, arm = forth[y0:y1, x0:x1].reshape(-1, 2), np.stack([x, y], -1).reshape(-1, 2) - center
            step = np.median(way, 0)
            off = np.linalg.norm(way - step, axis=1)
            near = off <= max(2 * np.median(off), 0.5)  # the object, not what shows beside it
            grown = 1 + (arm[near] * (way[near] - step)).sum() / max((arm[near] ** 2).sum(), 1e-9)
            center, half = center + step, half * np.clip(grown, 0.9, 1.1)
        found.append(np.concatenate([center - half, center + half]) / np.tile(size, 2))
    return np.stack(found)


def control_figures(frames, asked):
    """{box_iou, box_success}: how far what was in each box of frame 0 follows it, over the boxes of frames 1 on whose object was
    there from the start; success: IoU of at least 0.5. None where there are none. asked: Tracklets."""
    from svd_xtend.tracklets import iou

    overlaps = []
    for n in np.flatnonzero(asked.valid[0]):
        later = 1 + np.flatnonzero(asked.valid[1:, n])
        overlaps += iou(follow(frames, asked.boxes[0, n])[later], asked.boxes[later, n]).tolist()
    if not overlaps:
        return {"box_iou": None, "box_success": None}
    return {"box_iou": float(np.mean(overlaps)), "box_success": float(np.mean(np.array(overlaps) >= 0.5))}


# ------------------------------------------------------------------------------------------------ by published networks


def lpips():
    """A function of two clips: (f,) learned perceptual distance of their frames (Zhang et al. 2018, AlexNet), by torchmetrics. Raises
    Missing where it cannot."""
    import importlib.util

    import torch

    file = Path(torch.hub.get_dir(), "checkpoints", ALEXNET)
    if not importlib.util.find_spec("torchvision"):
        raise Missing(
            f"LPIPS is left out: pip install torchvision, and put https://download.pytorch.org/models/{ALEXNET} at {file}"
        )
    if not file.is_file():
        raise Missing(f"LPIPS is left out: download https://download.pytorch.org/models/{ALEXNET} to {file}")
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as distance

    def measure(made, true):
        pairs = zip(planes(made).split(1), planes(true).split(1))
        return np.array([float(distance(a, b, net_type="alex", normalize=True)) for a, b in pairs])

    return measure


def i3d(file=None):
    """A function of a clip: the features (400,) of which FVD is made, as StyleGAN-V has them (Skorokhodov et al. 2022): I3D in
    TorchScript, a short side of 224, cropped to a square. Raises Missing where the network is not at hand."""
    import torch
    from torch.nn.functional import interpolate

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    file = Path(file or Path(cache, "svd_xtend", I3D))
    if not file.is_file():
        raise Missing(f"FVD is left out: download {I3D_SOURCE} to {file}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = torch.jit.load(str(file), device).eval()

    def features(frames):
        pixels = planes(frames) * 2 - 1
        scale = 224 / min(pixels.shape[-2:])
        height, width = (math.ceil(side * scale - 1e-6) for side in pixels.shape[-2:])
        pixels = interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
        top, left = (height - 224) // 2, (width - 224) // 2
        clip = pixels[:, :, top : top + 224, left : left + 224].permute(1, 0, 2, 3)[None].to(device)
        with torch.no_grad():
            return network(clip, rescale=False, resize=False, return_features=True).double().cpu().numpy().reshape(-1)

    return features


def frechet(a, b):
    """Squared Frechet distance of two normal distributions fitted to samples (n, d) and (m, d)."""
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # trace of the square root of one other: their product's eigenvalues are those of a positive semidefinite matrix
    root = np.sqrt(np.linalg.eigvals(np.atleast_2d(one @ other)).astype(complex)).real.sum()
    return float(mean + np.trace(np.atleast_2d(one)) + np.trace(np.atleast_2d(other)) - 2 * root)
