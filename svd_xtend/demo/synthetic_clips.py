"""Moving shapes: clips with exact ground truth, drawn at first use, to train and to measure the embedded SVD on.

    python -m svd_xtend.demo.synthetic_clips --base_folder data/fall --domain fall --clips 48

A clip's motion can be read from its first frame and its motion_bucket_id, as far as it can be known at all:

    pointed shapes (triangle, dart, drop)   have a white nose and move where it points, `speed(bucket)` pixels a frame
    round shapes (disc, ring)               roam on smooth paths that nothing announces: no single rule fits the base model

    domain      holds
    shapes      1 or 2 of both kinds: what the embedded SVD is trained on
    pointed     pointed ones only: what it is measured on, since a true continuation exists
    fall        pointed ones that fall from rest, whatever they point at: the shifted domain, for fine-tuning
    roam        1 to 3 of both kinds, far along smooth paths that neither nose nor bucket announces: only boxes tell

Next: svd_xtend/tiny.py, the model.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from svd_xtend.data.annotations import write_tracklets
from svd_xtend.data.tracklets import Tracklets, box_iou, palette

DOMAINS = ("shapes", "pointed", "fall", "roam")
COLORS = np.array(
    [[226, 44, 44], [236, 212, 46], [44, 180, 72], [52, 200, 222], [56, 84, 230], [218, 64, 200]]
)
WHITE = np.array([255, 255, 255])
POINTED, ROUND = ("triangle", "dart", "drop"), ("disc", "ring")
NOSE = 0.2  # white from here on towards the tip, in radii from the centre
BUCKETS = (64, 127, 190)
FPS = 7
HELD_OUT_SEED = 7919  # clips that nothing is ever trained on
DEMO = "data/demo"
SUPERSAMPLE = 4  # shapes are drawn at this multiple and averaged down: soft edges


@dataclass
class SyntheticClip:
    """Frames and what is true of them.

    frames (f, h, w, 3) uint8; boxes (f, n, 4) float xyxy in [0, 1]; centroids (f, n, 2) in pixels, areas (f, n) in
    pixels, both of the coloured part, without the nose; colors (n, 3) uint8; kinds n names.
    """

    frames: np.ndarray
    boxes: np.ndarray
    centroids: np.ndarray
    areas: np.ndarray
    colors: np.ndarray
    kinds: list
    motion_bucket_id: int

    def cut(self, frames):
        """These frames of it, a slice."""
        names = ("frames", "boxes", "centroids", "areas")
        return replace(self, **{name: getattr(self, name)[frames] for name in names})

    def tracklets(self):
        """The boxes as Tracklets, all valid and hard."""
        there = np.ones(self.boxes.shape[:2], bool)
        ids = tuple(map(str, range(len(self.kinds))))
        return Tracklets(
            self.boxes.astype(np.float32), there, there, palette(len(ids)), ids, tuple(self.kinds)
        )


def pixels_per_frame_of(motion_bucket_id, width=64):
    """Pixels a frame: 2 at bucket 127 and 64 pixels of width."""
    return motion_bucket_id / 127 * 2 * width / 64


# ---------------------------------------------------------------------------------------------------------------- draw


def outline(kind, center, heading, radius):
    """Polygon of a shape, (k, 2) in pixels. Pointed shapes have their tip towards `heading` (radians, y down)."""
    if kind == "triangle":
        points = np.array([[1.25, 0], [-0.8, 0.85], [-0.8, -0.85]])
    elif kind == "dart":
        points = np.array([[1.3, 0], [-1.0, 0.95], [-0.35, 0], [-1.0, -0.95]])
    elif kind == "drop":
        arc = np.linspace(0.35 * np.pi, 1.65 * np.pi, 24)
        points = np.concatenate(
            [[[1.35, 0]], np.stack([0.75 * np.cos(arc) - 0.3, 0.75 * np.sin(arc)], 1)]
        )
    else:
        arc = np.linspace(0, 2 * np.pi, 36, endpoint=False)
        points = 0.95 * np.stack([np.cos(arc), np.sin(arc)], 1)
    cos, sin = np.cos(heading), np.sin(heading)
    return points * radius @ np.array([[cos, sin], [-sin, cos]]) + center


def shape_mask(kind, center, heading, radius, width, height):
    """Coverage in [0, 1] of the whole shape and of its nose, (h, w) each."""
    canvas = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    draw.polygon([tuple(p) for p in outline(kind, center, heading, radius) * SUPERSAMPLE], fill=255)
    if kind == "ring":
        draw.polygon(
            [tuple(p) for p in outline(kind, center, heading, 0.45 * radius) * SUPERSAMPLE], fill=0
        )
    whole = np.asarray(canvas.reduce(SUPERSAMPLE), np.float64) / 255
    y, x = np.mgrid[:height, :width] + 0.5
    ahead = (x - center[0]) * np.cos(heading) + (y - center[1]) * np.sin(heading) - NOSE * radius
    return whole, whole * np.clip(ahead + 0.5, 0, 1) * (kind in POINTED)


def background(rng, width, height):
    """(h, w, 3) in [0, 255]: a soft gradient between two greys."""
    low, high = rng.uniform(40, 170, 2)
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height))
    ramp = np.clip(x * np.cos(angle) + y * np.sin(angle) + 0.5, 0, 1)
    return (low + (high - low) * ramp)[..., None].repeat(3, 2)


# ---------------------------------------------------------------------------------------------------------------- move


def object_path(rng, domain, pointed, heading, start, pixels_per_frame, num_frames):
    """Centres (f, 2) in pixels."""
    t = np.arange(num_frames)[:, None]
    if domain == "fall":  # from rest, as far as the others go in the same time
        span = max(num_frames - 1, 1)
        return start + np.array([0, 1]) * pixels_per_frame * span * (t / span) ** 2
    if pointed and domain != "roam":
        return start + np.array([np.cos(heading), np.sin(heading)]) * pixels_per_frame * t
    bend = 0.5 if domain == "roam" else 1.0
    turn = bend * (rng.uniform(-0.35, 0.35) + rng.uniform(-0.1, 0.1) * np.arange(num_frames - 1))
    away = rng.uniform(np.pi / 3, 5 * np.pi / 3) if pointed else rng.uniform(0, 2 * np.pi)
    angles = heading * pointed + away + np.cumsum(turn)
    steps = pixels_per_frame * rng.uniform(0.6, 1.1) * np.stack([np.cos(angles), np.sin(angles)], 1)
    return start + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])


def place_objects(rng, domain, count, pixels_per_frame, num_frames, width, height):
    """[(kind, heading, radius, centres)] that stay inside the picture and never touch; fewer where no room is found."""
    objects = []
    for _ in range(count):
        for _attempt in range(200):
            pointed = domain in ("pointed", "fall") or rng.random() < 0.65
            kind = rng.choice(POINTED if pointed else ROUND)
            radius, heading = rng.uniform(7, 9.5) * width / 64, rng.uniform(0, 2 * np.pi)
            start = rng.uniform([0, 0], [width, height])
            if domain == "roam":
                pixels_per_frame = rng.uniform(2.5, 5.5) * width / 64
            centers = object_path(
                rng, domain, pointed, heading, start, pixels_per_frame, num_frames
            )
            margin = 1.05 * radius
            inside = (centers > margin).all() and (
                centers < np.array([width, height]) - margin
            ).all()
            apart = all(
                (np.linalg.norm(centers - other, axis=1) > 1.15 * (radius + r)).all()
                for _, _, r, other in objects
            )
            if inside and apart:
                objects.append((str(kind), heading, radius, centers))
                break
    return objects


def make_clip(seed, domain="shapes", num_frames=8, width=64, height=48):
    """The clip of this seed (an int or a sequence of ints): the same on every machine."""
    rng = np.random.default_rng(seed)
    bucket = int(rng.choice(BUCKETS))
    objects = []
    while not objects:
        most = 3 if domain == "roam" else 2
        objects = place_objects(
            rng,
            domain,
            int(rng.integers(1, most + 1)),
            pixels_per_frame_of(bucket, width),
            num_frames,
            width,
            height,
        )
    colors = COLORS[rng.permutation(len(COLORS))[: len(objects)]]
    frames = np.repeat(background(rng, width, height)[None], num_frames, 0)
    boxes, centroids = (
        np.zeros((num_frames, len(objects), 4)),
        np.zeros((num_frames, len(objects), 2)),
    )
    areas = np.zeros((num_frames, len(objects)))
    for n, (kind, heading, radius, centers) in enumerate(objects):
        for f in range(num_frames):
            mask, nose = shape_mask(kind, centers[f], heading, radius, width, height)
            frames[f] += mask[..., None] * (colors[n] - frames[f]) + nose[..., None] * (
                WHITE - colors[n]
            )
            y, x = np.nonzero(mask > 0.5)
            boxes[f, n] = (
                x.min() / width,
                y.min() / height,
                (x.max() + 1) / width,
                (y.max() + 1) / height,
            )
            y, x = np.nonzero(mask - nose > 0.5)
            centroids[f, n], areas[f, n] = (x.mean(), y.mean()), len(x)
    kinds = [kind for kind, *_ in objects]
    return SyntheticClip(
        frames.round().astype(np.uint8),
        boxes,
        centroids,
        areas,
        colors.astype(np.uint8),
        kinds,
        bucket,
    )


def write_clips(base_folder, domain="shapes", clips=48, seed=0, **size):
    """Write `clips` folders of PNG frames, each with its boxes in tracklets.json, its fps and motion_bucket_id in
    clip.json. Skips those that are there."""
    for i in range(clips):
        folder = Path(base_folder) / f"{domain}{i:04d}"
        if (folder / "clip.json").exists():  # written last, hence whole
            continue
        folder.mkdir(parents=True, exist_ok=True)
        clip = make_clip((seed, i), domain, **size)
        for f, frame in enumerate(clip.frames):
            Image.fromarray(frame).save(folder / f"{f:03d}.png")
        write_tracklets(folder / "tracklets.json", clip.tracklets())
        (folder / "clip.json").write_text(
            json.dumps({"fps": FPS, "motion_bucket_id": clip.motion_bucket_id})
        )


def ensure_demo(base_folders):
    """Draw the demo clips, a trainer's default --base_folder, as far as they are not there yet."""
    if DEMO in base_folders:
        write_clips(DEMO, "fall", 24)


# ------------------------------------------------------------------------------------------------------------- measure


def segment_shapes(frames, colors, max_distance=70):
    """Find objects by colour: centroids (f, n, 2) in pixels (NaN where nothing is found) and areas (f, n) in pixels."""
    distance = np.linalg.norm(
        frames[:, None].astype(np.float64) - colors[None, :, None, None], axis=-1
    )
    masks = distance < max_distance
    areas = masks.sum((2, 3))
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]]
    with np.errstate(invalid="ignore"):
        centroids = np.stack([(masks * x).sum((2, 3)) / areas, (masks * y).sum((2, 3)) / areas], -1)
    return centroids, areas


def psnr(a, b):
    """Decibels between two uint8 arrays."""
    return 10 * np.log10(
        255**2 / max(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2), 1e-9)
    )


def measure_clip(frames, clip):
    """How well generated frames (f, h, w, 3) uint8 continue `clip`; frame 0, which was given, does not count.

    centroid_error: pixels, mean over the objects and frames in which the object is found; kept: fraction of those,
    found meaning an area of 0.4 to 2 times the truth's; psnr: dB. Centroid error means little where kept is low.
    """
    centroids, areas = segment_shapes(frames[1:], clip.colors)
    ratio = areas / clip.areas[1:]
    kept = (ratio > 0.4) & (ratio < 2)
    errors = np.linalg.norm(centroids - clip.centroids[1:], axis=-1)
    return {
        "centroid_error": float(errors[kept].mean()) if kept.any() else float("nan"),
        "kept": float(kept.mean()),
        "psnr": float(psnr(frames[1:], clip.frames[1:])),
    }


def segment_boxes(frames, colors):
    """Boxes (f, n, 4) xyxy in [0, 1] of objects found by colour, white noses included, and areas (f, n) in pixels,
    without them; boxes have no area where nothing is found.

    The background is grey. A pixel is an object's where its chroma is more than 0.45 of the object's, in its direction; a
    white one is the nearest object's, within 2.2 radii of a disc of its area."""
    f, h, w, _ = frames.shape
    frames = frames.astype(np.float64)
    chroma, own = frames - frames.mean(-1, keepdims=True), colors - colors.mean(-1, keepdims=True)
    along = np.einsum(
        "fhwc,nc->fnhw", chroma, own / np.linalg.norm(own, axis=1, keepdims=True) ** 2
    )  # 1: its colour
    colored = (along > 0.45) & (along == along.max(1, keepdims=True))
    areas = colored.sum((2, 3))
    y, x = np.mgrid[:h, :w]
    center = [(colored * axis).sum((2, 3)) / np.maximum(areas, 1) for axis in (x, y)]
    reach = np.hypot(x - center[0][..., None, None], y - center[1][..., None, None])
    reach = reach / (2.2 * np.sqrt(np.maximum(areas, 1) / np.pi))[..., None, None]
    white = (frames.min(-1) > 180)[:, None] & (reach < 1) & (reach == reach.min(1, keepdims=True))
    masks = (colored | white) & (areas >= 4)[..., None, None]
    columns, rows = masks.any(2), masks.any(3)
    first = columns.argmax(-1) / w, rows.argmax(-1) / h
    last = 1 - columns[..., ::-1].argmax(-1) / w, 1 - rows[..., ::-1].argmax(-1) / h
    return np.stack([*first, *last], -1) * masks.any((2, 3))[..., None], areas


def is_contrasting(tracklets, colors):
    """Slots in those colours of the palette that are farthest in hue from the objects' `colors` (n, 3) uint8: a box that a
    model draws by mistake is then not taken for an object."""

    def hue(rgb):
        chroma = rgb - rgb.mean(-1, keepdims=True)
        return chroma / np.linalg.norm(chroma, axis=-1, keepdims=True)

    likeness = (hue(tracklets.colors) @ hue(colors.astype(np.float64)).T).max(1)
    return replace(tracklets, colors=tracklets.colors[np.argsort(likeness)])


def measure_control(frames, clip):
    """How well frames (f, h, w, 3) uint8 follow the boxes of `clip`, from frame 1 on: mean_iou and success, the
    fraction with IoU >= 0.5. An object of less than 0.4 or more than 2 times its area is lost: its IoU is 0."""
    boxes, areas = segment_boxes(frames, clip.colors)
    ratio = areas / clip.areas
    kept = (ratio > 0.4) & (ratio < 2)
    overlap = (box_iou(boxes, clip.boxes) * kept)[1:]
    return {"mean_iou": float(overlap.mean()), "success": float((overlap >= 0.5).mean())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base_folder", required=True, help="where the clip folders go")
    parser.add_argument("--domain", choices=DOMAINS, default="shapes")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_clips(args.base_folder, args.domain, args.clips, args.seed)
