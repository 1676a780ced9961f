"""Measure the time and memory of `prepare_data.py check`, which decodes every frame, on many clips.

    python benchmarks/bench_check.py                  # 10,000 clips of 25 frames, 192x108
    python benchmarks/bench_check.py --clips 500 --folders

For each clip all packets are read, and all frames are decoded and made small for PySceneDetect and
optical flow. Clips are independent, and the libraries release Python's lock while they work, so the
time scales with the cores until Python's own share, some milliseconds per clip, fills one core.
Memory is one clip per core, and some columns of numbers.

Prints a table, and one JSON document on its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
WIDTH = 192
HEIGHT = 108
NUM_FRAMES = 25
RATE = 25  # frames per second
NUM_ENCODED = 200  # clips that are encoded; the others are copies of them
SETTLING_SECONDS = 3  # the index does not trust files that changed a moment ago


@dataclass(frozen=True)
class Usage:
    """Seconds and memory of one run of the command."""

    seconds: float
    peak_mib: float


def draw_frame(clip_number: int, frame_number: int) -> np.ndarray:
    """Draw a square that moves over a gradient, at a speed that depends on the clip."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    red = (x + clip_number) % 256
    green = (2 * y) % 256
    blue = (x + y + 3 * clip_number) % 256
    frame = np.stack([red, green, blue], -1).astype(np.uint8)
    speed = 1 + clip_number % 7
    left = (frame_number * speed) % (WIDTH - 30)
    frame[30:70, left : left + 30] = 255
    return frame


def write_video(path: Path, clip_number: int) -> None:
    """Encode one clip."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width = WIDTH
        stream.height = HEIGHT
        stream.pix_fmt = "yuv420p"
        for i in range(NUM_FRAMES):
            picture = av.VideoFrame.from_ndarray(draw_frame(clip_number, i), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_frame_folder(path: Path, clip_number: int) -> None:
    """Write one clip as a folder of JPEG frames."""
    path.mkdir()
    for i in range(NUM_FRAMES):
        picture = av.VideoFrame.from_ndarray(draw_frame(clip_number, i), format="rgb24")
        picture.to_image().save(path / f"{i:03d}.jpg")


def make_clips(root: Path, num_clips: int, as_folders: bool) -> None:
    """Fill a folder with clips."""
    suffix = "" if as_folders else ".mp4"
    for i in tqdm(range(num_clips), desc="making clips"):
        target = root / f"clip{i:05d}{suffix}"
        source = root / f"clip{i % NUM_ENCODED:05d}{suffix}"
        if i < NUM_ENCODED and as_folders:
            write_frame_folder(target, i)
        elif i < NUM_ENCODED:
            write_video(target, i)
        elif as_folders:
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)


def run_check(root: Path, output_dir: Path, cache: Path) -> Usage:
    """Run the command once. cache: folder in which it keeps its index."""
    command = [
        sys.executable,
        str(ROOT / "prepare_data.py"),
        "check",
        str(root),
        f"--output_dir={output_dir}",
        "--num_frames=7",
    ]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("prepare_data.py check failed")
    return Usage(time.perf_counter() - began, usage.ru_maxrss / 1024)


def main(args: argparse.Namespace) -> None:
    """Make the clips, check them, and check them again."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder, "clips")
        output_dir = Path(folder, "out")
        cache = Path(folder, "cache")
        root.mkdir()
        make_clips(root, args.clips, args.folders)
        time.sleep(SETTLING_SECONDS)
        first = run_check(root, output_dir, cache)
        again = run_check(root, output_dir, cache)
        num_found = len(json.loads((output_dir / "report.json").read_text())["clips"])
    kind = "folders of JPEGs" if args.folders else "h264 files"
    print(
        f"{num_found} clips, {kind}, {NUM_FRAMES} frames of {WIDTH}x{HEIGHT}; "
        f"{os.cpu_count()} CPU cores"
    )
    for name, usage in (("first", first), ("again", again)):
        print(f"  {name:6} {usage.seconds:8.1f} s {usage.peak_mib:8.0f} MiB")
    document = {
        "clips": num_found,
        "kind": kind,
        "seconds": {"first": first.seconds, "again": again.seconds},
        "MiB": first.peak_mib,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--clips", type=int, default=10000, help="number of clips; default: %(default)s")
    parser.add_argument("--folders", action="store_true", help="folders of JPEG frames instead of video files")
    parser.add_argument("--folder", help="where to make the clips; default: the system's temporary folder")
    # fmt: on
    main(parser.parse_args())
