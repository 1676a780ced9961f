"""TODO training.trackers."""

import logging
from pathlib import Path

from PIL import Image

logger = logging.getLogger("svd_xtend")


def log_videos(accelerator, step, stems):
    """Hand what video.write_clip wrote to the trackers, as videos. stems: {tag: path without its suffix}."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            videos = {
                tag: wandb.Video(f"{stem}.mp4", caption=stem.name) for tag, stem in stems.items()
            }
            tracker.log(videos, step=step)
        elif tracker.name == "tensorboard":
            for tag, stem in stems.items():
                # not add_image or add_video, which encode anew: a picture that stands still, or with moviepy
                tracker.writer.file_writer.add_summary(gif_summary(tag, f"{stem}.gif"), step)
            tracker.writer.flush()


def gif_summary(tag, file):
    """A gif as tensorboard's images, among which it plays."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(file) as gif:
        width, height = gif.size
    image = Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=Path(file).read_bytes()
    )
    return Summary(value=[Summary.Value(tag=tag, image=image)])
