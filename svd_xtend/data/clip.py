"""A clip of a source video: its frames by index, and the time at which each is shown.

    frame_indices = clip.frame_indices(start=3, length=14, fps=7)     # a window of 14 frames
    frames = clip.read(frame_indices, 512, 320)                       # (14, 320, 512, 3) uint8

A clip is a folder of pictures or a video file. `video_decode` reads video files, `images` reads
pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from svd_xtend.data import images, motion, video_decode

DURATION_TOLERANCE = 0.1  # of a frame, by which a clip may be too short: containers round times
EXPECTED_METADATA = '{"fps": 7, "motion_bucket_id": 127, "caption": "a dog"}'
MAX_FPS = 1e6

FrameIndices = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class ClipSpec:
    """Describe the clips that a model is trained on.

    width, height: pixels; 0 where sizes are not needed. num_frames: frames of a clip. fps: frames
    per second of a clip, or "native" for the frame rate of each video. resize_mode: "crop" or
    "stretch".
    """

    width: int
    height: int
    num_frames: int
    fps: float | str
    resize_mode: str = "crop"


@dataclass(frozen=True)
class Clip:
    """A source video on disk: a folder of pictures, or a video file.

    path: the folder, or the video file. files: file names of the frames in the folder; [] for a
    video file. rate: frames per second of the source video. times: (n,) seconds of the frames of a
    video file, as `probe_video` returns them; None for a folder. source_size: (width, height) of
    the frames on disk, if known. size: (width, height) of a sample, if known. metadata: `fps` at
    which the clip is sampled, `motion_bucket_id`, `caption`.
    """

    path: Path
    files: list[str]
    rate: float
    times: np.ndarray | None = None
    source_size: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        if self.files or self.times is None:
            return len(self.files)
        return len(self.times)

    @property
    def stem(self) -> str:
        """The name of the folder, or of the video file without its suffix."""
        return self.path.name if self.files else self.path.stem

    # ----------------------------------------------------------------------------------- sampling

    def frame_times(self) -> np.ndarray:
        """Return the seconds (n,) from the first frame to each frame, `rate` frames per second on
        average.

        The timestamps of a video file are stretched to `rate`, which metadata may have set.
        """
        if self.times is None or len(self.times) < 2:
            return np.arange(len(self)) / self.rate
        elapsed = self.times - self.times[0]
        return elapsed * ((len(self) - 1) / elapsed[-1] / self.rate)

    def num_starts(self, length: int, fps: float) -> int:
        """Return with how many of the first frames a window of `length` frames at `fps` can begin.

        Raises ValueError if the clip is shorter than the window.
        """
        frame_times = self.frame_times()
        duration = frame_times[-1]
        last_start_time = duration - (length - 1) / fps + DURATION_TOLERANCE / self.rate
        num_starts = int(np.searchsorted(frame_times, last_start_time, side="right"))
        if num_starts == 0:
            raise ValueError(
                f"{self.path}: {duration:.3g} s are too short for {length} frames at {fps:.4g} fps"
            )
        return num_starts

    def frame_indices(self, start: int, length: int, fps: float) -> np.ndarray:
        """Return the frames (length,) that a window at `fps` shows if it begins with frame `start`.

        Each is the frame nearest in time, so a frame may be skipped or repeated.
        """
        frame_times = self.frame_times()
        wanted_times = frame_times[start] + np.arange(length) / fps
        return video_decode.nearest_frames(frame_times, wanted_times)

    # ------------------------------------------------------------------------------------ reading

    def iter_frames(self, frame_indices: FrameIndices) -> Iterator[np.ndarray]:
        """Yield frames (h, w, 3) uint8 in their own size, upright; indices in ascending order.

        Raises ValueError, starting with the path, if a frame cannot be read.
        """
        if self.files:
            return (images.load_frame(self.path / self.files[i]) for i in frame_indices)
        assert self.times is not None, "probe_video gives the times of a video file"
        return video_decode.read_frames(self.path, self.times, frame_indices)

    def read(
        self, frame_indices: FrameIndices, width: int, height: int, resize_mode: str = "crop"
    ) -> np.ndarray:
        """Return frames (f, height, width, 3) uint8; indices in ascending order.

        resize_mode: see `images.resize_frame`. Raises ValueError, starting with the path, if a
        frame cannot be read.
        """
        frames: Iterable[np.ndarray]
        if self.files:  # a JPEG is decoded at a suitable size
            frames = (
                images.load_frame(self.path / self.files[i], width, height, resize_mode)
                for i in frame_indices
            )
        else:
            decoded = images.retry_io(lambda _: list(self.iter_frames(frame_indices)), self.path)
            frames = (images.resize_frame(frame, width, height, resize_mode) for frame in decoded)
        return np.stack(list(frames))

    def chunk_readers(
        self, width: int, height: int, resize_mode: str, length: int
    ) -> list[Callable[[], np.ndarray]]:
        """Return functions that read all frames in order, `length` at a time.

        Each function returns (f, height, width, 3) uint8. A video file is decoded only once, so its
        functions must be called in order; those of a folder can be called in parallel.
        """
        frame_indices = np.arange(len(self))
        chunks = np.split(frame_indices, frame_indices[length::length])
        if self.files:
            return [partial(self.read, chunk, width, height, resize_mode) for chunk in chunks]
        frames = self.iter_frames(frame_indices)

        def read_next_chunk(length: int) -> np.ndarray:
            chunk = [
                images.resize_frame(next(frames), width, height, resize_mode) for _ in range(length)
            ]
            return np.stack(chunk)

        return [partial(read_next_chunk, len(chunk)) for chunk in chunks]

    def iter_small_frames(self, frame_indices: FrameIndices) -> Iterator[np.ndarray]:
        """Yield frames that are large enough to measure motion; indices in ascending order.

        A JPEG is decoded at a small size. The frames of a video file have their own size.
        """
        if not self.files:
            return self.iter_frames(frame_indices)
        source_size = self.picture_size()
        scale_to = 2 * motion.FLOW_SIDE
        width, height = (max(round(side * scale_to / max(source_size)), 1) for side in source_size)
        return (images.load_frame(self.path / self.files[i], width, height) for i in frame_indices)

    # ---------------------------------------------------------------------------------- measuring

    def picture_size(self) -> tuple[int, int]:
        """Return (width, height) of the frames on disk, upright."""
        if self.source_size:
            return self.source_size
        if self.files:
            return images.picture_size([self.path / name for name in self.files])
        height, width = next(self.iter_frames([0])).shape[:2]
        return width, height

    def digest(self) -> str:
        """Return a hash that changes when a file of the clip is added, removed, renamed or
        rewritten."""
        if self.files:
            paths = [self.path / name for name in self.files]
        else:
            paths = [self.path]
        stamps = []
        for path in paths:
            status = images.retry_io(os.stat, path)
            stamps.append((path.name, status.st_size, status.st_mtime_ns))
        return hashlib.blake2b(json.dumps(stamps).encode(), digest_size=16).hexdigest()

    def measure_motion(self, keyframes: FrameIndices = ()) -> dict[str, float]:
        """Return {"motions": motion score}; see `motion.clip_motion_score`.

        keyframes: indices of frames that can be decoded alone.
        """
        score = motion.clip_motion_score(self.iter_small_frames, len(self), self.rate, keyframes)
        return {"motions": score}


def load_picture(
    path: str | os.PathLike,
    width: int | None = None,
    height: int | None = None,
    resize_mode: str = "crop",
) -> Image.Image:
    """Read a picture, or the first frame of a video file, as a PIL image.

    width, height: pixels to resize to; None keeps the size. resize_mode: see `images.resize_frame`.
    """
    if not video_decode.is_video(path):
        return images.load_image(path, width, height, resize_mode)
    frame = next(video_decode.read_frames(path, np.zeros(1), [0]))
    if width and height:
        frame = images.resize_frame(frame, width, height, resize_mode)
    return Image.fromarray(frame)


def find_continuation(
    path: str | os.PathLike, base_folders: Iterable[str | os.PathLike], rate: float
) -> tuple[Clip, int] | None:
    """Find the clip that a picture is a frame of; return the clip and the index of the frame.

    A video file is a clip that begins with frame 0. A picture belongs to a clip if its folder has a
    clip.json or lies in one of the base folders; otherwise the result is None.
    rate: frames per second of a folder without frame-rate metadata.
    """
    path = Path(path)
    if video_decode.is_video(path):
        video = video_decode.probe_video(path)
        size = (video.width, video.height)
        return Clip(path, [], video.rate, video.times, source_size=size), 0
    clip_json = path.parent / "clip.json"
    metadata: dict[str, Any] = {}
    if clip_json.is_file():
        metadata = read_clip_json(clip_json)
    elif path.absolute().parent.parent not in {Path(root).absolute() for root in base_folders}:
        return None
    files = [frame.name for frame in images.list_frames(path.parent)]
    clip = Clip(path.parent, files, metadata.get("fps", rate), metadata=metadata)
    return clip, files.index(path.name)


def read_clip_json(file: str | os.PathLike) -> dict[str, Any]:
    """Return the `fps`, `motion_bucket_id` and `caption` that a clip.json states.

    Raises ValueError, starting with the path, if it holds something else.
    """
    try:
        return parse_clip_metadata(json.loads(images.read_bytes(file)))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: expected {EXPECTED_METADATA}, got: {error}") from error


def parse_clip_metadata(record: dict[str, Any]) -> dict[str, Any]:
    """Return the `fps`, `motion_bucket_id` and `caption` of a JSON object, those that it states.

    "text" is accepted for "caption". Raises ValueError, TypeError or AttributeError on wrong
    values.
    """
    metadata: dict[str, Any] = {}
    for key in ("fps", "motion_bucket_id"):
        if record.get(key) is not None:
            metadata[key] = float(record[key])
    if "fps" in metadata and not 0 < metadata["fps"] < MAX_FPS:
        raise ValueError(f"fps {metadata['fps']:g} is not above 0 and below {MAX_FPS:g}")
    caption = record.get("caption", record.get("text"))
    if caption is not None:
        metadata["caption"] = str(caption)
    return metadata
