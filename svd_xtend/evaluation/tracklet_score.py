"""Look at an annotation file, or score how well a generated video follows its boxes.

Render the frames of a video with their boxes, before you train on an annotation:

    python -m svd_xtend.evaluation.tracklet_score gt/gt.txt --frames img1 --output_dir outputs/boxes

Score a generated video. Run a tracker on it first, and give the boxes that the tracker found:

    python -m svd_xtend.evaluation.tracklet_score clip_boxes.json --frames clip.mp4 \\
        --score tracker.txt

Annotation files have one of the formats BDD100K (Scalabel), MOTChallenge, KITTI tracking,
YouTube-VIS or JSON of this project; svd_xtend/data/annotations.py describes them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from svd_xtend.data import images
from svd_xtend.data.annotations import read_tracklets
from svd_xtend.data.tracklets import Tracklets, box_iou, render_boxes
from svd_xtend.inference import video_writer

SUCCESS_IOU = 0.5  # a box is followed from this intersection over union on


def score_tracklets(asked: Tracklets, found: Tracklets, from_frame: int = 1) -> dict[str, float]:
    """Return how well the boxes that a tracker found in a video follow the boxes asked for.

    In each frame, found boxes are assigned to asked boxes so that the sum of their IoU is the
    largest. Asked boxes without a found box count as IoU 0.

    Args:
        asked: the boxes that the video was generated with.
        found: the boxes that a tracker found in the video.
        from_frame: the first frame that counts. Frame 0 is the condition of the model.

    Returns:
        boxes: number of asked boxes. mean_iou: their mean IoU. success: the fraction whose IoU is
        at least 0.5. mota, idf1: at IoU 0.5, by motmetrics (Bernardin & Stiefelhagen 2008;
        Ristani et al. 2016).
    """
    import motmetrics
    from scipy.optimize import linear_sum_assignment

    found = found.at(range(len(asked)))
    overlaps: list[float] = []
    num_boxes = 0
    accumulator = motmetrics.MOTAccumulator(auto_id=True)
    for f in range(from_frame, len(asked)):
        asked_slots = np.flatnonzero(asked.valid[f])
        found_slots = np.flatnonzero(found.valid[f])
        asked_boxes = asked.boxes[f, asked_slots]
        found_boxes = found.boxes[f, found_slots]
        ious = box_iou(asked_boxes[:, None], found_boxes[None])  # (asked, found)
        assignment = linear_sum_assignment(-ious)
        overlaps += ious[assignment].tolist()
        num_boxes += len(asked_slots)
        # motmetrics takes distances; nan forbids an assignment
        distances = np.where(ious >= SUCCESS_IOU, 1 - ious, np.nan)
        accumulator.update(asked_slots, found_slots, distances)

    mot_metrics = motmetrics.metrics.create().compute(
        accumulator, metrics=["mota", "idf1"], return_dataframe=False
    )
    num_boxes = max(num_boxes, 1)
    iou_of_boxes = np.array(overlaps)
    return {
        "boxes": float(num_boxes),
        "mean_iou": float(iou_of_boxes.sum() / num_boxes),
        "success": float((iou_of_boxes >= SUCCESS_IOU).sum() / num_boxes),
        "mota": float(mot_metrics["mota"]),
        "idf1": float(mot_metrics["idf1"]),
    }


def read_frames(path: str | Path, num_frames: int | None) -> list[Image.Image]:
    """Return the first `num_frames` frames of a video file or of a folder of frames; None: all."""
    if Path(path).is_file():
        return images.read_video(path)[:num_frames]
    return [images.load_image(file) for file in images.list_frames(path)[:num_frames]]


def main(args: argparse.Namespace) -> None:
    """Render an annotation, or print the scores of a tracker's output as JSON."""
    frames = read_frames(args.frames, args.num_frames)
    size = frames[0].size
    videos = read_tracklets(args.tracklets, size)
    name = args.video or next(iter(videos))
    if name not in videos:
        raise SystemExit(
            f"--video {name}: not in {args.tracklets}, which has {', '.join(list(videos)[:5])}"
        )
    tracklets = videos[name]

    if args.score:
        found = next(iter(read_tracklets(args.score, size).values()))
        scores = score_tracklets(tracklets.at(range(len(frames))), found)
        print(json.dumps(scores, indent=1))
    else:
        stem = Path(args.output_dir, name)
        video_writer.write_clip(stem, render_boxes(frames, tracklets), args.fps)
        print(f"wrote {stem}.mp4, .gif and .png")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tracklets", help="annotation file, in any of the formats above")
    parser.add_argument(
        "--frames", required=True, help="folder of the video's frames, or a video file"
    )
    parser.add_argument(
        "--video", help="name of a video in the annotation file; default: the first"
    )
    parser.add_argument(
        "--score",
        metavar="FILE",
        help="score this output of a tracker, in MOTChallenge format; default: render the boxes",
    )
    parser.add_argument("--num_frames", type=int, help="use only the first frames; default: all")
    parser.add_argument(
        "--fps", type=float, default=7, help="of the rendered video; default: %(default)s"
    )
    parser.add_argument(
        "--output_dir",
        default="outputs/boxes",
        help="folder of the rendered video; default: %(default)s",
    )
    return parser


if __name__ == "__main__":
    main(build_parser().parse_args())
