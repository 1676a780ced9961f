"""The embedded SVD: a real Stable Video Diffusion in miniature, and how it was trained.

    python -m svd_xtend.demo.tiny_svd --output_dir outputs/tiny_svd       # train it again: VAE, then UNet by train_svd.py
    python -m svd_xtend.demo.tiny_svd --evaluate svd_xtend/demo/weights/svd       # the model card's figures
    python -m svd_xtend.demo.tiny_svd --evaluate svd_xtend/demo/weights/svd --tracklet_weights svd_xtend/demo/weights/boxes     # those of its box control

All five components in the layout of stabilityai/stable-video-diffusion-img2vid, 64x48 pixels x 8 frames, trained on
svd_xtend/shapes.py. A killed training resumes when the same command is given again. Next: svd_xtend/demo/weights/svd/README.md.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from svd_xtend.demo.synthetic_clips import (
    DOMAINS,
    FPS,
    HELD_OUT_SEED,
    is_contrasting,
    make_clip,
    measure_clip,
    measure_control,
    psnr,
    write_clips,
)
from svd_xtend.models.precision import fast_bf16

TINY_SVD = Path(__file__).parent / "weights" / "svd"  # the shipped weights
TINY_BOXES = Path(__file__).parent / "weights" / "boxes"  # its box control
WIDTH, HEIGHT, NUM_FRAMES = 64, 48, 8
TRAIN_SEED, VAE_SEED = 1, 0


# --------------------------------------------------------------------------------------------------------------- build


def build_vae():
    """AutoencoderKLTemporalDecoder, 4x downsampling, 4 latent channels, 2.4 M parameters.

    GroupNorm has 32 groups everywhere in diffusers' temporal decoder: 96 channels at full resolution, so that groups of
    three keep an image's brightness. Residual branches start at zero; posterior noise starts at std 0.05, not 1.
    """
    import torch
    from diffusers import AutoencoderKLTemporalDecoder

    torch.manual_seed(VAE_SEED)
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 3,
        block_out_channels=(96, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        sample_size=WIDTH,
        force_upcast=True,
    )
    zero_residual_branches(vae)
    start_as_lowpass(vae)
    return vae


def start_as_lowpass(vae):
    """Set the VAE by hand to `average 4x4 pixels, interpolate them back`, from where training adds the detail.

    Channels 0 to 2 carry R, G, B through both halves. Two things are in their way, before the last convolution of each:
    GroupNorm would remove a picture's brightness, so each group holds (p, K - p/2, -K - p/2): mean 0 and a variance
    that K rules; SiLU is not linear, but silu(z) - silu(-z) = z, so a second group holds -p.
    """
    import torch

    point = torch.zeros(3, 3)
    point[1, 1] = 1
    average = (
        torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]) / 4
    )  # the encoder pads on the right and below
    tent = torch.tensor([1.0, 2, 1]) / 4
    encoder, decoder = vae.encoder, vae.decoder
    with torch.no_grad():
        carry_channels(encoder.conv_in, point)
        for block in encoder.down_blocks[:2]:
            carry_channels(block.downsamplers[0].conv, average)
        carry_channels(encoder.down_blocks[1].resnets[0].conv_shortcut, torch.ones(1, 1))
        into_groups(encoder.down_blocks[2].resnets[0].conv_shortcut)
        out_of_groups(encoder.conv_out)
        torch.nn.init.eye_(vae.quant_conv.weight[:4, :4, 0, 0])
        vae.quant_conv.weight[:4, 4:], vae.quant_conv.weight[4:], vae.quant_conv.bias[:] = 0, 0, 0
        vae.quant_conv.bias[4:] = -6.0  # posterior std 0.05; the default is 1

        carry_channels(decoder.conv_in, point)
        for block in decoder.up_blocks[:2]:
            carry_channels(block.upsamplers[0].conv, torch.outer(tent, tent))
        carry_channels(
            decoder.up_blocks[1].resnets[0].spatial_res_block.conv_shortcut, torch.ones(1, 1)
        )
        into_groups(decoder.up_blocks[2].resnets[0].spatial_res_block.conv_shortcut)
        out_of_groups(decoder.conv_out)
        torch.nn.init.zeros_(decoder.time_conv_out.weight)
        decoder.time_conv_out.weight[range(3), range(3), 1, 0, 0] = 1.0
        torch.nn.init.zeros_(decoder.time_conv_out.bias)


K = 4.0  # the constant in each group: large beside a pixel


def carry_channels(conv, kernel):
    """Pass channels 0 to 2 on, each filtered by one k x k kernel."""
    conv.weight[:3], conv.bias[:] = 0, 0
    conv.weight[range(3), range(3)] = kernel


def into_groups(conv):
    """1x1 convolution: R, G, B, -R, -G, -B, each as a group of three (see start_as_lowpass)."""
    conv.weight[:18], conv.bias[:18] = 0, 0
    for i in range(6):
        sign = 1 if i < 3 else -1
        for place, (scale, constant) in enumerate(((1, 0), (-0.5, K), (-0.5, -K))):
            conv.weight[3 * i + place, i % 3], conv.bias[3 * i + place] = sign * scale, constant


def out_of_groups(conv):
    """3x3 convolution behind GroupNorm and SiLU: the inverse."""
    conv.weight[:3], conv.bias[:3] = 0, 0
    for c in range(3):
        conv.weight[c, 3 * c, 1, 1] = K * (2 / 3) ** 0.5
        conv.weight[c, 9 + 3 * c, 1, 1] = -K * (2 / 3) ** 0.5


def build_unet():
    """UNetSpatioTemporalConditionModel of 3.7 M parameters whose residual branches start at zero."""
    import torch
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(VAE_SEED)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=WIDTH // 4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(64, 96),
        num_attention_heads=(2, 3),
        layers_per_block=1,
        cross_attention_dim=64,
        addition_time_embed_dim=64,
        projection_class_embeddings_input_dim=192,
        num_frames=NUM_FRAMES,
    )
    zero_residual_branches(unet)
    return unet


def zero_residual_branches(model):
    """Start every resnet, transformer and VAE attention as the identity."""
    import torch

    for name, module in model.named_modules():
        if name.endswith((".conv2", ".proj_out")) or (
            ".mid_block.attentions" in name and name.endswith(".to_out.0")
        ):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def build_image_encoder():
    """A random CLIP vision tower: 64-d embedding of a 224x224 picture (the pipeline's fixed size), 0.3 M parameters."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(VAE_SEED)
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=32,
        image_size=224, projection_dim=64,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config)


def build_pipeline(vae, unet):
    """A StableVideoDiffusionPipeline with SVD's own scheduler settings."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessor

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_type="continuous", timestep_spacing="leading", steps_offset=1, use_karras_sigmas=True,
        sigma_min=0.002, sigma_max=700.0,
    )  # fmt: skip
    return StableVideoDiffusionPipeline(
        vae, build_image_encoder(), unet, scheduler, CLIPImageProcessor()
    )


def save_pipeline(pipe, folder):
    """Write `folder` as the hub lays out SVD's fp16 variant."""
    import torch

    pipe.to(dtype=torch.float16).save_pretrained(folder, variant="fp16")
    index = Path(
        folder, "model_index.json"
    )  # without torchvision transformers writes its fallback's name
    index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))


# ----------------------------------------------------------------------------------------------------------- train VAE


def clips_to_pixels(clips):
    """Clips -> pixel_values (b, f, 3, h, w) in [-1, 1]."""
    import torch

    frames = np.stack([clip.frames for clip in clips])
    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def vae_batch(step, steps):
    """Clips of all domains, keyed by the step: 16 single frames for two thirds of the way, then 2 clips x 8 frames."""
    count, f = (16, 1) if step < 2 / 3 * steps else (2, NUM_FRAMES)
    return clips_to_pixels(
        [
            make_clip((VAE_SEED, step, i), DOMAINS[(step + i) % 3], f, WIDTH, HEIGHT)
            for i in range(count)
        ]
    )


def vae_loss(vae, pixel_values):
    """L1 + 4 MSE + L1 of the 8x8-pooled error (brightness, which GroupNorm likes to lose) + 1e-4 KL."""
    import torch.nn.functional as F

    b, f = pixel_values.shape[:2]
    pixels = pixel_values.flatten(0, 1)
    posterior = vae.encode(pixels).latent_dist
    error = (vae.decode(posterior.sample(), num_frames=f).sample - pixels).float()
    return (
        error.abs().mean()
        + 4 * error.square().mean()
        + F.avg_pool2d(error, 8).abs().mean()
        + 1e-4 * posterior.kl().mean() / 192
    )


def train_vae(folder, steps, learning_rate=1e-3):
    """Train the VAE, saving every 100 steps; returns it with scaling_factor set to 1 / std of its latents."""
    import torch
    from tqdm import tqdm

    vae, state_file, log = (
        build_vae(),
        Path(folder, "vae_training.pt"),
        Path(folder, "vae_metrics.jsonl"),
    )
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae.to(device).train()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="VAE")
    for step in bar:
        torch.manual_seed(step)
        rate = (
            learning_rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_bf16()):
            loss = vae_loss(vae, vae_batch(step, steps).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            figures = {
                "step": step + 1,
                "psnr": vae_psnr(vae, "shapes", 16),
                "loss": loss.item(),
                "time": time.time(),
            }
            with log.open("a") as f:
                f.write(json.dumps(figures) + "\n")
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
    pixel_values = torch.cat([vae_batch(steps + i, steps).flatten(0, 1) for i in range(16)])
    with torch.no_grad():
        std = vae.cpu().encode(pixel_values).latent_dist.mode().std().item()
    vae.register_to_config(scaling_factor=round(1 / std, 5))
    return vae.eval()


def reconstruct(vae, clip):
    """A clip's frames (f, h, w, 3) uint8 after the VAE."""
    import torch

    pixels = clips_to_pixels([clip])[0].to(next(vae.parameters()).device)
    with torch.no_grad():
        out = vae.decode(vae.encode(pixels).latent_dist.mode(), num_frames=len(pixels)).sample
    return ((out.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def vae_psnr(vae, domain, count=64):
    """Mean PSNR in dB of reconstructing `count` held-out clips."""
    clips = [make_clip((HELD_OUT_SEED, i), domain, NUM_FRAMES, WIDTH, HEIGHT) for i in range(count)]
    return float(np.mean([psnr(reconstruct(vae, clip), clip.frames) for clip in clips]))


# ---------------------------------------------------------------------------------------------------------- train UNet


def train_unet(folder, vae, steps):
    """Train the UNet by train_svd.py, as any user would, and return the trained pipeline."""
    import torch

    from svd_xtend.models.loading import load_svd

    start, out = Path(folder, "start"), Path(folder, "trained")
    if not (start / "model_index.json").exists():
        save_pipeline(build_pipeline(vae, build_unet()), start)
    write_clips(Path(folder, "clips"), "shapes", 3000, TRAIN_SEED)
    write_clips(Path(folder, "held_out"), "pointed", 4, HELD_OUT_SEED)
    images = [str(Path(folder, "held_out", f"pointed{i:04d}", "000.png")) for i in range(4)]
    flags = dict(
        pretrained_model_name_or_path=start, base_folder=Path(folder, "clips"), width=WIDTH, height=HEIGHT,
        num_frames=NUM_FRAMES, per_gpu_batch_size=8, vae_encode_chunk=8, num_workers=1, learning_rate=1e-3,
        lr_scheduler="cosine", lr_warmup_steps=50, adam_beta2=0.99, P_mean=1.5, P_std=1.6, conditioning_dropout_prob="0 0 0.05",
        max_train_steps=steps, checkpointing_steps=100, checkpoints_total_limit=2, validation_steps=500,
        num_inference_steps=10, seed=TRAIN_SEED, mixed_precision="no", output_dir=out,
    )  # fmt: skip
    command = [sys.executable, str(Path(__file__).parents[2] / "train_svd.py"), "--use_ema"]
    for name, value in flags.items():
        command += [f"--{name}", *str(value).split()]
    subprocess.run([*command, "--validation_image", *images], check=True)
    return load_svd(str(out), torch.float32)


# ------------------------------------------------------------------------------------------------------------ evaluate


def sample_tiny(pipe, clip, seed):
    """Frames (f, h, w, 3) uint8 from a clip's first one: the stock pipeline, 10 steps, default guidance."""
    import torch
    from PIL import Image

    frames = pipe(
        Image.fromarray(clip.frames[0]), HEIGHT, WIDTH, NUM_FRAMES, num_inference_steps=10, fps=7,
        motion_bucket_id=clip.motion_bucket_id, generator=torch.Generator().manual_seed(seed),
    ).frames[0]  # fmt: skip
    return np.stack([np.asarray(frame) for frame in frames])


def held_out_clips(domain, count):
    """The first `count` clips of a domain that nothing was trained on, under a progress bar."""
    from tqdm import tqdm

    for i in tqdm(range(count), desc=f"held-out {domain}"):
        yield i, make_clip((HELD_OUT_SEED, i), domain, NUM_FRAMES, WIDTH, HEIGHT)


def write_sheet(title, frames):
    """A row of a picture: all frames under a title."""
    from PIL import Image

    from svd_xtend.data.images import add_title, contact_sheet

    images = [
        frame if isinstance(frame, Image.Image) else Image.fromarray(frame) for frame in frames
    ]
    return add_title(contact_sheet(images), title)


def load_for_evaluation(folder, lora=None):
    import torch

    from svd_xtend.models.loading import load_svd
    from svd_xtend.models.lora import load_lora

    pipe = load_svd(str(folder), torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
    if lora:
        load_lora(pipe.unet, lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mean_of_rows(rows):
    """{row: [{figure: value}]} -> {row: {figure: mean}}."""
    return {
        name: {key: float(np.nanmean([r[key] for r in row])) for key in row[0]}
        for name, row in rows.items()
    }


def evaluate_tiny(folder, picture=None, domain="pointed", count=64, lora=None):
    """{row: {figure: mean}} on held-out clips of `domain`: the model beside the static copy of frame 0 and the VAE's
    reconstruction of the truth. `picture`: a PNG of the first clips, truth above model."""
    from svd_xtend.data.images import stack_images

    pipe = load_for_evaluation(folder, lora)
    rows, seconds, sheets = {"static copy": [], "VAE": [], "model": []}, [], []
    for i, clip in held_out_clips(domain, count):
        rows["static copy"].append(measure_clip(np.repeat(clip.frames[:1], NUM_FRAMES, 0), clip))
        rows["VAE"].append(measure_clip(reconstruct(pipe.vae, clip), clip))
        began = time.perf_counter()
        frames = sample_tiny(pipe, clip, i)
        seconds.append(time.perf_counter() - began)
        rows["model"].append(measure_clip(frames, clip))
        if i < 6:
            sheets += [write_sheet("truth", clip.frames), write_sheet("model", frames)]
    if picture:
        stack_images(sheets, vertical=True).save(picture)
    figures = mean_of_rows(rows)
    figures["model"]["seconds_per_clip"] = float(np.mean(seconds))
    return figures


def evaluate_control(folder, weights, picture=None, count=64, lora=None):
    """{row: {mean_iou, success}} of held-out `roam` clips, whose boxes nothing in frame 0 announces: without boxes, with
    all of them, with the first and the last (what lies between is interpolated and soft; the last frame counts), and
    beside them the static copy and the measure's own ceiling. `picture`: a stem, for .png and .gif of the first clips."""
    from svd_xtend.inference import video_writer
    from svd_xtend.models.box_control import load_box_control

    pipe = load_for_evaluation(folder, lora)
    adapter, shown, rows = load_box_control(pipe.unet, weights), [], {}
    for i, clip in held_out_clips("roam", count):
        asked = is_contrasting(clip.tracklets().pad(adapter.config["slots"]), clip.colors)
        made = {
            "static copy": np.repeat(clip.frames[:1], NUM_FRAMES, 0),
            "VAE of the truth": reconstruct(pipe.vae, clip),
        }
        for name, boxes in (
            ("without boxes", None),
            ("with boxes", asked),
            ("ends only", asked.only_ends().grow_soft_boxes()),
        ):
            adapter.set(boxes)
            made[name] = sample_tiny(pipe, clip, i)
        for name, frames in made.items():
            counted = slice(None, None, NUM_FRAMES - 1) if name == "ends only" else slice(None)
            rows.setdefault(name, []).append(measure_control(frames[counted], clip.cut(counted)))
        shown += [control_row(clip, made)] * (i < 4)
    if picture:
        video_writer.write_comparison(picture, shown, FPS)
    return mean_of_rows(rows)


def control_row(clip, made):
    """{title: frames} of a clip's pictures: asked for, without boxes, with boxes, and that with the boxes drawn over it."""
    from PIL import Image

    from svd_xtend.data.images import enlarge
    from svd_xtend.data.tracklets import render_boxes

    asked, without, controlled = (
        [enlarge(Image.fromarray(frame), 256) for frame in made[name]]
        for name in ("static copy", "without boxes", "with boxes")
    )
    asked, drawn = (render_boxes(frames, clip.tracklets()) for frames in (asked, controlled))
    return {
        "init image, boxes": asked,
        "without boxes": without,
        "with boxes": controlled,
        "the same, drawn over": drawn,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir", help="train: everything goes here, the result into its tiny_svd/"
    )
    parser.add_argument("--vae_steps", type=int, default=1100)
    parser.add_argument("--unet_steps", type=int, default=2800)
    parser.add_argument(
        "--evaluate", metavar="FOLDER", help="measure this SVD on held-out clips instead"
    )
    parser.add_argument("--lora", help="with these adapters")
    parser.add_argument("--tracklet_weights", help="measure how well boxes are followed with these")
    parser.add_argument("--domain", default="pointed", help="clips to measure on: pointed, fall")
    parser.add_argument("--clips", type=int, default=64, help="how many")
    parser.add_argument(
        "--picture",
        help="PNG of the first six, truth above model; with --tracklet_weights a stem, for .png and .gif",
    )
    args = parser.parse_args()
    if args.evaluate and args.tracklet_weights:
        print(
            json.dumps(
                evaluate_control(
                    args.evaluate, args.tracklet_weights, args.picture, args.clips, args.lora
                ),
                indent=1,
            )
        )
    elif args.evaluate:
        print(
            json.dumps(
                evaluate_tiny(args.evaluate, args.picture, args.domain, args.clips, args.lora),
                indent=1,
            )
        )
    elif args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        vae = train_vae(args.output_dir, args.vae_steps)
        print(
            "VAE, held-out PSNR in dB:",
            {d: round(vae_psnr(vae, d), 2) for d in ("shapes", "pointed", "fall")},
        )
        pipe = train_unet(args.output_dir, vae, args.unet_steps)
        save_pipeline(pipe, Path(args.output_dir, "tiny_svd"))
    else:
        parser.error("pass --output_dir to train, or --evaluate")
