"""TODO data.annotations."""

import configparser
import functools
import json
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from svd_xtend.data.images import read_bytes
from svd_xtend.data.tracklets import Tracklets, interpolate_keyframes, palette

logger = logging.getLogger("svd_xtend")


# ---------------------------------------------------------------------------------------------------------------- read


class Record(NamedTuple):
    """One box of a public format: frame 0-based, xyxy in pixels, edges between pixels; box None: only that the frame is."""

    video: str
    frame: int
    id: str = ""
    category: str = ""
    box: tuple = None
    size: tuple = None


def malformed_error(file, where, expected, found):
    found = str(found)
    return ValueError(
        f"{file}: {where}: expected {expected}, got {found[:80]}{'...' * (len(found) > 80)}"
    )


def read_tracklets(file, size=None):
    """{video name: Tracklets} of an annotation file, in any of the formats above; at least one.

    size: (width, height) in pixels of the pictures, for formats that do not tell it. Boxes that are not finite or have
    no area are left out, with a warning. Raises ValueError with file, record and what was expected.
    """
    file = Path(file)
    return parse_file(file, size, file.stat().st_mtime_ns if file.exists() else None)


@functools.lru_cache(maxsize=2)  # a file of many videos is asked once for each of them
def parse_file(file, size, written):
    try:
        text = read_bytes(file).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as an annotation file ({error})") from error
    try:
        found = parse_by_format(file, text, size)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if str(error).startswith(str(file)):
            raise
        formats = "one of the formats that svd_xtend/tracklets.py lists"
        raise malformed_error(
            file, "the file", formats, f"{type(error).__name__}: {error}"
        ) from error
    if not found:
        raise malformed_error(file, "the file", "at least one video", "none")
    return found


def parse_by_format(file, text, size):
    if text.lstrip()[:1] not in ("[", "{"):
        words = next((line for line in text.splitlines() if line.strip()), "")
        return assemble_tracklets(
            file, parse_motchallenge(file, text) if "," in words else parse_kitti(file, text), size
        )
    try:
        document = json.loads(text)
    except ValueError as error:
        raise malformed_error(file, "the file", "JSON", error) from error
    if "tracklets" in document:
        return {file.stem: parse_own_format(file, document, "")}
    if "annotations" in document:
        return assemble_tracklets(file, parse_youtube_vis(file, document), size)
    if isinstance(document, list) or "frames" in document:
        return assemble_tracklets(file, parse_scalabel(file, document), size)
    if isinstance(document.get("videos"), dict):
        return {
            name: parse_own_format(file, told, f"videos.{name}: ")
            for name, told in document["videos"].items()
        }
    raise malformed_error(
        file, "the file", '"tracklets", "videos", "annotations" or "frames"', sorted(document)
    )


def parse_numbers(file, where, expected, values):
    """floats, or the error that says what they should have been. Booleans and text are not numbers."""
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        raise malformed_error(file, where, expected, values)
    if any(isinstance(v, (bool, str)) or not isinstance(v, (int, float)) for v in values):
        raise malformed_error(file, where, expected, values)
    return tuple(float(v) for v in values)


def parse_scalabel(file, document):
    """BDD100K MOT 2020 (Scalabel): a list of frames, or {"frames": [...]}."""
    frames = document if isinstance(document, list) else document["frames"]
    count = {}
    if not isinstance(frames, list):
        raise malformed_error(file, "frames", "a list", frames)
    for i, frame in enumerate(frames):
        if not isinstance(frame, dict):
            raise malformed_error(file, f"frame {i}", "an object with name and labels", frame)
        video = str(frame.get("videoName") or file.stem)
        at = frame.get("frameIndex", frame.get("index", count.get(video, 0)))
        if not isinstance(at, int) or at < 0:
            raise malformed_error(file, f"frame {i}: frameIndex", "an integer from 0 on", at)
        count[video] = at + 1
        size = frame.get("size") or (document.get("config") or {}).get("imageSize") if isinstance(document, dict) else frame.get("size")  # fmt: skip
        size = (size["width"], size["height"]) if size else None
        yield Record(video, at, size=size)
        for j, label in enumerate(frame.get("labels") or []):
            where = f"frame {i}, label {j}"
            if not isinstance(label, dict) or "id" not in label:
                raise malformed_error(file, where, "an object with id and box2d", label)
            if label.get("box2d") is None:  # labels of other tasks
                continue
            box = label["box2d"]
            box = [box.get(k) for k in ("x1", "y1", "x2", "y2")] if isinstance(box, dict) else box
            x1, y1, x2, y2 = parse_numbers(
                file, f"{where}: box2d", "{x1, y1, x2, y2} in pixels", box
            )
            # the right and lower pixel belong to the box
            yield Record(
                video,
                at,
                str(label["id"]),
                str(label.get("category", "")),
                (x1, y1, x2 + 1, y2 + 1),
                size,
            )


def parse_youtube_vis(file, document):
    """YouTube-VIS: an annotation is a tracklet, null where it is absent."""
    names = {c["id"]: c["name"] for c in document.get("categories", [])}
    videos = {}
    for i, video in enumerate(document.get("videos", [])):
        try:
            files, size = video.get("file_names") or [], (video["width"], video["height"])
            name = (
                Path(files[0]).parts[-2]
                if files and len(Path(files[0]).parts) > 1
                else str(video["id"])
            )
            videos[video["id"]] = name, size
        except (KeyError, TypeError, AttributeError) as error:
            raise malformed_error(
                file, f"videos[{i}]", "id, width, height and file_names", video
            ) from error
        if files or video.get("length"):
            yield Record(name, int(video.get("length") or len(files)) - 1, size=size)
    for i, annotation in enumerate(document["annotations"]):
        if not isinstance(annotation, dict) or annotation.get("video_id") not in videos:
            raise malformed_error(
                file, f"annotations[{i}]: video_id", "the id of one of the videos", annotation
            )
        name, size = videos[annotation["video_id"]]
        for f, box in enumerate(annotation.get("bboxes") or []):
            if box is not None:
                x, y, w, h = parse_numbers(
                    file, f"annotations[{i}].bboxes[{f}]", "[x, y, w, h] in pixels, or null", box
                )
                category = names.get(annotation.get("category_id"), "")
                yield Record(
                    name, f, str(annotation.get("id", i)), category, (x, y, x + w, y + h), size
                )


def parse_motchallenge(file, text):
    """MOTChallenge gt.txt (9 columns) and MOT15 or a tracker's result (10). The size is in seqinfo.ini, if anywhere.

    Lines whose seventh number is 0 are to be ignored. <sequence>/gt/gt.txt is named after the sequence."""
    folder = file.absolute().parent
    sequence = folder.parent if folder.name in ("gt", "det") else folder
    info = configparser.ConfigParser()
    info.read(sequence / "seqinfo.ini")
    told = info["Sequence"] if "Sequence" in info else {}
    size = (
        (int(told["imWidth"]), int(told["imHeight"]))
        if "imWidth" in told and "imHeight" in told
        else None
    )
    name = sequence.name if folder.name in ("gt", "det") else file.stem
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        expected = "9 or 10 numbers: frame from 1, id, left, top, width, height, ..."
        try:
            row = [float(word) for word in line.split(",")]
        except ValueError as error:
            raise malformed_error(file, f"line {i}", expected, line) from error
        if len(row) not in (9, 10) or not (row[0] >= 1 and row[0] == int(row[0])):
            raise malformed_error(file, f"line {i}", expected, line)
        if row[1] < 0:
            raise malformed_error(
                file, f"line {i}", "an id from 0 on (these are detections; run a tracker)", line
            )
        if row[6] != 0:
            x, y, w, h = row[2] - 1, row[3] - 1, row[4], row[5]
            category = f"{row[7]:g}" if len(row) == 9 else ""
            yield Record(name, int(row[0]) - 1, f"{row[1]:g}", category, (x, y, x + w, y + h), size)


def parse_kitti(file, text):
    """KITTI tracking, label_02/0001.txt: frame, track, type, ..., left, top, right, bottom; DontCare is left out."""
    for i, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        expected = "17 or 18 words: frame from 0, track, type, ..."
        try:
            frame, box = int(words[0]), tuple(float(word) for word in words[6:10])
        except ValueError as error:
            raise malformed_error(file, f"line {i}", expected, line) from error
        if len(words) not in (17, 18) or frame < 0:
            raise malformed_error(file, f"line {i}", expected, line)
        wanted = words[2] != "DontCare"
        yield Record(file.stem, frame, *((words[1], words[2], box) if wanted else ()))


def assemble_tracklets(file, records, size=None):
    """{video: Tracklets} of records, whose own size wins over `size`. Slots are in the order in which ids appear."""
    videos, dropped = {}, 0
    for r in records:
        frames, rows, slots = videos.setdefault(r.video, ([0], [], {}))
        frames[0] = max(frames[0], r.frame + 1)
        if r.box is None:
            continue
        if r.size is None and size is None:
            raise ValueError(
                f"{file}: does not tell the pictures' size; pass it, or the folder of frames"
            )
        width, height = r.size or size
        if not np.isfinite(r.box).all() or r.box[2] <= r.box[0] or r.box[3] <= r.box[1]:
            dropped += 1
            continue
        slot = slots.setdefault(r.id, (len(slots), r.category))[0]
        rows.append(
            (
                r.frame,
                slot,
                r.box[0] / width,
                r.box[1] / height,
                r.box[2] / width,
                r.box[3] / height,
            )
        )
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


def parse_own_format(file, told, prefix):
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
        raise malformed_error(file, f"{prefix}tracklets", "a list", tracks)
    keys = []
    for i, track in enumerate(tracks):
        where = f"{prefix}tracklets[{i}]"
        if not isinstance(track, dict) or not isinstance(track.get("boxes"), dict):
            raise malformed_error(
                file, where, '{"id": ..., "boxes": {"0": [x1, y1, x2, y2], ...}}', track
            )
        given = {}
        for frame, box in track["boxes"].items():
            if not frame.isdigit():
                raise malformed_error(file, f"{where}: boxes", "frames counted from 0", frame)
            scale = np.array([width, height, width, height])
            expected = "[x1, y1, x2, y2] with x1 <= x2 and y1 <= y2, or null"
            box = (
                None
                if box is None
                else np.array(parse_numbers(file, f"{where}, frame {frame}", expected, box)) / scale
            )
            if box is not None and not (
                np.isfinite(box).all() and box[0] <= box[2] and box[1] <= box[3]
            ):
                raise malformed_error(
                    file, f"{where}, frame {frame}", expected, track["boxes"][frame]
                )
            given[int(frame)] = box
        keys.append(dict(sorted(given.items())))
        f = max([f, *(k + 1 for k in given)])
    n = len(tracks)
    boxes, valid, hard = (
        np.zeros((f, n, 4), np.float32),
        np.zeros((f, n), bool),
        np.zeros((f, n), bool),
    )
    for slot, given in enumerate(keys):
        for frame, box, hard_here in interpolate_keyframes(given):
            boxes[frame, slot], valid[frame, slot], hard[frame, slot] = box, True, hard_here
    ids = tuple(str(track.get("id", i)) for i, track in enumerate(tracks))
    return Tracklets(
        boxes, valid, hard, palette(n), ids, tuple(str(t.get("category", "")) for t in tracks)
    )


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


def find_tracklets(source, video, size, is_only_video=False, texts=True):
    """Tracklets of one video folder from `source`, an annotation file or a folder of them; None where it has none.

    A folder may hold <video>.json, <video>.txt, <video>/tracklets.json or <video>/gt/gt.txt. only: the folder that is
    trained on holds no other video, so that a file of one video needs no matching name. texts: <video>.txt is no caption."""
    source = Path(source)
    if source.is_dir():
        choices = (
            f"{video}.json",
            *[f"{video}.txt"] * texts,
            f"{video}/tracklets.json",
            f"{video}/gt/gt.txt",
        )
        file = next((source / c for c in choices if (source / c).is_file()), None)
        found = read_tracklets(file, size) if file else {}
        return next(iter(found.values()), None) if len(found) == 1 else found.get(video)
    found = read_tracklets(source, size)
    return next(iter(found.values())) if is_only_video and len(found) == 1 else found.get(video)


def find_clip_tracklets(path, source, size, is_only_video=False):
    """Tracklets of the video at `path`, a folder of frames or a file, from `source`, as find_tracklets has it; None: those that lie
    in it or beside it, where a <video>.txt is a caption."""
    path = Path(path)
    name = path.name if path.is_dir() else path.stem
    return find_tracklets(source or path.parent, name, size, is_only_video, texts=source is not None)


def find_picture_tracklets(source, path, size):
    """Those of `source` for a picture: of the video in whose folder it lies or after which it is named, or the only ones."""
    names = Path(path).absolute().parent.name, Path(path).stem
    found = read_tracklets(source, size)
    for name in names if len(found) > 1 else found:
        if name in found:
            return found[name]
    raise ValueError(
        f"{source}: has {len(found)} videos, none of them named {' or '.join(names)}: {sorted(found)[:5]}"
    )
