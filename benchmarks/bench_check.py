"""How long prepare_data.py check takes, and how much memory: of very many clips, every frame of which it decodes.

    python benchmarks/bench_check.py                  # 10,000 clips of 25 frames, 192x108, made for it and deleted
    python benchmarks/bench_check.py --clips 500 --folders

Physics: of each clip all packets are read, all frames decoded, and made small for PySceneDetect and optical flow. Clips are
independent of each other, and the libraries let go of Python's lock while they work: it scales with cores until Python's own
share, some milliseconds a clip, fills one. Memory is one clip a core, and some columns.

Prints a table, and one JSON document on its last line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
SIZE, FRAMES, RATE = (192, 108), 25, 25
DISTINCT = 200  # are encoded, the others are copies of their bytes


def make(root, clips, folders):
    """Squares that move over gradients, faster from clip to clip."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    for i in tqdm(range(clips), desc="making clips"):
        target = root / (f"clip{i:05d}" if folders else f"clip{i:05d}.mp4")
        if i >= DISTINCT:
            source = root / f"clip{i % DISTINCT:05d}{target.suffix}"
            (shutil.copytree if folders else shutil.copyfile)(source, target)
            continue
        target.mkdir() if folders else None
        with av.open(str(root / "scratch.mp4" if folders else target), "w") as container:
            stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
            for f in range(FRAMES):
                frame = np.stack([(x + i) % 256, (2 * y) % 256, (x + y + 3 * i) % 256], -1).astype(
                    np.uint8
                )
                left = round(f * (1 + i % 7)) % (SIZE[0] - 30)
                frame[30:70, left : left + 30] = 255
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                if folders:
                    picture.to_image().save(target / f"{f:03d}.jpg")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    (root / "scratch.mp4").unlink(missing_ok=True)


def check(root, out, cache):
    """(seconds, MiB at the most) of one run of the command."""
    command = [
        sys.executable,
        str(ROOT / "prepare_data.py"),
        "check",
        str(root),
        f"--output_dir={out}",
        "--num_frames=7",
    ]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("prepare_data.py check failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def main(args):
    """Make, check, check again."""
    rows = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder, "clips")
        root.mkdir()
        make(root, args.clips, args.folders)
        time.sleep(3)  # what changed a moment ago is not trusted
        for name in ("first", "again"):
            rows[name] = check(root, Path(folder, "out"), Path(folder, "cache"))
        found = len(json.loads(Path(folder, "out", "report.json").read_text())["clips"])
    kind = "folders of JPEGs" if args.folders else "h264 files"
    print(
        f"{found} clips, {kind}, {FRAMES} frames of {SIZE[0]}x{SIZE[1]}; {os.cpu_count()} CPU cores"
    )
    for name, (seconds, memory) in rows.items():
        print(f"  {name:6} {seconds:8.1f} s {memory:8.0f} MiB")
    print(
        json.dumps(
            {
                "clips": found,
                "kind": kind,
                "seconds": {k: s for k, (s, _) in rows.items()},
                "MiB": rows["first"][1],
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=10000, help="default: %(default)s")
    parser.add_argument(
        "--folders", action="store_true", help="of JPEG frames instead of video files"
    )
    parser.add_argument(
        "--folder", help="where to make them; default: the system's temporary folder"
    )
    main(parser.parse_args())
