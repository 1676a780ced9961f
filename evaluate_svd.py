"""Did it learn? A fine-tuned SVD beside its base on clips that neither was trained on; and does training do what inference does?

    python evaluate_svd.py --tuned outputs/lora                                  # as that run was told: its held-out clips, its size
    python evaluate_svd.py --tuned outputs/svd/checkpoint-1000 --ema --validation_folder data/held_out
    python evaluate_svd.py --tuned outputs/tracklet/stage3 --protocol ctrl-v --validation_folder data/kitti_test
    python evaluate_svd.py --parity --pretrained_model_name_or_path /path/to/weight --width 512 --height 320

--tuned takes what any trainer wrote: a full SVD, a LoRA, box control, a checkpoint of these. Several processes (accelerate launch)
share the clips. Next: svd_xtend/held_out.py, svd_xtend/metrics.py.
"""

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path

import numpy as np

import train_svd
from infer_svd import load_checkpoint
from svd_xtend import checkpoints, fast_unet, held_out, metrics, runs, shapes, video
from svd_xtend.lora import FILE_NAME, load_lora

logger = logging.getLogger("svd_xtend")

METRICS = {  # title; where it should go: higher, lower, or to what the true clips have
    "psnr": ("PSNR, dB", "higher"),
    "ssim": ("SSIM", "higher"),
    "lpips": ("LPIPS", "lower"),
    "first_frame_psnr": ("PSNR of frame 0, dB", "higher"),
    "motion": ("motion, picture lengths a second", "truth"),
    "flicker": ("flicker of what stands still, of 255", "truth"),
    "warp_error": ("warp error, of 255", "truth"),
    "box_iou": ("boxes: mean IoU", "higher"),
    "box_success": ("boxes: IoU of at least 0.5", "higher"),
    "fvd": ("FVD", "lower"),
}
# Ctrl-V (arXiv 2406.05630): 25 frames of 512x320, 30 sampling steps; frame 0 counts, and pictures are compared at 410x256
PROTOCOLS = {"ctrl-v": dict(num_clips=200, num_frames=25, width=512, height=320, num_inference_steps=30)}
COMPARED_AT = {"ctrl-v": (410, 256)}
SHOWN = 4  # clips in the comparison
BASE, TUNED, TRUTH = "#8a8f98", "#5584e6", "#e2702c"


# --------------------------------------------------------------------------------------------------------- what is compared


def run_of(tuned):
    """What the run that wrote `tuned`, an --output_dir or a checkpoint in it, was told; {} where that is not known."""
    for folder in (Path(tuned), Path(tuned).absolute().parent):
        if (folder / "args.json").is_file():
            return json.loads((folder / "args.json").read_text())
    return {}


def settle(flags):
    """All flags of a trainer: train_svd.py's defaults, over them what the run of --tuned was told, the protocol, and `flags`."""
    run = run_of(flags.tuned) if flags.tuned else {}
    args = vars(train_svd.build_parser().parse_args([]))
    args |= {name: value for name, value in run.items() if name not in ("output_dir", "validation_image")}
    args["num_clips"] = args["validation_clips"]
    args |= PROTOCOLS.get(flags.protocol, {})
    args |= {name: value for name, value in vars(flags).items() if value is not None or name not in args}
    for name in ("width", "height"):
        if args[name] % 8 or args[name] <= 0:
            raise ValueError(f"--{name} {args[name]}: must be a multiple of 8")
    if args["P_mean"] is None:
        args["P_mean"], args["P_std"] = train_svd.default_P(args["width"], args["height"])
    if flags.validation_folder:
        args["validation_ratio"] = 0.0
    if args["validation_folder"] and not (run and all(Path(folder).is_dir() for folder in args["base_folder"])):
        args["base_folder"] = args["validation_folder"]  # how much moves is then ranked among the held-out clips alone
    args["validation_clips"], args["validation_steps"] = args["num_clips"], 1
    args |= dict(latent_cache=None, folder_weights=None, image_ratio=0.0, per_gpu_batch_size=1)
    args["output_dir"] = flags.output_dir or str(
        Path(flags.tuned, "evaluation") if flags.tuned else "outputs/evaluation"
    )
    args["mixed_precision"] = precision(flags.mixed_precision, run.get("mixed_precision"))
    return argparse.Namespace(**args)


def precision(asked, trained):
    """What to compute in: as asked, or as the run did where this machine can, or the best that it has."""
    try:
        return runs.check_precision(asked or trained or runs.best_precision())
    except ValueError:
        if asked:
            raise
        return runs.best_precision()


def has_boxes(args):
    """Whether --tuned is box control."""
    return bool(args.tuned) and (Path(args.tuned, "tracklet_weights.safetensors").is_file() or hasattr(args, "stage"))


def tune(unet, args):
    """Put what --tuned holds into `unet`; returns the model, which where it is box control takes boxes."""
    folder, lora = Path(args.tuned), Path(args.tuned, FILE_NAME)
    if (folder / checkpoints.TRAINED).is_file() and has_boxes(args):
        from svd_xtend.boxes import ControlledUNet, new_boxes

        if args.lora:
            load_lora(unet, args.lora)
        model = ControlledUNet(unet, new_boxes(unet, args.max_objects, enhancer=args.enhancer))
        checkpoints.load_trained(model, folder / (checkpoints.EMA if args.ema else checkpoints.TRAINED))
        return model
    if (folder / checkpoints.TRAINED).is_file():
        load_checkpoint(unet, folder, args.ema, flag="--tuned")
    elif args.ema:
        raise ValueError(
            f"--ema: averages are in checkpoints, and {folder} is none; pass --tuned {folder}/checkpoint-..."
        )
    elif has_boxes(args):
        from svd_xtend.boxes import ControlledUNet, load_boxes

        if getattr(args, "lora", None):
            load_lora(unet, args.lora)
        return ControlledUNet(unet, load_boxes(unet, folder))
    elif folder.suffix == ".safetensors" or lora.is_file():
        load_lora(unet, folder)
    elif (folder / "unet").is_dir():
        whole = checkpoints.load_any_variant(type(unet), folder, "--tuned", unet.dtype, subfolder="unet")
        unet.load_state_dict(whole.state_dict())
    else:
        raise ValueError(
            f"--tuned {folder}: holds nothing that a trainer writes. Expected unet/, {FILE_NAME}, tracklet_weights.safetensors, or a "
            f"checkpoint with {checkpoints.TRAINED}"
        )
    return unet


def load(args, tuned, device):
    """(pipeline, model): the base, or with what --tuned holds; all at rest in the precision that a run computes in."""
    import torch

    pipe = checkpoints.load_svd(args.pretrained_model_name_or_path, torch.float32, args.revision, args.pretrain_unet)
    model = tune(pipe.unet, args) if tuned else pipe.unet
    fast_unet.speed_up(pipe.unet)
    model.requires_grad_(False)
    checkpoints.place(pipe, model, args.mixed_precision, device)
    return pipe, model


def dataset(args):
    """The trainer's DummyDataset, or where boxes matter its TrackletDataset, with boxes as they are."""
    if not has_boxes(args) and not args.tracklets:
        return train_svd.DummyDataset
    from train_svd_tracklet import TrackletDataset, script_parser

    plain = {"draw_boxes": "no", "soft_boxes": 0.0, "box_dropout": 0.0}
    return partial(
        TrackletDataset, argparse.Namespace(**{**vars(script_parser().parse_args([])), **vars(args), **plain})
    )


def clips_of(args, process):
    """The held-out clips, each in the motion bucket that it has among those of the training."""
    if not args.validation_folder and not args.validation_ratio:
        raise ValueError("--validation_folder: pass a folder of clips that nothing was trained on")
    for folder in args.validation_folder or []:
        if not Path(folder).is_dir():
            raise ValueError(f"--validation_folder {folder}: no such folder")
    return train_svd.load_data(args, dataset(args), process)[1]


def windows(data, count):
    """[(clip, number of its first frame)] of up to `count` windows that do not overlap: of each clip the first, or where there are
    fewer clips all, spread evenly."""
    found = [(n, 0) for n in range(len(data))]
    if len(found) < count:
        found = []
        for n in range(len(data)):
            clip, start = data.clips[n], 0
            while start < clip.starts(data.sample_frames, clip.told["fps"]):
                found.append((n, start))
                start = int(clip.numbers(start, data.sample_frames, clip.told["fps"])[-1]) + 1
    chosen = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int))
    return [(data.clips[found[i][0]], found[i][1]) for i in chosen]


# ----------------------------------------------------------------------------------------------------------------- measure


def boxes_of(data, clip, numbers, args):
    """Tracklets of these frames as a sample shows them, or None where the data has none."""
    if not hasattr(data, "boxes_of"):
        return None
    from svd_xtend import tracklets

    own, size = data.boxes_of(clip)
    return tracklets.fit(own, size, *clip.size, args.resize_mode, numbers, args.max_objects, args.min_box_size)


def networks():
    """({name: metric by a published network}, {name: how to get it}), those at hand and those that are not."""
    found, left_out = {}, {}
    for name, find in (("lpips", metrics.lpips), ("fvd", metrics.i3d)):
        try:
            found[name] = find()
        except metrics.Missing as missing:
            left_out[name] = str(missing)
            logger.warning("%s", missing)
    return found, left_out


def measure(made, true, fps, boxes, found, compared_at=None):
    """{name: figure} of a clip (f, h, w, 3) uint8 beside the true one; of FVD the features. compared_at: (width, height) of a protocol
    at which pictures are compared, frame 0 too, which else, being given, does not count."""
    told = metrics.order_figures(made, fps) | (metrics.control_figures(made, boxes) if boxes else {})
    if compared_at:
        made, true = (np.stack([video.resize(f, *compared_at, "stretch") for f in frames]) for frames in (made, true))
    by_frame = metrics.frame_figures(made, true)
    if "lpips" in found:
        by_frame["lpips"] = found["lpips"](made, true)
    told |= {name: float(values[0 if compared_at else 1 :].mean()) for name, values in by_frame.items()}
    told |= {"first_frame_psnr": float(by_frame["psnr"][0]), "psnr_by_frame": by_frame["psnr"].tolist()}
    return told | ({"fvd": found["fvd"](made).tolist()} if "fvd" in found else {})


def render(pipe, model, data, places, args, found, first, bar):
    """[(number, {row: figures}, {row: frames} of those shown, boxes)] of this process's share of `places`. first: measure the true clips,
    and ones that stand still, too. Clips that cannot be read are left out."""
    from PIL import Image

    rows, compared_at, name = [], COMPARED_AT.get(args.protocol), "base" if first else "tuned"
    adapter = getattr(model, "adapter", None)
    for i, (clip, start) in places:
        numbers, told = clip.numbers(start, args.num_frames, clip.told["fps"]), clip.told
        try:
            true, boxes = clip.read(numbers, *clip.size, args.resize_mode), boxes_of(data, clip, numbers, args)
        except ValueError as error:
            logger.warning("%s; it is left out", error)
            continue
        if adapter:
            adapter.set(boxes)
        made = train_svd.sample(pipe, Image.fromarray(true[0]), told, args.validation_seed + i, args)
        clips = {name: np.stack([np.asarray(frame) for frame in made])}
        if first:
            clips |= {"truth": true, "still": np.repeat(true[:1], len(true), 0)}
        figures = {row: measure(frames, true, told["fps"], boxes, found, compared_at) for row, frames in clips.items()}
        rows.append((i, f"{clip.path} from frame {start}", figures, clips if i < SHOWN else {}, boxes))
        bar.update()
    return rows


def compare(args):
    """Measure base and --tuned on the held-out clips, and write what came of it."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from tqdm import tqdm

    process = PartialState()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    (found, left_out), data, losses, rows = networks(), None, {}, {}
    for tuned in [False, True][: 1 + bool(args.tuned)]:
        pipe, model = load(args, tuned, process.device)
        args.num_frames = args.num_frames or pipe.unet.config.num_frames
        if data is None:
            data = clips_of(args, process)
            places = list(enumerate(windows(data, args.num_clips)))[process.process_index :: process.num_processes]
            held = held_out.HeldOut(data, args, loss_of(args), train_svd.encode_ahead, pipe, process)
            bar = tqdm(total=len(places) * (1 + bool(args.tuned)), desc="clips", disable=not process.is_main_process)
        held.pipe = pipe
        losses["tuned" if tuned else "base"] = held.losses(model if tuned else partial(without_boxes, model))
        for i, clip, figures, frames, boxes in gather_object(
            render(pipe, model, data, places, args, found, not tuned, bar)
        ):
            row = rows.setdefault(i, {"clip": clip, "figures": {}, "frames": {}, "boxes": boxes})
            row["figures"] |= figures
            row["frames"] |= frames
        held.pipe = pipe = model = None  # one UNet at a time
    bar.close()
    if process.is_main_process:
        write(args, held.sigmas, losses, [rows[i] for i in sorted(rows)], left_out)


def without_boxes(unet, *inputs, **boxes):
    return unet(*inputs)


def loss_of(args):
    """The loss that the run of --tuned trained."""
    if not has_boxes(args):
        return train_svd.svd_loss
    from train_svd_tracklet import tracklet_loss

    return tracklet_loss


# -------------------------------------------------------------------------------------------------------------------- show


def table_of(rows):
    """[{name, label, better, still, base, tuned, truth, difference}] of each metric that was measured; difference: mean and interval over
    the clips of tuned - base, of a metric that is better nearer to the truth of how far it is from there."""
    table = []
    for name, (label, better) in METRICS.items():
        if not any(name in row["figures"]["base"] for row in rows):
            continue
        told = {"name": name, "label": label, "better": better, "difference": None}
        columns = {c: [r["figures"][c].get(name) for r in rows] for c in rows[0]["figures"]}
        for column, values in columns.items():
            values = [value for value in values if value is not None]
            if name == "fvd":
                told[column] = metrics.frechet(
                    np.array(values), np.array([r["figures"]["truth"]["fvd"] for r in rows])
                )
            else:
                told[column] = float(np.mean(values)) if values else None
        if better != "truth" and not name.startswith("box"):
            told["truth"] = None  # beside itself
        if "tuned" in columns and name != "fvd":
            pairs = [pair for pair in zip(columns["base"], columns["tuned"], columns["truth"]) if None not in pair]
            away = [abs(t - true) - abs(b - true) if better == "truth" else t - b for b, t, true in pairs]
            told["difference"] = held_out.interval(away) if away else None
        table.append({**{column: None for column in ("still", "base", "tuned", "truth")}, **told})
    return table


def in_words(table):
    """The table for a terminal."""
    lines = [("", "still", "base", "tuned", "truth", "tuned - base (95 %)")]
    for row in table:
        cells = ["" if row[c] is None else f"{row[c]:.4g}" for c in ("still", "base", "tuned", "truth")]
        mean, low, high = row["difference"] or (None, None, None)
        ends = f" ({low:+.3g} to {high:+.3g})" if low is not None else ""
        nearer = " of the distance" if row["better"] == "truth" and mean is not None else ""
        lines.append((row["label"], *cells, "" if mean is None else f"{mean:+.3g}{ends}{nearer}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def write(args, sigmas, losses, rows, left_out):
    """evaluation.json, figures.png, comparison.gif and .png; and the table, on standard output."""
    if not rows:
        raise ValueError(
            f"--validation_folder {' '.join(args.validation_folder or args.base_folder)}: no clip can be read"
        )
    out, table = Path(args.output_dir), table_of(rows)
    row = held_out.compare(sigmas, losses["base"], losses["tuned"]) if "tuned" in losses else None
    preset = PROTOCOLS.get(args.protocol, {})
    told = {
        "base": args.pretrained_model_name_or_path, "tuned": args.tuned, "ema": args.ema, "protocol": args.protocol,
        "otherwise_than_protocol": {k: getattr(args, k) for k in preset if getattr(args, k) != preset[k]},
        "clips": len(rows), "num_frames": args.num_frames, "size": [args.width, args.height], "held_out": row,
        "base_loss": losses["base"].mean(0).tolist(), "sigma": sigmas, "metrics": table, "left_out": left_out,
        "by_clip": [{"clip": r["clip"], **{c: {k: v for k, v in f.items() if k != "fvd"} for c, f in r["figures"].items()}} for r in rows],
        "args": {k: v for k, v in vars(args).items() if k != "hub_token"},
    }  # fmt: skip
    with runs.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "evaluation.json").write_text(json.dumps(told, indent=1, default=str))
        draw(out / "figures.png", row, rows)
        video.write_comparison(out / "comparison", [shown(r) for r in rows if r["frames"]], 7)
    print(
        f"\n{len(rows)} clips that nothing was trained on, {args.num_frames} frames of {args.width}x{args.height}\n{in_words(table)}"
    )
    if row:
        print(f"\nheld-out loss {held_out.told(row)}")
    for text in left_out.values():
        print(text)
    print(f"{out}/evaluation.json, figures.png, comparison.gif .png")


def shown(row):
    """{title: frames} of a clip, for people."""
    from PIL import Image

    from svd_xtend.tracklets import render

    clips = {
        name: [Image.fromarray(frame) for frame in row["frames"][name]]
        for name in ("base", "tuned", "truth")
        if name in row["frames"]
    }
    return {name: render(clip, row["boxes"]) if row["boxes"] else clip for name, clip in clips.items()}


def draw(file, row, rows):
    """A picture of it: the loss at each noise level, how good each frame is, how much moves."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.6) if row else (8, 3.6), layout="constrained")
    axes, colors = list(figure.subplots(1, 3 if row else 2)), {"base": BASE, "tuned": TUNED, "still": TRUTH}
    if row:
        mean, low, high = (np.array([d[k] if d[k] is not None else d[0] for d in row["by_sigma"]]) for k in range(3))
        ax = axes.pop(0)
        ax.errorbar(row["sigma"], mean, (mean - low, high - mean), color=TUNED, marker="o", capsize=4, lw=1.5)
        ax.axhline(0, color=BASE, lw=1)
        ax.set(xscale="log", xlabel="sigma", ylabel="held-out loss, tuned - base", title="below 0: it learned")
    for name in rows[0]["figures"].keys() & colors.keys():
        curves = np.array([r["figures"][name]["psnr_by_frame"] for r in rows])[:, 1:]
        axes[0].plot(range(1, curves.shape[1] + 1), curves.mean(0), color=colors[name], label=name, lw=2)
    axes[0].set(xlabel="frame", ylabel="PSNR, dB", title="like the true frames")
    axes[0].legend()
    for name in ("base", "tuned"):
        points = [
            (r["figures"]["truth"]["motion"], r["figures"][name]["motion"]) for r in rows if name in r["figures"]
        ]
        if points:
            axes[1].scatter(*zip(*points), color=colors[name], label=name, s=18)
    most = max(max(f["motion"] for f in r["figures"].values()) for r in rows) or 1
    axes[1].plot([0, most], [0, most], color=TRUTH, lw=1)
    axes[1].set(xlabel="of the true clip", ylabel="of the model's", title="motion, picture lengths a second")
    axes[1].legend()
    figure.savefig(file, dpi=110)


# ------------------------------------------------------------------------------------------------------------------ parity


SEED = 0
SIGMAS = (0.05, 1.0, 10.0, 200.0)
ALLOWED = {  # of a tensor's largest value, in the order of the way from a clip to the loss
    "image_embeds": 1e-4, "image_latents": 1e-4, "added_time_ids": 1e-6, "dropped image_embeds": 0.0, "dropped image_latents": 0.0,
    "c_noise": 1e-6, "noisy_latents": 1e-4, "F_x": 1e-3, "dropped F_x": 1e-3, "denoised": 1e-3, "loss": 1e-3,
}  # fmt: skip


class Drawn:
    """Draws for svd_loss of which the pipeline can be given the same: one for each shape."""

    def __init__(self, device):
        self.device = device

    def normal(self, *shape):
        import torch

        return torch.randn((1, *shape), generator=torch.Generator().manual_seed(SEED)).to(self.device)

    def uniform(self):
        import torch

        return torch.full((1,), 0.5, device=self.device)


def by_pipeline(pipe, batch, strength, sigma):
    """{name: tensor} of a step of the stock pipeline and its scheduler from noise level sigma to 0, under guidance."""
    import torch
    from PIL import Image

    pixel_values, noise, given, scheduler = batch["pixel_values"], Drawn(pipe.device), [], pipe.scheduler
    with torch.no_grad():
        posterior = pipe.vae.encode(pixel_values[0]).latent_dist
    z = noise.normal(*posterior.mean.shape)[0]
    latents = (posterior.mean + posterior.std * z) * pipe.vae.config.scaling_factor
    noisy = latents + sigma * z
    scheduler.set_timesteps(sigmas=[sigma, 0.0])
    handle = pipe.unet.register_forward_hook(
        lambda _, args, kwargs, out: given.append((args, kwargs, out[0])), with_kwargs=True
    )
    frame = ((pixel_values[0, 0].permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
    try:
        denoised = pipe(
            Image.fromarray(frame), *pixel_values.shape[-2:], len(latents), sigmas=[sigma, 0.0], min_guidance_scale=2.0,
            max_guidance_scale=2.0, fps=batch["fps"].item(), motion_bucket_id=batch["motion_bucket_id"].item(),
            noise_aug_strength=strength, generator=torch.Generator().manual_seed(SEED), output_type="latent",
            latents=noisy[None] / scheduler.init_noise_sigma,
        ).frames  # fmt: skip
    finally:
        handle.remove()
    ((sample, c_noise), kwargs, F_x) = given[0]
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

    how = {**vars(args), "P_mean": float(np.log(sigma)), "P_std": 0.0}
    with torch.no_grad():
        loss, _ = (
            train_svd.svd_loss(
                spy, pipe, batch, argparse.Namespace(**{**how, "conditioning_dropout_prob": (0.0, 0.0, dropped)})
            )
            for dropped in (0.0, 1.0)
        )
    (sample, c_noise, embeds, ids, F_x), (none, _, no_embeds, _, F_none) = given
    c_skip, c_out, c_in, _ = train_svd.scalings(torch.tensor(sigma))
    guided = F_none + 2.0 * (F_x - F_none)
    return {
        "image_embeds": embeds[0], "image_latents": sample[0, :, 4:], "added_time_ids": ids[0], "dropped image_embeds": no_embeds[0],
        "dropped image_latents": none[0, :, 4:], "c_noise": c_noise, "noisy_latents": sample[0, :, :4], "F_x": F_x[0],
        "dropped F_x": F_none[0], "denoised": (c_skip / c_in * sample[:, :, :4] + c_out * guided)[0], "loss": loss,
    }  # fmt: skip


def parity(args):
    """Whether training tells the UNet what inference tells it, and makes of its answer what inference does: tensor by tensor, on one
    clip, in float32, at some noise levels. Returns the name of the first tensor that differs, or None."""
    import torch
    from torch.utils.data import default_collate
    from tqdm import tqdm

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes.ensure_demo(args.base_folder)
    pipe = checkpoints.load_svd(
        args.pretrained_model_name_or_path, torch.float32, args.revision, args.pretrain_unet
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    args.num_frames = args.num_frames or pipe.unet.config.num_frames
    folders = args.validation_folder or args.base_folder
    data = train_svd.DummyDataset(
        folders, args.width, args.height, args.num_frames, args.fps, args.motion_bucket_id, args.resize_mode
    )
    batch = runs.to_device(default_collate([data[0]]), device)
    told = train_svd.condition(
        pipe, batch["pixel_values"][:, 0], batch["fps"], batch["motion_bucket_id"], Drawn(device)
    )
    strength = told[2][0, 2].item()  # the pipeline is told that of the trainer
    stock = [by_pipeline(pipe, batch, strength, sigma) for sigma in tqdm(SIGMAS, desc="pipeline")]
    fast_unet.speed_up(pipe.unet)  # as every trainer does
    own = [by_trainer(pipe, batch, sigma, args) for sigma in tqdm(SIGMAS, desc="trainer")]
    print(f"{'tensor':24}{'shape':22}{'largest value':>14}{'difference':>14}{'allowed':>12}")
    first = None
    for name, allowed in ALLOWED.items():
        largest = max(s[name].abs().max().item() for s in stock)
        off = max((s[name] - o[name].reshape(s[name].shape)).abs().max().item() for s, o in zip(stock, own))
        passed = off <= allowed * largest  # nan does not
        first = first or (None if passed else name)
        shape = "x".join(map(str, stock[0][name].shape)) or "1"
        print(
            f"{name:24}{shape:22}{largest:14.5g}{off:14.3g}{allowed * largest:12.3g}  {'PASS' if passed else 'FAIL'}"
        )
    print(f"FAIL: {first} is the first that differs; what comes after it follows from it" if first else "PASS")
    return first


# --------------------------------------------------------------------------------------------------------------------- CLI


def build_parser():
    """What is evaluated, on what. Flags that are a trainer's have no default here: that of the run holds, or of train_svd.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--tuned", metavar="FOLDER", help="a trainer's --output_dir, a checkpoint in it, or a LoRA file; without it the base alone is measured")
    parser.add_argument("--ema", action="store_true", help="of a checkpoint the moving averages")
    parser.add_argument("--parity", action="store_true", help="compare what the trainer does with the stock pipeline and scheduler on one clip, tensor by tensor, and nothing else; ends with 1 where they differ")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="as published; ctrl-v (arXiv 2406.05630): 200 clips of 25 frames of 512x320, compared at 410x256, frame 0 too. Flags given here still win, and the result says so")
    parser.add_argument("--num_clips", type=int, help="clips that are rendered and measured; default: the run's --validation_clips, or 16")
    parser.add_argument("--output_dir", help="default: evaluation/ in --tuned, where report.html finds it, or outputs/evaluation")
    g = parser.add_argument_group("as in training; default: as the run of --tuned was told, or else train_svd.py's")
    g.add_argument("--pretrained_model_name_or_path", metavar="PATH", help="the base")
    g.add_argument("--revision")
    g.add_argument("--validation_folder", nargs="+", metavar="FOLDER", help="clips that nothing was trained on")
    g.add_argument("--tracklets", help="annotation file, or folder of them: were boxes obeyed? Of box control by default those in the clips' folders")
    g.add_argument("--width", type=int)
    g.add_argument("--height", type=int)
    g.add_argument("--num_frames", type=int)
    g.add_argument("--fps", type=runs.number_or("native"))
    g.add_argument("--source_fps", type=float)
    g.add_argument("--motion_bucket_id", type=runs.number_or("auto"))
    g.add_argument("--resize_mode", choices=["crop", "stretch"])
    g.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    g.add_argument("--num_inference_steps", type=int)
    g.add_argument("--noise_aug_strength", type=float)
    g.add_argument("--decode_chunk_size", type=int)
    g.add_argument("--vae_encode_chunk", type=int)
    g.add_argument("--validation_seed", type=int)
    # fmt: on
    return parser


if __name__ == "__main__":
    parser = build_parser()
    flags = parser.parse_args()
    if flags.tuned and not Path(flags.tuned).exists():
        parser.error(f"--tuned {flags.tuned}: not there")
    if flags.num_clips is not None and flags.num_clips < 1:
        parser.error(f"--num_clips {flags.num_clips}: must be at least 1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = settle(flags)
    sys.exit(bool(parity(args)) if args.parity else compare(args))
