"""Tracklets: boxes of objects over time, and what training and inference do with them.

    tracklets = fit_to_picture(tracklets, (854, 480), 512, 320, "crop", range(14), slots=8)
    soft = tracklets.mark_soft(rng, probability=0.8).grow_soft_boxes(rng)
    control = soft.cond()                                  # arrays for the model
    target = draw_boxes(pixel_values, tracklets)           # the target of self-tracking

A tracklet has a slot, which is the same in all frames. Annotation files are read and written by
svd_xtend/data/annotations.py, and the layers that see the boxes are in
svd_xtend/models/box_control.py.

Letters in shapes: f frames, n slots (objects), h and w height and width in pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from svd_xtend.data.images import SHEET_GAP, enlarge, stack_images

# width of a drawn line as a fraction of the picture's width: 4 of 1024 px, TrackDiffusion's SVD branch
LINE_WIDTH = 4 / 1024
MIN_LINE_WIDTH = 2  # pixels
# soft boxes grow on each side by Beta(1, 8) times the picture's size (Boximator, Sec. 4)
SOFT_BOX_BETA = (1, 8)
SOFT_OBJECT_PROBABILITY = 0.5  # of an object to be soft or hard in all frames alike
RENDER_WIDTH = 256  # pixels, the least width of pictures that are rendered for people


def palette(n: int) -> np.ndarray:
    """Return n colours (n, 3) in [0, 1] whose hues are evenly spread over the colour wheel."""
    colors = [colorsys.hsv_to_rgb(i / n, 1.0, 1.0) for i in range(n)]
    return np.array(colors, np.float32).reshape(n, 3)


@dataclass(frozen=True)
class Tracklets:
    """Boxes of n objects over f frames. A slot is the same object in all frames."""

    boxes: np.ndarray  # (f, n, 4) float32: xyxy as fractions of the picture, in [0, 1]
    valid: np.ndarray  # (f, n) bool: the object is in the frame
    hard: (
        np.ndarray
    )  # (f, n) bool: the box is exact; soft boxes are regions that contain the object
    colors: np.ndarray  # (n, 3) float32 in [0, 1]
    ids: tuple[str, ...]  # n
    categories: tuple[str, ...]  # n

    @staticmethod
    def empty(num_frames: int) -> Tracklets:
        """Return tracklets of `num_frames` frames and no objects."""
        return Tracklets(
            boxes=np.zeros((num_frames, 0, 4), np.float32),
            valid=np.zeros((num_frames, 0), bool),
            hard=np.zeros((num_frames, 0), bool),
            colors=palette(0),
            ids=(),
            categories=(),
        )

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.boxes)

    # ------------------------------------------------------------------- frames, crops and slots

    def at(self, frame_indices: Sequence[int] | np.ndarray) -> Tracklets:
        """Select frames. Frames after the end of the annotation contain no objects."""
        if len(self) == 0:
            return Tracklets.empty(len(frame_indices))
        frame_indices = np.asarray(frame_indices)
        is_annotated = frame_indices < len(self)
        indices = np.minimum(frame_indices, len(self) - 1)
        return replace(
            self,
            boxes=self.boxes[indices] * is_annotated[:, None, None],
            valid=self.valid[indices] & is_annotated[:, None],
            hard=self.hard[indices] & is_annotated[:, None],
        )

    def project(self, crop: tuple[float, float, float, float]) -> Tracklets:
        """Express the boxes in fractions of `crop`, which is xyxy in fractions of the picture.

        A box outside the crop becomes a line on its border (Boximator).
        """
        x0, y0, x1, y1 = crop
        offset = np.array([x0, y0, x0, y0])
        size = np.array([x1 - x0, y1 - y0, x1 - x0, y1 - y0])
        boxes = (self.boxes - offset) / size
        return replace(self, boxes=boxes.clip(0, 1).astype(np.float32))

    def flip(self) -> Tracklets:
        """Mirror the boxes left to right."""
        x0, y0, x1, y1 = np.moveaxis(self.boxes, -1, 0)
        return replace(self, boxes=np.stack([1 - x1, y0, 1 - x0, y1], -1))

    def take_slots(self, slots: Sequence[int]) -> Tracklets:
        """Select slots, in the given order."""
        return Tracklets(
            boxes=self.boxes[:, slots],
            valid=self.valid[:, slots],
            hard=self.hard[:, slots],
            colors=self.colors[slots],
            ids=tuple(self.ids[slot] for slot in slots),
            categories=tuple(self.categories[slot] for slot in slots),
        )

    def select_largest(self, n: int, min_size: float = 0.0) -> Tracklets:
        """Select at most `n` objects: those whose area, summed over the frames, is the largest.

        Objects that are never in the picture are left out, and so are objects whose longer side is
        shorter than `min_size`, as a fraction of the picture, in all frames.
        """
        sides = np.maximum(self.boxes[..., 2:] - self.boxes[..., :2], 0) * self.valid[..., None]
        areas = sides.prod(-1).sum(0)
        longest_sides = sides.max((0, 2), initial=0)
        slots = []
        for slot in np.argsort(-areas, kind="stable"):
            if areas[slot] > 0 and longest_sides[slot] >= min_size:
                slots.append(int(slot))
        return self.take_slots(sorted(slots[:n]))

    def pad(self, n: int) -> Tracklets:
        """Add slots without objects up to `n`, and use the colours of `palette(n)`.

        Raises ValueError if there are more than `n` objects.
        """
        num_frames, num_objects = self.valid.shape
        if num_objects > n:
            raise ValueError(
                f"{num_objects} objects do not fit {n} slots. Call select_largest({n}) first."
            )
        boxes = np.zeros((num_frames, n, 4), np.float32)
        valid = np.zeros((num_frames, n), bool)
        hard = np.zeros((num_frames, n), bool)
        boxes[:, :num_objects] = self.boxes
        valid[:, :num_objects] = self.valid
        hard[:, :num_objects] = self.hard
        no_names = ("",) * (n - num_objects)
        return Tracklets(
            boxes, valid, hard, palette(n), self.ids + no_names, self.categories + no_names
        )

    # ------------------------------------------------------------------------- hard and soft boxes

    def mark_soft(self, rng: np.random.Generator, probability: float) -> Tracklets:
        """Mark boxes as soft with a probability. `grow_soft_boxes` then enlarges them.

        For half of the objects the frames are drawn independently, for the other half all frames
        alike. Otherwise tracklets that are exact in all frames, as people draw them, would hardly
        ever occur in training.
        """
        draws = rng.random(self.hard.shape)
        is_drawn_once = rng.random(self.hard.shape[1]) < SOFT_OBJECT_PROBABILITY
        draws = np.where(is_drawn_once, draws[:1], draws)
        return replace(self, hard=self.hard & (draws >= probability))

    def grow_soft_boxes(self, rng: np.random.Generator | None = None) -> Tracklets:
        """Enlarge soft boxes on each side by Beta(1, 8) of the picture, at most to its border.

        Without `rng` the boxes grow by the mean of Beta(1, 8), which is 1/9. The result is for the
        model. Draw and measure with the boxes before they grew.
        """
        a, b = SOFT_BOX_BETA
        if rng is None:
            margins = np.full(self.boxes.shape, a / (a + b))
        else:
            margins = rng.beta(a, b, self.boxes.shape)
        outward = np.array([-1, -1, 1, 1])
        grown = (self.boxes + margins * outward).clip(0, 1)
        boxes = np.where(self.hard[..., None], self.boxes, grown)
        return replace(self, boxes=boxes.astype(np.float32))

    def only_ends(self) -> Tracklets:
        """Keep the first and the last box of each object, and interpolate between them.

        The interpolated boxes are soft. This is how a user gives a path.
        """
        boxes = self.boxes.copy()
        valid = self.valid.copy()
        hard = np.zeros_like(self.hard)
        for slot in np.flatnonzero(self.valid.any(0)):
            valid_frames = np.flatnonzero(self.valid[:, slot])
            first = int(valid_frames[0])
            last = int(valid_frames[-1])
            keyframes = {first: self.boxes[first, slot], last: self.boxes[last, slot]}
            for frame, box, is_keyframe in interpolate_keyframes(keyframes):
                boxes[frame, slot] = box
                valid[frame, slot] = True
                hard[frame, slot] = is_keyframe
        return replace(self, boxes=boxes, valid=valid, hard=hard)

    # -------------------------------------------------------------------------------- for the model

    def shuffled_colors(self, rng: np.random.Generator) -> Tracklets:
        """Permute the colours, so that the model does not learn that slot 0 is red."""
        return replace(self, colors=self.colors[rng.permutation(len(self.colors))])

    def without_objects(self) -> Tracklets:
        """Empty all slots."""
        return replace(self, valid=np.zeros_like(self.valid))

    def cond(self) -> dict[str, np.ndarray]:
        """Return the model's keyword arguments, all float32.

        boxes (f, n, 4); valid and hard (f, n) with 0 or 1; colors (n, 3).
        """
        return {
            "boxes": np.ascontiguousarray(self.boxes, dtype=np.float32),
            "valid": np.ascontiguousarray(self.valid, dtype=np.float32),
            "hard": np.ascontiguousarray(self.hard, dtype=np.float32),
            "colors": np.ascontiguousarray(self.colors, dtype=np.float32),
        }


def crop_window(
    size: tuple[int, int], width: int, height: int, resize_mode: str = "crop"
) -> tuple[float, float, float, float]:
    """Return the part of a picture that images.load_image keeps, xyxy in fractions of the picture.

    size: (width, height) of the picture. width, height: of the clip. resize_mode: "crop" keeps the
    largest centred part of the clip's aspect ratio, "stretch" keeps all.
    """
    if resize_mode == "stretch":
        return 0.0, 0.0, 1.0, 1.0
    w, h = size
    kept_x = min(1.0, width / height * h / w)
    kept_y = min(1.0, height / width * w / h)
    return (1 - kept_x) / 2, (1 - kept_y) / 2, (1 + kept_x) / 2, (1 + kept_y) / 2


def fit_to_picture(
    tracklets: Tracklets,
    size: tuple[int, int],
    width: int,
    height: int,
    resize_mode: str,
    frame_indices: Sequence[int] | np.ndarray,
    slots: int,
    min_size: float = 0.0,
) -> Tracklets:
    """Return the tracklets of a clip, from those of its source video.

    Args:
        tracklets: of all frames of the source video.
        size: (width, height) of the source video.
        width: of the clip.
        height: of the clip.
        resize_mode: "crop" or "stretch", see `crop_window`.
        frame_indices: frames of the source video that the clip shows.
        slots: number of slots; the largest objects are selected.
        min_size: see `Tracklets.select_largest`.
    """
    crop = crop_window(size, width, height, resize_mode)
    visible = tracklets.at(frame_indices).project(crop)
    return visible.select_largest(slots, min_size).pad(slots)


# ---------------------------------------------------------------------------------------------- draw


def draw_boxes(
    pixel_values: np.ndarray,
    tracklets: Tracklets,
    from_frame: int = 1,
    line_width: int | None = None,
) -> np.ndarray:
    """Draw the outline of each valid box in its colour: the target of self-tracking (Boximator).

    Lines lie inside the boxes. Frame 0 is the condition of the model and stays clean by default.

    Args:
        pixel_values: (f, 3, h, w) uint8.
        tracklets: of the same f frames.
        from_frame: the first frame with boxes.
        line_width: in pixels; by default 4 per 1024 pixels of the width, and at least 2.

    Returns:
        A new array (f, 3, h, w) uint8.
    """
    frames = np.ascontiguousarray(pixel_values.transpose(0, 2, 3, 1))
    if not line_width:
        line_width = max(MIN_LINE_WIDTH, round(LINE_WIDTH * frames.shape[2]))
    for f in range(from_frame, len(frames)):
        picture = Image.fromarray(frames[f])
        for slot in np.flatnonzero(tracklets.valid[f]):
            left, top, right, bottom = to_pixel_corners(tracklets.boxes[f, slot], picture.size)
            # Pillow draws wider lines to the outside of the box
            max_line_width = (min(right - left, bottom - top) + 1) // 2
            ImageDraw.Draw(picture).rectangle(
                (left, top, right, bottom),
                outline=to_rgb(tracklets.colors[slot]),
                width=max(1, min(line_width, max_line_width)),
            )
        frames[f] = np.asarray(picture)
    return frames.transpose(0, 3, 1, 2)


def to_pixel_corners(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the first and last pixel of a box, (left, top, right, bottom), both included.

    box: xyxy in [0, 1]. size: (width, height). The first pixel is always inside the picture.
    """
    w, h = size
    x0, y0, x1, y1 = (box * np.array([w, h, w, h])).round().astype(int).tolist()
    left = min(x0, w - 1)
    top = min(y0, h - 1)
    return left, top, max(x1 - 1, left), max(y1 - 1, top)


def to_rgb(color: np.ndarray) -> tuple[int, ...]:
    """Return a colour (3,) in [0, 1] as integers in [0, 255]."""
    return tuple((color * 255).round().astype(int).tolist())


def render_boxes(
    frames: Sequence[Image.Image], tracklets: Tracklets, min_width: int = RENDER_WIDTH
) -> list[Image.Image]:
    """Return the frames with boxes and ids, for people to look at.

    Hard boxes have thick lines, soft boxes thin ones. Frames are enlarged to `min_width` pixels.
    """
    pictures = [enlarge(frame, min_width).convert("RGB") for frame in frames]
    for f, picture in enumerate(pictures[: len(tracklets)]):
        draw = ImageDraw.Draw(picture)
        font = ImageFont.load_default(max(12, picture.width // 40))
        hard_line_width = max(2, picture.width // 160)
        for slot in np.flatnonzero(tracklets.valid[f]):
            color = to_rgb(tracklets.colors[slot])
            corners = to_pixel_corners(tracklets.boxes[f, slot], picture.size)
            line_width = hard_line_width if tracklets.hard[f, slot] else 1
            draw.rectangle(corners, outline=color, width=line_width)
            draw.text(
                (corners[0] + 3, corners[1] + 1),
                tracklets.ids[slot],
                fill=color,
                font=font,
                stroke_width=1,
                stroke_fill="black",
            )
    return pictures


def beside_boxes(
    frames: Sequence[Image.Image], tracklets: Tracklets, min_width: int = RENDER_WIDTH
) -> list[Image.Image]:
    """Return each frame, enlarged, with a copy to its right that has boxes and ids."""
    pairs = []
    for frame, with_boxes in zip(frames, render_boxes(frames, tracklets, min_width)):
        pairs.append(stack_images([enlarge(frame, min_width), with_boxes], gap=SHEET_GAP))
    return pairs


# -------------------------------------------------------------------------------- functions of boxes


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union of xyxy boxes, 0 for two boxes without area.

    a, b: (..., 4), broadcast against each other. Returns (...) in [0, 1].
    """
    overlap = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = overlap.clip(0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).clip(0).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clip(0).prod(-1)
    union = area_a + area_b - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1e-12), 0.0)


def interpolate_keyframes(
    keyframes: Mapping[int, np.ndarray | None],
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Yield (frame, box, is_keyframe) for each frame in which an object is present.

    Boxes between two keyframes are interpolated linearly.

    keyframes: {frame: box (4,), or None if the object is absent from this frame on}, in the order
    of the frames. The object is absent after the last keyframe.
    """
    frames = list(keyframes)
    for index, frame in enumerate(frames):
        box = keyframes[frame]
        if box is None:
            continue
        yield frame, box, True
        if index + 1 == len(frames):
            continue
        next_frame = frames[index + 1]
        next_box = keyframes[next_frame]
        if next_box is None:
            continue
        for between in range(frame + 1, next_frame):
            t = (between - frame) / (next_frame - frame)
            yield between, (1 - t) * box + t * next_box, False
