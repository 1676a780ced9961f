"""Did it learn? A fine-tuned SVD beside its base on clips that neither was trained on; and does training do what inference does?

    python evaluate_svd.py --tuned outputs/lora                                  # as that run was told: its held-out clips, its size
    python evaluate_svd.py --tuned outputs/svd/checkpoint-1000 --ema --validation_folder data/held_out
    python evaluate_svd.py --tuned outputs/tracklet/stage3 --protocol ctrl-v --validation_folder data/kitti_test
    python evaluate_svd.py --parity --pretrained_model_name_or_path /path/to/weight    # first of all, with a model or diffusers new to you

--tuned takes what any trainer wrote: a full SVD, a LoRA, box control, a checkpoint of these. Several processes (accelerate launch)
share the clips. Next: svd_xtend/held_out.py, svd_xtend/metrics.py.
"""

import argparse
import json
import logging
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np

import train_svd
import train_svd_tracklet
from svd_xtend.data import images, split, tracklets
from svd_xtend.demo import synthetic_clips
from svd_xtend.evaluation import metrics, report
from svd_xtend.inference import video_writer
from svd_xtend.inference.pipeline import load_checkpoint
from svd_xtend.models import loading, precision, unet_optimizations
from svd_xtend.models.lora import LORA_FILE, load_lora
from svd_xtend.training import checkpoints, distributed, flag_types, run_record, validation_loss

logger = logging.getLogger("svd_xtend")

# Ctrl-V (arXiv 2406.05630): 25 frames of 512x320, 30 sampling steps, told 7 frames a second and bucket 127; frame 0 counts, and
# pictures are compared at 410x256
PROTOCOLS = {
    "ctrl-v": dict(
        num_clips=200, num_frames=25, width=512, height=320, num_inference_steps=30, fps=7.0, motion_bucket_id=127.0, buckets=False,
    )
}  # fmt: skip
COMPARED_AT = {"ctrl-v": (410, 256)}
PARITY = dict(width=128, height=64)  # which does not depend on the size
# clips and boxes as they are, but for what a run was told
PLAIN = dict(draw_boxes="no", soft_boxes=0.0, box_dropout=0.0)
SHOWN = 4  # clips in the comparison


# --------------------------------------------------------------------------------------------------------- what is compared


def run_of(tuned):
    """What the run that wrote `tuned`, an --output_dir, a file or a checkpoint in it, was told; {} where that is not known."""
    for file in (Path(tuned, "args.json"), Path(tuned).absolute().parent / "args.json"):
        if file.is_file():
            try:
                return dict(json.loads(file.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"--tuned {tuned}: {file} is damaged ({error})") from error
    return {}


def settle(flags):
    """All flags of a trainer: the defaults, over them what the run of --tuned was told, the protocol, and `flags`."""
    if flags.tuned and not Path(flags.tuned).exists():
        raise ValueError(f"--tuned {flags.tuned}: not there")
    run = run_of(flags.tuned) if flags.tuned else {}
    args = vars(train_svd_tracklet.script_parser().parse_args([])) | PLAIN
    args |= {
        name: value for name, value in run.items() if name not in ("output_dir", "validation_image")
    }
    args |= {
        "num_clips": args["validation_clips"],
        **PROTOCOLS.get(flags.protocol, PARITY if flags.parity else {}),
    }
    args |= {
        name: value for name, value in vars(flags).items() if value is not None or name not in args
    }
    args["box_control"] = "stage" in run or bool(
        flags.tuned and Path(flags.tuned, loading.BOX_CONTROL_FILE).is_file()
    )
    for name, value in zip(("P_mean", "P_std"), train_svd.default_P(args["width"], args["height"])):
        args[name] = value if args[name] is None else args[name]
    args["mixed_precision"] = choose_precision(flags.mixed_precision, run.get("mixed_precision"))
    args["validation_ratio"] = 0.0 if flags.validation_folder else args["validation_ratio"]
    args["trained_with"] = run.get("num_frames"), run.get("fps")
    gone = [folder for folder in args["base_folder"] if not Path(folder).is_dir()]
    if args["validation_folder"] and (gone or not run):
        args["base_folder"], args["trained_with"] = args["validation_folder"], (None, None)
        if gone and run and args["motion_bucket_id"] == "auto":
            told = "--base_folder %s of the run is not here: motion_bucket_id is by rank among the held-out clips"
            logger.warning(told, gone[0])
    args |= dict(latent_cache=None, folder_weights=None, image_ratio=0.0, per_gpu_batch_size=1)
    args |= dict(validation_clips=args["num_clips"], validation_steps=1)
    args["output_dir"] = flags.output_dir or str(evaluation_folder(flags.tuned, flags.ema))
    args = argparse.Namespace(**args)
    check(args)
    return args


def evaluation_folder(tuned, ema):
    """evaluation/ in a run's folder, where report.html finds it, or beside a LoRA file; of a checkpoint evaluation/checkpoint-1000."""
    tuned = Path(tuned or "outputs")
    if (tuned / checkpoints.TRAINED_FILE).is_file():
        return tuned.absolute().parent / "evaluation" / f"{tuned.absolute().name}{'-ema' * ema}"
    return (tuned.parent if tuned.is_file() else tuned) / "evaluation"


def step_of(tuned):
    """How many steps a checkpoint, or what a run wrote at its end, was trained; None where that is not known."""
    if tuned and Path(tuned, checkpoints.TRAINED_FILE).is_file():
        return checkpoints.read_progress(tuned)["step"]
    rows = run_record.read_rows(Path(tuned, "metrics.jsonl")) if tuned else []
    return rows[-1]["step"] if rows else None


def choose_precision(asked, trained):
    """What to compute in: as asked, or as the run did where this machine can, or the best that it has."""
    try:
        return precision.check_precision(asked or trained or precision.best_precision())
    except ValueError:
        if asked:
            raise
        return precision.best_precision()


def check(args):
    """Raise where a flag, or what the run of --tuned was told in its place, cannot be."""
    least = {
        "num_clips": 1,
        "num_frames": 2,
        "num_inference_steps": 1,
        "decode_chunk_size": 1,
        "vae_encode_chunk": 1,
    }
    if wrong := flag_types.find_wrong_number(args, least):
        raise ValueError(wrong)
    if args.ema and not Path(args.tuned or "", checkpoints.TRAINED_FILE).is_file():
        raise ValueError("--ema: averages are in checkpoints; pass --tuned .../checkpoint-...")
    if args.parity:
        return
    if not args.validation_folder and not args.validation_ratio:
        raise ValueError("--validation_folder: pass a folder of clips that nothing was trained on")
    for folder in args.validation_folder or args.base_folder:
        if not Path(folder).is_dir():
            whose = (
                ""
                if args.validation_folder
                else f"; --tuned {args.tuned} has held out a part of it"
            )
            raise ValueError(
                f"--validation_folder {folder}: no such folder{whose}. Pass one of clips that nothing trained on"
            )


# ------------------------------------------------------------------------------------------------------------------ models


def tune(unet, args):
    """Put into `unet` what --tuned holds, but for a whole UNet; returns the model, which where it is box control takes boxes."""
    folder = Path(args.tuned)
    is_checkpoint = (folder / checkpoints.TRAINED_FILE).is_file()
    if args.box_control:
        from svd_xtend.models.box_control import ControlledUNet, load_box_control, new_box_control

        if args.lora:
            load_lora(unet, args.lora)
        if not is_checkpoint:
            return ControlledUNet(unet, load_box_control(unet, folder))
        unet = ControlledUNet(unet, new_box_control(unet, args.max_objects, enhancer=args.enhancer))
    if is_checkpoint:
        load_checkpoint(unet, folder, args.ema, flag="--tuned")
    elif folder.suffix == ".safetensors" or (folder / LORA_FILE).is_file():
        load_lora(unet, folder)
    else:
        there = sorted(folder.glob("checkpoint-*"), key=images.natural_key)
        advice = (
            f"; pass {there[-1]}"
            if there
            else f". Expected unet/, {LORA_FILE}, {loading.BOX_CONTROL_FILE}, or a checkpoint"
        )
        raise ValueError(
            f"--tuned {folder}: holds nothing that a trainer writes at its end{advice}"
        )
    return unet


def load(args, tuned, device):
    """(pipeline, model): the base, or with what --tuned holds; all at rest in the precision that a run computes in."""
    import torch

    whole = tuned and Path(args.tuned, "unet").is_dir()  # a full training
    unet = args.tuned if whole else args.pretrain_unet
    pipe = loading.load_svd(args.pretrained_model_name_or_path, torch.float32, args.revision, unet)
    unet_optimizations.speed_up(pipe.unet)
    model = tune(pipe.unet, args) if tuned and not whole else pipe.unet
    model.requires_grad_(False)
    loading.move_models(pipe, model, args.mixed_precision, device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, model


# ------------------------------------------------------------------------------------------------------------------- clips


def clips_of(args, process):
    """The held-out clips as a trainer's dataset, with boxes where there are some; each in the motion bucket that it has among the
    clips that train."""
    boxed = args.box_control or args.tracklets
    held = partial(train_svd_tracklet.TrackletDataset, args) if boxed else train_svd.DummyDataset
    # first those that train, which may be too short now
    kinds = iter([(train_svd.DummyDataset, args.trained_with), (held, (args.num_frames, args.fps))])

    def dataset(folders, width, height, num_frames, fps, *rest):
        kind, (frames, rate) = next(kinds)
        return kind(folders, width, height, frames or num_frames, rate or fps, *rest)

    return train_svd.load_data(args, dataset, process)[1]


def windows(data, count):
    """[(clip, number of its first frame)] of up to `count` windows: of each clip of which the held-out loss is told the first, or where
    there are fewer clips all that do not overlap, spread evenly."""
    found = [(next(data.order.choices(i)), 0) for i in range(min(count, len(data)))]
    if len(found) < count:
        found = []
        for n in range(len(data)):
            clip, start = data.clips[n], 0
            while start < clip.num_starts(data.sample_frames, clip.metadata["fps"]):
                found.append((n, start))
                start = int(clip.frame_indices(start, data.sample_frames, clip.metadata["fps"])[-1]) + 1
    chosen = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int))
    return [(data.clips[found[i][0]], found[i][1]) for i in chosen]


def boxes_of(data, clip, numbers, args):
    """Tracklets of these frames as a sample shows them, or None where the data has none."""
    if not hasattr(data, "boxes_of"):
        return None
    own, size = data.boxes_of(clip)
    return tracklets.fit_to_picture(
        own, size, *clip.size, args.resize_mode, numbers, args.max_objects, args.min_box_size
    )


# ----------------------------------------------------------------------------------------------------------------- measure


def networks(num_frames, process):
    """({name: metric by a published network}, {name: how to get it}), those at hand and those that are not; says what is not."""
    found, left_out = {}, {}
    for name, find in (("lpips", metrics.lpips), ("fvd", partial(metrics.i3d, num_frames))):
        try:
            found[name] = find()
        except metrics.Missing as missing:
            left_out[name] = str(missing)
            if process.is_main_process:  # now, not after hours
                print(missing, flush=True)
    return found, left_out


def measure(made, true, fps, boxes, found, compared_at=None):
    """({name: figure} of a clip (f, h, w, 3) uint8 beside the true one, features for FVD or None). compared_at: (width, height) of a
    protocol at which pictures are compared, frame 0 too, which else, being given, does not count."""
    ways = metrics.flows(made)
    told = metrics.order_figures(made, ways, fps) | (
        metrics.control_figures(ways, boxes) if boxes else {}
    )
    if compared_at:
        true = (
            true
            if true is None
            else np.stack([images.resize_frame(f, *compared_at, "stretch") for f in true])
        )
        made = np.stack([images.resize_frame(f, *compared_at, "stretch") for f in made])
    if true is not None:
        by_frame = metrics.frame_figures(made, true)
        if "lpips" in found:
            by_frame["lpips"] = found["lpips"](made, true)
        told |= {
            name: float(values[0 if compared_at else 1 :].mean())
            for name, values in by_frame.items()
        }
        told |= {
            "first_frame_psnr": float(by_frame["psnr"][0]),
            "psnr_by_frame": by_frame["psnr"].tolist(),
        }
    return told, found["fvd"](made) if "fvd" in found else None


def render(name, pipe, model, data, args, found, process):
    """This process's part of [{number, clip, fps, boxes, and by column figures, features, and frames of those shown}]; of the base
    what is true, and what a picture that stands still is worth, too. Clips that cannot be read are left out."""
    from PIL import Image

    places = list(enumerate(windows(data, args.num_clips)))[
        process.process_index :: process.num_processes
    ]
    sample, rows = counted(train_svd.sample, len(places), f"{name}: clips", process), []
    for i, (clip, start) in places:
        numbers, told = clip.frame_indices(start, args.num_frames, clip.metadata["fps"]), clip.metadata
        try:
            true, boxes = (
                clip.read(numbers, *clip.size, args.resize_mode),
                boxes_of(data, clip, numbers, args),
            )
        except ValueError as error:
            logger.warning("%s; it is left out", error)
            continue
        if hasattr(model, "adapter"):
            model.adapter.set(boxes.grow_soft_boxes())
        made = sample(pipe, Image.fromarray(true[0]), told, args.validation_seed + i, args)
        clips = {name: np.stack([np.asarray(frame) for frame in made])}
        if name == "base":
            clips |= {"truth": true, "still": np.repeat(true[:1], len(true), 0)}
        row = {
            "number": i,
            "clip": f"{clip.path} from frame {start}",
            "film": split.source_video(clip.path),
        }
        row |= {"fps": told["fps"], "boxes": boxes, "frames": clips if i < SHOWN else {}}
        rows.append({**row, "figures": {}, "features": {}})
        for column, frames in clips.items():
            beside = None if column == "truth" else true
            told_of = measure(
                frames, beside, told["fps"], boxes, found, COMPARED_AT.get(args.protocol)
            )
            rows[-1]["figures"][column], rows[-1]["features"][column] = told_of
    return rows


def counted(function, total, what, process):
    """`function`, with a bar that counts its calls."""
    from tqdm import tqdm

    bar = tqdm(total=total, desc=what, disable=not process.is_main_process)

    def call(*inputs, **named):
        answer = function(*inputs, **named)
        bar.update()
        if bar.n == total:
            bar.close()
        return answer

    return call


def held_out_of(data, args, pipe, process):
    """The HeldOut of these clips, under the loss that the run of --tuned trained."""
    loss = train_svd_tracklet.tracklet_loss if args.box_control else train_svd.svd_loss
    share = len(range(process.process_index, min(args.num_clips, len(data)), process.num_processes))
    encode = counted(train_svd.encode_ahead, share, "held-out clips", process)
    return validation_loss.ValidationLoss(data, args, loss, encode, pipe, process)


def losses_of(name, model, held, process):
    """HeldOut's losses of a model; boxes go only to one that takes them."""

    def call(*inputs, **boxes):
        return model(*inputs, **(boxes if hasattr(model, "adapter") else {}))

    return held.losses(counted(call, len(held.own) * len(held.sigmas), f"{name}: loss", process))


def compare(args):
    """Measure base and --tuned on the held-out clips, and write what came of it."""
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import gather_object

    process = Accelerator(
        mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))]
    )
    if process.num_processes > 1:
        distributed.fail_together(process.process_index)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    torch.backends.cudnn.allow_tf32 = args.allow_tf32 or args.mixed_precision != "no"
    if process.is_main_process:
        print(
            f"precision {args.mixed_precision}, {process.device}, {process.num_processes} process(es)",
            flush=True,
        )
    data, held, losses, rows = None, None, {}, {}
    for name in ["tuned", "base"][not args.tuned :]:  # what may be wrong with --tuned shows at once
        pipe, model = load(args, name == "tuned", process.device)
        args.num_frames = args.num_frames or pipe.unet.config.num_frames
        if data is None:
            data, (found, left_out) = clips_of(args, process), networks(args.num_frames, process)
        with run_record.output_errors(args.output_dir):
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        held = held or held_out_of(data, args, pipe, process)
        held.pipe = pipe
        losses[name] = losses_of(name, model, held, process)
        for row in gather_object(render(name, pipe, model, data, args, found, process)):
            kept = rows.setdefault(row["number"], row)
            for part in ("figures", "features", "frames"):
                kept[part] |= row[part]
        held.pipe = pipe = model = None  # one UNet at a time
    if process.is_main_process:
        whole = [rows[i] for i in sorted(rows) if losses.keys() <= rows[i]["figures"].keys()]
        write(args, held, losses, whole, left_out)
    process.end_training()


# -------------------------------------------------------------------------------------------------------------------- show


def write(args, held, losses, rows, left_out):
    """evaluation.json, figures.png, comparison.gif and .png; and the table, on standard output."""
    if not rows:
        raise ValueError(
            f"--validation_folder {args.validation_folder or args.base_folder}: no clip can be read"
        )
    out, table = Path(args.output_dir), metrics.table_of(rows)
    row = (
        validation_loss.compare_losses(held.sigmas, losses["base"], losses["tuned"], held.films)
        if "tuned" in losses
        else None
    )
    preset, used = PROTOCOLS.get(args.protocol, {}), {**vars(args), "num_clips": len(rows)}
    otherwise = {name: used[name] for name in preset if used[name] != preset[name]}
    told = {
        "base": args.pretrained_model_name_or_path, "tuned": args.tuned, "ema": args.ema, "protocol": args.protocol,
        "otherwise_than_protocol": otherwise, "step": step_of(args.tuned),
        "clips": len(rows), "films": len({r["film"] for r in rows}), "num_frames": args.num_frames, "size": [args.width, args.height], "held_out": row,
        "base_loss": losses["base"].mean(0).tolist(), "sigma": held.sigmas, "metrics": table, "left_out": left_out,
        "by_clip": [{"clip": r["clip"], **r["figures"]} for r in rows],
        "args": {k: v for k, v in vars(args).items() if k != "hub_token"},
    }  # fmt: skip
    count = validation_loss.count_in_words(told["clips"], told["films"])
    what = f"{count} held out, {args.num_frames} frames of {args.width}x{args.height}"
    run_record.write_atomically(out / "evaluation.json", json.dumps(told, indent=1, default=str))
    model = Path(args.tuned or args.pretrained_model_name_or_path).name
    with run_record.output_errors(out):
        metrics.draw(out / "figures.png", row, rows, f"{model}: {what}")
        if some := [shown(r) for r in rows if r["frames"]]:
            video_writer.write_comparison(out / "comparison", some, rows[0]["fps"])
    if args.tuned and out.name == "evaluation" and (out.parent / "report.html").is_file():
        report.write_report(out.parent)
    but = (
        f", but {', '.join(f'{name} {value}' for name, value in otherwise.items())}"
        if otherwise
        else ""
    )
    print(f"\nprotocol {args.protocol}{but}" if args.protocol else "")
    print(f"{what}\n{metrics.in_words(table)}")
    print(
        f"\nheld-out loss {validation_loss.format_comparison(row, 'the base') if row else format(losses['base'].mean(), '.4g')}"
    )
    print(
        "\n".join([*left_out.values(), f"{out}/evaluation.json, figures.png, comparison.gif .png"])
    )


def shown(row):
    """{title: frames} of a clip, for people."""
    from PIL import Image

    columns = [column for column in ("base", "tuned", "truth") if column in row["frames"]]
    clips = {
        column: [Image.fromarray(frame) for frame in row["frames"][column]] for column in columns
    }
    return {
        name: tracklets.render_boxes(clip, row["boxes"]) if row["boxes"] else clip
        for name, clip in clips.items()
    }


# ------------------------------------------------------------------------------------------------------------------ parity


SEED = 0
SIGMAS = (0.05, 1.0, 10.0, 200.0)
ALLOWED = {  # of a tensor's largest value, in the order of the way from a clip to the loss; the VAE rounds by memory layout
    "image_embeds": 1e-3, "image_latents": 5e-3, "added_time_ids": 1e-6, "dropped image_embeds": 0.0, "dropped image_latents": 0.0,
    "c_noise": 1e-6, "noisy_latents": 1e-3, "F_x": 5e-3, "dropped F_x": 5e-3, "denoised": 5e-3, "loss": 1e-3,
}  # fmt: skip


class Drawn:
    """Draws for svd_loss of which the pipeline can be given the same: one for each shape."""

    def __init__(self, device):
        self.device = device

    def normal(self, *shape):
        import torch

        return torch.randn((1, *shape), generator=torch.Generator().manual_seed(SEED)).to(
            self.device
        )

    def uniform(self):
        import torch

        return torch.full((1,), 0.5, device=self.device)


def by_pipeline(pipe, batch, strength, sigma):
    """{name: tensor} of a step of the stock pipeline and its scheduler from noise level sigma to 0, under guidance."""
    import torch
    from PIL import Image

    pixel_values, noise, given, scheduler = (
        batch["pixel_values"],
        Drawn(pipe.device),
        [],
        pipe.scheduler,
    )
    with torch.no_grad():
        posterior = pipe.vae.encode(pixel_values[0]).latent_dist
    z = noise.normal(*posterior.mean.shape)[0]
    latents = (posterior.mean + posterior.std * z) * pipe.vae.config.scaling_factor
    noisy = latents + sigma * z
    scheduler.set_timesteps(sigmas=[sigma, 0.0])
    handle = pipe.unet.register_forward_hook(lambda _, *call: given.append(call), with_kwargs=True)
    frame = (
        ((pixel_values[0, 0].permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
    )
    try:
        denoised = pipe(
            Image.fromarray(frame), *pixel_values.shape[-2:], len(latents), sigmas=[sigma, 0.0], min_guidance_scale=2.0,
            max_guidance_scale=2.0, fps=batch["fps"].item(), motion_bucket_id=batch["motion_bucket_id"].item(),
            noise_aug_strength=strength, generator=torch.Generator().manual_seed(SEED), output_type="latent",
            latents=noisy[None] / scheduler.init_noise_sigma,
        ).frames  # fmt: skip
    finally:
        handle.remove()
    (sample, c_noise), kwargs, (F_x, *_) = given[0]
    embeds, ids = kwargs["encoder_hidden_states"], kwargs["added_time_ids"]
    scheduler.set_timesteps(sigmas=[sigma, 0.0])
    alone = scheduler.step(F_x[1:], scheduler.timesteps[0], noisy[None]).pred_original_sample
    return {
        "image_embeds": embeds[1], "image_latents": sample[1, :, 4:], "added_time_ids": ids[1], "dropped image_embeds": embeds[0],
        "dropped image_latents": sample[0, :, 4:], "c_noise": c_noise, "noisy_latents": sample[1, :, :4], "F_x": F_x[1],
        "dropped F_x": F_x[0], "denoised": denoised[0], "loss": train_svd.loss_weight(sigma) * ((alone - latents) ** 2).mean(),
    }  # fmt: skip


def by_trainer(pipe, batch, sigma, args):
    """The same tensors as train_svd.svd_loss hands them to its UNet, and what follows from that UNet's answer."""
    import torch

    given, batch = [], {**batch, "noise": Drawn(pipe.device)}

    def spy(*inputs):
        answer = pipe.unet(*inputs)
        given.append((*inputs, answer.sample))
        return answer

    def loss_of(dropped):
        how = {
            "P_mean": float(np.log(sigma)),
            "P_std": 0.0,
            "conditioning_dropout_prob": (0.0, 0.0, dropped),
        }
        with torch.no_grad():
            return train_svd.svd_loss(spy, pipe, batch, argparse.Namespace(**{**vars(args), **how}))

    loss, _ = loss_of(0.0), loss_of(1.0)
    (sample, c_noise, embeds, ids, F_x), (none, _, no_embeds, _, F_none) = given
    c_skip, c_out, c_in, _ = train_svd.scalings(torch.tensor(sigma))
    guided = F_none + 2.0 * (F_x - F_none)
    return {
        "image_embeds": embeds[0], "image_latents": sample[0, :, 4:], "added_time_ids": ids[0], "dropped image_embeds": no_embeds[0],
        "dropped image_latents": none[0, :, 4:], "c_noise": c_noise, "noisy_latents": sample[0, :, :4], "F_x": F_x[0],
        "dropped F_x": F_none[0], "denoised": (c_skip / c_in * sample[:, :, :4] + c_out * guided)[0], "loss": loss,
    }  # fmt: skip


def drawn_batch(width, height, num_frames, device):
    """A batch of one clip of moving shapes."""
    import torch

    frames = np.stack(
        [images.resize_frame(frame, width, height) for frame in synthetic_clips.make_clip(SEED).frames]
    )
    frames = torch.from_numpy(frames[np.arange(num_frames) % len(frames)]).permute(0, 3, 1, 2)[None]
    told = {"fps": torch.tensor([6.0]), "motion_bucket_id": torch.tensor([180.0]), "index": [0]}
    return distributed.batch_to_device({**told, "pixel_values": frames}, device)


def parity(args):
    """Whether training tells the UNet what inference tells it, and makes of its answer what inference does: tensor by tensor, on one
    drawn clip, in float32, at some noise levels. Returns the name of the first tensor that differs, or None."""
    import diffusers
    import torch
    from tqdm import tqdm

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = args.pretrained_model_name_or_path
    pipe = loading.load_svd(path, torch.float32, args.revision, args.pretrain_unet).to(device)
    pipe.set_progress_bar_config(disable=True)
    batch = drawn_batch(
        args.width, args.height, args.num_frames or pipe.unet.config.num_frames, device
    )
    *_, ids = train_svd.condition(
        pipe, batch["pixel_values"][:, 0], batch["fps"], batch["motion_bucket_id"], Drawn(device)
    )
    strength = ids[0, 2].item()  # the pipeline is told that of the trainer
    stock = [by_pipeline(pipe, batch, strength, sigma) for sigma in tqdm(SIGMAS, desc="pipeline")]
    unet_optimizations.speed_up(pipe.unet)  # as every trainer does
    own = [by_trainer(pipe, batch, sigma, args) for sigma in tqdm(SIGMAS, desc="trainer")]
    print(f"{path}, diffusers {diffusers.__version__}, torch {torch.__version__}, {device}\n")
    print(f"{'tensor':24}{'shape':16}{'largest value':>14}{'difference':>14}{'allowed':>12}")
    first = None
    for name, allowed in ALLOWED.items():
        largest = max(s[name].abs().max().item() for s in stock)
        off = max(
            (s[name] - o[name].reshape(s[name].shape)).abs().max().item()
            for s, o in zip(stock, own)
        )
        passed = off <= allowed * largest  # nan does not
        first = first or (None if passed else name)
        shape, answer = (
            "x".join(map(str, stock[0][name].shape)) or "1",
            "PASS" if passed else "FAIL",
        )
        print(f"{name:24}{shape:16}{largest:14.5g}{off:14.3g}{allowed * largest:12.3g}  {answer}")
    print(
        f"\nFAIL: {first} is the first that differs; what comes after it may follow from it"
        if first
        else "\nPASS"
    )
    return first


# --------------------------------------------------------------------------------------------------------------------- CLI


def build_parser():
    """What is evaluated, on what. Flags that are a trainer's have no default here: that of the run holds, or of train_svd.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--tuned", metavar="FOLDER", help="a trainer's --output_dir, a checkpoint in it, or a LoRA file; without it the base alone is measured")
    parser.add_argument("--ema", action="store_true", help="of a checkpoint the moving averages")
    parser.add_argument("--parity", action="store_true", help="compare what the trainer does with the stock pipeline and scheduler on one clip, tensor by tensor, and nothing else; ends with 1 where they differ")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="as published; ctrl-v (arXiv 2406.05630): 200 clips of 25 frames of 512x320, compared at 410x256, frame 0 too. Flags given here still win, and the result says so")
    parser.add_argument("--num_clips", type=int, help="clips that are rendered and measured; default: the run's --validation_clips, or 16")
    parser.add_argument("--output_dir", help="default: evaluation/ in --tuned, where report.html finds it, of a checkpoint evaluation/checkpoint-1000 beside it, or outputs/evaluation")
    g = parser.add_argument_group("as in training; default: as the run of --tuned was told, or else train_svd.py's")
    g.add_argument("--pretrained_model_name_or_path", metavar="PATH", help="the base")
    g.add_argument("--revision", help="Hub revision of it")
    g.add_argument("--validation_folder", nargs="+", metavar="FOLDER", help="clips that nothing was trained on")
    g.add_argument("--tracklets", help="annotation file, or folder of them: were boxes obeyed? Of box control by default those in the clips' folders")
    g.add_argument("--width", type=int, help="pixels, a multiple of 8")
    g.add_argument("--height", type=int, help="pixels, a multiple of 8")
    g.add_argument("--num_frames", type=int, help="of each clip, 2 or more")
    g.add_argument("--fps", type=flag_types.number_or_word("native"), help="frames a second at which clips are sampled, and which the model is told")
    g.add_argument("--source_fps", type=float, help="frames a second of frame folders without clip.json")
    g.add_argument("--motion_bucket_id", type=flag_types.number_or_word("auto"), help="auto: by how much moves in each clip; or a number, 1 to 255")
    g.add_argument("--resize_mode", choices=["crop", "stretch"], help="cover and crop the centre, or ignore the aspect ratio")
    g.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="of all models; default: the run's where this machine has it")
    g.add_argument("--num_inference_steps", type=int, help="sampling steps")
    g.add_argument("--noise_aug_strength", type=float, help="noise on the first frame")
    g.add_argument("--decode_chunk_size", type=int, help="frames decoded at once; lower it when out of memory")
    g.add_argument("--vae_encode_chunk", type=int, help="frames encoded at once")
    g.add_argument("--validation_seed", type=int, help="of the noise of loss and clips, the same for both models")
    # fmt: on
    return parser


def in_own_words(error, flags):
    """What an error says, under the flag of this script that gave the path: others call it otherwise."""
    text = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
    flag, _, rest = text.partition(" ")
    own = {"--tuned": [flags.tuned], "--validation_folder": flags.validation_folder or []}
    found = [
        name for name, paths in own.items() if any(path and rest.startswith(path) for path in paths)
    ]
    return f"{found[0]} {rest}" if found and flag[:2] == "--" and flag not in own else text


if __name__ == "__main__":
    parser = build_parser()
    flags = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        args = settle(flags)
        sys.exit(bool(parity(args)) if args.parity else compare(args))
    except (ValueError, OSError) as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise  # the other processes then end, too
        parser.exit(2, f"{in_own_words(error, flags)}\n")
