"""Tracklets: boxes over time, one slot an object. Public formats in; crops, soft boxes and pictures out.

    python -m svd_xtend.evaluation.tracklet_score gt/gt.txt --frames img1 --output_dir outputs/boxes      # look at an annotation
    python -m svd_xtend.evaluation.tracklet_score clip_boxes.json --frames clip.mp4 --score tracker.txt   # were the boxes obeyed?

    format           told by                                    frames     boxes
    this project's   "tracklets", or "videos" of such           0-based    xyxy, fractions or pixels: see `own_format`
    BDD100K          a list of frames, or {"frames": [...]}     0-based    box2d {x1, y1, x2, y2}, pixels
    YouTube-VIS      "videos" and "annotations"                 0-based    x y w h or null, pixels
    MOTChallenge     9 or 10 numbers a line, with commas        1-based    x y w h, 1-based pixels
    KITTI tracking   17 or 18 words a line                      0-based    xyxy, pixels

Next: svd_xtend/models/box_control.py, the layers that see them.
"""

import colorsys
import logging
from dataclasses import dataclass, replace

import numpy as np

logger = logging.getLogger("svd_xtend")

LINE_WIDTH = (
    4 / 1024
)  # of a drawn box, as a fraction of the picture's width (TrackDiffusion's SVD branch: 4 px at 1024)
SOFT_BOX_BETA = (
    1,
    8,
)  # soft boxes grow on each side by Beta(1, 8) times the picture's size (Boximator, Sec. 4)


def palette(n):
    """n colours (n, 3) in [0, 1], far apart: hues round the wheel."""
    return np.array(
        [colorsys.hsv_to_rgb(i / max(n, 1), 1.0, 1.0) for i in range(n)], np.float32
    ).reshape(n, 3)


@dataclass(frozen=True)
class Tracklets:
    """Boxes of n objects over f frames; a slot is the same object in all frames.

    boxes (f, n, 4) float32 xyxy in [0, 1] of the picture's width and height; valid (f, n) bool: the object is there;
    hard (f, n) bool: the box is exact, not a region that holds it; colors (n, 3) in [0, 1]; ids and categories: n str.
    """

    boxes: np.ndarray
    valid: np.ndarray
    hard: np.ndarray
    colors: np.ndarray
    ids: tuple
    categories: tuple

    @staticmethod
    def empty(f):
        """f frames of nothing."""
        none = np.zeros((f, 0), bool)
        return Tracklets(np.zeros((f, 0, 4), np.float32), none, none, palette(0), (), ())

    def __len__(self):
        """Frames."""
        return len(self.boxes)

    def at(self, frames):
        """These frames, by their numbers; where the annotation ends early, nothing is there."""
        frames = np.asarray(frames)
        there, kept = frames < len(self), np.minimum(frames, max(len(self) - 1, 0))
        if not len(self):
            return Tracklets.empty(len(frames))
        return replace(self, boxes=self.boxes[kept] * there[:, None, None], valid=self.valid[kept] & there[:, None], hard=self.hard[kept] & there[:, None])  # fmt: skip

    def project(self, crop):
        """As seen in `crop`, xyxy fractions of the picture. What leaves it becomes a line on its border (Boximator)."""
        x0, y0, x1, y1 = crop
        boxes = (self.boxes - np.array([x0, y0, x0, y0])) / np.array([x1 - x0, y1 - y0] * 2)
        return replace(self, boxes=boxes.clip(0, 1).astype(np.float32))

    def flip(self):
        """Mirrored left to right."""
        x0, y0, x1, y1 = np.moveaxis(self.boxes, -1, 0)
        return replace(self, boxes=np.stack([1 - x1, y0, 1 - x0, y1], -1))

    def take_slots(self, slots):
        """These slots, in this order."""
        return Tracklets(
            self.boxes[:, slots], self.valid[:, slots], self.hard[:, slots], self.colors[slots],
            tuple(self.ids[i] for i in slots), tuple(self.categories[i] for i in slots),
        )  # fmt: skip

    def select_largest(self, n, min_size=0.0):
        """The at most n largest and longest: by area summed over the frames in which they are there. Objects that are
        never in the picture, or whose longer side never reaches `min_size` of it, go."""
        sides = np.maximum(self.boxes[..., 2:] - self.boxes[..., :2], 0) * self.valid[..., None]
        areas, longest = sides.prod(-1).sum(0), sides.max((0, 2), initial=0)
        order = [
            int(i)
            for i in np.argsort(-areas, kind="stable")
            if areas[i] > 0 and longest[i] >= min_size
        ]
        return self.take_slots(sorted(order[:n]))

    def pad(self, n):
        """To n slots in the colours of `palette(n)`; the new ones hold nothing."""
        f, own = self.valid.shape
        if own > n:
            raise ValueError(f"{own} objects do not fit {n} slots; choose among them first")
        boxes, valid, hard = (
            np.zeros((f, n, 4), np.float32),
            np.zeros((f, n), bool),
            np.zeros((f, n), bool),
        )
        boxes[:, :own], valid[:, :own], hard[:, :own] = self.boxes, self.valid, self.hard
        more = ("",) * (n - own)
        return Tracklets(boxes, valid, hard, palette(n), self.ids + more, self.categories + more)

    def mark_soft(self, rng, probability):
        """Mark boxes as soft with this probability; `relaxed` then hides where exactly they were.

        For half of the objects each frame is drawn for itself, for the others all frames as one: tracks that are exact
        throughout, as people draw them, would hardly ever occur otherwise."""
        draws, whole = rng.random(self.hard.shape), rng.random(self.hard.shape[1]) < 0.5
        draws = np.where(whole, draws[:1], draws)
        return replace(self, hard=self.hard & (draws >= probability))

    def grow_soft_boxes(self, rng=None):
        """Soft boxes grown on each side by Beta(1, 8) of the picture, at most to its border; without rng by the mean,
        1/9. What the model is shown: draw and measure with the boxes before it."""
        a, b = SOFT_BOX_BETA
        margins = (
            np.full(self.boxes.shape, a / (a + b))
            if rng is None
            else rng.beta(a, b, self.boxes.shape)
        )
        grown = (self.boxes + margins * np.array([-1, -1, 1, 1])).clip(0, 1)
        return replace(
            self, boxes=np.where(self.hard[..., None], self.boxes, grown).astype(np.float32)
        )

    def only_ends(self):
        """As a user gives a path: for each object the first and the last box; what lies between is interpolated and soft."""
        boxes, valid, hard = self.boxes.copy(), self.valid.copy(), np.zeros_like(self.hard)
        for slot in np.flatnonzero(self.valid.any(0)):
            first, last = np.flatnonzero(self.valid[:, slot])[[0, -1]]
            given = {int(f): self.boxes[f, slot] for f in (first, last)}
            for f, box, exact in interpolate_keyframes(given):
                boxes[f, slot], valid[f, slot], hard[f, slot] = box, True, exact
        return replace(self, boxes=boxes, valid=valid, hard=hard)

    def shuffled_colors(self, rng):
        """Another order of the colours: the model must not learn that slot 0 is red."""
        return replace(self, colors=self.colors[rng.permutation(len(self.colors))])

    def without_objects(self):
        """The same slots with nothing in them."""
        return replace(self, valid=np.zeros_like(self.valid))

    def cond(self):
        """Keyword arguments of the model: boxes (f, n, 4), valid (f, n), hard (f, n), colors (n, 3), all float32."""
        names = ("boxes", "valid", "hard", "colors")
        return {name: np.ascontiguousarray(getattr(self, name), dtype=np.float32) for name in names}


def crop_window(size, width, height, resize_mode="crop"):
    """What video.load_image keeps of a picture of `size` (w, h), xyxy in fractions of it."""
    if resize_mode == "stretch":
        return 0.0, 0.0, 1.0, 1.0
    w, h = size
    keep_x, keep_y = min(1.0, width / height * h / w), min(1.0, height / width * w / h)
    return (1 - keep_x) / 2, (1 - keep_y) / 2, (1 + keep_x) / 2, (1 + keep_y) / 2


def fit_to_picture(tracklets, size, width, height, resize_mode, frames, n, min_size=0.0):
    """Tracklets of pictures of `size` -> those of a clip of `frames`, by their numbers: crop, at most n objects, n slots."""
    seen = tracklets.at(frames).project(crop_window(size, width, height, resize_mode))
    return seen.select_largest(n, min_size).pad(n)


# ---------------------------------------------------------------------------------------------------------------- draw


def draw_boxes(pixel_values, tracklets, first=1, line_width=None):
    """Self-tracking's target: frames (f, 3, h, w) uint8 with each valid box outlined in its colour, from frame `first`
    on (frame 0 is the condition and stays clean). Lines lie inside the box, 4 px wide per 1024 of width, at least 2."""
    from PIL import Image, ImageDraw

    frames = np.ascontiguousarray(pixel_values.transpose(0, 2, 3, 1))
    line = line_width or max(2, round(LINE_WIDTH * frames.shape[2]))
    for f in range(first, len(frames)):
        picture = Image.fromarray(frames[f])
        for n in np.flatnonzero(tracklets.valid[f]):
            color, box = to_rgb(tracklets.colors[n]), to_pixel_corners(tracklets.boxes[f, n], picture.size)
            most = (
                min(box[2] - box[0], box[3] - box[1]) + 1
            ) // 2  # beyond it Pillow draws outwards
            ImageDraw.Draw(picture).rectangle(box, outline=color, width=max(1, min(line, most)))
        frames[f] = np.asarray(picture)
    return frames.transpose(0, 3, 1, 2)


def to_pixel_corners(box, size):
    """xyxy in [0, 1] -> the corner pixels, of which at least one is in the picture."""
    w, h = size
    x0, y0, x1, y1 = (box * np.array([w, h, w, h])).round().astype(int).tolist()
    x0, y0 = min(x0, w - 1), min(y0, h - 1)
    return x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)


def to_rgb(color):
    return tuple((color * 255).round().astype(int).tolist())


def render_boxes(frames, tracklets, least=256):
    """For people: PIL frames enlarged, hard boxes in a thick line, soft ones in a thin one, ids beside them."""
    from PIL import ImageDraw, ImageFont

    from svd_xtend.data.images import enlarge

    pictures = [enlarge(frame, least).convert("RGB") for frame in frames]
    for f, picture in enumerate(pictures[: len(tracklets)]):
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(12, picture.width // 40))
        for n in np.flatnonzero(tracklets.valid[f]):
            color, box = to_rgb(tracklets.colors[n]), to_pixel_corners(tracklets.boxes[f, n], picture.size)
            draw.rectangle(
                box,
                outline=color,
                width=max(2, picture.width // 160) if tracklets.hard[f, n] else 1,
            )
            where = box[0] + 3, box[1] + 1
            draw.text(
                where, tracklets.ids[n], fill=color, font=font, stroke_width=1, stroke_fill="black"
            )
    return pictures


def beside_boxes(frames, tracklets, least=256):
    """The clean frames, enlarged, and to the right of each the same with its boxes."""
    from svd_xtend.data.images import SHEET_GAP, enlarge, stack_images

    return [
        stack_images([enlarge(a, least), b], gap=SHEET_GAP)
        for a, b in zip(frames, render_boxes(frames, tracklets, least))
    ]


# --------------------------------------------------------------------------------------------------------------- score


def box_iou(a, b):
    """Intersection over union of xyxy boxes, (..., 4) and (..., 4) broadcast."""
    corner = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = corner.clip(0).prod(-1)
    total = (
        (a[..., 2:] - a[..., :2]).clip(0).prod(-1)
        + (b[..., 2:] - b[..., :2]).clip(0).prod(-1)
        - both
    )
    return np.where(total > 0, both / np.maximum(total, 1e-12), 0.0)


def interpolate_keyframes(given):
    """{frame: box or None} -> (frame, box, is it one of those given) for each frame in which the object is there."""
    frames = list(given)
    for a, b in zip(frames, [*frames[1:], None]):
        if given[a] is None:
            continue
        yield a, given[a], True
        if b is None or given[b] is None:
            continue
        for frame in range(a + 1, b):
            t = (frame - a) / (b - a)
            yield frame, (1 - t) * given[a] + t * given[b], False
