"""Read and write annotation files: boxes of objects in videos, in public formats.

    videos = read_tracklets("labels.json", size=(1280, 720))      # {video name: Tracklets}
    write_tracklets("tracklets.json", videos["b1c66a42"])

A file's format is recognised by its content:

    format           recognised by                              frames from  boxes
    this project's   "tracklets", or "videos" with "tracklets"  0            xyxy, see `parse_project`
    BDD100K          a list of frames, or {"frames": [...]}     0            box2d {x1, y1, x2, y2}, pixels
    YouTube-VIS      "videos" and "annotations"                 0            x y w h or null, pixels
    MOTChallenge     9 or 10 numbers per line, with commas      1            x y w h, pixels from 1
    KITTI tracking   17 or 18 words per line                    0            xyxy, pixels
"""

from __future__ import annotations

import configparser
import functools
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from svd_xtend.data.images import read_bytes
from svd_xtend.data.tracklets import Tracklets, interpolate_keyframes, palette

logger = logging.getLogger("svd_xtend")

MAX_QUOTED_CHARACTERS = 80  # of a malformed value in an error message

Size = tuple[float, float]  # (width, height) in pixels


@dataclass(frozen=True)
class Record:
    """One box of one object in one frame, as a public format has it.

    A record without a box says only that the video has this frame.
    """

    video: str
    frame: int  # from 0
    id: str = ""
    category: str = ""
    # xyxy in pixels: coordinates are edges between pixels, so the right-most pixel ends at `width`
    box: tuple[float, float, float, float] | None = None
    size: Size | None = None


def malformed_error(file: Path, place: str, expected: str, actual: object) -> ValueError:
    """Return the error for a malformed file: where, what was expected and what was found."""
    quoted = str(actual)
    if len(quoted) > MAX_QUOTED_CHARACTERS:
        quoted = quoted[:MAX_QUOTED_CHARACTERS] + "..."
    return ValueError(f"{file}: {place}: expected {expected}, got {quoted}")


# ---------------------------------------------------------------------------------------------- read


def read_tracklets(file: str | Path, size: Size | None = None) -> dict[str, Tracklets]:
    """Return {video name: Tracklets} of an annotation file in one of the formats above.

    Boxes that are not finite or have no area are left out, with a warning. There is at least one
    video.

    size: (width, height) of the pictures in pixels, for files that do not contain it.

    Raises ValueError with the file, the place in it and what was expected there.
    """
    file = Path(file)
    modification_time = file.stat().st_mtime_ns if file.exists() else None
    return parse_file(file, size, modification_time)


# A file of many videos is read once for each of them. `modification_time` is part of the key.
@functools.lru_cache(maxsize=2)
def parse_file(
    file: Path, size: Size | None, modification_time: int | None
) -> dict[str, Tracklets]:
    """Return {video name: Tracklets} of a file, from memory if it has not changed."""
    try:
        text = read_bytes(file).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as an annotation file ({error})") from error
    try:
        videos = parse_by_format(file, text, size)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if str(error).startswith(str(file)):
            raise
        formats = "one of the formats that svd_xtend/data/annotations.py lists"
        actual = f"{type(error).__name__}: {error}"
        raise malformed_error(file, "the file", formats, actual) from error
    if not videos:
        raise malformed_error(file, "the file", "at least one video", "none")
    return videos


def parse_by_format(file: Path, text: str, size: Size | None) -> dict[str, Tracklets]:
    """Recognise the format of a file's text and parse it."""
    is_json = text.lstrip()[:1] in ("[", "{")
    if not is_json:
        lines = [line for line in text.splitlines() if line.strip()]
        if lines and "," in lines[0]:
            records = parse_motchallenge(file, text)
        else:
            records = parse_kitti(file, text)
        return assemble_tracklets(file, records, size)

    try:
        document = json.loads(text)
    except ValueError as error:
        raise malformed_error(file, "the file", "JSON", error) from error
    if "tracklets" in document:
        return {file.stem: parse_project(file, document, "")}
    if "annotations" in document:
        return assemble_tracklets(file, parse_youtube_vis(file, document), size)
    if isinstance(document, list) or "frames" in document:
        return assemble_tracklets(file, parse_scalabel(file, document), size)
    if isinstance(document.get("videos"), dict):
        videos = {}
        for name, video in document["videos"].items():
            videos[name] = parse_project(file, video, f"videos.{name}: ")
        return videos
    raise malformed_error(
        file, "the file", '"tracklets", "videos", "annotations" or "frames"', sorted(document)
    )


def parse_box(file: Path, place: str, expected: str, values: Any) -> tuple[float, ...]:
    """Return a list of four numbers as floats. Booleans and text do not count as numbers.

    Raises ValueError at `place` with `expected`.
    """
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        raise malformed_error(file, place, expected, values)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise malformed_error(file, place, expected, values)
    return tuple(float(value) for value in values)


def parse_scalabel(file: Path, document: Any) -> Iterator[Record]:
    """Yield the records of BDD100K MOT 2020 (Scalabel): a list of frames, or {"frames": [...]}."""
    frames = document
    if isinstance(document, dict):
        frames = document["frames"]
    if not isinstance(frames, list):
        raise malformed_error(file, "frames", "a list", frames)

    next_indices: dict[str, int] = {}  # {video: index of its next frame}, for files without indices
    for i, frame in enumerate(frames):
        if not isinstance(frame, dict):
            raise malformed_error(file, f"frame {i}", "an object with name and labels", frame)
        video = str(frame.get("videoName") or file.stem)
        # older files call it `index`, or do not number the frames
        default_index = next_indices.get(video, 0)
        frame_index = frame.get("frameIndex", frame.get("index", default_index))
        if not isinstance(frame_index, int) or frame_index < 0:
            raise malformed_error(
                file, f"frame {i}: frameIndex", "an integer from 0 on", frame_index
            )
        next_indices[video] = frame_index + 1

        size_of_frame = frame.get("size")
        if not size_of_frame and isinstance(document, dict):
            size_of_frame = (document.get("config") or {}).get("imageSize")
        size = None
        if size_of_frame:
            size = (size_of_frame["width"], size_of_frame["height"])

        yield Record(video, frame_index, size=size)
        for j, label in enumerate(frame.get("labels") or []):
            place = f"frame {i}, label {j}"
            if not isinstance(label, dict) or "id" not in label:
                raise malformed_error(file, place, "an object with id and box2d", label)
            box = label.get("box2d")
            if box is None:  # a label of another task, lanes for instance
                continue
            if isinstance(box, dict):
                box = [box.get(key) for key in ("x1", "y1", "x2", "y2")]
            x1, y1, x2, y2 = parse_box(file, f"{place}: box2d", "{x1, y1, x2, y2} in pixels", box)
            yield Record(
                video,
                frame_index,
                id=str(label["id"]),
                category=str(label.get("category", "")),
                # x2 and y2 are the last pixels that belong to the box
                box=(x1, y1, x2 + 1, y2 + 1),
                size=size,
            )


def parse_youtube_vis(file: Path, document: dict[str, Any]) -> Iterator[Record]:
    """Yield the records of YouTube-VIS. An annotation is a tracklet, with null where it is absent."""
    categories = {}
    for category in document.get("categories", []):
        categories[category["id"]] = category["name"]

    names_and_sizes: dict[Any, tuple[str, Size]] = {}  # by video id
    for i, video in enumerate(document.get("videos", [])):
        try:
            frame_files = video.get("file_names") or []
            size = (video["width"], video["height"])
            name = str(video["id"])
            if frame_files and len(Path(frame_files[0]).parts) > 1:
                name = Path(frame_files[0]).parts[-2]
            names_and_sizes[video["id"]] = (name, size)
        except (KeyError, TypeError, AttributeError) as error:
            raise malformed_error(
                file, f"videos[{i}]", "id, width, height and file_names", video
            ) from error
        if frame_files or video.get("length"):
            num_frames = int(video.get("length") or len(frame_files))
            yield Record(name, num_frames - 1, size=size)

    for i, annotation in enumerate(document["annotations"]):
        if not isinstance(annotation, dict) or annotation.get("video_id") not in names_and_sizes:
            raise malformed_error(
                file, f"annotations[{i}]: video_id", "the id of one of the videos", annotation
            )
        name, size = names_and_sizes[annotation["video_id"]]
        for f, box in enumerate(annotation.get("bboxes") or []):
            if box is None:
                continue
            place = f"annotations[{i}].bboxes[{f}]"
            x, y, w, h = parse_box(file, place, "[x, y, w, h] in pixels, or null", box)
            yield Record(
                name,
                f,
                id=str(annotation.get("id", i)),
                category=categories.get(annotation.get("category_id"), ""),
                box=(x, y, x + w, y + h),
                size=size,
            )


def parse_motchallenge(file: Path, text: str) -> Iterator[Record]:
    """Yield the records of MOTChallenge: gt.txt (9 columns), MOT15 or a tracker's result (10).

    The columns are frame, id, left, top, width, height, confidence, class, visibility. Lines whose
    confidence is 0 are ignored. The size comes from seqinfo.ini, if there is one. The file
    <sequence>/gt/gt.txt has the name of the sequence.
    """
    folder = file.absolute().parent
    is_in_sequence = folder.name in ("gt", "det")
    sequence = folder.parent if is_in_sequence else folder
    name = sequence.name if is_in_sequence else file.stem

    parser = configparser.ConfigParser()
    parser.read(sequence / "seqinfo.ini")
    size = None
    if "Sequence" in parser:
        info = parser["Sequence"]
        if "imWidth" in info and "imHeight" in info:
            size = (int(info["imWidth"]), int(info["imHeight"]))

    expected = "9 or 10 numbers: frame from 1, id, left, top, width, height, ..."
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = [float(word) for word in line.split(",")]
        except ValueError as error:
            raise malformed_error(file, f"line {i}", expected, line) from error
        if len(row) not in (9, 10):
            raise malformed_error(file, f"line {i}", expected, line)
        frame, track_id, left, top, width, height, confidence, object_class = row[:8]
        if not (frame >= 1 and frame == int(frame)):
            raise malformed_error(file, f"line {i}", expected, line)
        if track_id < 0:
            raise malformed_error(
                file, f"line {i}", "an id from 0 on (these are detections; run a tracker)", line
            )
        if confidence == 0:
            continue
        x = left - 1
        y = top - 1
        yield Record(
            name,
            int(frame) - 1,
            id=f"{track_id:g}",
            # with 10 columns the last three are world coordinates
            category=f"{object_class:g}" if len(row) == 9 else "",
            box=(x, y, x + width, y + height),
            size=size,
        )


def parse_kitti(file: Path, text: str) -> Iterator[Record]:
    """Yield the records of KITTI tracking, label_02/0001.txt for instance.

    The words of a line are frame, track, type, truncated, occluded, alpha, left, top, right,
    bottom, ... Lines of type DontCare only say that the video has the frame.
    """
    expected = "17 or 18 words: frame from 0, track, type, ..."
    for i, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            frame = int(words[0])
            coordinates = [float(word) for word in words[6:10]]
        except ValueError as error:
            raise malformed_error(file, f"line {i}", expected, line) from error
        if len(words) not in (17, 18) or frame < 0:
            raise malformed_error(file, f"line {i}", expected, line)
        track_id, category = words[1:3]
        if category == "DontCare":
            yield Record(file.stem, frame)
        else:
            left, top, right, bottom = coordinates
            yield Record(file.stem, frame, track_id, category, (left, top, right, bottom))


@dataclass
class VideoRecords:
    """The records of one video, while `assemble_tracklets` collects them."""

    num_frames: int = 0
    categories: dict[str, str] = field(default_factory=dict)  # {object id: category}, by slot
    frames: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    boxes: list[tuple[float, ...]] = field(default_factory=list)  # in fractions of the picture


def assemble_tracklets(
    file: Path, records: Iterable[Record], size: Size | None = None
) -> dict[str, Tracklets]:
    """Return {video: Tracklets} of records. Slots are in the order in which ids first appear.

    size: of the pictures, for records without a size. Raises ValueError if neither is given.
    """
    videos: dict[str, VideoRecords] = {}
    num_dropped = 0
    for record in records:
        video = videos.setdefault(record.video, VideoRecords())
        video.num_frames = max(video.num_frames, record.frame + 1)
        if record.box is None:
            continue
        picture_size = record.size or size
        if picture_size is None:
            raise ValueError(
                f"{file}: does not contain the size of the pictures. Pass it, or the folder of frames."
            )
        x0, y0, x1, y1 = record.box
        if not np.isfinite(record.box).all() or x1 <= x0 or y1 <= y0:
            num_dropped += 1
            continue
        width, height = picture_size
        video.categories.setdefault(record.id, record.category)
        video.frames.append(record.frame)
        video.ids.append(record.id)
        video.boxes.append((x0 / width, y0 / height, x1 / width, y1 / height))
    if num_dropped:
        logger.warning(
            "%s: left out %d boxes that are not finite or have no area", file, num_dropped
        )

    tracklets = {}
    for name, video in videos.items():
        n = len(video.categories)
        slot_of_id = {id: slot for slot, id in enumerate(video.categories)}
        slots = [slot_of_id[id] for id in video.ids]
        boxes = np.zeros((video.num_frames, n, 4), np.float32)
        valid = np.zeros((video.num_frames, n), bool)
        if video.boxes:
            boxes[video.frames, slots] = video.boxes
            valid[video.frames, slots] = True
        tracklets[name] = Tracklets(
            boxes=boxes,
            valid=valid,
            hard=valid.copy(),
            colors=palette(n),
            ids=tuple(video.categories),
            categories=tuple(video.categories.values()),
        )
    return tracklets


def parse_project(file: Path, document: dict[str, Any], prefix: str) -> Tracklets:
    """Parse this project's JSON, which can be written by hand:

        {"size": [854, 480],             optional: boxes are in these pixels; without it, in fractions
         "frames": 14,                   optional: number of frames; default: up to the last keyframe
         "tracklets": [
           {"id": "rhino", "category": "animal",
            "boxes": {"0": [100, 80, 300, 240], "13": [400, 90, 600, 250], "20": null}}]}

    Between two keyframes the box is interpolated linearly and soft. null: the object is absent from
    this frame on.

    prefix: place of `document` in the file, for error messages.
    """
    width, height = document.get("size") or (1, 1)
    scale = np.array([width, height, width, height])
    tracks = document["tracklets"]
    num_frames = document.get("frames", 0)
    if not isinstance(tracks, list):
        raise malformed_error(file, f"{prefix}tracklets", "a list", tracks)

    keyframes_of_tracks = []
    for i, track in enumerate(tracks):
        place = f"{prefix}tracklets[{i}]"
        if not isinstance(track, dict) or not isinstance(track.get("boxes"), dict):
            raise malformed_error(
                file, place, '{"id": ..., "boxes": {"0": [x1, y1, x2, y2], ...}}', track
            )
        keyframes = {}
        for frame, values in track["boxes"].items():
            if not frame.isdigit():
                raise malformed_error(file, f"{place}: boxes", "frames counted from 0", frame)
            keyframes[int(frame)] = parse_keyframe(file, f"{place}, frame {frame}", values, scale)
        keyframes_of_tracks.append(dict(sorted(keyframes.items())))
        num_frames = max([num_frames, *(frame + 1 for frame in keyframes)])

    n = len(tracks)
    boxes = np.zeros((num_frames, n, 4), np.float32)
    valid = np.zeros((num_frames, n), bool)
    hard = np.zeros((num_frames, n), bool)
    for slot, keyframes in enumerate(keyframes_of_tracks):
        for frame, box, is_keyframe in interpolate_keyframes(keyframes):
            boxes[frame, slot] = box
            valid[frame, slot] = True
            hard[frame, slot] = is_keyframe
    ids = tuple(str(track.get("id", i)) for i, track in enumerate(tracks))
    categories = tuple(str(track.get("category", "")) for track in tracks)
    return Tracklets(boxes, valid, hard, palette(n), ids, categories)


def parse_keyframe(file: Path, place: str, values: Any, scale: np.ndarray) -> np.ndarray | None:
    """Return a box (4,) xyxy in fractions of the picture, or None for null.

    scale: (4,) what the values are divided by. Raises ValueError if they are not a box.
    """
    if values is None:
        return None
    expected = "[x1, y1, x2, y2] with x1 <= x2 and y1 <= y2, or null"
    box = np.array(parse_box(file, place, expected, values)) / scale
    if not np.isfinite(box).all() or box[0] > box[2] or box[1] > box[3]:
        raise malformed_error(file, place, expected, values)
    return box


# --------------------------------------------------------------------------------------------- write


def write_tracklets(file: str | Path, tracklets: Tracklets) -> None:
    """Write this project's JSON, see `parse_project`.

    The hard boxes are written, in fractions of the picture. Soft boxes are not: a reader
    interpolates between the hard ones.
    """
    tracks = []
    for slot, (id, category) in enumerate(zip(tracklets.ids, tracklets.categories)):
        boxes: dict[int, list[float] | None] = {}
        was_valid = False
        for frame in range(len(tracklets)):
            is_valid = bool(tracklets.valid[frame, slot])
            if is_valid and tracklets.hard[frame, slot]:
                boxes[frame] = [round(float(x), 5) for x in tracklets.boxes[frame, slot]]
            elif was_valid and not is_valid:
                boxes[frame] = None
            was_valid = is_valid
        tracks.append({"id": id, "category": category, "boxes": boxes})
    document = {"frames": len(tracklets), "tracklets": tracks}
    Path(file).write_text(json.dumps(document))


# ---------------------------------------------------------------------------------------------- find


def find_tracklets(
    source: str | Path,
    video: str,
    size: Size | None,
    is_only_video: bool = False,
    accept_txt: bool = True,
) -> Tracklets | None:
    """Return the tracklets of one video, or None if `source` does not contain it.

    Args:
        source: an annotation file, or a folder with <video>.json, <video>.txt,
            <video>/tracklets.json or <video>/gt/gt.txt.
        video: name of the video.
        size: (width, height) of the video, for files that do not contain it.
        is_only_video: the training data is this video alone. Then the one video of an annotation
            file is taken, whatever its name.
        accept_txt: False if <video>.txt in a folder is not an annotation file but a caption.
    """
    source = Path(source)
    if not source.is_dir():
        videos = read_tracklets(source, size)
        if is_only_video and len(videos) == 1:
            return next(iter(videos.values()))
        return videos.get(video)

    names = [f"{video}.json"]
    if accept_txt:
        names.append(f"{video}.txt")
    names += [f"{video}/tracklets.json", f"{video}/gt/gt.txt"]
    for name in names:
        if (source / name).is_file():
            videos = read_tracklets(source / name, size)
            if len(videos) == 1:
                return next(iter(videos.values()))
            return videos.get(video)
    return None


def find_clip_tracklets(
    path: str | Path, source: str | Path | None, size: Size | None, is_only_video: bool = False
) -> Tracklets | None:
    """Return the tracklets of the video at `path`, or None if there are none.

    path: a folder of frames, or a video file. source: see `find_tracklets`; None looks in the video
    folder and beside the video, where <video>.txt is a caption.
    """
    path = Path(path)
    video = path.name if path.is_dir() else path.stem
    if source:
        return find_tracklets(source, video, size, is_only_video)
    return find_tracklets(path.parent, video, size, is_only_video, accept_txt=False)


def find_picture_tracklets(source: str | Path, path: str | Path, size: Size | None) -> Tracklets:
    """Return the tracklets in the annotation file `source` for the picture at `path`.

    The video is the only one in the file, or the one with the name of the picture's folder, or the
    one with the name of the picture. Raises ValueError if there is no such video.
    """
    videos = read_tracklets(source, size)
    if len(videos) == 1:
        return next(iter(videos.values()))
    folder_name = Path(path).absolute().parent.name
    picture_name = Path(path).stem
    for name in (folder_name, picture_name):
        if name in videos:
            return videos[name]
    raise ValueError(
        f"{source}: has {len(videos)} videos, none of them named {folder_name} or {picture_name}: "
        f"{sorted(videos)[:5]}"
    )
