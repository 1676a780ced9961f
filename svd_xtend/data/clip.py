"""A clip: frames by number, whether they are the pictures of a folder or in a video file, and when each is shown.

    clip.frame_indices(start=3, length=14, fps=7)       # which frames a window of 14 at 7 a second shows
    clip.read(numbers, 512, 320)                  # (f, h, w, 3) uint8

Next: svd_xtend/decode.py, video files; svd_xtend/video.py, pictures.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from svd_xtend.data import images, motion, video_decode

DURATION_TOLERANCE = 0.1  # of a frame, by which a clip may be too short: containers round times
EXPECTED_METADATA = '{"fps": 7, "motion_bucket_id": 127, "caption": "a dog"}'


@dataclass(frozen=True)
class ClipSpec:
    """Describe the clips that a model is trained on.

    width, height: pixels; 0 where sizes are not needed. num_frames: frames of a clip. fps: frames per second of a clip, or
    "native" for the frame rate of each video. resize_mode: "crop" or "stretch".
    """

    width: int
    height: int
    num_frames: int
    fps: float | str
    resize_mode: str = "crop"


@dataclass(frozen=True)
class Clip:
    """path: a folder, of whose frames `files` are the names, or a video file; rate: frames a second; times:
    seconds (n,) of a file's frames, as it counts them; source_size: (width, height) of its frames, size: of a sample of it,
    where they are known; metadata: `fps` at which it is sampled, `motion_bucket_id`, `caption`."""

    path: Path
    files: list
    rate: float
    times: np.ndarray = None
    source_size: tuple = None
    size: tuple = None
    metadata: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.files or self.times)

    @property
    def stem(self):
        """Its name, of a file without the suffix."""
        return self.path.name if self.files else self.path.stem

    def frame_times(self):
        """Seconds (n,) from the first frame to each, at `rate` on average."""
        if self.times is None or len(self.times) < 2:
            return np.arange(len(self)) / self.rate
        passed = self.times - self.times[0]
        return passed * ((len(self) - 1) / passed[-1] / self.rate)

    def num_starts(self, length, fps):
        """How many frames a window of `length` frames, `fps` a second, can begin with; ValueError where it is too short."""
        clock = self.frame_times()
        count = int(
            np.searchsorted(
                clock, clock[-1] - (length - 1) / fps + DURATION_TOLERANCE / self.rate, side="right"
            )
        )
        if not count:
            raise ValueError(
                f"{self.path}: {clock[-1]:.3g} s are too short for {length} frames at {fps:.4g} a second"
            )
        return count

    def frame_indices(self, start, length, fps):
        """The frames (length,) nearest in time to those of a window of `fps` a second that begins with frame `start`."""
        clock = self.frame_times()
        return video_decode.nearest_frames(clock, clock[start] + np.arange(length) / fps)

    def iter_frames(self, numbers):
        """Yields these frames as they are, (h, w, 3) uint8, upright; of numbers that do not fall."""
        if self.files:
            return (images.load_frame(self.path / self.files[i]) for i in numbers)
        return video_decode.read_frames(self.path, self.times, numbers)

    def read(self, numbers, width, height, resize_mode="crop"):
        """Frames (f, h, w, 3) uint8 of that size. Raises ValueError with the path in front."""
        if self.files:  # JPEG is decoded at a fitting size
            frames = (
                images.load_frame(self.path / self.files[i], width, height, resize_mode)
                for i in numbers
            )
        else:
            found = images.retry_io(lambda _: list(self.iter_frames(numbers)), self.path)
            frames = (images.resize_frame(frame, width, height, resize_mode) for frame in found)
        return np.stack(list(frames))

    def chunk_readers(self, width, height, resize_mode, length):
        """All frames in order, `length` at a time: functions that read them; those of a video file, which is decoded once, must
        be called one after the other."""
        numbers = np.arange(len(self))
        parts = np.split(numbers, numbers[length::length])
        if self.files:
            return [partial(self.read, part, width, height, resize_mode) for part in parts]
        frames = self.iter_frames(numbers)

        def go_on(part):
            return np.stack([images.resize_frame(next(frames), width, height, resize_mode) for _ in part])

        return [partial(go_on, part) for part in parts]

    def picture_size(self):
        """(width, height) of its frames, upright."""
        if self.source_size:
            return self.source_size
        if self.files:
            return images.picture_size([self.path / name for name in self.files])
        height, width = next(iter(self.iter_frames([0]))).shape[:2]
        return width, height

    def digest(self):
        """Changes when a file of it is added, removed, renamed or written again."""
        files = [self.path / name for name in self.files] or [self.path]
        told = [
            (file.name, s.st_size, s.st_mtime_ns)
            for file in files
            for s in [images.retry_io(os.stat, file)]
        ]
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()

    def iter_small_frames(self, numbers):
        """Yields these frames, of a folder in a size that is enough to see what moves; of JPEGs no more is decoded."""
        if not self.files:
            return self.iter_frames(numbers)
        size = self.picture_size()
        width, height = (max(round(side * 2 * motion.FLOW_SIDE / max(size)), 1) for side in size)
        return (images.load_frame(self.path / self.files[i], width, height) for i in numbers)

    def measure_motion(self, keys=()):
        """{motions: its motion.score}. keys: frames that can be decoded alone."""
        return {"motions": motion.clip_motion(self.iter_small_frames, len(self), self.rate, keys)}


def load_picture(path, width=None, height=None, resize_mode="crop"):
    """A picture, or the first frame of a video file, as a PIL image, of that size where one is given."""
    if not video_decode.is_video(path):
        return images.load_image(path, width, height, resize_mode)
    frame = next(iter(video_decode.read_frames(path, np.zeros(1), [0])))
    return Image.fromarray(images.resize_frame(frame, width, height, resize_mode) if width else frame)


def find_continuation(path, base_folders, rate):
    """(the clip that a picture is a frame of, the frame's number), or None: of a video file, or of a folder of frames that lies
    in a base folder or has a clip.json. rate: frames a second of a folder that does not tell."""
    path = Path(path)
    if video_decode.is_video(path):
        film = video_decode.probe_video(path)
        return Clip(path, [], film.rate, film.times, (film.width, film.height)), 0
    file, among = path.parent / "clip.json", {Path(root).absolute() for root in base_folders}
    if not file.is_file() and path.absolute().parent.parent not in among:
        return None
    told = read_clip_json(file) if file.is_file() else {}
    files = [frame.name for frame in images.list_frames(path.parent)]
    return Clip(path.parent, files, told.get("fps", rate), metadata=told), files.index(path.name)


def read_clip_json(file):
    """{fps, motion_bucket_id, caption}, those that a clip.json tells."""
    try:
        return parse_clip_metadata(json.loads(images.read_bytes(file)))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: expected {EXPECTED_METADATA}, got: {error}") from error


def parse_clip_metadata(own):
    """Of a JSON object what is said of a clip; raises ValueError, TypeError or AttributeError."""
    told = {key: float(own[key]) for key in ("fps", "motion_bucket_id") if own.get(key) is not None}
    if "fps" in told and not 0 < told["fps"] < 1e6:
        raise ValueError(f"fps {told['fps']:g}")
    caption = own.get("caption", own.get("text"))
    return {**told, **({"caption": str(caption)} if caption is not None else {})}
