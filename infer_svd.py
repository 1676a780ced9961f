"""Animate images with Stable Video Diffusion: each becomes an mp4, a gif and a contact sheet.

    python infer_svd.py --image photo.jpg                   # the embedded SVD
    python infer_svd.py --pretrained_model_name_or_path /path/to/weight --lora outputs/lora --image photo.jpg

    python infer_svd.py --pretrained_model_name_or_path outputs/svd --image a.jpg b.jpg --width 512 --height 320
    python infer_svd.py --image photo.jpg --tracklets path.json     # objects follow boxes

The base model is any SVD, also one that train_svd.py wrote. Over it you can load a LoRA (--lora), a
checkpoint of a training run (--checkpoint, --ema), and box control (--tracklet_weights, --tracklets).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from svd_xtend.data import images, tracklets
from svd_xtend.data.annotations import find_picture_tracklets, write_tracklets
from svd_xtend.demo.tiny_svd import TINY_BOXES, TINY_SVD
from svd_xtend.inference import pipeline, video_writer
from svd_xtend.training import flag_types

if TYPE_CHECKING:
    from diffusers import StableVideoDiffusionPipeline
    from PIL import Image

    from svd_xtend.data.tracklets import Tracklets
    from svd_xtend.models.box_control import BoxAdapter


def load_pipeline(
    args: argparse.Namespace,
) -> tuple[StableVideoDiffusionPipeline, BoxAdapter | None]:
    """Return the pipeline with all weights that the flags name, and its box control or None."""
    return pipeline.load_pipeline(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        checkpoint=args.checkpoint,
        ema=args.ema,
        lora=args.lora,
        lora_scale=args.lora_scale,
        tracklet_weights=args.tracklet_weights if args.tracklets else None,
        box_guidance_scale=args.box_guidance_scale,
        cpu_offload=args.cpu_offload,
    )


def read_boxes(
    args: argparse.Namespace, image_path: str, annotation_file: str, num_frames: int, slots: int
) -> Tracklets:
    """Read the boxes of an image from its annotation file, as the resized image shows them."""
    size = images.picture_size([image_path])
    boxes = find_picture_tracklets(annotation_file, image_path, size)
    return tracklets.fit_to_picture(
        boxes, size, args.width, args.height, args.resize_mode, range(num_frames), slots
    )


def animate(
    pipe: StableVideoDiffusionPipeline,
    box_control: BoxAdapter | None,
    image: Image.Image,
    boxes: Tracklets | None,
    num_frames: int,
    args: argparse.Namespace,
) -> list[Image.Image]:
    """Return the frames of a video that begins with `image`. With box control, objects follow `boxes`."""
    import torch

    callback = None
    if box_control is not None and boxes is not None:
        box_control.set(boxes.grow_soft_boxes())
        callback = box_control.scheduled_sampling(args.box_tau, args.num_inference_steps)
    return pipe(
        image,
        height=args.height,
        width=args.width,
        num_frames=num_frames,
        num_inference_steps=args.num_inference_steps,
        min_guidance_scale=args.min_guidance_scale,
        max_guidance_scale=args.max_guidance_scale,
        fps=args.fps,
        motion_bucket_id=args.motion_bucket_id,
        noise_aug_strength=args.noise_aug_strength,
        decode_chunk_size=args.decode_chunk_size,
        generator=torch.Generator().manual_seed(args.seed),
        callback_on_step_end=callback,
    ).frames[0]


def write_videos(
    stem: Path, frames: list[Image.Image], boxes: Tracklets | None, fps: float
) -> None:
    """Write a video; if it has boxes, also one that shows them, and the boxes for scoring."""
    video_writer.write_clip(stem, frames, fps)
    message = f"wrote {stem}.mp4, .gif, .png"
    if boxes is not None:
        with_boxes = f"{stem}_boxes"
        video_writer.write_clip(with_boxes, tracklets.beside_boxes(frames, boxes), fps)
        write_tracklets(f"{with_boxes}.json", boxes)
        message += f", and {with_boxes}.mp4, .gif, .png, .json with the boxes drawn in"
    print(message)


def main(args: argparse.Namespace) -> None:
    """Load the model once, then animate every image."""
    pipe, box_control = load_pipeline(args)
    num_frames = args.num_frames or pipe.unet.config.num_frames
    annotation_files = args.tracklets
    if len(annotation_files) == 1:
        annotation_files = annotation_files * len(args.image)
    for i, path in enumerate(args.image):
        image = images.load_image(path, args.width, args.height, args.resize_mode)
        boxes = None
        if box_control is not None:
            slots = box_control.config["slots"]
            boxes = read_boxes(args, path, annotation_files[i], num_frames, slots)
        frames = animate(pipe, box_control, image, boxes, num_frames, args)
        write_videos(Path(args.output_dir, images.clip_name(path)), frames, boxes, args.fps)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    g = parser.add_argument_group("model")
    g.add_argument("--pretrained_model_name_or_path", default=str(TINY_SVD), help="base model: Hub name or folder of an SVD; default: the embedded one")
    g.add_argument("--revision", help="its revision on the Hub")
    g.add_argument("--checkpoint", help="checkpoint folder of a training run on that base model, full or LoRA")
    g.add_argument("--ema", action="store_true", help="use the EMA weights of --checkpoint")
    g.add_argument("--lora", help="pytorch_lora_weights.safetensors, or its folder")
    g.add_argument("--lora_scale", type=float, default=1.0, help="strength of the LoRA; 0: base model, 1: as trained; default: %(default)s")
    g.add_argument("--cpu_offload", action="store_true", help="keep only the module that is running on the GPU, for small GPUs; slower")

    g = parser.add_argument_group("box control")
    g.add_argument("--tracklets", nargs="+", default=[], metavar="FILE", help="boxes that objects follow: one annotation file for each image, or one for all")
    g.add_argument("--tracklet_weights", default=str(TINY_BOXES), help="--output_dir of train_svd_tracklet.py on that base model; default: that of the embedded SVD")
    g.add_argument("--box_guidance_scale", type=float, default=1.0, help="strength of guidance by boxes; any value but 1 takes 1.5 times as long; default: %(default)s")
    g.add_argument("--box_tau", type=float, default=1.0, help="share of the sampling steps, from the first on, that use the boxes (GLIGEN's scheduled sampling); default: %(default)s")

    g = parser.add_argument_group("input and output")
    g.add_argument("--image", nargs="+", required=True, help="images to animate")
    g.add_argument("--output_dir", default="outputs/infer", help="default: %(default)s")
    g.add_argument("--width", type=flag_types.multiple_of_8, default=64, help="pixels, a multiple of 8; 1024 or 512 for SVD; default: %(default)s")
    g.add_argument("--height", type=flag_types.multiple_of_8, default=48, help="pixels, a multiple of 8; 576 or 320 for SVD; default: %(default)s")
    g.add_argument("--resize_mode", choices=["crop", "stretch"], default="crop", help="crop: cover and crop the centre; stretch: ignore the aspect ratio; default: %(default)s")

    g = parser.add_argument_group("sampling")
    g.add_argument("--num_frames", type=flag_types.positive_int, help="default: that of the base model")
    g.add_argument("--num_inference_steps", type=flag_types.positive_int, default=25, help="sampling steps; default: %(default)s")
    g.add_argument("--min_guidance_scale", type=float, default=1.0, help="guidance scale of the first frame; default: %(default)s")
    g.add_argument("--max_guidance_scale", type=float, default=3.0, help="guidance scale of the last frame; default: %(default)s")
    g.add_argument("--fps", type=flag_types.positive_float, default=7, help="frames per second that the model is conditioned on, and of the video; default: %(default)s")
    g.add_argument("--motion_bucket_id", type=float, default=127, help="0 to 255; a higher value means more motion; default: %(default)s")
    g.add_argument("--noise_aug_strength", type=float, default=0.02, help="noise on the image; more of it means more motion and less likeness; default: %(default)s")
    g.add_argument("--decode_chunk_size", type=flag_types.positive_int, default=8, help="frames that the VAE decodes at once; lower it on out-of-memory; default: %(default)s")
    g.add_argument("--seed", type=int, default=111, help="default: %(default)s")
    # fmt: on
    return parser


def parse_args() -> argparse.Namespace:
    """Parse the command line, and check that flags fit together."""
    parser = build_parser()
    args = parser.parse_args()
    num_files = len(args.tracklets)
    if num_files not in (0, 1, len(args.image)):
        parser.error(
            f"--tracklets: expected 1 file or {len(args.image)}, one for each --image; got {num_files}"
        )
    if args.tracklet_weights != str(TINY_BOXES) and not args.tracklets:
        parser.error("--tracklet_weights: has no effect without boxes; also pass --tracklets")
    if args.ema and not args.checkpoint:
        parser.error("--ema: only checkpoints have EMA weights; pass --checkpoint")
    return args


if __name__ == "__main__":
    main(parse_args())
