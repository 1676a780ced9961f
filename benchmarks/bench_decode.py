"""Measure what reading a window of a video file costs, beside what it must cost.

    python benchmarks/bench_decode.py
    python benchmarks/bench_decode.py --videos my.mp4 --rounds 40

A frame is coded as its difference to other frames, so a window must be decoded from the last
keyframe before it. Beyond that, a reader opens the file, reads its index, seeks, starts a decoder
and converts to RGB.

floor   a container that is already open and stands at that keyframe is decoded to the window's end,
        and the window's frames are converted
ours    video_decode.read_frames, which opens the file each time
whole   all frames are decoded and converted

Windows begin at random frames. The ratio is the median over the windows of ours / floor. The last
line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from svd_xtend.data import video_decode


@dataclass(frozen=True)
class Codec:
    """How a test video is encoded."""

    suffix: str
    name: str  # FFmpeg's
    options: dict[str, str]
    pix_fmt: str = "yuv420p"


CODECS = {
    "h264": Codec("mp4", "libx264", {}),
    "hevc": Codec("mp4", "libx265", {"x265-params": "log-level=none", "preset": "ultrafast"}),
    "av1": Codec("mkv", "libsvtav1", {"preset": "10"}),
    "vp9": Codec("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "mpeg4": Codec("avi", "mpeg4", {}),
    "mjpeg": Codec("mov", "mjpeg", {}, "yuvj420p"),
    "gif": Codec("gif", "gif", {}, "rgb8"),
}
WIDTH = 1280
HEIGHT = 720
NUM_FRAMES = 120
KEYFRAME_INTERVAL = 48  # frames
RATE = 24  # frames per second
PAN = 4  # pixels per frame


def write_video(path: str | Path, codec: Codec) -> None:
    """Encode a window that pans over smooth noise."""
    rng = np.random.default_rng(0)
    channels = []
    for _ in range(3):
        noise = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 4), np.uint8)
        smooth = Image.fromarray(noise).resize((2 * WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        channels.append(np.asarray(smooth))
    scene = np.stack(channels, -1)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec.name, rate=RATE, options=codec.options)
        stream.width = WIDTH
        stream.height = HEIGHT
        stream.gop_size = KEYFRAME_INTERVAL
        stream.pix_fmt = codec.pix_fmt
        for i in range(NUM_FRAMES):
            window = np.ascontiguousarray(scene[:, PAN * i : PAN * i + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
        container.mux(stream.encode())


def time_floor(
    path: str | Path, times: np.ndarray, frame_indices: list[int], seek_offset: int = 0
) -> float:
    """Return the seconds to decode from the keyframe to the window's end and to convert the window.

    times: VideoInfo.times. seek_offset: frames to seek further back. If the window's first frames
    are shown before the keyframe and refer to the one before it, the measurement is repeated from
    there.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if frame_indices[0] > 0:
            seek_time = times[max(frame_indices[0] - seek_offset, 0)]
            timestamp = round(seek_time / video_decode.timestamp_unit(stream))
            container.seek(timestamp, stream=stream)
        packets = container.demux(stream)
        began = time.perf_counter()
        num_converted = 0
        for packet in packets:
            for frame in packet.decode():
                index = video_decode.nearest_frame(times, video_decode.frame_time(frame))
                if index in frame_indices:
                    frame.to_ndarray(format="rgb24")
                    num_converted += 1
                if num_converted == len(frame_indices):
                    return time.perf_counter() - began
    if seek_offset:
        raise ValueError(f"{path}: the window was not found")
    return time_floor(path, times, frame_indices, video_decode.MAX_REORDERED_FRAMES)


def time_whole(path: str | Path) -> float:
    """Return the seconds to decode and convert all frames."""
    began = time.perf_counter()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            frame.to_ndarray(format="rgb24")
    return time.perf_counter() - began


def measure_file(path: str | Path, num_frames: int, rounds: int) -> dict[str, float]:
    """Return the row of one file, medians over `rounds` windows of `num_frames` frames."""
    video = video_decode.probe_video(path)
    rng = np.random.default_rng(1)
    floor_seconds = []
    our_seconds = []
    for _ in range(rounds):
        start = int(rng.integers(len(video.times) - num_frames))
        frame_indices = list(range(start, start + num_frames))
        floor_seconds.append(time_floor(path, video.times, frame_indices))
        began = time.perf_counter()
        list(video_decode.read_frames(path, video.times, frame_indices))
        our_seconds.append(time.perf_counter() - began)
    ratios = [ours / floor for floor, ours in zip(floor_seconds, our_seconds)]
    return {
        "floor_ms": 1e3 * statistics.median(floor_seconds),
        "ours_ms": 1e3 * statistics.median(our_seconds),
        "ratio": statistics.median(ratios),
        "whole_ms": 1e3 * time_whole(path),
    }


def main(args: argparse.Namespace) -> None:
    """Measure the given files, or files of all codecs made here, and print a table."""
    files = {}
    if args.videos:
        for path in map(Path, args.videos):
            files[path.name] = measure_file(path, args.num_frames, args.rounds)
    else:
        print(
            f"{args.num_frames} of {NUM_FRAMES} frames of {WIDTH}x{HEIGHT}, "
            f"a keyframe every {KEYFRAME_INTERVAL}"
        )
        with tempfile.TemporaryDirectory() as folder:
            for name, codec in tqdm(CODECS.items(), desc="encoding", leave=False):
                path = Path(folder, f"{name}.{codec.suffix}")
                write_video(path, codec)
                files[name] = measure_file(path, args.num_frames, args.rounds)
    print(f"{'file':12}{'floor ms':>10}{'ours ms':>9}{'ratio':>7}{'whole ms':>10}")
    for name, row in files.items():
        print(
            f"{name:12}{row['floor_ms']:10.1f}{row['ours_ms']:9.1f}"
            f"{row['ratio']:7.2f}{row['whole_ms']:10.1f}"
        )
    print(json.dumps({"num_frames": args.num_frames, "rounds": args.rounds, "files": files}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--videos", nargs="+", default=[], help="your files; default: one of each codec, made here")
    parser.add_argument("--num_frames", type=int, default=14, help="frames of a window; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, help="windows per file; default: %(default)s")
    # fmt: on
    main(parser.parse_args())
