"""How long a folder of very many videos takes to start from, and what a loader process holds of it.

    python benchmarks/bench_folder.py                        # 20,000 videos of 14 empty frames, made for it and deleted
    python benchmarks/bench_folder.py --videos 1000000       # some GB, and minutes to make

Prints a table, and one JSON document on its last line.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from svd_xtend.data import folder_index, sampler
from svd_xtend.data.clip import ClipSpec


def make(root, videos, frames):
    """Folders of empty files: only their names count here."""
    for v in range(videos):
        folder = os.path.join(root, f"video_{v}")
        os.mkdir(folder)
        for f in range(frames):
            os.close(os.open(os.path.join(folder, f"{f:04d}.jpg"), os.O_CREAT | os.O_WRONLY))
    time.sleep(folder_index.SETTLED / 1e9)


def private(pid="self"):
    """MiB that a process has written, and shares with no other; pages of the index, which is mapped, are not among them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def worker(clips, count, answer):
    """What a loader process does: looks clips up, anywhere."""
    drawn, before, began = sampler.ClipSampler(clips.pools(), 0), private(), time.perf_counter()
    for index in range(count):
        clips[next(drawn.choices(index))]
    answer.put(((time.perf_counter() - began) / count, private() - before))


def main(args):
    """Measure and print."""
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as root,
        tempfile.TemporaryDirectory() as cache,
    ):
        os.environ["XDG_CACHE_HOME"] = cache
        make(root, args.videos, args.frames)
        seconds = {}
        spec = ClipSpec(width=0, height=0, num_frames=args.frames, fps=7)
        for name in ("first start", "next start"):
            began = time.perf_counter()
            clips = sampler.ClipCollection(root, spec)
            seconds[name] = time.perf_counter() - began
        os.remove(Path(root, "video_0", "0000.jpg"))
        began = time.perf_counter()
        assert len(sampler.ClipCollection(root, spec)) == args.videos - 1
        seconds["after one has changed"] = time.perf_counter() - began
        answer = multiprocessing.Queue()
        process = multiprocessing.get_context("fork").Process(
            target=worker, args=(clips, 20000, answer)
        )
        process.start()
        seconds["a sample's clip"], grown = answer.get()
        process.join()
        size = sum(f.stat().st_size for f in Path(cache).rglob("*.index")) / 2**20
    print(f"{args.videos} videos of {args.frames} frames, {os.cpu_count()} CPU cores")
    for name, value in seconds.items():
        print(f"  {name:24} {value:12.6f} s")
    print(
        f"  index file               {size:9.1f} MiB, a loader process grows by {grown:.1f} MiB in 20000 samples"
    )
    print(
        json.dumps(
            {
                "videos": args.videos,
                "frames": args.frames,
                "seconds": seconds,
                "index_MiB": size,
                "worker_MiB": grown,
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=20000, help="default: %(default)s")
    parser.add_argument("--frames", type=int, default=14, help="of each; default: %(default)s")
    parser.add_argument(
        "--folder", help="where to make them; default: the system's temporary folder"
    )
    main(parser.parse_args())
