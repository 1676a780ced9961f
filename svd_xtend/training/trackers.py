"""Send validation videos to Weights & Biases or TensorBoard, as videos that play."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from accelerate import Accelerator
    from tensorboard.compat.proto.summary_pb2 import Summary


def log_videos(accelerator: Accelerator, step: int, stems: dict[str, Path]) -> None:
    """Log the videos that video_writer.write_clip wrote to every tracker of the run.

    stems: {tag: path of the video without its suffix}; the .mp4 and the .gif lie there.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            videos = {}
            for tag, stem in stems.items():
                videos[tag] = wandb.Video(f"{stem}.mp4", caption=stem.name)
            tracker.log(videos, step=step)
        elif tracker.name == "tensorboard":
            for tag, stem in stems.items():
                # The public add_image would keep one frame only, and add_video encodes anew and
                # needs moviepy.
                tracker.writer.file_writer.add_summary(gif_summary(tag, f"{stem}.gif"), step)
            tracker.writer.flush()


def gif_summary(tag: str, file: str | Path) -> Summary:
    """Return a GIF as an image of TensorBoard, whose page plays it."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(file) as gif:
        width, height = gif.size
    image = Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=Path(file).read_bytes()
    )
    return Summary(value=[Summary.Value(tag=tag, image=image)])
