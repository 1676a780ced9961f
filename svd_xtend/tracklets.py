"""Tracklets: boxes over time, one slot an object. Public formats in; crops, soft boxes and pictures out.

    python -m svd_xtend.tracklets gt/gt.txt --frames img1 --output_dir outputs/boxes      # look at an annotation
    python -m svd_xtend.tracklets clip_boxes.json --frames clip.mp4 --score tracker.txt   # were the boxes obeyed?

    format           told by                                    frames     boxes
    this project's   "tracklets", or "videos" of such           0-based    xyxy, fractions or pixels: see `own_format`
    BDD100K          a list of frames, or {"frames": [...]}     0-based    box2d {x1, y1, x2, y2}, pixels
    YouTube-VIS      "videos" and "annotations"                 0-based    x y w h or null, pixels
    MOTChallenge     9 or 10 numbers a line, with commas        1-based    x y w h, 1-based pixels
    KITTI tracking   17 or 18 words a line                      0-based    xyxy, pixels

Next: svd_xtend/boxes.py, the layers that see them.
"""

import argparse
import colorsys
import configparser
import functools
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from svd_xtend.video import read_bytes

logger = logging.getLogger("svd_xtend")
LINE_WIDTH = (
    4 / 1024
)  # of a drawn box, as a fraction of the picture's width (TrackDiffusion's SVD branch: 4 px at 1024)
MARGIN = (1, 8)  # soft boxes grow on each side by Beta(1, 8) times the picture's size (Boximator, Sec. 4)


def palette(n):
    """n colours (n, 3) in [0, 1], far apart: hues round the wheel."""
    return np.array([colorsys.hsv_to_rgb(i / max(n, 1), 1.0, 1.0) for i in range(n)], np.float32).reshape(n, 3)


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

    def choose(self, slots):
        """These slots, in this order."""
        return Tracklets(
            self.boxes[:, slots], self.valid[:, slots], self.hard[:, slots], self.colors[slots],
            tuple(self.ids[i] for i in slots), tuple(self.categories[i] for i in slots),
        )  # fmt: skip

    def select(self, n, min_size=0.0):
        """The at most n largest and longest: by area summed over the frames in which they are there. Objects that are
        never in the picture, or whose longer side never reaches `min_size` of it, go."""
        sides = np.maximum(self.boxes[..., 2:] - self.boxes[..., :2], 0) * self.valid[..., None]
        areas, longest = sides.prod(-1).sum(0), sides.max((0, 2), initial=0)
        order = [int(i) for i in np.argsort(-areas, kind="stable") if areas[i] > 0 and longest[i] >= min_size]
        return self.choose(sorted(order[:n]))

    def pad(self, n):
        """To n slots in the colours of `palette(n)`; the new ones hold nothing."""
        f, own = self.valid.shape
        if own > n:
            raise ValueError(f"{own} objects do not fit {n} slots; choose among them first")
        boxes, valid, hard = np.zeros((f, n, 4), np.float32), np.zeros((f, n), bool), np.zeros((f, n), bool)
        boxes[:, :own], valid[:, :own], hard[:, :own] = self.boxes, self.valid, self.hard
        more = ("",) * (n - own)
        return Tracklets(boxes, valid, hard, palette(n), self.ids + more, self.categories + more)

    def soften(self, rng, probability):
        """Mark boxes as soft with this probability; `relaxed` then hides where exactly they were.

        For half of the objects each frame is drawn for itself, for the others all frames as one: tracks that are exact
        throughout, as people draw them, would hardly ever occur otherwise."""
        draws, whole = rng.random(self.hard.shape), rng.random(self.hard.shape[1]) < 0.5
        draws = np.where(whole, draws[:1], draws)
        return replace(self, hard=self.hard & (draws >= probability))

    def relaxed(self, rng=None):
        """Soft boxes grown on each side by Beta(1, 8) of the picture, at most to its border; without rng by the mean,
        1/9. What the model is shown: draw and measure with the boxes before it."""
        a, b = MARGIN
        margins = np.full(self.boxes.shape, a / (a + b)) if rng is None else rng.beta(a, b, self.boxes.shape)
        grown = (self.boxes + margins * np.array([-1, -1, 1, 1])).clip(0, 1)
        return replace(self, boxes=np.where(self.hard[..., None], self.boxes, grown).astype(np.float32))

    def only_ends(self):
        """As a user gives a path: for each object the first and the last box; what lies between is interpolated and soft."""
        boxes, valid, hard = self.boxes.copy(), self.valid.copy(), np.zeros_like(self.hard)
        for slot in np.flatnonzero(self.valid.any(0)):
            first, last = np.flatnonzero(self.valid[:, slot])[[0, -1]]
            given = {int(f): self.boxes[f, slot] for f in (first, last)}
            for f, box, exact in interpolate(given):
                boxes[f, slot], valid[f, slot], hard[f, slot] = box, True, exact
        return replace(self, boxes=boxes, valid=valid, hard=hard)

    def shuffled_colors(self, rng):
        """Another order of the colours: the model must not learn that slot 0 is red."""
        return replace(self, colors=self.colors[rng.permutation(len(self.colors))])

    def none(self):
        """The same slots with nothing in them."""
        return replace(self, valid=np.zeros_like(self.valid))

    def cond(self):
        """Keyword arguments of the model: boxes (f, n, 4), valid (f, n), hard (f, n), colors (n, 3), all float32."""
        names = ("boxes", "valid", "hard", "colors")
        return {name: np.ascontiguousarray(getattr(self, name), dtype=np.float32) for name in names}


# ---------------------------------------------------------------------------------------------------------------- read


class Record(NamedTuple):
    """One box of a public format: frame 0-based, xyxy in pixels, edges between pixels; box None: only that the frame is."""

    video: str
    frame: int
    id: str = ""
    category: str = ""
    box: tuple = None
    size: tuple = None


def malformed(file, where, expected, found):
    found = str(found)
    return ValueError(f"{file}: {where}: expected {expected}, got {found[:80]}{'...' * (len(found) > 80)}")


def read_tracklets(file, size=None):
    """{video name: Tracklets} of an annotation file, in any of the formats above; at least one.

    size: (width, height) in pixels of the pictures, for formats that do not tell it. Boxes that are not finite or have
    no area are left out, with a warning. Raises ValueError with file, record and what was expected.
    """
    file = Path(file)
    return parse(file, size, file.stat().st_mtime_ns if file.exists() else None)


@functools.lru_cache(maxsize=2)  # a file of many videos is asked once for each of them
def parse(file, size, written):
    try:
        text = read_bytes(file).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as an annotation file ({error})") from error
    try:
        found = dispatch(file, text, size)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if str(error).startswith(str(file)):
            raise
        formats = "one of the formats that svd_xtend/tracklets.py lists"
        raise malformed(file, "the file", formats, f"{type(error).__name__}: {error}") from error
    if not found:
        raise malformed(file, "the file", "at least one video", "none")
    return found


def dispatch(file, text, size):
    if text.lstrip()[:1] not in ("[", "{"):
        words = next((line for line in text.splitlines() if line.strip()), "")
        return assemble(file, motchallenge(file, text) if "," in words else kitti(file, text), size)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise malformed(file, "the file", "JSON", error) from error
    if "tracklets" in document:
        return {file.stem: own_format(file, document, "")}
    if "annotations" in document:
        return assemble(file, youtube_vis(file, document), size)
    if isinstance(document, list) or "frames" in document:
        return assemble(file, scalabel(file, document), size)
    if isinstance(document.get("videos"), dict):
        return {name: own_format(file, told, f"videos.{name}: ") for name, told in document["videos"].items()}
    raise malformed(file, "the file", '"tracklets", "videos", "annotations" or "frames"', sorted(document))


def numbers(file, where, expected, values):
    """floats, or the error that says what they should have been. Booleans and text are not numbers."""
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        raise malformed(file, where, expected, values)
    if any(isinstance(v, (bool, str)) or not isinstance(v, (int, float)) for v in values):
        raise malformed(file, where, expected, values)
    return tuple(float(v) for v in values)


def scalabel(file, document):
    """BDD100K MOT 2020 (Scalabel): a list of frames, or {"frames": [...]}."""
    frames = document if isinstance(document, list) else document["frames"]
    count = {}
    if not isinstance(frames, list):
        raise malformed(file, "frames", "a list", frames)
    for i, frame in enumerate(frames):
        if not isinstance(frame, dict):
            raise malformed(file, f"frame {i}", "an object with name and labels", frame)
        video = str(frame.get("videoName") or file.stem)
        at = frame.get("frameIndex", frame.get("index", count.get(video, 0)))
        if not isinstance(at, int) or at < 0:
            raise malformed(file, f"frame {i}: frameIndex", "an integer from 0 on", at)
        count[video] = at + 1
        size = frame.get("size") or (document.get("config") or {}).get("imageSize") if isinstance(document, dict) else frame.get("size")  # fmt: skip
        size = (size["width"], size["height"]) if size else None
        yield Record(video, at, size=size)
        for j, label in enumerate(frame.get("labels") or []):
            where = f"frame {i}, label {j}"
            if not isinstance(label, dict) or "id" not in label:
                raise malformed(file, where, "an object with id and box2d", label)
            if label.get("box2d") is None:  # labels of other tasks
                continue
            box = label["box2d"]
            box = [box.get(k) for k in ("x1", "y1", "x2", "y2")] if isinstance(box, dict) else box
            x1, y1, x2, y2 = numbers(file, f"{where}: box2d", "{x1, y1, x2, y2} in pixels", box)
            # the right and lower pixel belong to the box
            yield Record(video, at, str(label["id"]), str(label.get("category", "")), (x1, y1, x2 + 1, y2 + 1), size)


def youtube_vis(file, document):
    """YouTube-VIS: an annotation is a tracklet, null where it is absent."""
    names = {c["id"]: c["name"] for c in document.get("categories", [])}
    videos = {}
    for i, video in enumerate(document.get("videos", [])):
        try:
            files, size = video.get("file_names") or [], (video["width"], video["height"])
            name = Path(files[0]).parts[-2] if files and len(Path(files[0]).parts) > 1 else str(video["id"])
            videos[video["id"]] = name, size
        except (KeyError, TypeError, AttributeError) as error:
            raise malformed(file, f"videos[{i}]", "id, width, height and file_names", video) from error
        if files or video.get("length"):
            yield Record(name, int(video.get("length") or len(files)) - 1, size=size)
    for i, annotation in enumerate(document["annotations"]):
        if not isinstance(annotation, dict) or annotation.get("video_id") not in videos:
            raise malformed(file, f"annotations[{i}]: video_id", "the id of one of the videos", annotation)
        name, size = videos[annotation["video_id"]]
        for f, box in enumerate(annotation.get("bboxes") or []):
            if box is not None:
                x, y, w, h = numbers(file, f"annotations[{i}].bboxes[{f}]", "[x, y, w, h] in pixels, or null", box)
                category = names.get(annotation.get("category_id"), "")
                yield Record(name, f, str(annotation.get("id", i)), category, (x, y, x + w, y + h), size)


def motchallenge(file, text):
    """MOTChallenge gt.txt (9 columns) and MOT15 or a tracker's result (10). The size is in seqinfo.ini, if anywhere.

    Lines whose seventh number is 0 are to be ignored. <sequence>/gt/gt.txt is named after the sequence."""
    folder = file.absolute().parent
    sequence = folder.parent if folder.name in ("gt", "det") else folder
    info = configparser.ConfigParser()
    info.read(sequence / "seqinfo.ini")
    told = info["Sequence"] if "Sequence" in info else {}
    size = (int(told["imWidth"]), int(told["imHeight"])) if "imWidth" in told and "imHeight" in told else None
    name = sequence.name if folder.name in ("gt", "det") else file.stem
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        expected = "9 or 10 numbers: frame from 1, id, left, top, width, height, ..."
        try:
            row = [float(word) for word in line.split(",")]
        except ValueError as error:
            raise malformed(file, f"line {i}", expected, line) from error
        if len(row) not in (9, 10) or not (row[0] >= 1 and row[0] == int(row[0])):
            raise malformed(file, f"line {i}", expected, line)
        if row[1] < 0:
            raise malformed(file, f"line {i}", "an id from 0 on (these are detections; run a tracker)", line)
        if row[6] != 0:
            x, y, w, h = row[2] - 1, row[3] - 1, row[4], row[5]
            category = f"{row[7]:g}" if len(row) == 9 else ""
            yield Record(name, int(row[0]) - 1, f"{row[1]:g}", category, (x, y, x + w, y + h), size)


def kitti(file, text):
    """KITTI tracking, label_02/0001.txt: frame, track, type, ..., left, top, right, bottom; DontCare is left out."""
    for i, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        expected = "17 or 18 words: frame from 0, track, type, ..."
        try:
            frame, box = int(words[0]), tuple(float(word) for word in words[6:10])
        except ValueError as error:
            raise malformed(file, f"line {i}", expected, line) from error
        if len(words) not in (17, 18) or frame < 0:
            raise malformed(file, f"line {i}", expected, line)
        wanted = words[2] != "DontCare"
        yield Record(file.stem, frame, *((words[1], words[2], box) if wanted else ()))


def assemble(file, records, size=None):
    """{video: Tracklets} of records, whose own size wins over `size`. Slots are in the order in which ids appear."""
    videos, dropped = {}, 0
    for r in records:
        frames, rows, slots = videos.setdefault(r.video, ([0], [], {}))
        frames[0] = max(frames[0], r.frame + 1)
        if r.box is None:
            continue
        if r.size is None and size is None:
            raise ValueError(f"{file}: does not tell the pictures' size; pass it, or the folder of frames")
        width, height = r.size or size
        if not np.isfinite(r.box).all() or r.box[2] <= r.box[0] or r.box[3] <= r.box[1]:
            dropped += 1
            continue
        slot = slots.setdefault(r.id, (len(slots), r.category))[0]
        rows.append((r.frame, slot, r.box[0] / width, r.box[1] / height, r.box[2] / width, r.box[3] / height))
    if dropped:
        logger.warning("%s: left out %d boxes that are not finite or have no area", file, dropped)
    found = {}
    for video, ((f,), rows, slots) in videos.items():
        n, table = len(slots), np.array(rows, np.float64).reshape(-1, 6)
        at = tuple(table[:, :2].astype(int).T)
        boxes, valid = np.zeros((f, n, 4), np.float32), np.zeros((f, n), bool)
        boxes[at], valid[at] = table[:, 2:], True
        categories = tuple(category for _, category in slots.values())
        found[video] = Tracklets(boxes, valid, valid.copy(), palette(n), tuple(slots), categories)
    return found


def own_format(file, told, prefix):
    """This project's JSON, made to be written by hand:

        {"size": [854, 480],             optional: boxes are in these pixels; without it, in fractions of the picture
         "frames": 14,                   optional: how many there are; default: up to the last one named
         "tracklets": [
           {"id": "rhino", "category": "animal",
            "boxes": {"0": [100, 80, 300, 240], "13": [400, 90, 600, 250], "20": null}}]}

    Between two frames that are given the box is interpolated linearly and soft; null: gone from this frame on.
    """
    width, height = told.get("size") or (1, 1)
    tracks, f = told["tracklets"], told.get("frames", 0)
    if not isinstance(tracks, list):
        raise malformed(file, f"{prefix}tracklets", "a list", tracks)
    keys = []
    for i, track in enumerate(tracks):
        where = f"{prefix}tracklets[{i}]"
        if not isinstance(track, dict) or not isinstance(track.get("boxes"), dict):
            raise malformed(file, where, '{"id": ..., "boxes": {"0": [x1, y1, x2, y2], ...}}', track)
        given = {}
        for frame, box in track["boxes"].items():
            if not frame.isdigit():
                raise malformed(file, f"{where}: boxes", "frames counted from 0", frame)
            scale = np.array([width, height, width, height])
            expected = "[x1, y1, x2, y2] with x1 <= x2 and y1 <= y2, or null"
            box = None if box is None else np.array(numbers(file, f"{where}, frame {frame}", expected, box)) / scale
            if box is not None and not (np.isfinite(box).all() and box[0] <= box[2] and box[1] <= box[3]):
                raise malformed(file, f"{where}, frame {frame}", expected, track["boxes"][frame])
            given[int(frame)] = box
        keys.append(dict(sorted(given.items())))
        f = max([f, *(k + 1 for k in given)])
    n = len(tracks)
    boxes, valid, hard = np.zeros((f, n, 4), np.float32), np.zeros((f, n), bool), np.zeros((f, n), bool)
    for slot, given in enumerate(keys):
        for frame, box, hard_here in interpolate(given):
            boxes[frame, slot], valid[frame, slot], hard[frame, slot] = box, True, hard_here
    ids = tuple(str(track.get("id", i)) for i, track in enumerate(tracks))
    return Tracklets(boxes, valid, hard, palette(n), ids, tuple(str(t.get("category", "")) for t in tracks))


def interpolate(given):
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


def write_tracklets(file, tracklets):
    """Write this project's JSON: the hard boxes, in fractions of the picture; soft ones come back by interpolation."""
    document = {"frames": len(tracklets), "tracklets": []}
    for slot, (id, category) in enumerate(zip(tracklets.ids, tracklets.categories)):
        boxes, there = {}, False
        for frame in range(len(tracklets)):
            now = bool(tracklets.valid[frame, slot])
            if now and tracklets.hard[frame, slot]:
                boxes[frame] = [round(float(x), 5) for x in tracklets.boxes[frame, slot]]
            elif there and not now:
                boxes[frame] = None
            there = now
        document["tracklets"].append({"id": id, "category": category, "boxes": boxes})
    Path(file).write_text(json.dumps(document))


def tracklets_of(source, video, size, only=False, texts=True):
    """Tracklets of one video folder from `source`, an annotation file or a folder of them; None where it has none.

    A folder may hold <video>.json, <video>.txt, <video>/tracklets.json or <video>/gt/gt.txt. only: the folder that is
    trained on holds no other video, so that a file of one video needs no matching name. texts: <video>.txt is no caption."""
    source = Path(source)
    if source.is_dir():
        choices = (f"{video}.json", *[f"{video}.txt"] * texts, f"{video}/tracklets.json", f"{video}/gt/gt.txt")
        file = next((source / c for c in choices if (source / c).is_file()), None)
        found = read_tracklets(file, size) if file else {}
        return next(iter(found.values()), None) if len(found) == 1 else found.get(video)
    found = read_tracklets(source, size)
    return next(iter(found.values())) if only and len(found) == 1 else found.get(video)


def of_clip(path, source, size, only=False):
    """Tracklets of the video at `path`, a folder of frames or a file, from `source`, as tracklets_of has it; None: those that lie
    in it or beside it, where a <video>.txt is a caption."""
    path = Path(path)
    name = path.name if path.is_dir() else path.stem
    return tracklets_of(source or path.parent, name, size, only, texts=source is not None)


def tracklets_for(source, path, size):
    """Those of `source` for a picture: of the video in whose folder it lies or after which it is named, or the only ones."""
    names = Path(path).absolute().parent.name, Path(path).stem
    found = read_tracklets(source, size)
    for name in names if len(found) > 1 else found:
        if name in found:
            return found[name]
    raise ValueError(
        f"{source}: has {len(found)} videos, none of them named {' or '.join(names)}: {sorted(found)[:5]}"
    )


def crop_of(size, width, height, resize_mode="crop"):
    """What video.load_image keeps of a picture of `size` (w, h), xyxy in fractions of it."""
    if resize_mode == "stretch":
        return 0.0, 0.0, 1.0, 1.0
    w, h = size
    keep_x, keep_y = min(1.0, width / height * h / w), min(1.0, height / width * w / h)
    return (1 - keep_x) / 2, (1 - keep_y) / 2, (1 + keep_x) / 2, (1 + keep_y) / 2


def fit(tracklets, size, width, height, resize_mode, frames, n, min_size=0.0):
    """Tracklets of pictures of `size` -> those of a clip of `frames`, by their numbers: crop, at most n objects, n slots."""
    seen = tracklets.at(frames).project(crop_of(size, width, height, resize_mode))
    return seen.select(n, min_size).pad(n)


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
            color, box = rgb(tracklets.colors[n]), pixel_box(tracklets.boxes[f, n], picture.size)
            most = (min(box[2] - box[0], box[3] - box[1]) + 1) // 2  # beyond it Pillow draws outwards
            ImageDraw.Draw(picture).rectangle(box, outline=color, width=max(1, min(line, most)))
        frames[f] = np.asarray(picture)
    return frames.transpose(0, 3, 1, 2)


def pixel_box(box, size):
    """xyxy in [0, 1] -> the corner pixels, of which at least one is in the picture."""
    w, h = size
    x0, y0, x1, y1 = (box * np.array([w, h, w, h])).round().astype(int).tolist()
    x0, y0 = min(x0, w - 1), min(y0, h - 1)
    return x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)


def rgb(color):
    return tuple((color * 255).round().astype(int).tolist())


def render(frames, tracklets, least=256):
    """For people: PIL frames enlarged, hard boxes in a thick line, soft ones in a thin one, ids beside them."""
    from PIL import ImageDraw, ImageFont

    from svd_xtend.video import enlarge

    pictures = [enlarge(frame, least).convert("RGB") for frame in frames]
    for f, picture in enumerate(pictures[: len(tracklets)]):
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(12, picture.width // 40))
        for n in np.flatnonzero(tracklets.valid[f]):
            color, box = rgb(tracklets.colors[n]), pixel_box(tracklets.boxes[f, n], picture.size)
            draw.rectangle(box, outline=color, width=max(2, picture.width // 160) if tracklets.hard[f, n] else 1)
            where = box[0] + 3, box[1] + 1
            draw.text(where, tracklets.ids[n], fill=color, font=font, stroke_width=1, stroke_fill="black")
    return pictures


def beside(frames, tracklets, least=256):
    """The clean frames, enlarged, and to the right of each the same with its boxes."""
    from svd_xtend.video import GAP, enlarge, stack

    return [stack([enlarge(a, least), b], gap=GAP) for a, b in zip(frames, render(frames, tracklets, least))]


# --------------------------------------------------------------------------------------------------------------- score


def iou(a, b):
    """Intersection over union of xyxy boxes, (..., 4) and (..., 4) broadcast."""
    corner = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = corner.clip(0).prod(-1)
    total = (a[..., 2:] - a[..., :2]).clip(0).prod(-1) + (b[..., 2:] - b[..., :2]).clip(0).prod(-1) - both
    return np.where(total > 0, both / np.maximum(total, 1e-12), 0.0)


def score(asked, found, first=1):
    """How well what a tracker found in a video obeys the boxes asked for, from frame `first` on (frame 0 was given).

    mean_iou and success (IoU >= 0.5), over the asked boxes, under the best assignment in each frame, misses counting 0;
    mota and idf1 at IoU 0.5 by motmetrics (Bernardin & Stiefelhagen 2008; Ristani et al. 2016)."""
    import motmetrics
    from scipy.optimize import linear_sum_assignment

    overlaps, count, accumulator = [], 0, motmetrics.MOTAccumulator(auto_id=True)
    found = found.at(range(len(asked)))
    for f in range(first, len(asked)):
        ours, theirs = np.flatnonzero(asked.valid[f]), np.flatnonzero(found.valid[f])
        table = iou(asked.boxes[f, ours][:, None], found.boxes[f, theirs][None])
        overlaps += table[linear_sum_assignment(-table)].tolist()
        count += len(ours)
        accumulator.update(ours, theirs, np.where(table >= 0.5, 1 - table, np.nan))
    told = motmetrics.metrics.create().compute(accumulator, metrics=["mota", "idf1"], return_dataframe=False)
    overlaps, count = np.array(overlaps), max(count, 1)
    figures = {"boxes": count, "mean_iou": overlaps.sum() / count, "success": (overlaps >= 0.5).sum() / count, **told}
    return {name: float(value) for name, value in figures.items()}


def main(args):
    """Render an annotation, or score a tracker's output against it."""
    from PIL import Image

    from svd_xtend import video

    clip = video.read_clip(args.frames) if Path(args.frames).is_file() else video.list_frames(args.frames)
    clip = [frame if isinstance(frame, Image.Image) else video.load_image(frame) for frame in clip[: args.num_frames]]
    size = clip[0].size
    asked = read_tracklets(args.tracklets, size)
    name = args.video or next(iter(asked))
    if name not in asked:
        raise SystemExit(f"--video {name}: not in {args.tracklets}, which has {', '.join(list(asked)[:5])}")
    if args.score:
        found = next(iter(read_tracklets(args.score, size).values()))
        print(json.dumps(score(asked[name].at(range(len(clip))), found), indent=1))
        return
    video.write_clip(Path(args.output_dir, name), render(clip, asked[name]), args.fps)
    print(f"{Path(args.output_dir, name)}.mp4 .gif .png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tracklets", help="annotation file, in any of the formats above")
    parser.add_argument("--frames", required=True, help="folder of the video's frames, or a video file")
    parser.add_argument("--video", help="which video of the file; default: its first")
    parser.add_argument(
        "--score", metavar="FILE", help="a tracker's output on the generated video, MOTChallenge format"
    )
    parser.add_argument("--num_frames", type=int, help="render only so many; default: all")
    parser.add_argument("--fps", type=float, default=7)
    parser.add_argument("--output_dir", default="outputs/boxes")
    main(parser.parse_args())
