"""Train box control for Stable Video Diffusion: objects follow boxes over time (tracklets).

    bash train_svd_tracklet.sh                                       # the embedded SVD on moving shapes, three stages
    accelerate launch train_svd_tracklet.py --stage 2 --pretrained_model_name_or_path=/path/to/weight \\
        --base_folder=/path/to/frames --tracklets=/path/to/annotations --tracklet_weights=outputs/tracklet/stage1

The loop of train_svd.py; the UNet is frozen, layers that see the boxes train (Boximator, arXiv 2402.01566, Sec. 4):

    stage   target frames            boxes           learning rate   steps
    1       with the boxes drawn in  exact           2e-4            5 parts    self-tracking
    2       with the boxes drawn in  80 % soft       3e-5            5 parts
    3       clean                    80 % soft       3e-5            1 part

All flags of train_svd.py hold. Next: svd_xtend/models/box_control.py, svd_xtend/tracklets.py.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from svd_xtend.data import annotations, sampler, tracklets
from svd_xtend.data.clip import load_picture
from svd_xtend.inference import video_writer
from svd_xtend.models import loading
from train_svd import (
    DummyDataset,
    build_parser,
    logger,
    parse,
    select_parameters,
    svd_loss,
    train,
    validate,
)

STAGES = {
    1: dict(draw_boxes="yes", soft_boxes=0.0, learning_rate=2e-4, max_train_steps=50000),
    2: dict(draw_boxes="yes", soft_boxes=0.8, learning_rate=3e-5, max_train_steps=50000),
    3: dict(draw_boxes="no", soft_boxes=0.8, learning_rate=3e-5, max_train_steps=10000),
}


class TrackletDataset(DummyDataset):
    """DummyDataset whose items also hold `cond`, the boxes that the model is shown, and `foreground` (f, n, 4), where
    the objects are. Boxes are drawn into frames 1 on with --draw_boxes; frame 0, the condition, is always clean."""

    def __init__(self, options, *args):
        super().__init__(*args)
        self.options, bare, some = options, [], sampler.indices_to_check(self.clips)
        for clip in (self.clips[int(i)] for i in some):
            own, _ = self.boxes_of(clip)
            bare += [clip.stem] * (not own.ids)
            if own.ids and len(own) != len(clip):
                logger.warning(
                    "%s: boxes for %d frames, but there are %d", clip.path, len(own), len(clip)
                )
        source = f"--tracklets {options.tracklets or 'in the video folders'}"
        if len(bare) == len(some):
            raise ValueError(
                f"{source}: no boxes for any video; expected a file naming {bare[0]}, or {bare[0]}.json"
            )
        if bare:
            logger.warning(
                "%s: %d videos train without boxes: %s", source, len(bare), ", ".join(bare[:5])
            )

    def boxes_of(self, clip):
        """(Tracklets of a video's frames, size of these)."""
        size = clip.picture_size()
        only = len(self.clips) == 1 and clip.path.parent in map(
            Path, self.options.base_folder
        )  # not one held out
        return annotations.find_clip_tracklets(
            clip.path, self.options.tracklets, size, is_only_video=only
        ) or tracklets.Tracklets.empty(len(clip)), size

    def read_window(self, clip, frames, index):
        item, (own, size), options = (
            super().read_window(clip, frames, index),
            self.boxes_of(clip),
            self.options,
        )
        rng = np.random.default_rng((self.seed, index, 1))
        how = *clip.size, self.resize_mode, frames, options.max_objects, options.min_box_size
        boxes = tracklets.fit_to_picture(own, size, *how).shuffled_colors(rng)
        boxes = boxes.without_objects() if rng.random() < options.box_dropout else boxes
        if options.draw_boxes == "yes":
            item["pixel_values"] = tracklets.draw_boxes(item["pixel_values"], boxes)
        shown = boxes.mark_soft(rng, options.soft_boxes).grow_soft_boxes(rng)
        return {**item, "cond": shown.cond(), "foreground": boxes.boxes * boxes.valid[..., None]}


def tracklet_loss(model, pipe, batch, args):
    """svd_loss, with --foreground_weight times as much weight inside boxes as outside (TrackDiffusion: 2)."""
    from svd_xtend.models.box_control import foreground_weight

    if args.foreground_weight != 1:
        scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        size = (side // scale for side in batch["pixel_values"].shape[-2:])
        batch = {
            **batch,
            "pixel_weight": foreground_weight(batch["foreground"], *size, args.foreground_weight),
        }
    return svd_loss(model, pipe, batch, args)


def add_boxes(unet, args):
    """The adapter trains, with it what of the UNet --train_params names; a --lora below it stays as it is."""
    from svd_xtend.models.box_control import ControlledUNet, load_box_control, new_box_control
    from svd_xtend.models.lora import load_lora

    if args.lora:
        load_lora(unet, args.lora)
    if args.tracklet_weights:
        adapter = load_box_control(unet, args.tracklet_weights)
        told = adapter.config["slots"], adapter.config["enhancer"]
        if told != (args.max_objects, args.enhancer):
            raise ValueError(
                f"--tracklet_weights: has (max_objects, enhancer) {told}; pass flags that agree"
            )
    else:
        adapter = new_box_control(unet, args.max_objects, enhancer=args.enhancer, seed=args.seed)
    unet.requires_grad_(False)
    if named := [*adapter.replaced, *args.train_params]:
        select_parameters(unet, argparse.Namespace(train_params=named))
    for name, p in unet.named_parameters():
        p.requires_grad_(p.requires_grad and ".lora_" not in name)
    return ControlledUNet(unet, adapter.requires_grad_(True))


def export_boxes(pipe, unet, args):
    """Write tracklet_weights.safetensors: the adapter and what else was ever trained with it."""
    from svd_xtend.models.box_control import save_box_control

    save_box_control(unet.adapter, args.output_dir, loading.trainable_parameters(unet.unet))


def validation_boxes(i, args):
    """Tracklets of validation image i: --validation_tracklets, or its own video's from that frame on; None: it has none."""
    path, told = args.validation_image[i], args.validation[i]
    size, frames = load_picture(path).size, range(args.num_frames)
    if args.validation_tracklets:
        own = annotations.find_picture_tracklets(args.validation_tracklets[i], path, size)
    else:
        clip, frames = Path(told["clip"] or path).absolute(), told["frames"] or frames
        among = clip.parent in map(Path.absolute, map(Path, args.base_folder))
        own = annotations.find_clip_tracklets(clip, args.tracklets, size, is_only_video=among)
    return own and tracklets.fit_to_picture(
        own, size, args.width, args.height, args.resize_mode, frames, args.max_objects
    )


def validate_boxes(pipe, unet, step, args):
    """Render each image under its boxes, as train_svd.py does, clean and beside that with the boxes in view."""
    clips = []
    for i, (path, told) in enumerate(zip(args.validation_image, args.validation)):
        boxes = validation_boxes(i, args)
        unet.adapter.set(boxes and boxes.grow_soft_boxes())
        one = argparse.Namespace(**{**vars(args), "validation_image": [path], "validation": [told]})
        for name, image, frames in validate(pipe, unet, step, one):
            if boxes:
                frames, stem = (
                    tracklets.beside_boxes(frames, boxes),
                    Path(args.output_dir, "validation", f"step{step:06d}_{name}"),
                )
                video_writer.write_clip(stem, frames, told["fps"])
            clips.append((name, image, frames))
    unet.adapter.set(None)
    return clips


def script_parser(stage=1):
    """The shared flags and the boxes' own, with the defaults of a stage."""
    presets = dict(
        output_dir=f"outputs/tracklet/stage{stage}", lr_scheduler="linear", lr_warmup_steps=750
    )
    parser = build_parser(__doc__, **(presets | STAGES[stage]))
    # fmt: off
    g = parser.add_argument_group("tracklets (--train_params here adds parts of the UNet, time_mixer conv_in conv_out for instance; default: none of it)")
    g.add_argument("--stage", type=int, choices=STAGES, default=1, help="presets of the table above; default: %(default)s")
    g.add_argument("--tracklets", help="annotation file, or folder of them (BDD100K, MOTChallenge, KITTI, YouTube-VIS, JSON of this project); default: tracklets.json in each video folder")
    g.add_argument("--tracklet_weights", help="go on from these: the last stage's --output_dir")
    g.add_argument("--lora", help="LoRA under the boxes, frozen")
    g.add_argument("--max_objects", type=int, default=8, help="slots; of more objects the largest and longest are taken; default: %(default)s")
    g.add_argument("--min_box_size", type=float, default=0.02, help="leave out objects whose longer side stays under this fraction of the picture; default: %(default)s")
    g.add_argument("--draw_boxes", choices=["yes", "no"], help="self-tracking: draw the boxes into the target frames; default: by stage")
    g.add_argument("--soft_boxes", type=float, help="fraction of boxes shown as a larger region; default: by stage")
    g.add_argument("--box_dropout", type=float, default=0.25, help="fraction of clips without boxes; default: %(default)s")
    g.add_argument("--foreground_weight", type=float, default=1.0, help="weight of the loss inside boxes (TrackDiffusion: 2); default: %(default)s")
    g.add_argument("--enhancer", choices=["carry", "tokens", "none"], default="carry", help="in the decoder: TrackDiffusion's Instance Enhancer that also carries frame 0's features along with the boxes, that has tokens alone, or none; default: %(default)s")
    g.add_argument("--validation_tracklets", nargs="+", default=[], metavar="FILE", help="boxes for each --validation_image; default: those of its own video")
    # fmt: on
    return parser


def script_parse(argv=None):
    """Parse; the stage decides defaults."""
    args, _ = script_parser().parse_known_args(argv)
    parser = script_parser(args.stage)
    args = parse(parser, argv)
    if len(args.validation_tracklets) not in (0, len(args.validation_image)):
        parser.error("--validation_tracklets: must be as many as --validation_image")
    if args.latent_cache and args.draw_boxes == "yes":
        parser.error(
            "--latent_cache: holds frames as they are, without the boxes that stages 1 and 2 draw into them"
        )
    for flag in ("soft_boxes", "box_dropout"):
        if not 0 <= getattr(args, flag) <= 1:
            parser.error(f"--{flag} {getattr(args, flag)}: must be between 0 and 1")
    return args


if __name__ == "__main__":
    args = script_parse()
    data = partial(TrackletDataset, args)
    train(
        args,
        dataset=data,
        prepare_unet=add_boxes,
        export=export_boxes,
        validate=validate_boxes,
        loss=tracklet_loss,
    )
