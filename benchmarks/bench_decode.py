"""What a window of a video file costs, beside what cannot be saved: decoding it and the way to it from the keyframe.

    python benchmarks/bench_decode.py
    python benchmarks/bench_decode.py --videos my.mp4 --rounds 40

Physics: a frame is coded by its difference to others, so that a window is decoded from the last keyframe before it on. Beyond
that a reader opens the file, reads its index, seeks, starts a decoder, and converts. `floor`: a container that is open and
stands at that keyframe is decoded up to the window's end, and the window's frames are converted. `ours`: svd_xtend.decode.read,
which opens the file each time. `whole`: all frames are decoded. Windows are drawn at random; ratios are medians of each window's.

The last line is one JSON document.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from svd_xtend.data import video_decode

CODECS = {  # suffix, codec, options
    "h264": ("mp4", "libx264", {}),
    "hevc": ("mp4", "libx265", {"x265-params": "log-level=none", "preset": "ultrafast"}),
    "av1": ("mkv", "libsvtav1", {"preset": "10"}),
    "vp9": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "mpeg4": ("avi", "mpeg4", {}),
    "mjpeg": ("mov", "mjpeg", {}),
    "gif": ("gif", "gif", {}),
}
SIZE, FRAMES, GOP, RATE = (1280, 720), 120, 48, 24


def write(path, codec, options):
    """A window that pans over smooth noise."""
    g, (width, height) = np.random.default_rng(0), SIZE
    noise = [
        Image.fromarray(g.integers(0, 256, (height // 8, width // 4), np.uint8)) for _ in range(3)
    ]
    scene = np.stack(
        [np.asarray(n.resize((2 * width, height), Image.Resampling.BICUBIC)) for n in noise], -1
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.gop_size = width, height, GOP
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for i in range(FRAMES):
            window = np.ascontiguousarray(scene[:, 4 * i : 4 * i + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
        container.mux(stream.encode())


def floor(path, film, numbers, back=0):
    """Seconds of decoding from the keyframe to the window's end and of converting the window; from the keyframe before,
    where the window's first frames lead one and refer to it."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if numbers[0]:
            container.seek(
                round(film.times[max(numbers[0] - back, 0)] / float(stream.time_base)),
                stream=stream,
            )
        packets, began, done = container.demux(stream), time.perf_counter(), 0
        for packet in packets:
            for frame in packet.decode():
                number = video_decode.nearest_frame(film.times, float(frame.pts * frame.time_base))
                if number in numbers:
                    frame.to_ndarray(format="rgb24")
                    done += 1
                if done == len(numbers):
                    return time.perf_counter() - began
    if back:
        raise ValueError(f"{path}: the window was not found")
    return floor(path, film, numbers, video_decode.MAX_REORDERED_FRAMES)


def measure(path, args):
    """Medians of one file."""
    film, g, rows = video_decode.probe_video(path), np.random.default_rng(1), []
    for _ in range(args.rounds):
        start = int(g.integers(len(film.times) - args.num_frames))
        numbers = list(range(start, start + args.num_frames))
        least = floor(path, film, numbers)
        began = time.perf_counter()
        list(video_decode.read_frames(path, film.times, numbers))
        rows.append((least, time.perf_counter() - began))
    began = time.perf_counter()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            frame.to_ndarray(format="rgb24")
    whole = time.perf_counter() - began
    ours = statistics.median(b for _, b in rows)
    return {"floor_ms": 1e3 * statistics.median(a for a, _ in rows), "ours_ms": 1e3 * ours,
            "ratio": statistics.median(b / a for a, b in rows), "whole_ms": 1e3 * whole}  # fmt: skip


def main(args):
    """Write the files, measure them, print a table."""
    print(f"{args.num_frames} of {FRAMES} frames of {SIZE[0]}x{SIZE[1]}, a keyframe every {GOP}")
    print(f"{'file':12}{'floor ms':>10}{'ours ms':>9}{'ratio':>7}{'whole ms':>10}")
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        videos = {Path(path).name: Path(path) for path in args.videos}
        for name, (suffix, codec, options) in (
            () if videos else tqdm(CODECS.items(), desc="encoding", leave=False)
        ):
            videos_path = Path(folder, f"{name}.{suffix}")
            write(videos_path, codec, options)
            table[name] = measure(videos_path, args)
        table.update({name: measure(path, args) for name, path in videos.items()})
    for name, r in table.items():
        print(
            f"{name:12}{r['floor_ms']:10.1f}{r['ours_ms']:9.1f}{r['ratio']:7.2f}{r['whole_ms']:10.1f}"
        )
    print(json.dumps({"num_frames": args.num_frames, "rounds": args.rounds, "files": table}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--videos", nargs="+", default=[], help="files of yours instead of those made here"
    )
    parser.add_argument(
        "--num_frames", type=int, default=14, help="of a window; default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=20, help="windows; default: %(default)s")
    main(parser.parse_args())
