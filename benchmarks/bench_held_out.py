"""What the held-out loss and the page cost: a short run with the default flags of train_svd.py, at the embedded SVD's size.

    python benchmarks/bench_held_out.py                # share of training time where --validation_steps is 500, the default

A step is a forward, a backward and an update of 1 clip; an evaluation 80 forwards, of 16 clips at 5 noise levels. Prints a table, and
one JSON document on its last line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from svd_xtend.demo.synthetic_clips import write_clips
from svd_xtend.evaluation import report
from svd_xtend.training import run_record

ROOT = Path(__file__).parents[1]


def main(args):
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        for name, clips, seed in (("train", 48, 0), ("held", 16, 1)):
            write_clips(Path(folder, name), "fall", clips, seed)
        flags = [f"--{name}={value}" for name, value in {
            "base_folder": f"{folder}/train", "validation_folder": f"{folder}/held", "output_dir": f"{folder}/out", "width": 64,
            "height": 48, "seed": 1, "max_train_steps": args.steps, "validation_steps": args.steps,
        }.items()]  # fmt: skip
        subprocess.run([sys.executable, ROOT / "train_svd.py", *flags], check=True, cwd=folder)
        out = Path(folder, "out")
        step = statistics.median(
            row["s/step"] for row in run_record.read_rows(out / "metrics.jsonl")
        )
        evaluations = [row["seconds"] for row in run_record.read_rows(out / "held_out.jsonl")]
        began = time.perf_counter()
        page = report.write_report(out).stat().st_size
        page_seconds = time.perf_counter() - began
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    )
    share = statistics.mean(evaluations) / (500 * step)
    print(f"{device}: a step {step:.3f} s, an evaluation {statistics.mean(evaluations):.2f} s")
    print(f"  held-out loss, once in 500 steps   {share:.1%} of their time")
    print(
        f"  report.html                        {page / 1e6:.2f} MB, {page_seconds:.2f} s to write"
    )
    print(json.dumps({"device": device, "step": step, "evaluations": evaluations, "share": share, "page": page, "page_seconds": page_seconds}))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="of training; default: %(default)s")
    main(parser.parse_args())
