"""Does a model obey --motion_bucket_id? Trained with each clip's own bucket, by how much moves in it, and with 127 for all.

    python benchmarks/bench_motion.py                                # 10 minutes; writes outputs/motion/motion.png
    python benchmarks/bench_motion.py --picture .asset/motion.png

Physics: shapes fall at three speeds, which no file tells and no first frame shows; only the frames do. A model that is told
how much moves in each clip can learn what the number means; one that is told 127 of every clip cannot. Both start from the
embedded SVD with its sense of the bucket taken out: the weights that read it are folded, at 127, into the bias, so that it
renders as before at 127, and at any other bucket the same. Both are trained by train_svd.py, alike but for one flag. Then held-out
pictures, with room to fall at any speed, are animated at several buckets, and how far the shapes fall is measured by colour.

Prints a table, and one JSON document on its last line.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from svd_xtend.data import motion
from svd_xtend.demo import synthetic_clips
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.models.loading import load_svd
from svd_xtend.models.precision import best_precision

ROOT = Path(__file__).parents[1]
BUCKETS = (43, 85, 128, 170, 213)  # the middles of the three speeds' thirds, and between them
FALL = {64: 7.06, 127: 14.0, 190: 20.94}  # pixels in 7 frames, shapes.speed


def forget_buckets(pipe, bucket=127.0):
    """Take the sense of motion_bucket_id out of an SVD: it renders at each as it did at `bucket`."""
    unet = pipe.unet
    embedded = unet.add_time_proj(torch.tensor([bucket])).flatten()
    width = len(embedded)
    with torch.no_grad():
        reads = unet.add_embedding.linear_1.weight[:, width : 2 * width]  # of (fps, bucket, noise)
        unet.add_embedding.linear_1.bias += reads @ embedded
        reads.zero_()
    return pipe


def train(start, clips, bucket, args):
    """train_svd.py, as a user runs it; returns its folder."""
    out = Path(args.output_dir, bucket)
    flags = dict(
        pretrained_model_name_or_path=start, base_folder=clips, motion_bucket_id=bucket, width=64, height=48, num_workers=0,
        per_gpu_batch_size=4, vae_encode_chunk=32, learning_rate=5e-4, lr_scheduler="cosine", lr_warmup_steps=10,
        max_train_steps=args.steps, checkpointing_steps=args.steps, checkpoints_total_limit=1, validation_steps=0, seed=1,
        mixed_precision=best_precision(), output_dir=out,
    )  # fmt: skip
    command = [
        sys.executable,
        str(ROOT / "train_svd.py"),
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    subprocess.run(command, check=True)
    return out


def sweep(folder, clips):
    """{bucket: {"fall": pixels, mean over the shapes that are kept, "error": its standard error, "kept": fraction, "motion"}}."""
    pipe, rows = load_svd(str(folder), torch.float32), {}
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    for bucket in tqdm(BUCKETS, desc=f"{folder}"):
        fell, kept, moved = [], [], []
        for i, clip in enumerate(clips):
            frames = pipe(
                Image.fromarray(clip.frames[0]), 48, 64, 8, num_inference_steps=10, fps=synthetic_clips.FPS,
                motion_bucket_id=bucket, generator=torch.Generator().manual_seed(i),
            ).frames[0]  # fmt: skip
            frames = np.stack([np.asarray(frame) for frame in frames])
            centroids, areas = synthetic_clips.segment_shapes(frames, clip.colors)
            there = (areas[-1] > 0.4 * clip.areas[0]) & (areas[-1] < 2 * clip.areas[0])
            fell += (centroids[-1] - centroids[0])[there, 1].tolist()
            kept += there.tolist()
            moved.append(motion.motion_score(frames, 1 / synthetic_clips.FPS))
        error = np.std(fell) / max(len(fell), 1) ** 0.5
        rows[bucket] = {"fall": float(np.mean(fell)), "error": float(error), "kept": float(np.mean(kept)), "motion": float(np.mean(moved))}  # fmt: skip
    return rows


def draw(file, table):
    """How far the shapes fall over the bucket, of both models."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for (name, rows), color in zip(table.items(), (motion.BLUE, motion.ORANGE)):
        falls, errors = [r["fall"] for r in rows.values()], [r["error"] for r in rows.values()]
        label = "own bucket of each clip" if name == "auto" else f"{name} for all clips"
        axes.errorbar(
            list(rows), falls, errors, color=color, marker="o", capsize=3, lw=2, label=label
        )
    for third, (speed, fall) in zip((1, 86, 171), FALL.items()):
        axes.hlines(
            fall,
            third,
            third + 84,
            color="#999999",
            ls=":",
            label="the true clips" if speed == 64 else None,
        )
    axes.set(
        xlabel="motion_bucket_id",
        ylabel="pixels fallen in 7 frames",
        ylim=(0, 28),
        xticks=[1, *BUCKETS, 255],
    )
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def main(args):
    """Draw the clips, train both, sweep both."""
    out = Path(args.output_dir)
    synthetic_clips.write_clips(out / "clips", "fall", args.clips, seed=5)
    for file in (out / "clips").glob("*/clip.json"):
        file.write_text(json.dumps({"fps": synthetic_clips.FPS}))  # nothing tells the speed
    if not (out / "start" / "model_index.json").exists():
        forget_buckets(load_svd(str(TINY_SVD), torch.float32)).save_pretrained(out / "start")
    every = (
        synthetic_clips.make_clip((synthetic_clips.HELD_OUT_SEED, i), "fall") for i in range(10**6)
    )
    held_out = [
        clip
        for clip, _ in zip((c for c in every if c.motion_bucket_id == 190), range(args.pictures))
    ]
    table = {
        bucket: sweep(train(out / "start", out / "clips", bucket, args), held_out)
        for bucket in ("auto", "127")
    }
    print(f"{'trained with':14}{'at':>6}{'pixels':>9}{'+-':>6}{'kept':>7}{'motion':>8}")
    for name, rows in table.items():
        for bucket, r in rows.items():
            print(
                f"{name:14}{bucket:6}{r['fall']:9.2f}{r['error']:6.2f}{r['kept']:7.2f}{r['motion']:8.3f}"
            )
    picture = Path(args.picture or out / "motion.png")
    draw(picture, table)
    print(f"look at {picture}")
    print(
        json.dumps(
            {"steps": args.steps, "clips": args.clips, "pictures": args.pictures, "models": table}
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=300, help="of each training; default: %(default)s"
    )
    parser.add_argument("--clips", type=int, default=90, help="to train on; default: %(default)s")
    parser.add_argument(
        "--pictures", type=int, default=16, help="held out, that are animated; default: %(default)s"
    )
    parser.add_argument("--output_dir", default="outputs/motion", help="default: %(default)s")
    parser.add_argument("--picture", help="default: motion.png in the output folder")
    main(parser.parse_args())
