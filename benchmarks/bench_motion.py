"""Test whether a model obeys --motion_bucket_id, trained with each clip's own bucket or with 127
for all.

    python benchmarks/bench_motion.py                            # 10 minutes on 2 CPU cores
    python benchmarks/bench_motion.py --picture .asset/motion.png

Shapes fall at three speeds. The speed is in no metadata and in no first frame; only the frames show
it. A model that receives each clip's own bucket can learn what the bucket means, and one that
receives 127 for every clip cannot.

Both models start from a copy of the embedded SVD that does not react to the bucket: the weights
that read it are folded, at 127, into the bias, so that the model renders at any bucket as it did at
127. train_svd.py trains both, with the same flags except --motion_bucket_id. Then validation
pictures, in which the shapes have room to fall at any speed, are animated at several buckets. How
far the shapes fall is measured by their colour.

Prints a table, and one JSON document on its last line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from svd_xtend.data import motion
from svd_xtend.demo import synthetic_clips
from svd_xtend.demo.synthetic_clips import SyntheticClip
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.models.loading import load_svd
from svd_xtend.models.precision import best_precision

if TYPE_CHECKING:
    from diffusers import StableVideoDiffusionPipeline

ROOT = Path(__file__).parents[1]
WIDTH = 64  # pixels
HEIGHT = 48
NUM_FRAMES = 8
NUM_INFERENCE_STEPS = 10
TRAINED_BUCKETS = ("auto", "127")  # --motion_bucket_id of the two runs
RENDERED_BUCKETS = (43, 85, 128, 170, 213)  # the middles of the three speeds' ranks, and between
FASTEST_BUCKET = 190  # motion_bucket_id of the fastest synthetic clips
# Pixels that shapes of each speed fall in 7 frames, from their ground truth.
TRUE_FALLS = (7.06, 14.0, 20.94)
# A shape is kept if its area at the end, relative to the first frame, is between these.
MIN_KEPT_AREA = 0.4
MAX_KEPT_AREA = 2.0

Row = dict[str, float]


def forget_buckets(
    pipe: StableVideoDiffusionPipeline, bucket: float = 127.0
) -> StableVideoDiffusionPipeline:
    """Make an SVD ignore motion_bucket_id: it renders at every bucket as it did at `bucket`."""
    unet = pipe.unet
    embedding = unet.add_time_proj(torch.tensor([bucket])).flatten()
    width = len(embedding)
    layer = unet.add_embedding.linear_1
    with torch.no_grad():
        bucket_weights = layer.weight[:, width : 2 * width]  # the input is (fps, bucket, noise)
        layer.bias += bucket_weights @ embedding
        bucket_weights.zero_()
    return pipe


def train_model(base_model: Path, clips: Path, bucket: str, args: argparse.Namespace) -> Path:
    """Run train_svd.py and return its output folder. bucket: its --motion_bucket_id."""
    output_dir = Path(args.output_dir, bucket)
    flags = {
        "pretrained_model_name_or_path": base_model,
        "base_folder": clips,
        "motion_bucket_id": bucket,
        "width": WIDTH,
        "height": HEIGHT,
        "num_workers": 0,
        "per_gpu_batch_size": 4,
        "vae_encode_chunk": 32,
        "learning_rate": 5e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 10,
        "max_train_steps": args.steps,
        "checkpointing_steps": args.steps,
        "checkpoints_total_limit": 1,
        "validation_steps": 0,
        "seed": 1,
        "mixed_precision": best_precision(),
        "output_dir": output_dir,
    }
    command = [sys.executable, str(ROOT / "train_svd.py")]
    command += [f"--{name}={value}" for name, value in flags.items()]
    subprocess.run(command, check=True)
    return output_dir


def measure_falls(model: Path, clips: Sequence[SyntheticClip]) -> dict[int, Row]:
    """Animate the first frames of the clips at each bucket; return {bucket: row of the table}.

    fall: pixels that the kept shapes fall, on average. error: its standard error. kept: fraction of
    the shapes that are kept. motion: frame lengths per second.
    """
    pipe = load_svd(str(model), torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    rows = {}
    for bucket in tqdm(RENDERED_BUCKETS, desc=str(model)):
        falls = []
        is_kept = []
        scores = []
        for i, clip in enumerate(clips):
            rendered = pipe(
                Image.fromarray(clip.frames[0]),
                HEIGHT,
                WIDTH,
                NUM_FRAMES,
                num_inference_steps=NUM_INFERENCE_STEPS,
                fps=synthetic_clips.FPS,
                motion_bucket_id=bucket,
                generator=torch.Generator().manual_seed(i),
            ).frames[0]
            frames = np.stack([np.asarray(frame) for frame in rendered])
            centroids, areas = synthetic_clips.segment_shapes(frames, clip.colors)
            min_areas = MIN_KEPT_AREA * clip.areas[0]
            max_areas = MAX_KEPT_AREA * clip.areas[0]
            kept = (areas[-1] > min_areas) & (areas[-1] < max_areas)
            displacements = centroids[-1] - centroids[0]  # (shapes, 2), x and y
            falls += displacements[kept, 1].tolist()
            is_kept += kept.tolist()
            scores.append(motion.motion_score(frames, 1 / synthetic_clips.FPS))
        rows[bucket] = {
            "fall": float(np.mean(falls)),
            "error": float(np.std(falls) / max(len(falls), 1) ** 0.5),
            "kept": float(np.mean(is_kept)),
            "motion": float(np.mean(scores)),
        }
    return rows


def plot_falls(file: str | Path, table: dict[str, dict[int, Row]]) -> None:
    """Write a picture of how far the shapes fall at each bucket, for both models."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for (trained_bucket, rows), color in zip(table.items(), (motion.BLUE, motion.ORANGE)):
        if trained_bucket == "auto":
            label = "own bucket of each clip"
        else:
            label = f"{trained_bucket} for all clips"
        axes.errorbar(
            list(rows),
            [row["fall"] for row in rows.values()],
            [row["error"] for row in rows.values()],
            color=color,
            marker="o",
            capsize=3,
            lw=2,
            label=label,
        )
    # Buckets are ranks, so each speed takes a third of the range.
    for first_bucket, fall in zip((1, 86, 171), TRUE_FALLS):
        lines = axes.hlines(fall, first_bucket, first_bucket + 84, color="#999999", ls=":")
    lines.set_label("ground truth")
    axes.set(
        xlabel="motion_bucket_id",
        ylabel="pixels fallen in 7 frames",
        ylim=(0, 28),
        xticks=[1, *RENDERED_BUCKETS, 255],
    )
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def make_validation_clips(count: int) -> list[SyntheticClip]:
    """Return validation clips of the fastest speed: their shapes have room to fall at any speed."""
    seeds = ((synthetic_clips.HELD_OUT_SEED, i) for i in itertools.count())
    clips = (synthetic_clips.make_clip(seed, "fall") for seed in seeds)
    fastest = (clip for clip in clips if clip.motion_bucket_id == FASTEST_BUCKET)
    return list(itertools.islice(fastest, count))


def print_table(table: dict[str, dict[int, Row]]) -> None:
    """Print the rows of both models."""
    print(f"{'trained with':14}{'at':>6}{'pixels':>9}{'+-':>6}{'kept':>7}{'motion':>8}")
    for trained_bucket, rows in table.items():
        for bucket, row in rows.items():
            print(
                f"{trained_bucket:14}{bucket:6}{row['fall']:9.2f}{row['error']:6.2f}"
                f"{row['kept']:7.2f}{row['motion']:8.3f}"
            )


def main(args: argparse.Namespace) -> None:
    """Make the clips, train both models, and render with both at all buckets."""
    output_dir = Path(args.output_dir)
    clips = output_dir / "clips"
    synthetic_clips.write_clips(clips, "fall", args.clips, seed=5)
    for file in clips.glob("*/clip.json"):
        file.write_text(json.dumps({"fps": synthetic_clips.FPS}))  # without the motion_bucket_id
    base_model = output_dir / "start"
    if not (base_model / "model_index.json").exists():
        forget_buckets(load_svd(str(TINY_SVD), torch.float32)).save_pretrained(base_model)
    validation_clips = make_validation_clips(args.pictures)
    table = {}
    for bucket in TRAINED_BUCKETS:
        model = train_model(base_model, clips, bucket, args)
        table[bucket] = measure_falls(model, validation_clips)
    print_table(table)
    picture = Path(args.picture or output_dir / "motion.png")
    plot_falls(picture, table)
    print(f"look at {picture}")
    document: dict[str, Any] = {
        "steps": args.steps,
        "clips": args.clips,
        "pictures": args.pictures,
        "models": table,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--steps", type=int, default=300, help="training steps of each model; default: %(default)s")
    parser.add_argument("--clips", type=int, default=90, help="training clips; default: %(default)s")
    parser.add_argument("--pictures", type=int, default=16, help="validation pictures that are animated; default: %(default)s")
    parser.add_argument("--output_dir", default="outputs/motion", help="folder for clips, models and the picture; default: %(default)s")
    parser.add_argument("--picture", help="file for the picture; default: motion.png in --output_dir")
    # fmt: on
    main(parser.parse_args())
