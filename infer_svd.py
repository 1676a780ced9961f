"""Animate pictures: image -> mp4, gif and contact sheet.

    python infer_svd.py --image photo.jpg                                            # the embedded SVD
    python infer_svd.py --pretrained_model_name_or_path outputs/svd --image a.jpg b.jpg --width 512 --height 320
    python infer_svd.py --pretrained_model_name_or_path /path/to/weight --lora outputs/lora --image photo.jpg
    python infer_svd.py --image photo.jpg --tracklets path.json                      # objects follow boxes

Weights: any SVD, a full export, a checkpoint over its base (--checkpoint, --ema), a LoRA over its base (--lora).
"""

import argparse
from pathlib import Path

from svd_xtend.data import annotations, images, tracklets
from svd_xtend.demo.tiny_svd import TINY_BOXES, TINY_SVD
from svd_xtend.inference import pipeline, video_writer


def load_pipeline(args):
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


def read_boxes(args, path, file, num_frames, slots):
    """The tracklets in `file` as the picture at `path` shows them after resizing."""
    size = images.picture_size([path])
    own = annotations.find_picture_tracklets(file, path, size)
    return tracklets.fit_to_picture(
        own, size, args.width, args.height, args.resize_mode, range(num_frames), slots
    )


def main(args):
    """Load once, then render every image."""
    import torch

    pipe, adapter = load_pipeline(args)
    num_frames, steps = args.num_frames or pipe.unet.config.num_frames, args.num_inference_steps
    files = args.tracklets * len(args.image) if len(args.tracklets) == 1 else args.tracklets
    for i, path in enumerate(args.image):
        image = images.load_image(path, args.width, args.height, args.resize_mode)
        boxes = (
            read_boxes(args, path, files[i], num_frames, adapter.config["slots"])
            if adapter
            else None
        )
        if adapter:
            adapter.set(boxes.grow_soft_boxes())
        frames = pipe(
            image, args.height, args.width, num_frames, steps, fps=args.fps,
            min_guidance_scale=args.min_guidance_scale, max_guidance_scale=args.max_guidance_scale,
            motion_bucket_id=args.motion_bucket_id, noise_aug_strength=args.noise_aug_strength,
            decode_chunk_size=args.decode_chunk_size, generator=torch.Generator().manual_seed(args.seed),
            callback_on_step_end=adapter and adapter.scheduled_sampling(args.box_tau, steps),
        ).frames[0]  # fmt: skip
        stem = Path(args.output_dir, images.clip_name(path))
        video_writer.write_clip(stem, frames, args.fps)
        if boxes:
            video_writer.write_clip(
                f"{stem}_boxes", tracklets.beside_boxes(frames, boxes), args.fps
            )
            annotations.write_tracklets(
                f"{stem}_boxes.json", boxes
            )  # as the clip shows them, to score it by
        print(f"{stem}.mp4 .gif .png" + f", {stem}_boxes with the boxes in view" * bool(boxes))


def build_parser():
    """Flags: weights, pictures, sampling."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--pretrained_model_name_or_path", default=str(TINY_SVD), help="Hub name or folder of an SVD, a full export included; default: the embedded one")
    parser.add_argument("--revision", help="Hub revision of it")
    parser.add_argument("--checkpoint", help="checkpoint folder of a training on that SVD, full or LoRA")
    parser.add_argument("--ema", action="store_true", help="the checkpoint's moving averages instead of its weights")
    parser.add_argument("--lora", help="pytorch_lora_weights.safetensors, or its folder")
    parser.add_argument("--lora_scale", type=float, default=1.0, help="0: the base; 1: as trained")
    parser.add_argument("--cpu_offload", action="store_true", help="keep on the GPU only the module at work: for small GPUs")
    parser.add_argument("--tracklets", nargs="+", default=[], metavar="FILE", help="boxes that the objects are to follow: one annotation file for each image, or one for all")
    parser.add_argument("--tracklet_weights", default=str(TINY_BOXES), help="output of train_svd_tracklet.py on that SVD; default: the embedded one's")
    parser.add_argument("--box_guidance_scale", type=float, default=1.0, help="how much farther to go in the boxes' direction; other than 1 takes half as long again; default: %(default)s")
    parser.add_argument("--box_tau", type=float, default=1.0, help="heed the boxes in this first part of the sampling steps (GLIGEN's scheduled sampling); default: %(default)s")
    parser.add_argument("--image", nargs="+", required=True, help="pictures to animate")
    parser.add_argument("--output_dir", default="outputs/infer", help="default: %(default)s")
    parser.add_argument("--width", type=int, default=64, help="pixels, a multiple of 8; 1024 or 512 for SVD; default: %(default)s")
    parser.add_argument("--height", type=int, default=48, help="pixels, a multiple of 8; 576 or 320 for SVD; default: %(default)s")
    parser.add_argument("--resize_mode", choices=["crop", "stretch"], default="crop", help="cover and crop the centre, or ignore the aspect ratio")
    parser.add_argument("--num_frames", type=int, help="default: the model's")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="sampling steps; default: %(default)s")
    parser.add_argument("--min_guidance_scale", type=float, default=1.0, help="guidance of the first frame; default: %(default)s")
    parser.add_argument("--max_guidance_scale", type=float, default=3.0, help="guidance of the last frame; default: %(default)s")
    parser.add_argument("--fps", type=float, default=7, help="frames a second, of the conditioning and of the files; default: %(default)s")
    parser.add_argument("--motion_bucket_id", type=float, default=127, help="0 to 255, more moves more; default: %(default)s")
    parser.add_argument("--noise_aug_strength", type=float, default=0.02, help="noise on the picture: more is less like it and moves more; default: %(default)s")
    parser.add_argument("--decode_chunk_size", type=int, default=8, help="frames decoded at once; lower when out of memory")
    parser.add_argument("--seed", type=int, default=111, help="default: %(default)s")
    # fmt: on
    return parser


if __name__ == "__main__":
    parser = build_parser()
    args = parser.parse_args()
    if len(args.tracklets) not in (0, 1, len(args.image)):
        parser.error(
            f"--tracklets: {len(args.tracklets)} files for {len(args.image)} images; pass one for each, or one"
        )
    if args.ema and not args.checkpoint:
        parser.error("--ema: averages are in checkpoints; pass --checkpoint")
    main(args)
