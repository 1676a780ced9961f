"""TODO evaluation.tracklet_score."""

import argparse
import json
import logging
from pathlib import Path

import numpy as np

from svd_xtend.data.annotations import read_tracklets
from svd_xtend.data.tracklets import box_iou, render_boxes

logger = logging.getLogger("svd_xtend")


def score_tracklets(asked, found, first=1):
    """How well what a tracker found in a video obeys the boxes asked for, from frame `first` on (frame 0 was given).

    mean_iou and success (IoU >= 0.5), over the asked boxes, under the best assignment in each frame, misses counting 0;
    mota and idf1 at IoU 0.5 by motmetrics (Bernardin & Stiefelhagen 2008; Ristani et al. 2016)."""
    import motmetrics
    from scipy.optimize import linear_sum_assignment

    overlaps, count, accumulator = [], 0, motmetrics.MOTAccumulator(auto_id=True)
    found = found.at(range(len(asked)))
    for f in range(first, len(asked)):
        ours, theirs = np.flatnonzero(asked.valid[f]), np.flatnonzero(found.valid[f])
        table = box_iou(asked.boxes[f, ours][:, None], found.boxes[f, theirs][None])
        overlaps += table[linear_sum_assignment(-table)].tolist()
        count += len(ours)
        accumulator.update(ours, theirs, np.where(table >= 0.5, 1 - table, np.nan))
    told = motmetrics.metrics.create().compute(
        accumulator, metrics=["mota", "idf1"], return_dataframe=False
    )
    overlaps, count = np.array(overlaps), max(count, 1)
    figures = {
        "boxes": count,
        "mean_iou": overlaps.sum() / count,
        "success": (overlaps >= 0.5).sum() / count,
        **told,
    }
    return {name: float(value) for name, value in figures.items()}


def main(args):
    """Render an annotation, or score a tracker's output against it."""
    from PIL import Image

    from svd_xtend.data import images
    from svd_xtend.inference import video_writer

    clip = (
        images.read_video(args.frames)
        if Path(args.frames).is_file()
        else images.list_frames(args.frames)
    )
    clip = [
        frame if isinstance(frame, Image.Image) else images.load_image(frame)
        for frame in clip[: args.num_frames]
    ]
    size = clip[0].size
    asked = read_tracklets(args.tracklets, size)
    name = args.video or next(iter(asked))
    if name not in asked:
        raise SystemExit(
            f"--video {name}: not in {args.tracklets}, which has {', '.join(list(asked)[:5])}"
        )
    if args.score:
        found = next(iter(read_tracklets(args.score, size).values()))
        print(json.dumps(score_tracklets(asked[name].at(range(len(clip))), found), indent=1))
        return
    video_writer.write_clip(Path(args.output_dir, name), render_boxes(clip, asked[name]), args.fps)
    print(f"{Path(args.output_dir, name)}.mp4 .gif .png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tracklets", help="annotation file, in any of the formats above")
    parser.add_argument(
        "--frames", required=True, help="folder of the video's frames, or a video file"
    )
    parser.add_argument("--video", help="which video of the file; default: its first")
    parser.add_argument(
        "--score",
        metavar="FILE",
        help="a tracker's output on the generated video, MOTChallenge format",
    )
    parser.add_argument("--num_frames", type=int, help="render only so many; default: all")
    parser.add_argument("--fps", type=float, default=7)
    parser.add_argument("--output_dir", default="outputs/boxes")
    main(parser.parse_args())
