"""Measure what the validation loss and report.html cost beside training.

    python benchmarks/bench_held_out.py     # share of training time at the default --validation_steps

Trains the embedded SVD for a short time with the default flags of train_svd.py. A step is a forward, a
backward and an update of 1 clip; a validation loss is 80 forwards, of 16 clips at 5 noise levels. Prints a
table, and a JSON document on the last line.
"""

from __future__ import annotations

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
VALIDATION_STEPS = 500  # default of train_svd.py


def train_with_validation(folder: Path, num_steps: int) -> Path:
    """Train on drawn clips with a validation set, and return the output folder."""
    write_clips(folder / "train", "fall", 48, 0)
    write_clips(folder / "validation", "fall", 16, 1)
    output_dir = folder / "out"
    flags = [
        f"--base_folder={folder / 'train'}",
        f"--validation_folder={folder / 'validation'}",
        f"--output_dir={output_dir}",
        "--width=64",
        "--height=48",
        "--seed=1",
        f"--max_train_steps={num_steps}",
        f"--validation_steps={num_steps}",
    ]
    subprocess.run([sys.executable, ROOT / "train_svd.py", *flags], check=True, cwd=folder)
    return output_dir


def main(args: argparse.Namespace) -> None:
    """Train, measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        output_dir = train_with_validation(Path(folder), args.steps)
        metrics = run_record.read_rows(output_dir / "metrics.jsonl")
        step_seconds = statistics.median(row["s/step"] for row in metrics)
        validations = run_record.read_rows(output_dir / "held_out.jsonl")
        validation_seconds = [row["seconds"] for row in validations]
        began = time.perf_counter()
        page_bytes = report.write_report(output_dir).stat().st_size
        page_seconds = time.perf_counter() - began
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{os.cpu_count()} CPU cores"
    mean_seconds = statistics.mean(validation_seconds)
    share = mean_seconds / (VALIDATION_STEPS * step_seconds)
    print(f"{device}: {step_seconds:.3f} s per step, {mean_seconds:.2f} s per validation loss")
    print(f"  validation loss every {VALIDATION_STEPS} steps   {share:.1%} of training time")
    print(
        f"  report.html                      {page_bytes / 1e6:.2f} MB, {page_seconds:.2f} s to write"
    )
    document = {
        "device": device,
        "step": step_seconds,
        "evaluations": validation_seconds,
        "share": share,
        "page": page_bytes,
        "page_seconds": page_seconds,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=60, help="training steps; default: %(default)s"
    )
    main(parser.parse_args())
