"""Read video files: the times and size of their frames, and any frames by index.

    video = probe_video("clip.mp4")     # times of all frames, size; decodes only the first frame
    frames = list(read_frames("clip.mp4", video.times, [3, 7, 11]))     # (h, w, 3) uint8, upright

Every format that FFmpeg reads (through PyAV) is supported. A frame is identified by its timestamp,
so variable frame rates and frames that an edit list hides need no special treatment. Sound is
ignored.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from svd_xtend.data.images import is_transient, retry_io

if TYPE_CHECKING:
    from fractions import Fraction

    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = {
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".m2ts",
    ".mts", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".ogg", ".3gp", ".3g2", ".mxf", ".vob",
    ".divx", ".dv", ".y4m", ".nut", ".rm", ".rmvb", ".mjpg", ".mjpeg",
}  # fmt: skip

# A header that states a larger frame is damaged, or the video needs a larger machine.
MAX_FRAME_PIXELS = 8192 * 8192

# Below this size, starting decoder threads takes longer than they save.
MIN_PIXELS_FOR_THREADS = 640 * 360

# H.264 and H.265 allow at most this many frames to be shown before a frame that is stored before
# them.
MAX_REORDERED_FRAMES = 16

# When FFmpeg opens a file it decodes a frame, to learn what the header may leave out. Nothing here
# needs that. Most decoders skip it when asked (`skip_frame`). These do not, so they are disabled
# while a file is opened; their containers always state the frame size.
CODECS_DISABLED_WHILE_OPENING = {"vp8", "vp9", "libvpx", "libvpx-vp9"}
MAX_STREAMS = 64  # streams of a file to which the options for opening apply

DEFAULT_FRAME_RATE = 25  # frames per second, where neither the file nor FFmpeg states one
MAX_TIME_ERROR = 0.25  # of a frame, that containers may round the times of a constant frame rate

# FFmpeg's numbers of colour spaces. Players assume BT.709 for a high-definition video that states
# none.
COLORSPACE_UNSPECIFIED = 2
COLORSPACE_BT709 = 1
HIGH_DEFINITION_HEIGHT = 720


@dataclass(frozen=True)
class VideoInfo:
    """Describe the frames of a video file.

    times: (n,) seconds of its frames, in the order in which they are shown. keyframes: indices of
    the frames that can be decoded alone. width, height: pixels, after rotation and with square
    pixels. rate: average frames per second.
    """

    times: np.ndarray
    keyframes: np.ndarray
    width: int
    height: int
    rate: float

    def is_regular(self) -> bool:
        """Return True if the frame rate is constant, up to the rounding of containers."""
        regular_times = self.times[0] + np.arange(len(self.times)) / self.rate
        return bool(np.abs(self.times - regular_times).max() < MAX_TIME_ERROR / self.rate)


def open_video(path: str | os.PathLike) -> tuple[InputContainer, VideoStream]:
    """Open a video file; return the container and its first video stream.

    Raises ValueError, starting with the path, if the file is no video that can be decoded.
    """
    import av

    with errors_name_path(path, "cannot be opened as a video"):
        allowed_codecs = av.codecs_available - CODECS_DISABLED_WHILE_OPENING
        options = {"skip_frame": "all", "codec_whitelist": ",".join(sorted(allowed_codecs))}
        # These options apply only while the file is opened, not to later decoding.
        container = av.open(
            os.path.abspath(path),
            stream_options=[options] * MAX_STREAMS,  # type: ignore[list-item]
        )
    try:
        if not container.streams.video:
            raise ValueError(f"{path}: has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError(f"{path}: FFmpeg has no decoder for its codec")
        width, height = stream.codec_context.width, stream.codec_context.height
        if not 0 < width * height <= MAX_FRAME_PIXELS:
            raise ValueError(f"{path}: its header states a frame size of {width}x{height}")
        if width * height < MIN_PIXELS_FOR_THREADS:
            stream.codec_context.thread_count = 1
        return container, stream
    except ValueError:
        container.close()
        raise


@contextlib.contextmanager
def errors_name_path(path: str | os.PathLike, problem: str) -> Iterator[None]:
    """Convert errors of FFmpeg and the system into a ValueError that starts with the path.

    Transient errors of a network file system pass through unchanged, so that the caller can retry.
    EIO is not treated as one, because FFmpeg reports it for most damaged files.
    """
    import av

    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        if is_transient(error.errno) and error.errno != errno.EIO:
            raise
        raise ValueError(f"{path}: {problem} ({error.strerror or error})") from error


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Read the headers of all packets and decode the first frame.

    Raises ValueError, starting with the path, if the file is damaged, ends early or holds no
    frames.
    """
    container, stream = retry_io(open_video, path)
    with container:
        timestamps = []
        is_keyframe = []
        with errors_name_path(path, "is damaged"):
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard and not packet.is_corrupt:
                    timestamps.append(packet.dts if packet.pts is None else packet.pts)
                    is_keyframe.append(packet.is_keyframe)
        first_frame = decode_first_frame(container, stream)
        rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_FRAME_RATE)
        stated_frames = stream.frames
        if None in timestamps:  # a bare stream without a container: trust the stated frame rate
            packet_times = np.arange(len(timestamps)) / rate
        else:
            packet_times = np.array(timestamps, np.float64) * timestamp_unit(stream)
    if not timestamps:
        raise ValueError(f"{path}: holds no frames")
    if stated_frames > len(timestamps) + 2:
        raise ValueError(
            f"{path}: ends early, {len(timestamps)} of {stated_frames} frames are present"
        )
    times = np.sort(packet_times)
    keyframe_times = np.sort(packet_times[np.array(is_keyframe)])
    if len(times) > 1:
        if times[-1] <= times[0]:
            raise ValueError(f"{path}: its timestamps do not advance")
        rate = (len(times) - 1) / (times[-1] - times[0])
    if first_frame is None:
        first_frame = next(read_frames(path, times, [0]))
    height, width = first_frame.shape[:2]
    return VideoInfo(times, np.searchsorted(times, keyframe_times), width, height, rate)


def decode_first_frame(container: InputContainer, stream: VideoStream) -> np.ndarray | None:
    """Return the first frame of a container that was read to its end.

    Returns None if the file cannot be decoded from its start; the caller then opens it again.
    """
    import av

    try:
        container.seek(stream.start_time or 0, stream=stream)
        return to_pixels(next(container.decode(stream)), pixel_aspect_ratio(stream))
    except (av.error.FFmpegError, OSError, StopIteration):
        return None


def read_frames(
    path: str | os.PathLike, times: np.ndarray, frame_indices: Sequence[int] | np.ndarray
) -> Iterator[np.ndarray]:
    """Yield frames (h, w, 3) uint8 RGB of a video file, upright and with square pixels.

    times: VideoInfo.times of the file. frame_indices: indices into `times`, in ascending order;
    repeats are allowed. The file is decoded from the last keyframe before the first requested frame
    to the last one, and only the requested frames are converted to RGB.

    Raises ValueError, starting with the path, if a requested frame is missing, or if a frame on the
    way to it is damaged.
    """
    frame_indices = np.asarray(frame_indices)
    first = int(frame_indices[0])
    last = int(frame_indices[-1])
    num_yielded = 0
    with errors_name_path(path, "cannot be decoded"):
        for index, frame, aspect_ratio in decode_range(path, times, first, last):
            if frame.is_corrupt:  # FFmpeg made up pixels where data was damaged
                raise ValueError(f"{path}: frame {index} is damaged")
            if index == frame_indices[num_yielded]:
                pixels = to_pixels(frame, aspect_ratio)
            while num_yielded < len(frame_indices) and frame_indices[num_yielded] == index:
                num_yielded += 1
                yield pixels
            if num_yielded == len(frame_indices):
                return
    raise ValueError(f"{path}: frame {frame_indices[num_yielded]} of {len(times)} is missing")


def decode_range(
    path: str | os.PathLike, times: np.ndarray, first: int, last: int
) -> Iterator[tuple[int, VideoFrame, Fraction | None]]:
    """Yield (index, decoded frame, aspect ratio of its pixels) of the frames first .. last.

    Up to three attempts are made, each going on where the one before stopped:
    1. Seek to the keyframe before the first frame, and identify frames by their timestamps.
    2. Seek to an earlier keyframe, which the first frames may refer to, and do the same.
    3. Decode from the start of the file and count the frames, for files with wrong timestamps.
    """
    if first == 0:
        seek_offsets: list[int | None] = [None]
    else:
        seek_offsets = [0, MAX_REORDERED_FRAMES, None]
    for seek_offset in seek_offsets:
        container, stream = open_video(path)
        with container:
            # AVI does not store the time at which a reordered frame is shown.
            is_untimed = container.format.name == "avi" and stream.codec_context.has_b_frames
            count_frames = seek_offset is None or is_untimed
            # Every frame of a GIF depends on the first one, and decoding starts there anyway.
            if seek_offset is not None and not is_untimed and container.format.name != "gif":
                seek_time = times[max(first - seek_offset, 0)]
                container.seek(round(seek_time / timestamp_unit(stream)), stream=stream)
            for count, frame in enumerate(container.decode(stream)):
                if count_frames:
                    index = count
                elif frame.pts is None:
                    break
                else:
                    index = nearest_frame(times, frame_time(frame))
                if index > first:
                    break  # the expected frame is missing, late, or refers to an earlier keyframe
                if index == first:
                    yield index, frame, pixel_aspect_ratio(stream)
                    first += 1
                if index == last:
                    return


def timestamp_unit(stream: VideoStream) -> float:
    """Return the unit of the stream's timestamps, in seconds."""
    return float(stream.time_base)  # type: ignore[arg-type]  # FFmpeg sets it for every stream


def frame_time(frame: VideoFrame) -> float:
    """Return the time of a decoded frame that has a timestamp, in seconds."""
    return float(frame.pts * frame.time_base)  # type: ignore[operator]


def pixel_aspect_ratio(stream: VideoStream) -> Fraction | None:
    """Return width / height of a pixel, or None if the file does not state it.

    Some files state it only in their frames, so this is called after decoding.
    """
    return stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio


def nearest_frames(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the index into the ascending `times` that is nearest to each wanted time.

    A time halfway between two goes to the earlier one.
    """
    if len(times) == 1:
        return np.zeros(len(wanted), int)
    after = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
    before_is_nearer = wanted - times[after - 1] <= times[after] - wanted
    return np.where(before_is_nearer, after - 1, after)


def nearest_frame(times: np.ndarray, wanted: float) -> int:
    """Return the index into the ascending `times` that is nearest to one wanted time."""
    return int(nearest_frames(times, np.array([wanted]))[0])


def to_pixels(frame: VideoFrame, aspect_ratio: Fraction | None = None) -> np.ndarray:
    """Convert a decoded frame to (h, w, 3) uint8 RGB, upright and with square pixels.

    aspect_ratio: width / height of a pixel of the frame; None means square.
    """
    from PIL import Image

    pixels: np.ndarray
    if frame.colorspace == COLORSPACE_UNSPECIFIED and frame.height >= HIGH_DEFINITION_HEIGHT:
        pixels = frame.to_ndarray(format="rgb24", src_colorspace=COLORSPACE_BT709)
    else:
        pixels = frame.to_ndarray(format="rgb24")
    if aspect_ratio and aspect_ratio != 1:
        square_width = max(round(frame.width * float(aspect_ratio)), 1)
        size = (square_width, frame.height)
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    if frame.rotation:
        pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
    return pixels


def is_video(name: str | os.PathLike) -> bool:
    """Return True if the file name has the suffix of a video."""
    return Path(name).suffix.lower() in VIDEO_SUFFIXES
