"""Measure how fast runs start from very many videos, and the memory of a loader process.

    python benchmarks/bench_folder.py                        # 20,000 videos of 14 frames
    python benchmarks/bench_folder.py --videos 1000000       # some GB, and minutes to make

The videos are folders of empty files, which are made for the measurement and deleted. Prints a
table, and one JSON document on its last line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from svd_xtend.data import folder_index
from svd_xtend.data.clip import ClipSpec
from svd_xtend.data.sampler import ClipCollection, ClipSampler

NUM_SAMPLES = 20000  # that a loader process looks up
START_METHODS = ("fork", "spawn")  # of loader processes; Linux forks by default
MIB = 2**20


def make_videos(root: str, num_videos: int, num_frames: int) -> None:
    """Make folders of empty files, because only their names count here."""
    for video in range(num_videos):
        folder = os.path.join(root, f"video_{video}")
        os.mkdir(folder)
        for frame in range(num_frames):
            path = os.path.join(folder, f"{frame:04d}.jpg")
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    time.sleep(folder_index.SETTLED / 1e9)


def private_memory() -> float:
    """Return the MiB that this process has written and does not share.

    Pages of the index are not among them, because the file is mapped.
    """
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kib = sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))
    return kib / 1024


def flush_index(root: str) -> int:
    """Write the index file to disk, and return its size in bytes.

    Otherwise the pages that a loader process maps would count as written by it.
    """
    with open(folder_index.index_file(root), "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def look_up_samples(clips: ClipCollection, answer: multiprocessing.Queue) -> None:
    """Look up clips as a loader process does.

    Puts (seconds per sample, MiB grown meanwhile, MiB of its own) into the answer.
    """
    memory_before = private_memory()
    clip_sampler = ClipSampler(clips.pools(), 0)
    began = time.perf_counter()
    for index in range(NUM_SAMPLES):
        clips[next(clip_sampler.choices(index))]
    seconds = (time.perf_counter() - began) / NUM_SAMPLES
    memory = private_memory()
    answer.put((seconds, memory - memory_before, memory))


def measure_loader(clips: ClipCollection, start_method: str) -> tuple[float, float, float]:
    """Return what look_up_samples answers from a process that is started this way."""
    context: Any = multiprocessing.get_context(start_method)
    answer = context.Queue()
    process = context.Process(target=look_up_samples, args=(clips, answer))
    process.start()
    result = answer.get()
    process.join()
    return result


def measure(num_videos: int, num_frames: int, parent: str | None) -> dict[str, Any]:
    """Return the measurements. parent: the folder in which the videos are made."""
    spec = ClipSpec(width=0, height=0, num_frames=num_frames, fps=7)
    seconds = {}
    loaders = {}
    with (
        tempfile.TemporaryDirectory(dir=parent) as root,
        tempfile.TemporaryDirectory() as cache,
    ):
        os.environ["XDG_CACHE_HOME"] = cache
        make_videos(root, num_videos, num_frames)
        for name in ("first start", "next start"):
            began = time.perf_counter()
            clips = ClipCollection(root, spec)
            seconds[name] = time.perf_counter() - began
        index_bytes = flush_index(root)
        for start_method in START_METHODS:
            per_sample, grown, private = measure_loader(clips, start_method)
            seconds[f"a sample's clip, {start_method}"] = per_sample
            loaders[start_method] = {"grown_MiB": grown, "private_MiB": private}
        os.remove(Path(root, "video_0", "0000.jpg"))
        began = time.perf_counter()
        num_clips = len(ClipCollection(root, spec))
        seconds["after one has changed"] = time.perf_counter() - began
        if num_clips != num_videos - 1:
            raise RuntimeError(f"expected {num_videos - 1} clips that are long enough: {num_clips}")
    return {
        "videos": num_videos,
        "frames": num_frames,
        "seconds": seconds,
        "index_MiB": index_bytes / MIB,
        "loaders": loaders,
    }


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    result = measure(args.videos, args.frames, args.folder)
    print(f"{args.videos} videos of {args.frames} frames, {os.cpu_count()} CPU cores")
    for name, value in result["seconds"].items():
        print(f"  {name:24} {value:12.6f} s")
    print(f"  {'index file':24} {result['index_MiB']:12.1f} MiB")
    for start_method, memory in result["loaders"].items():
        name = f"loader process, {start_method}"
        print(
            f"  {name:24} {memory['private_MiB']:12.1f} MiB of its own, "
            f"{memory['grown_MiB']:.1f} of them from {NUM_SAMPLES} samples"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--videos", type=int, default=20000, help="number of videos; default: %(default)s"
    )
    parser.add_argument(
        "--frames", type=int, default=14, help="frames of each video; default: %(default)s"
    )
    parser.add_argument(
        "--folder", help="where to make the videos; default: the system's temporary folder"
    )
    main(parser.parse_args())
