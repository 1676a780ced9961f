"""Draw clips of moving shapes with exact ground truth, to train and to evaluate the embedded SVD.

    python -m svd_xtend.demo.synthetic_clips --base_folder data/fall --domain fall --clips 48

    clip = make_clip((0, 3), domain="fall")        # the clip of this seed: the same on every machine
    metrics = score_synthetic_clip(frames, clip)   # how well generated frames continue it

The motion of a clip follows from its first frame and its motion_bucket_id, as far as it can be known at all:

    pointed shapes (triangle, dart, drop)   have a white nose and move where it points, at a speed given by the bucket
    round shapes (disc, ring)               move on smooth paths that the first frame does not determine

    domain      content                                               used for
    shapes      1 or 2 shapes of both kinds                           training the embedded SVD
    pointed     1 or 2 pointed shapes                                 evaluating it: a single correct continuation exists
    fall        1 or 2 pointed shapes that fall from rest             fine-tuning: the base model has never seen this
    roam        1 to 3 shapes of both kinds on long smooth paths      box control: only the boxes determine the motion
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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
POINTED = ("triangle", "dart", "drop")
ROUND = ("disc", "ring")
BUCKETS = (64, 127, 190)  # the values of motion_bucket_id
FPS = 7
HELD_OUT_SEED = 7919  # seed of the validation clips: nothing is ever trained on them
DEMO = "data/demo"  # the default --base_folder of the trainers
REFERENCE_WIDTH = 64  # pixels: sizes and speeds below are for clips of this width

NOSE_START = 0.2  # the nose begins this far from the centre towards the tip, in radii
RING_HOLE = 0.45  # radius of a ring's hole, in radii
SUPERSAMPLE = 4  # shapes are drawn this many times larger and averaged down: soft edges
MAX_ATTEMPTS = 200  # random placements of an object before it is left out

KEPT_AREA = (
    0.4,
    2.0,
)  # an object counts as kept if its area is in this range, relative to the ground truth
SUCCESS_IOU = 0.5  # a box counts as obeyed from this IoU on
CHROMA_THRESHOLD = 0.45  # of an object's chroma, above which a pixel belongs to the object
WHITE_LEVEL = 180  # of 255: pixels brighter than this in all channels may be a nose
NOSE_REACH = 2.2  # a nose lies within so many radii of a disc with the object's area
MIN_AREA = 4  # pixels; smaller regions of a colour are not an object


@dataclass
class SyntheticClip:
    """Frames of a clip and their ground truth.

    frames (f, h, w, 3) uint8; boxes (f, n, 4) float xyxy in [0, 1]; centroids (f, n, 2) in pixels and areas (f, n) in
    pixels, both of the coloured part of an object, without its nose; colors (n, 3) uint8; kinds: n names of shapes.
    """

    frames: np.ndarray
    boxes: np.ndarray
    centroids: np.ndarray
    areas: np.ndarray
    colors: np.ndarray
    kinds: list[str]
    motion_bucket_id: int

    def cut(self, frames: slice) -> SyntheticClip:
        """Return the clip with only these frames."""
        return replace(
            self,
            frames=self.frames[frames],
            boxes=self.boxes[frames],
            centroids=self.centroids[frames],
            areas=self.areas[frames],
        )

    def tracklets(self) -> Tracklets:
        """Return the boxes as tracklets, all of them valid and hard."""
        everywhere = np.ones(self.boxes.shape[:2], bool)
        ids = tuple(map(str, range(len(self.kinds))))
        return Tracklets(
            self.boxes.astype(np.float32),
            everywhere,
            everywhere,
            palette(len(ids)),
            ids,
            tuple(self.kinds),
        )


@dataclass
class PlacedObject:
    """A shape and its path: kind, heading in radians (y points down), radius in pixels, centers (f, 2) in pixels."""

    kind: str
    heading: float
    radius: float
    centers: np.ndarray


def pixels_per_frame_of(motion_bucket_id: float, width: int = REFERENCE_WIDTH) -> float:
    """Return the speed of pointed shapes: 2 pixels per frame at bucket 127 and a width of 64 pixels."""
    return motion_bucket_id / 127 * 2 * width / REFERENCE_WIDTH


# ---------------------------------------------------------------------------------------------------------------- draw


def outline(kind: str, center: np.ndarray, heading: float, radius: float) -> np.ndarray:
    """Return the polygon of a shape, (k, 2) in pixels. The tip of pointed shapes is towards `heading` (radians, y down)."""
    if kind == "triangle":
        points = np.array([[1.25, 0], [-0.8, 0.85], [-0.8, -0.85]])
    elif kind == "dart":
        points = np.array([[1.3, 0], [-1.0, 0.95], [-0.35, 0], [-1.0, -0.95]])
    elif kind == "drop":
        arc = np.linspace(0.35 * np.pi, 1.65 * np.pi, 24)
        tip = [[1.35, 0]]
        back = np.stack([0.75 * np.cos(arc) - 0.3, 0.75 * np.sin(arc)], 1)
        points = np.concatenate([tip, back])
    else:
        arc = np.linspace(0, 2 * np.pi, 36, endpoint=False)
        points = 0.95 * np.stack([np.cos(arc), np.sin(arc)], 1)
    cos = np.cos(heading)
    sin = np.sin(heading)
    return points * radius @ np.array([[cos, sin], [-sin, cos]]) + center


def shape_mask(
    kind: str, center: np.ndarray, heading: float, radius: float, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the coverage in [0, 1] of the whole shape and of its nose, (h, w) each. Round shapes have no nose."""
    canvas = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    polygon = outline(kind, center, heading, radius) * SUPERSAMPLE
    draw.polygon([tuple(point) for point in polygon], fill=255)
    if kind == "ring":
        hole = outline(kind, center, heading, RING_HOLE * radius) * SUPERSAMPLE
        draw.polygon([tuple(point) for point in hole], fill=0)
    whole = np.asarray(canvas.reduce(SUPERSAMPLE), np.float64) / 255
    if kind not in POINTED:
        return whole, np.zeros_like(whole)
    y, x = np.mgrid[:height, :width] + 0.5
    # distance in pixels from the line where the nose begins, towards the tip
    towards_tip = (x - center[0]) * np.cos(heading) + (y - center[1]) * np.sin(heading)
    beyond_start = towards_tip - NOSE_START * radius
    return whole, whole * np.clip(beyond_start + 0.5, 0, 1)


def draw_background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Draw a soft gradient between two greys, (h, w, 3) in [0, 255]."""
    low, high = rng.uniform(40, 170, 2)
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height))
    ramp = np.clip(x * np.cos(angle) + y * np.sin(angle) + 0.5, 0, 1)
    return (low + (high - low) * ramp)[..., None].repeat(3, 2)


# ---------------------------------------------------------------------------------------------------------------- move


def object_path(
    rng: np.random.Generator,
    domain: str,
    is_pointed: bool,
    heading: float,
    start: np.ndarray,
    pixels_per_frame: float,
    num_frames: int,
) -> np.ndarray:
    """Return the centres (f, 2) of an object in pixels."""
    frame = np.arange(num_frames)[:, None]
    if domain == "fall":  # accelerating from rest, as far as other shapes move in the same time
        last = max(num_frames - 1, 1)
        return start + np.array([0, 1]) * pixels_per_frame * last * (frame / last) ** 2
    if is_pointed and domain != "roam":
        direction = np.array([np.cos(heading), np.sin(heading)])
        return start + direction * pixels_per_frame * frame
    return start + smooth_path(rng, domain, is_pointed, heading, pixels_per_frame, num_frames)


def smooth_path(
    rng: np.random.Generator,
    domain: str,
    is_pointed: bool,
    heading: float,
    pixels_per_frame: float,
    num_frames: int,
) -> np.ndarray:
    """Return the offsets (f, 2) in pixels of a random smooth path from its start, which does not follow the nose."""
    bend = 0.5 if domain == "roam" else 1.0
    steady_turn = rng.uniform(-0.35, 0.35)
    turn_change = rng.uniform(-0.1, 0.1)
    turns = bend * (steady_turn + turn_change * np.arange(num_frames - 1))  # radians per frame
    if is_pointed:  # at least 60 degrees away from where the nose points
        first_angle = heading + rng.uniform(np.pi / 3, 5 * np.pi / 3)
    else:
        first_angle = rng.uniform(0, 2 * np.pi)
    angles = first_angle + np.cumsum(turns)
    speed = pixels_per_frame * rng.uniform(0.6, 1.1)
    steps = speed * np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])


def propose_object(
    rng: np.random.Generator,
    domain: str,
    pixels_per_frame: float,
    num_frames: int,
    width: int,
    height: int,
) -> PlacedObject:
    """Draw a random object with a random path, which may leave the picture."""
    is_pointed = domain in ("pointed", "fall") or rng.random() < 0.65
    kind = rng.choice(POINTED if is_pointed else ROUND)
    scale = width / REFERENCE_WIDTH
    radius = rng.uniform(7, 9.5) * width / REFERENCE_WIDTH
    heading = rng.uniform(0, 2 * np.pi)
    start = rng.uniform([0, 0], [width, height])
    if domain == "roam":
        pixels_per_frame = rng.uniform(2.5, 5.5) * scale
    centers = object_path(rng, domain, is_pointed, heading, start, pixels_per_frame, num_frames)
    return PlacedObject(str(kind), heading, radius, centers)


def stays_inside(candidate: PlacedObject, width: int, height: int) -> bool:
    """Return whether an object stays inside the picture in all frames."""
    margin = 1.05 * candidate.radius
    limit = np.array([width, height]) - margin
    return bool((candidate.centers > margin).all() and (candidate.centers < limit).all())


def stays_apart(candidate: PlacedObject, other: PlacedObject) -> bool:
    """Return whether two objects never touch."""
    distance = np.linalg.norm(candidate.centers - other.centers, axis=1)
    return bool((distance > 1.15 * (candidate.radius + other.radius)).all())


def place_objects(
    rng: np.random.Generator,
    domain: str,
    count: int,
    pixels_per_frame: float,
    num_frames: int,
    width: int,
    height: int,
) -> list[PlacedObject]:
    """Return up to `count` objects that stay inside the picture and never touch; fewer if there is no room for them."""
    objects: list[PlacedObject] = []
    for _ in range(count):
        for _attempt in range(MAX_ATTEMPTS):
            candidate = propose_object(rng, domain, pixels_per_frame, num_frames, width, height)
            is_apart = all(stays_apart(candidate, other) for other in objects)
            if stays_inside(candidate, width, height) and is_apart:
                objects.append(candidate)
                break
    return objects


def make_clip(
    seed: int | Sequence[int],
    domain: str = "shapes",
    num_frames: int = 8,
    width: int = 64,
    height: int = 48,
) -> SyntheticClip:
    """Draw the clip of a seed. It is the same on every machine."""
    rng = np.random.default_rng(seed)
    bucket = int(rng.choice(BUCKETS))
    pixels_per_frame = pixels_per_frame_of(bucket, width)
    max_objects = 3 if domain == "roam" else 2
    objects: list[PlacedObject] = []
    while not objects:
        count = int(rng.integers(1, max_objects + 1))
        objects = place_objects(rng, domain, count, pixels_per_frame, num_frames, width, height)
    colors = COLORS[rng.permutation(len(COLORS))[: len(objects)]]
    frames = np.repeat(draw_background(rng, width, height)[None], num_frames, 0)
    boxes = np.zeros((num_frames, len(objects), 4))
    centroids = np.zeros((num_frames, len(objects), 2))
    areas = np.zeros((num_frames, len(objects)))
    for n, placed in enumerate(objects):
        for f in range(num_frames):
            center = placed.centers[f]
            mask, nose = shape_mask(
                placed.kind, center, placed.heading, placed.radius, width, height
            )
            body_change = mask[..., None] * (colors[n] - frames[f])
            nose_change = nose[..., None] * (WHITE - colors[n])
            frames[f] += body_change + nose_change
            y, x = np.nonzero(mask > 0.5)
            left, right = x.min() / width, (x.max() + 1) / width
            top, bottom = y.min() / height, (y.max() + 1) / height
            boxes[f, n] = (left, top, right, bottom)
            y, x = np.nonzero(mask - nose > 0.5)
            centroids[f, n] = (x.mean(), y.mean())
            areas[f, n] = len(x)
    return SyntheticClip(
        frames=frames.round().astype(np.uint8),
        boxes=boxes,
        centroids=centroids,
        areas=areas,
        colors=colors.astype(np.uint8),
        kinds=[placed.kind for placed in objects],
        motion_bucket_id=bucket,
    )


def write_clips(
    base_folder: str | Path, domain: str = "shapes", clips: int = 48, seed: int = 0, **size: int
) -> None:
    """Write `clips` folders of PNG frames into `base_folder`. Folders that are complete already are kept.

    Each folder also has its boxes in tracklets.json, and its fps and motion_bucket_id in clip.json. size: num_frames,
    width and height of make_clip.
    """
    for i in range(clips):
        folder = Path(base_folder) / f"{domain}{i:04d}"
        if (folder / "clip.json").exists():  # this file is written last, so the folder is complete
            continue
        folder.mkdir(parents=True, exist_ok=True)
        clip = make_clip((seed, i), domain, **size)
        for f, frame in enumerate(clip.frames):
            Image.fromarray(frame).save(folder / f"{f:03d}.png")
        write_tracklets(folder / "tracklets.json", clip.tracklets())
        metadata = {"fps": FPS, "motion_bucket_id": clip.motion_bucket_id}
        (folder / "clip.json").write_text(json.dumps(metadata))


def ensure_demo(base_folders: Sequence[str]) -> None:
    """Draw the demo clips if the default --base_folder is among these folders."""
    if DEMO in base_folders:
        write_clips(DEMO, "fall", 24)


# ------------------------------------------------------------------------------------------------------------- measure


def segment_shapes(
    frames: np.ndarray, colors: np.ndarray, max_distance: float = 70
) -> tuple[np.ndarray, np.ndarray]:
    """Find objects by their colour. Return centroids (f, n, 2) and areas (f, n), both in pixels.

    frames: (f, h, w, 3) uint8; colors: (n, 3) uint8. The centroid of an object that is not found is NaN.
    """
    distance = np.linalg.norm(
        frames[:, None].astype(np.float64) - colors[None, :, None, None], axis=-1
    )
    masks = distance < max_distance
    areas = masks.sum((2, 3))
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]]
    with np.errstate(invalid="ignore"):
        centroids = np.stack([(masks * x).sum((2, 3)) / areas, (masks * y).sum((2, 3)) / areas], -1)
    return centroids, areas


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 arrays, in decibels."""
    squared_error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float(10 * np.log10(255**2 / max(squared_error, 1e-9)))


def is_kept(areas: np.ndarray, true_areas: np.ndarray) -> np.ndarray:
    """Return which objects still have about the area of the ground truth, in the shape of `areas`."""
    low, high = KEPT_AREA
    ratio = areas / true_areas
    return (ratio > low) & (ratio < high)


def score_synthetic_clip(frames: np.ndarray, clip: SyntheticClip) -> dict[str, float]:
    """Measure how well generated frames (f, h, w, 3) uint8 continue `clip`. Frame 0, which was given, does not count.

    kept: fraction of objects and frames in which the object has 0.4 to 2 times its true area. centroid_error: pixels,
    mean over the kept ones; it means little if few are kept. psnr: dB.
    """
    centroids, areas = segment_shapes(frames[1:], clip.colors)
    kept = is_kept(areas, clip.areas[1:])
    errors = np.linalg.norm(centroids - clip.centroids[1:], axis=-1)
    return {
        "centroid_error": float(errors[kept].mean()) if kept.any() else float("nan"),
        "kept": float(kept.mean()),
        "psnr": float(psnr(frames[1:], clip.frames[1:])),
    }


def without_grey(colors: np.ndarray) -> np.ndarray:
    """Return the chroma of RGB colours (..., 3): the colour minus the grey of its mean."""
    return colors - colors.mean(-1, keepdims=True)


def segment_boxes(frames: np.ndarray, colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find objects by their colour. Return boxes (f, n, 4) xyxy in [0, 1] and areas (f, n) in pixels.

    Boxes include the white noses, areas do not. The box of an object that is not found is (0, 0, 0, 0).

    The background is grey, so a pixel belongs to an object if its chroma, projected on that of the object, is more than
    0.45 of it. A white pixel belongs to the nearest object, within 2.2 radii of a disc of the object's area.
    """
    _, h, w, _ = frames.shape
    frames = frames.astype(np.float64)
    object_chroma = without_grey(colors)
    squared_length = np.linalg.norm(object_chroma, axis=1, keepdims=True) ** 2
    # (f, n, h, w): 1 for a pixel that has exactly the object's chroma
    likeness = np.einsum("fhwc,nc->fnhw", without_grey(frames), object_chroma / squared_length)
    colored = (likeness > CHROMA_THRESHOLD) & (likeness == likeness.max(1, keepdims=True))
    areas = colored.sum((2, 3))

    y, x = np.mgrid[:h, :w]
    center_x = (colored * x).sum((2, 3)) / np.maximum(areas, 1)
    center_y = (colored * y).sum((2, 3)) / np.maximum(areas, 1)
    distance = np.hypot(x - center_x[..., None, None], y - center_y[..., None, None])
    max_distance = NOSE_REACH * np.sqrt(np.maximum(areas, 1) / np.pi)
    reach = distance / max_distance[..., None, None]
    is_white = (frames.min(-1) > WHITE_LEVEL)[:, None]
    is_nose = is_white & (reach < 1) & (reach == reach.min(1, keepdims=True))
    masks = (colored | is_nose) & (areas >= MIN_AREA)[..., None, None]

    columns = masks.any(2)
    rows = masks.any(3)
    left = columns.argmax(-1) / w
    top = rows.argmax(-1) / h
    right = 1 - columns[..., ::-1].argmax(-1) / w
    bottom = 1 - rows[..., ::-1].argmax(-1) / h
    is_found = masks.any((2, 3))[..., None]
    return np.stack([left, top, right, bottom], -1) * is_found, areas


def with_contrasting_colors(tracklets: Tracklets, colors: np.ndarray) -> Tracklets:
    """Return the tracklets with those colours of the palette first whose hue differs most from the objects' `colors`.

    colors: (n, 3) uint8. If a model draws a box into the video by mistake, the box is then not taken for an object.
    """

    def hue(rgb: np.ndarray) -> np.ndarray:
        chroma = without_grey(rgb)
        return chroma / np.linalg.norm(chroma, axis=-1, keepdims=True)

    similarity = hue(tracklets.colors) @ hue(colors.astype(np.float64)).T
    most_similar = similarity.max(1)
    return replace(tracklets, colors=tracklets.colors[np.argsort(most_similar)])


def score_box_following(frames: np.ndarray, clip: SyntheticClip) -> dict[str, float]:
    """Measure how well frames (f, h, w, 3) uint8 follow the boxes of `clip`, from frame 1 on.

    mean_iou: mean IoU of the boxes of the objects with the given ones; success: fraction with an IoU of at least 0.5. An
    object that is not kept (less than 0.4 or more than 2 times its true area) has an IoU of 0.
    """
    boxes, areas = segment_boxes(frames, clip.colors)
    kept = is_kept(areas, clip.areas)
    overlap = (box_iou(boxes, clip.boxes) * kept)[1:]
    return {"mean_iou": float(overlap.mean()), "success": float((overlap >= SUCCESS_IOU).mean())}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base_folder", required=True, help="where the clip folders go")
    parser.add_argument("--domain", choices=DOMAINS, default="shapes", help="see above")
    parser.add_argument("--clips", type=int, default=48, help="number of clips")
    parser.add_argument("--num_frames", type=int, default=8, help="frames of each clip")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other clips")
    return parser


if __name__ == "__main__":
    args = build_parser().parse_args()
    write_clips(args.base_folder, args.domain, args.clips, args.seed, num_frames=args.num_frames)
