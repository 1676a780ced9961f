"""Index the clips of a base folder: video folders, video files and pictures, ten or a million.

    index = FolderIndex("/data/a")
    index.inspect(motions=True)              # open the videos and measure motion, once
    index.clip(3, rate=7)                    # the fourth clip as a clip.Clip
    index.note(3)                            # what else is known about it: caption, scene cuts, ...

The index is a pyarrow table, kept as one Feather (Arrow IPC) file per base folder in
~/.cache/svd_xtend. The next start asks the file system only which clips have changed, and lists
those again. The file is memory-mapped, so that all loader processes of a machine share its pages
instead of copying them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from svd_xtend.data import images, video_decode
from svd_xtend.data.clip import Clip, parse_clip_metadata, read_clip_json

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger("svd_xtend")

# Kinds of entries of a base folder. The first three are clips; a text file describes the clip
# beside it.
FRAME_FOLDER = 0
VIDEO_FILE = 1
PICTURE = 2
TEXT_FILE = 3
TEXT_SUFFIXES = {".txt", ".json", ".jsonl", ".csv", ".md"}

DEFAULT_SOURCE_FPS = 7  # frames per second of a folder without frame-rate metadata
FORMAT = 3  # version of the index file; files of another version are not read
SETTLED = 2e9  # nanoseconds after which a second change surely has a later time of change
UNSETTLED = -1  # change stamp of a clip that changed too recently to trust its time of change
LISTING_THREADS = 8  # that mostly wait for a network file system
CLIPS_PER_TASK = 100  # listing one folder is quicker than handing it to a thread
SAVED_EVERY = 60  # seconds of inspection that a killed run can lose

# The columns of the index, one row per clip. 0, NaN or False: not known (yet). File names are
# bytes, because not every file system holds to UTF-8; offsets have 64 bits, because the frame names
# of a million clips may exceed 2 GiB.
SCHEMA = pa.schema(
    {
        "name": pa.large_binary(),  # of the folder or file
        "frames": pa.large_list(pa.large_binary()),  # names of a folder's frames, in natural order
        "note": pa.large_string(),  # JSON; see FolderIndex.note
        "kinds": pa.uint8(),  # FRAME_FOLDER, VIDEO_FILE or PICTURE
        "counts": pa.int32(),  # frames
        "rates": pa.float64(),  # frames per second
        "motion_buckets": pa.float32(),  # motion_bucket_id of the metadata
        "widths": pa.int32(),  # pixels
        "heights": pa.int32(),  # pixels
        "motions": pa.float32(),  # motion.clip_motion: picture lengths per second
        "inspected": pa.uint8(),  # bool: the video file was opened
        "fully_decoded": pa.uint8(),  # bool: every frame was decoded
        "unusable": pa.uint8(),  # bool: the note has the reason as `trouble`
        "clip_json_times": pa.int64(),  # time of change of <folder>/clip.json, nanoseconds
        "stamps": pa.int64(),  # FileState.stamp
    }
)
TEXT_COLUMNS = ("name", "frames", "note")
BOOL_COLUMNS = ("inspected", "fully_decoded", "unusable")


def read_metadata_lines(root: str | os.PathLike) -> dict[str, list[str]]:
    """Return {clip name: its lines of <root>/metadata.jsonl}.

    The file has the format of Hugging Face's video data sets. Raises ValueError with the number of
    the first line that is no metadata.
    """
    file = Path(root, "metadata.jsonl")
    lines_of_clip: dict[str, list[str]] = {}
    if not file.is_file():
        return lines_of_clip
    text = images.read_bytes(file).decode("utf-8", "replace")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            parse_clip_metadata(record)
            name = str(record["file_name"]).strip("/")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            expected = '{"file_name": "a.mp4", "caption": "a dog"}'
            raise ValueError(
                f"{file}: line {number}: expected {expected}, got: {error!r}"
            ) from error
        lines_of_clip.setdefault(name, []).append(line)
    return lines_of_clip


def read_metadata(root: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Return {clip name: its metadata} of <root>/metadata.jsonl.

    The metadata holds those of `fps`, `motion_bucket_id` and `caption` that the line has. If
    several lines are about one clip, the last counts.
    """
    return {
        name: parse_clip_metadata(json.loads(lines[-1]))
        for name, lines in read_metadata_lines(root).items()
    }


@dataclass(slots=True)
class FileState:
    """Describe a clip as far as the file system does without opening it.

    Times are in nanoseconds; 0: no such file.
    """

    kind: int
    change_time: int
    size: int = 0  # bytes of a file
    caption_time: int = 0
    clip_json_time: int = 0
    metadata_checksum: int = 0  # of its line in metadata.jsonl

    def stamp(self, now: int) -> int:
        """Return a number that changes with the clip, or UNSETTLED if it changed just before `now`.

        A file system counts time in steps: what has just changed may change again without a later
        time of change.
        """
        last_change = max(self.change_time, self.caption_time, self.clip_json_time)
        if now - last_change <= SETTLED:
            return UNSETTLED
        state = (
            self.kind,
            self.change_time,
            self.size,
            self.caption_time,
            self.clip_json_time,
            self.metadata_checksum,
        )
        return hash(state)  # Python salts the hashes of strings, not those of integers


@dataclass
class FolderScan:
    """Describe what one pass over a base folder found."""

    clips: dict[str, FileState] = field(default_factory=dict)  # by name
    text_times: dict[str, int] = field(default_factory=dict)  # time of change of each text file
    stray: list[tuple[str, str]] = field(default_factory=list)  # (name, why it is no clip)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)  # of metadata.jsonl


def scan_folder(root: Path, with_clip_json: set[str]) -> FolderScan:
    """List a base folder without opening what is in it.

    with_clip_json: names of folders known to hold a clip.json.
    """
    scan = FolderScan(metadata=read_metadata(root))
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                kind = kind_of(entry)
                status = entry.stat()
            except OSError as error:  # circular or broken links
                scan.stray.append((entry.name, error.strerror or str(error)))
                continue
            if kind is None:
                scan.stray.append((entry.name, "is no picture, video or folder"))
            elif kind == TEXT_FILE:
                scan.text_times[entry.name] = status.st_mtime_ns
            elif kind == FRAME_FOLDER:
                scan.clips[entry.name] = FileState(kind, status.st_mtime_ns)
            else:
                scan.clips[entry.name] = FileState(kind, status.st_mtime_ns, status.st_size)
    for name, state in scan.clips.items():
        if scan.text_times:
            state.caption_time = scan.text_times.get(caption_file_name(name, state.kind), 0)
        if name in scan.metadata:
            state.metadata_checksum = zlib.crc32(repr(scan.metadata[name]).encode())
        if name in with_clip_json:
            with contextlib.suppress(OSError):  # removed, so that the folder has changed, too
                state.clip_json_time = os.stat(os.path.join(root, name, "clip.json")).st_mtime_ns
    return scan


class FolderIndex:
    """The clips of one base folder, in natural order of their names.

    arrays: {column: numpy array (clips,)} of the numeric columns of SCHEMA, read-only views of the
    mapped file.
    stray: [(name, reason)] of entries that are no clips. used: mask (clips,) of the clips that may
    be used, or True for all.

    Raises ValueError if the folder does not exist, or if its metadata.jsonl cannot be parsed.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(
                f"--base_folder {root}: no such folder. "
                f"Expected {root}/<video>/<frame>.jpg, or .mp4 files"
            )
        self.file = index_file(root)
        self.used: np.ndarray | bool = True
        stored = load_index(self.file)
        self.attach(empty_table() if stored is None else stored)

        names = self.names()
        clip_json_times = self.arrays["clip_json_times"].tolist()
        scan = scan_folder(self.root, {name for name, t in zip(names, clip_json_times) if t})
        self.stray = scan.stray
        now = time.time_ns()
        row_of_unchanged = {}
        for row, (name, stamp) in enumerate(zip(names, self.arrays["stamps"].tolist())):
            state = scan.clips.get(name)
            if state is not None and stamp != UNSETTLED and stamp == state.stamp(now):
                row_of_unchanged[name] = row
        if stored is None or not len(row_of_unchanged) == len(scan.clips) == len(names):
            self.store(self.list_changed(scan, row_of_unchanged))

    def attach(self, table: pa.RecordBatch) -> None:
        """Use this table from now on."""
        self.table = table
        self.stamp = (table.schema.metadata or {}).get(b"stamp")
        self.arrays = numeric_columns(table)

    def store(self, table: pa.RecordBatch) -> None:
        """Write the table to the index file, and use it from there, mapped instead of in memory."""
        stamp = os.urandom(8).hex()
        table = table.replace_schema_metadata({"format": str(FORMAT), "stamp": stamp})
        save_index(table, self.file)
        stored = load_index(self.file)
        is_ours = stored is not None and stored.schema.metadata[b"stamp"] == stamp.encode()
        self.attach(stored if is_ours else table)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a loader process that is not forked.

        It has no table, because the process maps the index file that `stamp` identifies.
        """
        state = dict(vars(self))
        del state["arrays"]
        stored = load_index(self.file)
        if stored is not None and stored.schema.metadata[b"stamp"] == self.stamp:
            state["table"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        table = load_index(self.file) if self.table is None else self.table
        if table is None or table.schema.metadata[b"stamp"] != self.stamp:
            raise ValueError(
                f"--base_folder {self.root}: another run has listed the folder again "
                "while this run started. Start this run again"
            )
        self.attach(table)

    def names(self) -> list[str]:
        """Return the names of all clips."""
        return decode_names(self.table.column("name"))

    def name(self, row: int) -> str:
        """Return the name of one clip."""
        return os.fsdecode(self.table.column("name")[row].as_py())

    def frame_names(self, row: int) -> list[str]:
        """Return the names of a folder's frames in natural order; [] for a file."""
        return [os.fsdecode(name) for name in self.table.column("frames")[row].as_py()]

    def note(self, row: int) -> dict[str, Any]:
        """Return what else is known about a clip.

        Of any clip: `caption`; `trouble`, the reason why it cannot be used; `cuts`, the frames that
        begin a new scene. Of a video file: `start`, the time of its first frame in seconds, and its
        `rate` in frames per second, or, where the frame rate varies, the `times` of all frames.
        """
        note = self.table.column("note")[row].as_py()
        return json.loads(note) if note else {}

    def notes(self) -> list[str]:
        """Return the notes of all clips as JSON, "" where nothing else is known."""
        return self.table.column("note").to_pylist()

    def content(self) -> pa.Buffer:
        """Return names, kinds and frames of all clips as bytes, to be compared or hashed."""
        return self.table.select(["name", "frames", "kinds", "counts"]).serialize()

    def clip(
        self, row: int, rate: float, size: tuple[int, int] | None = None, **metadata: float
    ) -> Clip:
        """Return one clip.

        rate: frames per second of a folder without frame-rate metadata; size, metadata: see Clip.
        """
        kind = self.arrays["kinds"][row]
        note = self.note(row)
        times = None
        if kind == VIDEO_FILE and "times" in note:
            times = np.array(note["times"])
        elif kind == VIDEO_FILE:
            times = note["start"] + np.arange(self.arrays["counts"][row]) / note["rate"]

        own_rate = float(self.arrays["rates"][row])
        width = int(self.arrays["widths"][row])
        height = int(self.arrays["heights"][row])
        path = self.root / self.name(row)
        frame_names = self.frame_names(row)
        if kind == PICTURE:  # the only frame of the folder that it lies in
            path = self.root
            frame_names = [self.name(row)]
        return Clip(
            path,
            frame_names,
            rate if np.isnan(own_rate) else own_rate,
            times=times,
            source_size=(width, height) if width else None,
            size=size,
            metadata={**metadata, "caption": note.get("caption", "")},
        )

    # -------------------------------------------------------------------------------------- listing

    def list_changed(self, scan: FolderScan, row_of_unchanged: dict[str, int]) -> pa.RecordBatch:
        """Return the table of all clips that `scan` found.

        Only those that have changed are listed again.
        """
        changed = [name for name in scan.clips if name not in row_of_unchanged]
        tasks = [changed[i : i + CLIPS_PER_TASK] for i in range(0, len(changed), CLIPS_PER_TASK)]
        unchanged_rows = pa.array(row_of_unchanged.values(), pa.int64())
        batches = [self.table.take(unchanged_rows)]
        with (
            ThreadPoolExecutor(LISTING_THREADS) as pool,
            progress_bar(len(changed), f"listing {self.root}") as bar,
        ):
            for batch in pool.map(partial(self.list_clips, scan), tasks):
                batches.append(batch)
                bar.update(batch.num_rows)
        table = pa.concat_batches([batch.replace_schema_metadata(None) for batch in batches])
        row_of_name = {name: row for row, name in enumerate(decode_names(table.column("name")))}
        order = [row_of_name[name] for name in sorted(scan.clips, key=images.natural_key)]
        return table.take(pa.array(order, pa.int64()))

    def list_clips(self, scan: FolderScan, names: list[str]) -> pa.RecordBatch:
        """Return the rows of these clips."""
        rows = [self.list_clip(scan, name) for name in names]
        return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)

    def list_clip(self, scan: FolderScan, name: str) -> dict[str, Any]:
        """Return the row of a clip from file names and text files.

        Video files are not opened: `inspect` fills in their number of frames, sizes and motions.
        """
        state = scan.clips[name]
        path = self.root / name
        metadata = dict(scan.metadata.get(name, {}))
        note: dict[str, Any] = {}
        frame_names: list[str] = []
        width = height = 0
        clip_json_time = 0
        now = time.time_ns()  # before the folder is read: what changes from here on is noticed
        try:
            caption_name = caption_file_name(name, state.kind)
            if caption_name in scan.text_times:
                text = images.read_bytes(self.root / caption_name)
                metadata["caption"] = text.decode("utf-8", "replace")
            if state.kind == FRAME_FOLDER:
                inside = images.retry_io(os.listdir, path)
                frame_names = images.select_frame_names(inside)
                if "clip.json" in inside:
                    clip_json_time = os.stat(path / "clip.json").st_mtime_ns
                    metadata.update(read_clip_json(path / "clip.json"))
                num_videos = sum(map(video_decode.is_video, inside))
                if num_videos and not frame_names:
                    note["trouble"] = (
                        f"holds {num_videos} video files: pass it as a --base_folder of its own"
                    )
            elif state.kind == PICTURE:
                width, height = images.check_picture(path)
        except (OSError, ValueError) as error:
            note["trouble"] = reason_of(error, path)
        if metadata.get("caption", "").strip():
            note["caption"] = metadata["caption"].strip()
        state.clip_json_time = clip_json_time
        return {
            "name": os.fsencode(name),
            "frames": [os.fsencode(frame_name) for frame_name in frame_names],
            "note": encode_note(note),
            "kinds": state.kind,
            "counts": 1 if state.kind == PICTURE else len(frame_names),
            "rates": metadata.get("fps", np.nan),
            "motion_buckets": metadata.get("motion_bucket_id", np.nan),
            "widths": width,
            "heights": height,
            "motions": np.nan,
            "inspected": 0,
            "fully_decoded": 0,
            "unusable": int("trouble" in note),
            "clip_json_times": clip_json_time,
            "stamps": state.stamp(now),
        }

    # ----------------------------------------------------------------------------------- inspection

    def inspect(
        self,
        sizes: bool = False,
        motions: bool = False,
        measure: Callable[[Clip, np.ndarray], dict[str, Any]] | None = None,
    ) -> None:
        """Open each video file that was not opened yet; store its length, rate, size and motion.

        sizes, motions: find these for frame folders, too. measure(clip, keyframes): replaces
        Clip.measure_motion, and is called once for every clip, each of whose frames it has to
        decode; it returns {column: value}, and may add {"cuts": frames that begin a new scene}.
        Results are saved once a minute, so that a killed run continues where it was.
        """
        import cv2

        rows = self.rows_to_inspect(sizes, motions, decode_fully=measure is not None)
        if not rows:
            return
        arrays = {name: np.array(values) for name, values in self.arrays.items()}
        notes = self.notes()
        last_saved = time.monotonic()
        cv2.setNumThreads(1)  # several clips are inspected at a time
        inspect_row = partial(
            self.inspect_clip,
            measure=measure or Clip.measure_motion,
            decode_fully=measure is not None,
            motions=motions,
        )
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            progress_bar(len(rows), f"inspecting {self.root}") as bar,
        ):
            for row, (values, note) in results_as_completed(pool, inspect_row, rows):
                for column, value in values.items():
                    arrays[column][row] = value
                arrays["unusable"][row] = "trouble" in note
                notes[row] = encode_note(note)
                bar.update()
                if time.monotonic() - last_saved > SAVED_EVERY:
                    save_index(replace_columns(self.table, arrays, notes), self.file)
                    last_saved = time.monotonic()
        self.store(replace_columns(self.table, arrays, notes))

    def rows_to_inspect(self, sizes: bool, motions: bool, decode_fully: bool) -> list[int]:
        """Return the clips that `inspect` has to open."""
        is_video_file = self.arrays["kinds"] == VIDEO_FILE
        has_frames = (self.arrays["kinds"] == FRAME_FOLDER) & (self.arrays["counts"] > 0)
        if decode_fully:
            todo = (is_video_file | has_frames) & ~self.arrays["fully_decoded"]
        else:
            todo = is_video_file & ~self.arrays["inspected"]
            if sizes:
                todo |= has_frames & (self.arrays["widths"] == 0)
            if motions:
                has_no_bucket = np.isnan(self.arrays["motion_buckets"])
                todo |= has_frames & np.isnan(self.arrays["motions"]) & has_no_bucket
        return np.flatnonzero(todo & ~self.arrays["unusable"]).tolist()

    def inspect_clip(
        self,
        row: int,
        measure: Callable[[Clip, np.ndarray], dict[str, Any]],
        decode_fully: bool,
        motions: bool,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Open a frame folder or video file; return ({column: value}, note). See `inspect`.

        A frame that is damaged makes the clip unusable if it is among those that `measure` reads.
        """
        path = self.root / self.name(row)
        note = self.note(row)
        values: dict[str, Any] = {"fully_decoded": decode_fully}
        keyframes: Any = ()
        try:
            if self.arrays["kinds"][row] == VIDEO_FILE:
                values["inspected"] = True
                video = video_decode.probe_video(path)
                keyframes = video.keyframes
                note["start"] = float(video.times[0])
                note["rate"] = video.rate
                if not video.is_regular():
                    note["times"] = video.times.tolist()
                values["counts"] = len(video.times)
                values["widths"] = video.width
                values["heights"] = video.height
                rate_of_metadata = float(self.arrays["rates"][row])
                rate = video.rate if np.isnan(rate_of_metadata) else rate_of_metadata
                values["rates"] = rate
                clip = Clip(path, [], rate, video.times)
            else:
                clip = self.clip(row, DEFAULT_SOURCE_FPS)
                values["widths"], values["heights"] = clip.picture_size()
            if motions or decode_fully or not clip.files:
                measured = measure(clip, keyframes)
                note["cuts"] = measured.pop("cuts", note.get("cuts", []))
                values.update(measured)
        except (OSError, ValueError) as error:
            note["trouble"] = reason_of(error, path)
        return values, note


def kind_of(entry: os.DirEntry) -> int | None:
    """Return FRAME_FOLDER, VIDEO_FILE, PICTURE, TEXT_FILE, or None for anything else."""
    if entry.is_dir():
        return FRAME_FOLDER
    if not entry.is_file():  # a pipe, or a broken link
        return None
    suffix = os.path.splitext(entry.name)[1].lower()
    if video_decode.is_video(entry.name):
        return VIDEO_FILE
    if suffix in TEXT_SUFFIXES:
        return TEXT_FILE
    return PICTURE if suffix in images.FRAME_SUFFIXES else None


def caption_file_name(name: str, kind: int) -> str:
    """Return the name of the text file beside a clip that holds its caption."""
    stem = name if kind == FRAME_FOLDER else os.path.splitext(name)[0]
    return f"{stem}.txt"


def reason_of(error: Exception, path: Path) -> str:
    """Return what an error says about a clip, without the clip's own path."""
    reason = getattr(error, "strerror", None) or str(error)
    return reason.replace(f"{path}{os.sep}", "").replace(f"{path}: ", "")


def progress_bar(total: int, description: str) -> tqdm:
    """Return a progress bar that shows itself after two seconds."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, delay=2)


def results_as_completed(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, function(item)) as they complete.

    Few items wait at a time, which bounds the memory.
    """
    waiting: dict[Future, Any] = {}
    for item in items:
        if len(waiting) >= 4 * pool._max_workers:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
        waiting[pool.submit(function, item)] = item
    for future in as_completed(waiting):
        yield waiting[future], future.result()


# ----------------------------------------------------------------------------------- the index file


def encode_note(note: dict[str, Any]) -> str:
    """Return a note as JSON, "" if it is empty."""
    return json.dumps(note) if note else ""


def decode_names(column: pa.Array) -> list[str]:
    """Return a column of file names as strings."""
    return [os.fsdecode(name) for name in column.to_pylist()]


def empty_table() -> pa.RecordBatch:
    """Return an index without clips."""
    return pa.RecordBatch.from_pylist([], schema=SCHEMA)


def numeric_columns(table: pa.RecordBatch) -> dict[str, np.ndarray]:
    """Return {column: array (clips,)} of the numeric columns, without copying them."""
    arrays = {}
    for name in SCHEMA.names:
        if name not in TEXT_COLUMNS:
            array = np.from_dlpack(table.column(name))  # unlike to_numpy, does not import pandas
            # Arrow packs eight booleans into a byte, which numpy cannot view; hence bytes
            arrays[name] = array.view(bool) if name in BOOL_COLUMNS else array
    return arrays


def replace_columns(
    table: pa.RecordBatch, arrays: dict[str, np.ndarray], notes: list[str]
) -> pa.RecordBatch:
    """Return the table with other numeric columns and notes."""
    columns = {name: table.column(name) for name in SCHEMA.names}
    columns["note"] = pa.array(notes, SCHEMA.field("note").type)
    for name, array in arrays.items():
        columns[name] = pa.array(array.view(np.uint8) if name in BOOL_COLUMNS else array)
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=table.schema)


def index_file(root: str | os.PathLike) -> Path:
    """Return the path of a base folder's index file."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "svd_xtend")
    digest = hashlib.blake2b(os.fsencode(os.path.abspath(root)), digest_size=12).hexdigest()
    return cache / f"{digest}.{FORMAT}.index"


def load_index(file: Path) -> pa.RecordBatch | None:
    """Return the memory-mapped table of an index file; None if it is missing or unreadable."""
    try:
        # one record batch, so that each column is one array
        mapped = pa.memory_map(str(file)).read_buffer()
        options = pa.ipc.IpcReadOptions(use_threads=False)  # loader processes will be forked
        table = pa.ipc.open_file(mapped, options=options).get_batch(0)
        table.validate()
    except (OSError, ValueError, pa.ArrowException):
        return None
    metadata = table.schema.metadata or {}
    is_current = metadata.get(b"format") == str(FORMAT).encode() and b"stamp" in metadata
    return table if is_current and table.schema == SCHEMA else None


def save_index(table: pa.RecordBatch, file: Path) -> None:
    """Write an index file completely or not at all.

    A file that cannot be written only costs the next start time.
    """
    unfinished = file.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_batch(table)
        os.replace(unfinished, file)
    except OSError as error:
        logger.warning(
            "%s: cannot be written (%s); the next start lists the folder again",
            file,
            error.strerror or error,
        )
        with contextlib.suppress(OSError):
            unfinished.unlink()
