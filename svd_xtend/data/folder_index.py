"""What a --base_folder holds, video folders, video files and pictures: the same for ten of them and for a million.

    listing = Listing("/data/a")
    listing.fill(motions=True)               # look into those that were not looked into yet
    listing.clip(3)                          # its frames by number; listing.note(3): what else is known of it

Folders are listed once, and what is in them is looked at once. What was found is kept in one file of ~/.cache/svd_xtend for each, by
which the next start asks only for what has changed since, and which loader processes read from where it lies instead of copying it.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import socket
import time
import zlib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from functools import partial
from pathlib import Path

import numpy as np

from svd_xtend.data import images, video_decode
from svd_xtend.data.clip import Clip, parse_clip_metadata, read_clip_json

logger = logging.getLogger("svd_xtend")

FORMAT = 2  # of an index: one of another is not read
SETTLED = 2e9  # nanoseconds; what is younger may change again without a later time of change
THREADS = 8  # that wait for a network file system
SAVED_EVERY = 60  # seconds of looking that a killed run can lose
FRAME_FOLDER, VIDEO_FILE, PICTURE, TEXT_FILE = range(
    4
)  # kinds: a folder of frames, a video file, a picture; what tells of them
TEXTS = {".txt", ".json", ".jsonl", ".csv", ".md"}
DEFAULT_SOURCE_FPS = 7  # frames a second of a folder that does not tell, where nobody does
COLUMNS = {  # of an index, one value a clip: type, and what stands there until it is known
    "counts": (np.int32, 0), "rates": (np.float64, np.nan), "buckets": (np.float32, np.nan), "widths": (np.int32, 0),
    "heights": (np.int32, 0), "motions": (np.float32, np.nan), "looked": (bool, False), "checked": (bool, False),
    "jsons": (np.int64, 0),
}  # fmt: skip


def metadata_rows(root):
    """{name: lines of metadata.jsonl at the root that are about that clip}, as Hugging Face's data sets have it."""
    file, found = Path(root, "metadata.jsonl"), {}
    if not file.is_file():
        return found
    for i, line in enumerate(images.read_bytes(file).decode("utf-8", "replace").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                parse_clip_metadata(row)
                found.setdefault(str(row["file_name"]).strip("/"), []).append(line)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                expected = '{"file_name": "a.mp4", "caption": "a dog"}'
                raise ValueError(
                    f"{file}: line {i}: expected {expected}, got: {error!r}"
                ) from error
    return found


def read_metadata(root):
    """{name: {fps, motion_bucket_id, caption}, those that metadata.jsonl tells of that clip}."""
    return {
        name: parse_clip_metadata(json.loads(rows[-1]))
        for name, rows in metadata_rows(root).items()
    }


class FolderIndex:
    """The clips of one base folder, in natural order.

    arrays: of each clip its kind, `counts` of frames, `rates` (frames a second; NaN: a folder that does not tell), told
    `buckets` (NaN: none), `widths` and `heights` (0: not looked at), `motions` (motion.score; NaN: not looked at), `looked`: a
    video file that was, `checked`: one whose every frame was decoded; `stamps` tell whether it has changed, `jsons` when its
    clip.json did. `names`, `frames` (those of a folder, joined by "/") and `notes` (JSON) lie one after the other, each up to
    its place in `name_ends`, `frame_ends`, `note_ends`. stray: [(name, why it is no clip)]. used: a mask of the clips that are, or
    True."""

    def __init__(self, root):
        self.root, self.file, self.used = Path(root), index_file(root), True
        if not self.root.is_dir():
            raise ValueError(
                f"--base_folder {root}: no such folder. Expected {root}/<video>/<frame>.jpg, or .mp4 files"
            )
        self.arrays = load_index(self.file)
        names = self.names()
        jsons, stamps = (
            (self.arrays[k].tolist() for k in ("jsons", "stamps")) if names else ((), ())
        )
        self.metadata = read_metadata(self.root)
        found = self.scan({name for name, time in zip(names, jsons) if time})
        same = [
            s != -1 and n in found and change_stamp(*found[n]) == s for n, s in zip(names, stamps)
        ]
        known = {name: i for i, name in enumerate(names) if same[i]}
        if self.arrays is None or not len(known) == len(found) == len(names):
            self.keep(self.list_changed(found, known))
        del self.metadata, self.texts

    def __getstate__(self):
        """For loader processes that are not forked: not the arrays, but where they lie."""
        own = self.arrays["stamp"].tobytes()
        kept = load_index(self.file)
        there = kept is not None and kept["stamp"].tobytes() == own
        return {
            **vars(self),
            "arrays": None if there else {k: np.array(v) for k, v in self.arrays.items()},
            "stamp": own,
        }

    def __setstate__(self, state):
        vars(self).update(state)
        self.arrays = self.arrays or load_index(self.file)
        if self.arrays is None or self.arrays["stamp"].tobytes() != self.stamp:
            raise ValueError(
                f"--base_folder {self.root}: was listed anew by another run while this one began; start again"
            )

    def keep(self, arrays):
        """Write the index, and read it from where it lies."""
        arrays["stamp"] = np.frombuffer(os.urandom(8), np.uint8)
        save_index(arrays, self.file)
        kept = load_index(self.file)
        self.arrays = (
            kept
            if kept is not None and kept["stamp"].tobytes() == arrays["stamp"].tobytes()
            else arrays
        )

    def names(self):
        """Of all clips, in natural order."""
        return decode_all(self.arrays["names"], self.arrays["name_ends"]) if self.arrays else []

    def name(self, i):
        """Of the i-th clip."""
        return decode_one(self.arrays["names"], self.arrays["name_ends"], i)

    def frame_names(self, i):
        """Of the frames of the i-th clip, a folder, in natural order."""
        joined = decode_one(self.arrays["frames"], self.arrays["frame_ends"], i)
        return joined.split("/") if joined else []

    def note(self, i, raw=False):
        """What else is known of the i-th clip: `caption`; `trouble`, why it cannot be used; of a file `start` and `rate`, or where
        that varies `times`, seconds of its frames; `cuts`, numbers of frames that begin a new scene. raw: as JSON."""
        note = decode_one(self.arrays["notes"], self.arrays["note_ends"], i)
        return note if raw else json.loads(note) if note else {}

    def notes(self):
        """Of all clips, as JSON."""
        return decode_all(self.arrays["notes"], self.arrays["note_ends"])

    # ------------------------------------------------------------------------------------------------------------ list

    def scan(self, jsons):
        """{name: (kind, times of change and sizes)} of the clips that are there. jsons: those known to have a clip.json."""
        found, self.texts, self.stray = {}, {}, []
        with os.scandir(self.root) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    kind, told = kind_of(entry), entry.stat()
                except OSError as error:  # links that go round in circles, or to nothing
                    self.stray.append((entry.name, error.strerror))
                    continue
                if kind is None:
                    self.stray.append((entry.name, "is no picture, video or folder"))
                elif kind == TEXT_FILE:
                    self.texts[entry.name] = told.st_mtime_ns
                else:
                    found[entry.name] = (
                        kind,
                        [told.st_mtime_ns] + [told.st_size] * (kind != FRAME_FOLDER),
                    )
        for name, (kind, told) in found.items():
            told.append(self.texts.get(caption_file(name, kind), 0) if self.texts else 0)
            if name in self.metadata:
                told.append(zlib.crc32(repr(self.metadata[name]).encode()))
            if name in jsons:
                with contextlib.suppress(OSError):  # it is gone; then the folder has changed, too
                    told.append(os.stat(os.path.join(self.root, name, "clip.json")).st_mtime_ns)
        return found

    def list_changed(self, found, known):
        """The arrays, of `found` as `scan` tells it, those that are not `known` {name: place here} listed anew."""
        changed, fresh = (
            [(name, kind) for name, (kind, _) in found.items() if name not in known],
            {},
        )
        # of a hundred each: a task for one folder would take longer to hand out than to do
        parts = [changed[i : i + 100] for i in range(0, len(changed), 100)]
        with (
            ThreadPoolExecutor(THREADS) as pool,
            progress_bar(len(changed), f"listing {self.root}") as bar,
        ):
            for part, rows in zip(
                parts, pool.map(lambda part: [self.list_one(*p) for p in part], parts)
            ):
                fresh.update(zip((name for name, _ in part), rows))
                bar.update(len(part))
        names = sorted(found, key=images.natural_key)
        places = [known.get(name, -1) for name in names]
        rows = [fresh[name] if place < 0 else None for name, place in zip(names, places)]
        arrays = {
            column: np.full(len(names), default, kind)
            for column, (kind, default) in COLUMNS.items()
        }
        kept = np.flatnonzero(np.array(places, int) >= 0)
        for column, values in arrays.items():
            if len(kept):
                values[kept] = self.arrays[column][np.array(places)[kept]]
            for i, row in enumerate(rows):
                if row and column in row:
                    values[i] = row[column]
        for name, row in fresh.items():
            found[name][1].extend([row["jsons"]] if "jsons" in row else [])
        arrays["kinds"] = np.array([found[name][0] for name in names], np.uint8)
        arrays["stamps"] = np.array([change_stamp(*found[name]) for name in names], np.int64)
        frames = [
            row["frames"] if row else self.frame_names(place) for row, place in zip(rows, places)
        ]
        notes = [
            dump_notes(row["note"]) if row else self.note(place, raw=True)
            for row, place in zip(rows, places)
        ]
        return {
            **arrays,
            **encode("name", names),
            **encode("frame", map("/".join, frames)),
            **encode("note", notes),
        }

    def list_one(self, name, kind):
        """What the names in a clip's folder tell of it, and texts: {column: value, frames, note}."""
        path, told, note, row = (
            self.root / name,
            dict(self.metadata.get(name, {})),
            {},
            {"frames": []},
        )
        try:
            if caption_file(name, kind) in self.texts:
                told["caption"] = images.read_bytes(self.root / caption_file(name, kind)).decode(
                    "utf-8", "replace"
                )
            if kind == FRAME_FOLDER:
                inside = images.retry_io(os.listdir, path)
                row["frames"] = images.select_frame_names(inside)
                if "clip.json" in inside:
                    row["jsons"] = os.stat(path / "clip.json").st_mtime_ns
                    told.update(read_clip_json(path / "clip.json"))
                videos = sum(map(video_decode.is_video, inside))
                if videos and not row["frames"]:
                    note["trouble"] = (
                        f"holds {videos} video files: pass it as a --base_folder of its own"
                    )
            elif kind == PICTURE:
                row["widths"], row["heights"] = images.check_picture(path)
        except (OSError, ValueError) as error:
            note["trouble"] = reason_of(error, path)
        row["counts"] = len(row["frames"]) if kind == FRAME_FOLDER else int(kind == PICTURE)
        row["rates"], row["buckets"] = told.get("fps", np.nan), told.get("motion_bucket_id", np.nan)
        if told.get("caption", "").strip():
            note["caption"] = told["caption"].strip()
        return {**row, "note": note}

    # ------------------------------------------------------------------------------------------------------------ look

    def fill(self, sizes=False, motions=False, measure=None):
        """Look into all video files that were not looked into yet; with `sizes`, and `motions`, also for those of folders. What
        was found is kept every minute, for a run that is killed. measure: of all clips, once, in place of Clip.measure_motion, which is
        so called, too; it may answer {cuts} beside columns."""
        import cv2

        a, columns = self.arrays, {name: np.array(self.arrays[name]) for name in COLUMNS}
        of_frames = (a["kinds"] == FRAME_FOLDER) & (a["counts"] > 0)
        todo = (a["kinds"] == VIDEO_FILE) & ~a["looked"]
        todo = todo | of_frames & (a["widths"] == 0) if sizes else todo
        todo = (
            todo | of_frames & np.isnan(a["motions"]) & np.isnan(a["buckets"]) if motions else todo
        )
        todo = ((a["kinds"] == VIDEO_FILE) | of_frames) & ~a["checked"] if measure else todo
        todo = [int(i) for i in np.flatnonzero(todo) if "trouble" not in self.note(i)]
        if not todo:
            return
        notes, saved = self.notes(), time.monotonic()
        cv2.setNumThreads(1)  # clips are looked at side by side
        look = partial(
            self.look, measure=measure or Clip.measure_motion, whole=measure is not None, motions=motions
        )
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            progress_bar(len(todo), f"looking into {self.root}") as bar,
        ):
            for i, (row, note) in results_in_order(pool, look, todo):
                for name, value in row.items():
                    columns[name][i] = value
                notes[i] = dump_notes(note)
                bar.update()
                if time.monotonic() - saved > SAVED_EVERY:
                    save_index({**a, **columns, **encode("note", notes)}, self.file)
                    saved = time.monotonic()
        self.keep({**a, **columns, **encode("note", notes)})

    def look(self, i, measure, whole, motions):
        """(columns, note) of the i-th clip, which is a folder or a video file: its size, when the frames of a file are shown, and
        what `measure` says of it, of folders with `motions` alone. What of it is decoded for that has to be whole."""
        note, row, path = self.note(i), {"checked": whole}, self.root / self.name(i)
        keys = ()
        try:
            if self.arrays["kinds"][i] == VIDEO_FILE:
                row["looked"] = True
                film = video_decode.probe_video(path)
                keys, note["start"], note["rate"] = film.keyframes, float(film.times[0]), film.rate
                if not film.is_regular():
                    note["times"] = film.times.tolist()
                row.update(counts=len(film.times), widths=film.width, heights=film.height)
                told = self.arrays["rates"][i]
                clip = Clip(path, [], film.rate if np.isnan(told) else float(told), film.times)
                row["rates"] = clip.rate
            else:
                clip = self.clip(i, DEFAULT_SOURCE_FPS)
                row["widths"], row["heights"] = clip.picture_size()
            if motions or whole or not clip.files:
                found = measure(clip, keys)
                note["cuts"] = found.pop("cuts", note.get("cuts", []))
                row.update(found)
        except (OSError, ValueError) as error:
            note["trouble"] = reason_of(error, path)
        return row, note

    def clip(self, i, rate, size=None, **told):
        """The i-th clip. rate: frames a second of a folder that does not tell; size, told: see Clip."""
        a, note, times = self.arrays, self.note(i), None
        if a["kinds"][i] == VIDEO_FILE:
            regular = "times" not in note
            times = (
                note["start"] + np.arange(a["counts"][i]) / note["rate"]
                if regular
                else np.array(note["times"])
            )
        rate = rate if np.isnan(a["rates"][i]) else float(a["rates"][i])
        told = {**told, "caption": note.get("caption", "")}
        own = (int(a["widths"][i]), int(a["heights"][i])) if a["widths"][i] else None
        if a["kinds"][i] == PICTURE:  # the one frame of its folder
            return Clip(self.root, [self.name(i)], rate, None, own, size, told)
        return Clip(self.root / self.name(i), self.frame_names(i), rate, times, own, size, told)


def kind_of(entry):
    """FRAMES, FILE, STILL, TEXT, or None: of something that is there, in a folder."""
    if entry.is_dir():
        return FRAME_FOLDER
    suffix = os.path.splitext(entry.name)[1].lower()
    if not entry.is_file():  # pipes, links to nothing
        return None
    if video_decode.is_video(entry.name):
        return VIDEO_FILE
    return TEXT_FILE if suffix in TEXTS else PICTURE if suffix in images.FRAME_SUFFIXES else None


def caption_file(name, kind):
    """The text beside a clip that is its caption."""
    return f"{name if kind == FRAME_FOLDER else os.path.splitext(name)[0]}.txt"


def change_stamp(kind, told):
    """A number that changes when a clip does; -1 of one that may still be written to without a later time of change."""
    return hash((kind, *told)) if time.time_ns() - max(told) > SETTLED else -1


def reason_of(error, path):
    """What is wrong with a clip, without its own name."""
    return (
        (getattr(error, "strerror", None) or str(error))
        .replace(f"{path}{os.sep}", "")
        .replace(f"{path}: ", "")
    )


def progress_bar(total, told):
    """A bar, where it takes longer than two seconds."""
    from tqdm import tqdm

    return tqdm(total=total, desc=told, delay=2)


def results_in_order(pool, function, items):
    """(item, function(item)) of each, as they end; a few wait at a time, so that memory is bounded."""
    waiting = {}
    for item in items:
        if len(waiting) >= 4 * pool._max_workers:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
        waiting[pool.submit(function, item)] = item
    for future in as_completed(waiting):
        yield waiting[future], future.result()


def dump_notes(note):
    return json.dumps(note) if note else ""


def encode(what, strings):
    """{<what>s: the strings one after the other as bytes, <what>_ends: where each ends}, whatever a file system allows."""
    parts = [os.fsencode(string) for string in strings]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return {f"{what}s": np.frombuffer(b"".join(parts), np.uint8), f"{what}_ends": ends}


def decode_one(joined, ends, i):
    """The i-th string."""
    return os.fsdecode(bytes(joined[ends[i - 1] if i else 0 : ends[i]]))


def decode_all(joined, ends):
    """All of them."""
    joined, ends = bytes(joined), [0, *ends.tolist()]
    return [os.fsdecode(joined[start:end]) for start, end in itertools.pairwise(ends)]


def index_file(root):
    """Where what was found in a base folder is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "svd_xtend")
    return (
        cache
        / f"{hashlib.blake2b(os.fsencode(os.path.abspath(root)), digest_size=12).hexdigest()}.{FORMAT}.index"
    )


def load_index(file):
    """The arrays of an index, mapped; None where there is none that can be read. One array of bytes, whose head says where
    the others are in it."""
    try:
        whole = np.asarray(np.memmap(file, np.uint8, "r"))  # still mapped, and faster to cut
        size = int(whole[:8].view(np.int64)[0])
        head = json.loads(bytes(whole[8 : 8 + size]))
        arrays = {k: whole[start:end].view(kind) for k, (start, end, kind) in head.items()}
        return arrays if len(whole) == max(end for _, end, _ in head.values()) else None
    except (OSError, ValueError, KeyError):
        return None


def save_index(arrays, file):
    """Write an index, whole or not at all; where that is not allowed the next start lists again."""
    head, start = {}, 4096
    for name, array in arrays.items():
        head[name] = (start, start + array.nbytes, array.dtype.str)
        start += -(-array.nbytes // 8) * 8
    told = json.dumps(head).encode()
    partial = file.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as f:
            f.write(len(told).to_bytes(8, "little") + told)
            for name, array in arrays.items():
                f.seek(head[name][0])
                f.write(array.tobytes())
            f.truncate(max(end for _, end, _ in head.values()))
        os.replace(partial, file)
    except OSError as error:
        logger.warning(
            "%s: not written (%s); the next start lists the folder again", file, error.strerror
        )
        with contextlib.suppress(OSError):
            partial.unlink()
