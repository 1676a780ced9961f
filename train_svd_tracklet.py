"""Train box control for Stable Video Diffusion: objects follow boxes over time (tracklets).

    bash train_svd_tracklet.sh                        # the embedded SVD on moving shapes, three stages
    accelerate launch train_svd_tracklet.py --stage 2 --pretrained_model_name_or_path=/path/to/weight \\
        --base_folder=/path/to/frames --tracklets=/path/to/annotations \\
        --tracklet_weights=outputs/tracklet/stage1

The loop is that of train_svd.py. The UNet is frozen; layers that see the boxes train (Boximator, arXiv
2402.01566, Sec. 4), in three stages:

    stage   target frames           boxes         learning rate   steps
    1       with the boxes drawn    exact         2e-4            5 parts    self-tracking
    2       with the boxes drawn    80 % soft     3e-5            5 parts
    3       clean                   80 % soft     3e-5            1 part

All flags of train_svd.py work here too.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svd_xtend.data import sampler, tracklets
from svd_xtend.data.annotations import find_clip_tracklets, find_picture_tracklets
from svd_xtend.data.clip import Clip, ClipSpec, load_picture
from svd_xtend.data.sampler import ClipCollection, ClipSampler
from svd_xtend.data.tracklets import Tracklets
from svd_xtend.inference import video_writer
from svd_xtend.models import loading
from svd_xtend.training.flag_types import fraction, non_negative_float, positive_int
from svd_xtend.training.validation import RenderedClip, ValidationInput
from train_svd import (
    DummyDataset,
    Recipe,
    build_parser,
    parse,
    render_validation,
    replace_args,
    select_parameters,
    train,
)

if TYPE_CHECKING:
    from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel

    from svd_xtend.models.box_control import ControlledUNet

logger = logging.getLogger("svd_xtend")

STAGES: dict[int, dict[str, Any]] = {
    1: dict(draw_boxes="yes", soft_boxes=0.0, learning_rate=2e-4, max_train_steps=50000),
    2: dict(draw_boxes="yes", soft_boxes=0.8, learning_rate=3e-5, max_train_steps=50000),
    3: dict(draw_boxes="no", soft_boxes=0.8, learning_rate=3e-5, max_train_steps=10000),
}


class TrackletDataset(DummyDataset):
    """Add boxes to the items of DummyDataset.

    `control` holds the boxes that the model is shown, `foreground` (f, n, 4) where the objects are.
    With --draw_boxes the boxes are drawn into frames 1 and later; frame 0, the condition, stays clean.
    args: the flags of this script.
    """

    def __init__(
        self,
        clips: ClipCollection,
        clip_sampler: ClipSampler,
        spec: ClipSpec,
        *,
        args: argparse.Namespace,
        seed: int = 0,
        latent_cache: str | None = None,
    ) -> None:
        super().__init__(clips, clip_sampler, spec, seed=seed, latent_cache=latent_cache)
        self.args = args
        self.check_annotations()

    def check_annotations(self) -> None:
        """Warn about videos without boxes. Raise ValueError if no video has any."""
        source = f"--tracklets {self.args.tracklets or 'in the video folders'}"
        checked = sampler.indices_to_check(self.clips)
        without_boxes = []
        for index in checked:
            clip = self.clips[int(index)]
            boxes, _ = self.boxes_of(clip)
            if not boxes.ids:
                without_boxes.append(clip.stem)
            elif len(boxes) != len(clip):
                logger.warning(
                    "%s: there are boxes for %d frames, but the video has %d",
                    clip.path,
                    len(boxes),
                    len(clip),
                )
        if len(without_boxes) == len(checked):
            name = without_boxes[0]
            raise ValueError(
                f"{source}: no boxes for any video. Expected a file that names {name}, or {name}.json."
            )
        if without_boxes:
            logger.warning(
                "%s: %d videos train without boxes: %s",
                source,
                len(without_boxes),
                ", ".join(without_boxes[:5]),
            )

    def boxes_of(self, clip: Clip) -> tuple[Tracklets, tuple[int, int]]:
        """Return the tracklets of all frames of a video, and the size (width, height) of these."""
        size = clip.picture_size()
        in_base_folder = clip.path.parent in map(Path, self.args.base_folder)
        boxes = find_clip_tracklets(
            clip.path,
            self.args.tracklets,
            size,
            is_only_video=len(self.clips) == 1 and in_base_folder,
        )
        return boxes or Tracklets.empty(len(clip)), size

    def read_window(self, clip: Clip, frame_indices: np.ndarray, index: int) -> dict[str, Any]:
        item = super().read_window(clip, frame_indices, index)
        args = self.args
        rng = np.random.default_rng((self.seed, index, 1))
        all_boxes, size = self.boxes_of(clip)
        width, height = clip.size or (self.spec.width, self.spec.height)
        boxes = tracklets.fit_to_picture(
            all_boxes,
            size,
            width,
            height,
            self.spec.resize_mode,
            frame_indices,
            args.max_objects,
            args.min_box_size,
        )
        boxes = boxes.shuffled_colors(rng)
        if rng.random() < args.box_dropout:
            boxes = boxes.without_objects()
        if args.draw_boxes == "yes":
            item["pixel_values"] = tracklets.draw_boxes(item["pixel_values"], boxes)
        shown = boxes.mark_soft(rng, args.soft_boxes).grow_soft_boxes(rng)
        foreground = boxes.boxes * boxes.valid[..., None]
        return {**item, "control": shown.cond(), "foreground": foreground}


def add_pixel_weight(batch: dict, pipe: StableVideoDiffusionPipeline, weight: float) -> dict:
    """Weight the loss inside boxes `weight` times as much as outside (TrackDiffusion: 2)."""
    from svd_xtend.models.box_control import foreground_weight

    if weight == 1:
        return batch
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    height, width = batch["pixel_values"].shape[-2:]
    pixel_weight = foreground_weight(batch["foreground"], height // scale, width // scale, weight)
    return {**batch, "pixel_weight": pixel_weight}


def add_boxes(unet: UNetSpatioTemporalConditionModel, args: argparse.Namespace) -> ControlledUNet:
    """Add the layers that see the boxes. They train, and what of the UNet --train_params names.

    A --lora below them stays frozen.
    """
    from svd_xtend.models.box_control import ControlledUNet, load_box_control, new_box_control
    from svd_xtend.models.lora import load_lora

    if args.lora:
        load_lora(unet, args.lora)
    if args.tracklet_weights:
        adapter = load_box_control(unet, args.tracklet_weights)
        max_objects = adapter.config["slots"]
        enhancer = adapter.config["enhancer"]
        if (max_objects, enhancer) != (args.max_objects, args.enhancer):
            raise ValueError(
                f"--tracklet_weights {args.tracklet_weights}: these weights need "
                f"--max_objects {max_objects} --enhancer {enhancer}."
            )
    else:
        adapter = new_box_control(unet, args.max_objects, enhancer=args.enhancer, seed=args.seed)
    unet.requires_grad_(False)
    # weights of the UNet that an earlier stage trained go on training
    unet_parameters = [*adapter.replaced, *args.train_params]
    if unet_parameters:
        select_parameters(unet, argparse.Namespace(train_params=unet_parameters))
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(False)
    return ControlledUNet(unet, adapter.requires_grad_(True))


def export_boxes(
    pipe: StableVideoDiffusionPipeline, unet: ControlledUNet, args: argparse.Namespace
) -> None:
    """Write tracklet_weights.safetensors: the adapter, and the UNet's weights that trained with it."""
    from svd_xtend.models.box_control import save_box_control

    unet_parameters = loading.trainable_parameters(unet.unet)
    save_box_control(unet.adapter, args.output_dir, unet_parameters)


def validation_boxes(
    position: int, validation_input: ValidationInput, args: argparse.Namespace
) -> Tracklets | None:
    """Return the tracklets of a validation image, or None if it has none.

    They come from --validation_tracklets, or from the video that the image is a frame of.
    """
    size = load_picture(validation_input.image).size
    boxes: Tracklets | None
    if args.validation_tracklets:
        file = args.validation_tracklets[position]
        boxes = find_picture_tracklets(file, validation_input.image, size)
        frame_indices = list(range(args.num_frames))
    else:
        frame_indices = validation_input.frames or list(range(args.num_frames))
        clip = Path(validation_input.clip or validation_input.image).absolute()
        in_base_folder = clip.parent in [Path(folder).absolute() for folder in args.base_folder]
        boxes = find_clip_tracklets(clip, args.tracklets, size, is_only_video=in_base_folder)
    if not boxes:
        return None
    return tracklets.fit_to_picture(
        boxes, size, args.width, args.height, args.resize_mode, frame_indices, args.max_objects
    )


def render_validation_with_boxes(
    pipe: StableVideoDiffusionPipeline, unet: ControlledUNet, step: int, args: argparse.Namespace
) -> list[RenderedClip]:
    """Render each validation image under its boxes, with the boxes shown in a second picture beside it."""
    clips = []
    for position, validation_input in enumerate(args.validation):
        boxes = validation_boxes(position, validation_input, args)
        unet.adapter.set(boxes and boxes.grow_soft_boxes())
        one_input = replace_args(args, validation=[validation_input])
        (clip,) = render_validation(pipe, unet, step, one_input)
        if boxes:
            stem = Path(args.output_dir, "validation", f"step{step:06d}_{clip.name}")
            frames = tracklets.beside_boxes(clip.frames, boxes)
            video_writer.write_clip(stem, frames, validation_input.fps)
            clip = RenderedClip(clip.name, clip.first_frame, frames)
        clips.append(clip)
    unet.adapter.set(None)
    return clips


def script_parser(stage: int = 1) -> argparse.ArgumentParser:
    """Return a parser of the shared flags and of box control's, with the defaults of a stage."""
    defaults = {
        "output_dir": f"outputs/tracklet/stage{stage}",
        "lr_scheduler": "linear",
        "lr_warmup_steps": 750,
        **STAGES[stage],
    }
    parser = build_parser(__doc__, **defaults)
    group = parser.add_argument_group(
        "tracklets",
        "--train_params adds parameters of the UNet here, for example time_mixer conv_in conv_out; "
        "default: none",
    )
    group.add_argument(
        "--stage",
        type=int,
        choices=STAGES,
        default=1,
        help="presets of the table above; default: %(default)s",
    )
    group.add_argument(
        "--tracklets",
        help="annotation file, or a folder of them (BDD100K, MOTChallenge, KITTI, YouTube-VIS, this "
        "project's JSON); default: tracklets.json in each video folder",
    )
    group.add_argument(
        "--tracklet_weights", help="weights to start from: --output_dir of the stage before"
    )
    group.add_argument("--lora", help="LoRA under the boxes, frozen")
    group.add_argument(
        "--max_objects",
        type=positive_int,
        default=8,
        help="objects of a clip; of more, the largest and longest are taken; default: %(default)s",
    )
    group.add_argument(
        "--min_box_size",
        type=non_negative_float,
        default=0.02,
        help="leave out objects whose longer side stays below this fraction of the picture; "
        "default: %(default)s",
    )
    group.add_argument(
        "--draw_boxes",
        choices=["yes", "no"],
        help="self-tracking: draw the boxes into the target frames; default: by stage",
    )
    group.add_argument(
        "--soft_boxes",
        type=fraction,
        help="fraction of boxes that are shown as a larger region; default: by stage",
    )
    group.add_argument(
        "--box_dropout",
        type=fraction,
        default=0.25,
        help="fraction of clips that are shown without boxes; default: %(default)s",
    )
    group.add_argument(
        "--foreground_weight",
        type=non_negative_float,
        default=1.0,
        help="weight of the loss inside boxes (TrackDiffusion: 2); default: %(default)s",
    )
    group.add_argument(
        "--enhancer",
        choices=["carry", "tokens", "none"],
        default="carry",
        help="in the decoder: tokens is TrackDiffusion's Instance Enhancer; carry also moves the "
        "features of frame 0 along with the boxes; default: %(default)s",
    )
    group.add_argument(
        "--validation_tracklets",
        nargs="+",
        default=[],
        metavar="FILE",
        help="boxes of each --validation_image; default: those of its own video",
    )
    return parser


def script_parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags. --stage decides the defaults of the others."""
    first_pass, _ = script_parser().parse_known_args(argv)
    parser = script_parser(first_pass.stage)
    args = parse(parser, argv)
    if len(args.validation_tracklets) not in (0, len(args.validation_image)):
        parser.error(
            f"--validation_tracklets: expected {len(args.validation_image)} files, one per "
            f"--validation_image; got {len(args.validation_tracklets)}"
        )
    if args.latent_cache and args.draw_boxes == "yes":
        parser.error(
            "--latent_cache: holds clean frames, and stages 1 and 2 draw boxes into them. "
            "Leave the flag out, or pass --draw_boxes no"
        )
    return args


def make_recipe(args: argparse.Namespace) -> Recipe:
    """Return what box control brings to the loop of train_svd.py."""
    return Recipe(
        make_dataset=partial(TrackletDataset, args=args),
        prepare_unet=add_boxes,
        prepare_batch=partial(add_pixel_weight, weight=args.foreground_weight),
        validate=render_validation_with_boxes,
        export=export_boxes,
    )


if __name__ == "__main__":
    args = script_parse()
    train(args, make_recipe(args))
