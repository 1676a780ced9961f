"""Video files: what one holds, and frames of it by number, decoded from the last keyframe before them.

    film = probe("clip.mp4")                       # times of all frames, size; hardly decodes
    pixels = list(read("clip.mp4", film.times, [3, 7, 11]))      # (h, w, 3) uint8 each, upright

What FFmpeg reads is read (by PyAV). Frames are known by their timestamps, so that a variable frame rate, and frames that an edit
list hides, are no special cases. Sound is ignored.
"""

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svd_xtend.data.images import is_transient, retry_io

SUFFIXES = {
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".asf", ".flv",
    ".f4v", ".ogv", ".ogg", ".3gp", ".3g2", ".mxf", ".vob", ".divx", ".dv", ".y4m", ".nut", ".rm", ".rmvb", ".mjpg", ".mjpeg",
}  # fmt: skip
MOST_PIXELS = (
    8192 * 8192
)  # of a frame; a header that says more is damaged, or needs another machine
THREADED = 640 * 360  # pixels of a frame, below which to start threads takes longer than they save
UNTOLD = 2  # FFmpeg's number of a colour space that a file does not tell
MAX_REORDERED_FRAMES = 16  # frames that may be shown before one that is stored before them, by H.264's and H.265's limits
BT709, HIGH_DEFINITION = (
    1,
    720,
)  # what such a file then has, from this height on, by every player's convention
# To open a file FFmpeg decodes a frame for what a header may not tell. Nothing here asks for that: most decoders, told to skip it,
# do; these do not, and are kept from it. All of their containers tell the size.
UNASKED = {"vp8", "vp9", "libvpx", "libvpx-vp9"}


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds: `times` (n,) seconds of its frames in the order in which they are shown, `keys` the numbers of
    those that can be decoded alone, `width` and `height` upright and of square pixels, `rate` frames a second on average."""

    times: np.ndarray
    keyframes: np.ndarray
    width: int
    height: int
    rate: float

    def is_regular(self):
        """Whether the frames are equally far apart, up to what a container rounds."""
        grid = self.times[0] + np.arange(len(self.times)) / self.rate
        return bool(np.abs(self.times - grid).max() < 0.25 / self.rate)


def open_video(path):
    """(container, its first video stream). Raises ValueError that starts with the path."""
    import av

    with readable(path, "cannot be opened as a video"):
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for ever
            raise ValueError(f"{path}: is no file")
        asked = ",".join(sorted(av.codecs_available - UNASKED))
        probing = 64 * [
            {"skip_frame": "all", "codec_whitelist": asked}
        ]  # of up to 64 streams; it ends with the opening
        container = av.open(os.path.abspath(path), stream_options=probing)
    try:
        if not container.streams.video:
            raise ValueError(f"{path}: has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError(f"{path}: FFmpeg knows no decoder for it")
        width, height = stream.codec_context.width, stream.codec_context.height
        if not 0 < width * height <= MOST_PIXELS:
            raise ValueError(f"{path}: says that its frames are {width}x{height}")
        if width * height < THREADED:
            stream.codec_context.thread_count = 1
        return container, stream
    except ValueError:
        container.close()
        raise


@contextlib.contextmanager
def readable(path, what):
    """Errors of FFmpeg and the system become a ValueError that starts with the path; but those of a network file system, which
    pass, stay as they are. EIO does not: it is what FFmpeg says of most that is damaged."""
    import av

    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        if is_transient(error) and error.errno != errno.EIO:
            raise
        raise ValueError(f"{path}: {what} ({error.strerror or error})") from error


def probe_video(path):
    """The VideoInfo of a file, from the headers of its packets; its first frame alone is decoded. Raises ValueError that starts
    with the path."""
    container, stream = retry_io(open_video, path)
    with container:
        with readable(path, "is damaged"):
            packets = [
                (p.dts if p.pts is None else p.pts, p.is_keyframe)
                for p in container.demux(stream)
                if p.size and not (p.is_discard or p.is_corrupt)
            ]
        first = first_frame(container, stream)
        rate, promised = float(stream.average_rate or stream.guessed_rate or 25), stream.frames
        if any(
            stamp is None for stamp, _ in packets
        ):  # a bare stream: frames follow each other at the stated rate
            stamped = np.arange(len(packets)) / rate
        else:
            stamped = np.array([stamp for stamp, _ in packets], np.float64) * float(
                stream.time_base
            )
    times, keys = (
        np.sort(stamped),
        np.sort(stamped[[key for _, key in packets]] if packets else stamped),
    )
    if not len(times):
        raise ValueError(f"{path}: holds no frames")
    if promised > len(times) + 2:
        raise ValueError(f"{path}: ends early, {len(times)} of {promised} frames are there")
    if len(times) > 1:
        if times[-1] <= times[0]:
            raise ValueError(f"{path}: its timestamps do not advance")
        rate = (len(times) - 1) / (times[-1] - times[0])
    height, width = (next(iter(read_frames(path, times, [0]))) if first is None else first).shape[
        :2
    ]
    return VideoInfo(times, np.searchsorted(times, keys), width, height, rate)


def first_frame(container, stream):
    """Pixels of it, from a container that was read through; None where that cannot go back."""
    import av

    try:
        container.seek(stream.start_time or 0, stream=stream)
        return to_pixels(next(container.decode(stream)), aspect_of(stream))
    except (av.error.FFmpegError, OSError, StopIteration):
        return None


def read_frames(path, times, numbers):
    """Frames of a file by their numbers in `times`, which must not fall: yields (h, w, 3) uint8, RGB, upright, of square
    pixels. Decodes from the last keyframe before the first of them to the last of them, and converts only them.

    Raises ValueError that starts with the path where one is missing or damaged."""
    numbers, done = np.asarray(numbers), 0
    with readable(path, "cannot be decoded"):
        for number, frame, aspect in decode(path, times, int(numbers[0]), int(numbers[-1])):
            if frame.is_corrupt:  # FFmpeg made it up where data was damaged
                raise ValueError(f"{path}: frame {number} is damaged")
            if number == numbers[done]:
                pixels = to_pixels(frame, aspect)
            while done < len(numbers) and numbers[done] == number:
                done += 1
                yield pixels
            if done == len(numbers):
                return
    raise ValueError(f"{path}: frame {numbers[done]} of {len(times)} is missing")


def decode(path, times, first, last):
    """(number, frame, its pixels' aspect) of frames first .. last: from a keyframe on by their timestamps, of two that are
    far enough apart; where these do not give each of them, as files that tell wrong ones, counted from the start."""
    for back in (0, MAX_REORDERED_FRAMES, None)[2 if first == 0 else 0 :]:
        container, stream = open_video(path)
        with container:
            reordered = (
                container.format.name == "avi" and stream.codec_context.has_b_frames
            )  # AVI cannot tell when
            counted = back is None or reordered
            if (
                not counted and container.format.name != "gif"
            ):  # all of a GIF hangs on its first frame, which it stands at
                container.seek(
                    round(times[max(first - back, 0)] / float(stream.time_base)), stream=stream
                )
            for count, frame in enumerate(container.decode(stream)):
                if not counted and frame.pts is None:
                    break
                number = (
                    count if counted else nearest_frames(times, float(frame.pts * frame.time_base))
                )
                if number > first:
                    break  # that one is missing, or comes later, or leads a keyframe and needs the one before
                if number == first:
                    yield number, frame, aspect_of(stream)
                    first += 1
                if number == last:
                    return


def aspect_of(stream):
    """Width to height of its pixels, which some files tell in their frames alone; None: it does not tell."""
    return stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio


def nearest_frames(times, time):
    """The number of the frame whose time is nearest; of two as near the earlier. time: a number, or an array of them."""
    after = np.clip(np.searchsorted(times, time), 1, max(len(times) - 1, 1))
    if len(times) == 1:
        return np.zeros_like(after) if np.ndim(time) else 0
    return after - (time - times[after - 1] <= times[after] - time)


def to_pixels(frame, aspect=None):
    """(h, w, 3) uint8 RGB of a decoded frame, turned upright, its pixels, of `aspect` width to height, made square."""
    from PIL import Image

    untold = frame.colorspace == UNTOLD and frame.height >= HIGH_DEFINITION
    pixels = frame.to_ndarray(format="rgb24", **({"src_colorspace": BT709} if untold else {}))
    if aspect and aspect != 1:
        size = max(round(frame.width * float(aspect)), 1), frame.height
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    return (
        np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
        if frame.rotation
        else pixels
    )


def is_video(name):
    """Whether a file is one by its name."""
    return Path(name).suffix.lower() in SUFFIXES
