"""The embedded SVD: a real Stable Video Diffusion at a very small size, and how it was trained.

    python -m svd_xtend.demo.tiny_svd --output_dir outputs/tiny_svd            # train it again: VAE, then UNet
    python -m svd_xtend.demo.tiny_svd --evaluate svd_xtend/demo/weights/svd    # the metrics of the model card
    python -m svd_xtend.demo.tiny_svd --evaluate svd_xtend/demo/weights/svd \\
        --tracklet_weights svd_xtend/demo/weights/boxes                        # the metrics of its box control

It has all five components in the layout of stabilityai/stable-video-diffusion-img2vid, for clips of 64x48 pixels and 8
frames, and is trained on the clips of svd_xtend/demo/synthetic_clips.py. If the training is killed, the same command
resumes it. svd_xtend/demo/weights/svd/README.md is its model card.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from svd_xtend.demo.synthetic_clips import (
    DOMAINS,
    FPS,
    HELD_OUT_SEED,
    SyntheticClip,
    make_clip,
    psnr,
    score_box_following,
    score_synthetic_clip,
    with_contrasting_colors,
    write_clips,
)
from svd_xtend.models.precision import fast_bf16

if TYPE_CHECKING:
    import torch
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from PIL import Image
    from transformers import CLIPVisionModelWithProjection

TINY_SVD = Path(__file__).parent / "weights" / "svd"  # the shipped weights
TINY_BOXES = Path(__file__).parent / "weights" / "boxes"  # its box control
WIDTH = 64
HEIGHT = 48
NUM_FRAMES = 8
TRAIN_SEED = 1
VAE_SEED = 0
INFERENCE_STEPS = 10
GROUP_CONSTANT = 4.0  # K of start_as_lowpass: large compared with a pixel value

VAE_CHECKPOINT_STEPS = 200
VAE_WARMUP_STEPS = 50
KL_WEIGHT = 1e-4
LATENT_PIXELS = 192  # of a frame: 16 x 12
TRAINING_CLIPS = 3000
PICTURE_CLIPS = 6  # clips in the picture of evaluate_tiny
CONTROL_PICTURE_CLIPS = 4  # clips in the picture of evaluate_control


# --------------------------------------------------------------------------------------------------------------- build


def build_vae() -> AutoencoderKLTemporalDecoder:
    """Build a VAE with 4x downsampling, 4 latent channels and 2.4 M parameters.

    GroupNorm has 32 groups everywhere in diffusers' temporal decoder. At full resolution there are 96 channels, so that
    groups of three channels keep an image's brightness. Residual branches start at zero, and the standard deviation of
    the posterior starts at 0.05, not at 1.
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


def start_as_lowpass(vae: AutoencoderKLTemporalDecoder) -> None:
    """Set the weights of the VAE so that it averages 4x4 pixels and interpolates them back. Training adds the detail.

    Channels 0 to 2 carry R, G and B through encoder and decoder. Before the last convolution of each, two layers would
    change them:

    - GroupNorm would remove the brightness. So the group of a pixel value p contains (p, K - p/2, -K - p/2): its mean is
      0, and its variance is almost K^2 2/3, whatever p is.
    - SiLU is not linear, but silu(z) - silu(-z) = z. So there is a second group for -p.
    """
    import torch

    point = torch.zeros(3, 3)
    point[1, 1] = 1
    # 2x2 pixels of a 3x3 kernel: the encoder pads on the right and below
    average = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]) / 4
    tent = torch.tensor([1.0, 2, 1]) / 4
    encoder = vae.encoder
    decoder = vae.decoder
    with torch.no_grad():
        carry_channels(encoder.conv_in, point)
        for block in encoder.down_blocks[:2]:
            carry_channels(block.downsamplers[0].conv, average)
        carry_channels(encoder.down_blocks[1].resnets[0].conv_shortcut, torch.ones(1, 1))
        write_groups(encoder.down_blocks[2].resnets[0].conv_shortcut)
        read_groups(encoder.conv_out)
        torch.nn.init.eye_(vae.quant_conv.weight[:4, :4, 0, 0])
        vae.quant_conv.weight[:4, 4:] = 0
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[:] = 0
        vae.quant_conv.bias[4:] = -6.0  # posterior std 0.05; the default is 1

        carry_channels(decoder.conv_in, point)
        for block in decoder.up_blocks[:2]:
            carry_channels(block.upsamplers[0].conv, torch.outer(tent, tent))
        carry_channels(
            decoder.up_blocks[1].resnets[0].spatial_res_block.conv_shortcut, torch.ones(1, 1)
        )
        write_groups(decoder.up_blocks[2].resnets[0].spatial_res_block.conv_shortcut)
        read_groups(decoder.conv_out)
        torch.nn.init.zeros_(decoder.time_conv_out.weight)
        rgb = range(3)
        decoder.time_conv_out.weight[rgb, rgb, 1, 0, 0] = 1.0
        torch.nn.init.zeros_(decoder.time_conv_out.bias)


def carry_channels(conv: torch.nn.Conv2d, kernel: torch.Tensor) -> None:
    """Let a convolution filter channels 0 to 2 with one k x k kernel each, and output nothing else in them."""
    assert conv.bias is not None
    conv.weight[:3] = 0
    conv.bias[:] = 0
    conv.weight[range(3), range(3)] = kernel


def write_groups(conv: torch.nn.Conv2d) -> None:
    """Let a 1x1 convolution write R, G, B, -R, -G and -B, each as a group of three channels (see start_as_lowpass)."""
    assert conv.bias is not None
    conv.weight[:18] = 0
    conv.bias[:18] = 0
    scales = (1, -0.5, -0.5)
    constants = (0, GROUP_CONSTANT, -GROUP_CONSTANT)
    for group in range(6):
        color = group % 3
        sign = 1 if group < 3 else -1
        for place in range(3):
            channel = 3 * group + place
            conv.weight[channel, color] = sign * scales[place]
            conv.bias[channel] = constants[place]


def read_groups(conv: torch.nn.Conv2d) -> None:
    """Let a 3x3 convolution after GroupNorm and SiLU read R, G and B back from the groups."""
    assert conv.bias is not None
    conv.weight[:3] = 0
    conv.bias[:3] = 0
    scale = GROUP_CONSTANT * (2 / 3) ** 0.5
    for color in range(3):
        conv.weight[color, 3 * color, 1, 1] = scale
        conv.weight[color, 9 + 3 * color, 1, 1] = -scale


def build_unet() -> UNetSpatioTemporalConditionModel:
    """Build a UNet of 3.7 M parameters whose residual branches start at zero."""
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


def zero_residual_branches(model: torch.nn.Module) -> None:
    """Let every resnet, every transformer and the VAE's attention start as the identity."""
    import torch

    for name, module in model.named_modules():
        ends_branch = name.endswith((".conv2", ".proj_out"))
        ends_vae_attention = ".mid_block.attentions" in name and name.endswith(".to_out.0")
        if ends_branch or ends_vae_attention:
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def build_image_encoder() -> CLIPVisionModelWithProjection:
    """Build a random CLIP vision encoder of 0.3 M parameters: 224x224 pixels (the size that the pipeline uses) to (64,)."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(VAE_SEED)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=32,
        image_size=224,
        projection_dim=64,
    )
    return CLIPVisionModelWithProjection(config)


def build_pipeline(
    vae: AutoencoderKLTemporalDecoder, unet: UNetSpatioTemporalConditionModel
) -> StableVideoDiffusionPipeline:
    """Build a pipeline with the scheduler settings of SVD."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessor

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    return StableVideoDiffusionPipeline(
        vae, build_image_encoder(), unet, scheduler, CLIPImageProcessor()
    )


def save_pipeline(pipe: StableVideoDiffusionPipeline, folder: str | Path) -> None:
    """Write a pipeline in the layout of SVD's fp16 variant on the Hub."""
    import torch

    pipe.to(dtype=torch.float16).save_pretrained(folder, variant="fp16")
    # without torchvision, transformers writes the name of its fallback class
    index = Path(folder, "model_index.json")
    index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))


# ----------------------------------------------------------------------------------------------------------- train VAE


def clips_to_pixels(clips: Sequence[SyntheticClip]) -> torch.Tensor:
    """Return the frames of clips as pixel_values (b, f, 3, h, w) in [-1, 1]."""
    import torch

    frames = np.stack([clip.frames for clip in clips])
    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def vae_batch(step: int, steps: int) -> torch.Tensor:
    """Return pixel_values (b, f, 3, h, w) of the clips of a step, of the domains shapes, pointed and fall in turn.

    For the first two thirds of `steps` a batch has 16 single frames, then 2 clips of 8 frames.
    """
    if step < 2 / 3 * steps:
        count = 16
        num_frames = 1
    else:
        count = 2
        num_frames = NUM_FRAMES
    clips = []
    for i in range(count):
        domain = DOMAINS[(step + i) % 3]
        clips.append(make_clip((VAE_SEED, step, i), domain, num_frames, WIDTH, HEIGHT))
    return clips_to_pixels(clips)


def vae_loss(vae: AutoencoderKLTemporalDecoder, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return L1 + 4 MSE + L1 of the 8x8-pooled error + 1e-4 KL of pixel_values (b, f, 3, h, w).

    The pooled error is the error of the brightness, which GroupNorm tends to lose.
    """
    import torch.nn.functional as F

    num_frames = pixel_values.shape[1]
    pixels = pixel_values.flatten(0, 1)
    posterior = vae.encode(pixels).latent_dist
    error = (vae.decode(posterior.sample(), num_frames=num_frames).sample - pixels).float()
    absolute = error.abs().mean()
    squared = error.square().mean()
    brightness = F.avg_pool2d(error, 8).abs().mean()
    kl = posterior.kl().mean()
    return absolute + 4 * squared + brightness + KL_WEIGHT * kl / LATENT_PIXELS


def vae_learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up times cosine decay."""
    warmup = min(1, (step + 1) / VAE_WARMUP_STEPS)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return peak * warmup * cosine


def train_vae(
    folder: str | Path, steps: int, learning_rate: float = 1e-3
) -> AutoencoderKLTemporalDecoder:
    """Train the VAE and return it, with its scaling_factor set to 1 / std of its latents.

    Saves to `folder` every 200 steps, and resumes from there.
    """
    import torch
    from tqdm import tqdm

    vae = build_vae()
    state_file = Path(folder, "vae_training.pt")
    log_file = Path(folder, "vae_metrics.jsonl")
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
        for group in optimizer.param_groups:
            group["lr"] = vae_learning_rate(step, steps, learning_rate)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_bf16()):
            loss = vae_loss(vae, vae_batch(step, steps).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        done = step + 1
        if done % VAE_CHECKPOINT_STEPS == 0 or done == steps:
            row = {
                "step": done,
                "psnr": vae_psnr(vae, "shapes", 16),
                "loss": loss.item(),
                "time": time.time(),
            }
            with log_file.open("a") as f:
                f.write(json.dumps(row) + "\n")
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            partial_file = state_file.with_suffix(".tmp")
            torch.save(state, partial_file)
            os.replace(partial_file, state_file)
    pixel_values = torch.cat([vae_batch(steps + i, steps).flatten(0, 1) for i in range(16)])
    with torch.no_grad():
        std = vae.cpu().encode(pixel_values).latent_dist.mode().std().item()
    vae.register_to_config(scaling_factor=round(1 / std, 5))
    return vae.eval()


def reconstruct(vae: AutoencoderKLTemporalDecoder, clip: SyntheticClip) -> np.ndarray:
    """Encode and decode the frames of a clip: (f, h, w, 3) uint8."""
    import torch

    pixels = clips_to_pixels([clip])[0].to(next(vae.parameters()).device)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
        decoded = vae.decode(latents, num_frames=len(pixels)).sample
    levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte()
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def vae_psnr(vae: AutoencoderKLTemporalDecoder, domain: str, count: int = 64) -> float:
    """Return the mean PSNR in dB of the VAE's reconstruction of `count` validation clips."""
    clips = [make_clip((HELD_OUT_SEED, i), domain, NUM_FRAMES, WIDTH, HEIGHT) for i in range(count)]
    return float(np.mean([psnr(reconstruct(vae, clip), clip.frames) for clip in clips]))


# ---------------------------------------------------------------------------------------------------------- train UNet


def train_unet(
    folder: str | Path, vae: AutoencoderKLTemporalDecoder, steps: int
) -> StableVideoDiffusionPipeline:
    """Train the UNet with train_svd.py, as a user does, and return the trained pipeline."""
    import torch

    from svd_xtend.models.loading import load_svd

    untrained = Path(folder, "start")
    output_dir = Path(folder, "trained")
    if not (untrained / "model_index.json").exists():
        save_pipeline(build_pipeline(vae, build_unet()), untrained)
    write_clips(Path(folder, "clips"), "shapes", TRAINING_CLIPS, TRAIN_SEED)
    write_clips(Path(folder, "held_out"), "pointed", 4, HELD_OUT_SEED)
    images = [str(Path(folder, "held_out", f"pointed{i:04d}", "000.png")) for i in range(4)]
    flags = {
        "pretrained_model_name_or_path": untrained,
        "base_folder": Path(folder, "clips"),
        "width": WIDTH,
        "height": HEIGHT,
        "num_frames": NUM_FRAMES,
        "per_gpu_batch_size": 8,
        "vae_encode_chunk": 8,
        "num_workers": 1,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "adam_beta2": 0.99,
        "P_mean": 1.5,
        "P_std": 1.6,
        "conditioning_dropout_prob": "0 0 0.05",
        "max_train_steps": steps,
        "checkpointing_steps": 100,
        "checkpoints_total_limit": 2,
        "validation_steps": 500,
        "num_inference_steps": INFERENCE_STEPS,
        "seed": TRAIN_SEED,
        "mixed_precision": "no",
        "output_dir": output_dir,
    }
    script = Path(__file__).parents[2] / "train_svd.py"
    command = [sys.executable, str(script), "--use_ema"]
    for name, value in flags.items():
        command += [f"--{name}", *str(value).split()]
    subprocess.run([*command, "--validation_image", *images], check=True)
    return load_svd(str(output_dir), torch.float32)


# ------------------------------------------------------------------------------------------------------------ evaluate


def sample_tiny(pipe: StableVideoDiffusionPipeline, clip: SyntheticClip, seed: int) -> np.ndarray:
    """Generate frames (f, h, w, 3) uint8 from a clip's first frame: stock pipeline, 10 steps, default guidance."""
    import torch
    from PIL import Image

    frames = pipe(
        Image.fromarray(clip.frames[0]),
        HEIGHT,
        WIDTH,
        NUM_FRAMES,
        num_inference_steps=INFERENCE_STEPS,
        fps=FPS,
        motion_bucket_id=clip.motion_bucket_id,
        generator=torch.Generator().manual_seed(seed),
    ).frames[0]
    return np.stack([np.asarray(frame) for frame in frames])


def validation_clips(domain: str, count: int) -> Iterator[tuple[int, SyntheticClip]]:
    """Yield (index, clip) of the first `count` validation clips of a domain, under a progress bar."""
    from tqdm import tqdm

    for i in tqdm(range(count), desc=f"validation clips of {domain}"):
        yield i, make_clip((HELD_OUT_SEED, i), domain, NUM_FRAMES, WIDTH, HEIGHT)


def titled_sheet(title: str, frames: np.ndarray) -> Image.Image:
    """Return a picture of all frames (f, h, w, 3) uint8 under a title."""
    from PIL import Image

    from svd_xtend.data.images import add_title, contact_sheet

    return add_title(contact_sheet([Image.fromarray(frame) for frame in frames]), title)


def load_for_evaluation(
    folder: str | Path, lora: str | Path | None = None
) -> StableVideoDiffusionPipeline:
    """Load a pipeline in float32 onto the GPU, if there is one, with a LoRA if one is given."""
    import torch

    from svd_xtend.models.loading import load_svd
    from svd_xtend.models.lora import load_lora

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_svd(str(folder), torch.float32).to(device)
    if lora:
        load_lora(pipe.unet, lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mean_metrics(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the clips, without those where it is NaN."""
    return {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}


def repeat_first_frame(clip: SyntheticClip) -> np.ndarray:
    """Return the static baseline: frame 0 in place of all frames."""
    return np.repeat(clip.frames[:1], NUM_FRAMES, 0)


def evaluate_tiny(
    folder: str | Path,
    picture: str | Path | None = None,
    domain: str = "pointed",
    count: int = 64,
    lora: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate an SVD on validation clips of `domain`. Return {row: {metric: mean}}.

    The rows are "model", "static copy" (frame 0 repeated) and "VAE" (its reconstruction of the ground truth). picture: a
    PNG of the first clips, ground truth above model.
    """
    from svd_xtend.data.images import stack_images

    pipe = load_for_evaluation(folder, lora)
    static_rows = []
    vae_rows = []
    model_rows = []
    seconds = []
    sheets = []
    for i, clip in validation_clips(domain, count):
        static_rows.append(score_synthetic_clip(repeat_first_frame(clip), clip))
        vae_rows.append(score_synthetic_clip(reconstruct(pipe.vae, clip), clip))
        began = time.perf_counter()
        frames = sample_tiny(pipe, clip, i)
        seconds.append(time.perf_counter() - began)
        model_rows.append(score_synthetic_clip(frames, clip))
        if i < PICTURE_CLIPS:
            sheets.append(titled_sheet("ground truth", clip.frames))
            sheets.append(titled_sheet("model", frames))
    if picture:
        stack_images(sheets, vertical=True).save(picture)
    model_metrics = mean_metrics(model_rows)
    model_metrics["seconds_per_clip"] = float(np.mean(seconds))
    return {
        "static copy": mean_metrics(static_rows),
        "VAE": mean_metrics(vae_rows),
        "model": model_metrics,
    }


def evaluate_control(
    folder: str | Path,
    weights: str | Path,
    picture: str | Path | None = None,
    count: int = 64,
    lora: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate box control on validation clips of `roam`. Return {row: {mean_iou, success}}.

    Nothing in frame 0 of these clips indicates the boxes. The rows are "without boxes", "with boxes", "ends only" (only the
    first and the last box are given; those between are interpolated and soft, and the last frame counts), "static copy" and
    "VAE of the truth", the highest value that the metric can reach. picture: a file name without suffix, for a .png and a
    .gif of the first clips.
    """
    from svd_xtend.inference import video_writer
    from svd_xtend.models.box_control import load_box_control

    pipe = load_for_evaluation(folder, lora)
    adapter = load_box_control(pipe.unet, weights)
    picture_rows = []
    rows: dict[str, list[dict[str, float]]] = {}
    for i, clip in validation_clips("roam", count):
        boxes = with_contrasting_colors(clip.tracklets().pad(adapter.config["slots"]), clip.colors)
        given_boxes = {
            "without boxes": None,
            "with boxes": boxes,
            "ends only": boxes.only_ends().grow_soft_boxes(),
        }
        videos = {
            "static copy": repeat_first_frame(clip),
            "VAE of the truth": reconstruct(pipe.vae, clip),
        }
        for name, given in given_boxes.items():
            adapter.set(given)
            videos[name] = sample_tiny(pipe, clip, i)
        for name, frames in videos.items():
            if name == "ends only":  # frame 0, which never counts, and the last frame
                counted = slice(None, None, NUM_FRAMES - 1)
            else:
                counted = slice(None)
            score = score_box_following(frames[counted], clip.cut(counted))
            rows.setdefault(name, []).append(score)
        if i < CONTROL_PICTURE_CLIPS:
            picture_rows.append(control_row(clip, videos))
    if picture:
        video_writer.write_comparison(picture, picture_rows, FPS)
    return {name: mean_metrics(row) for name, row in rows.items()}


def control_row(clip: SyntheticClip, videos: dict[str, np.ndarray]) -> dict[str, list[Image.Image]]:
    """Return {title: frames} of a clip: the given boxes, without boxes, with boxes, and the same with the boxes drawn over it."""
    from PIL import Image

    from svd_xtend.data.images import enlarge
    from svd_xtend.data.tracklets import render_boxes

    def enlarged(name: str) -> list[Image.Image]:
        return [enlarge(Image.fromarray(frame), 256) for frame in videos[name]]

    with_boxes = enlarged("with boxes")
    return {
        "init image, boxes": render_boxes(enlarged("static copy"), clip.tracklets()),
        "without boxes": enlarged("without boxes"),
        "with boxes": with_boxes,
        "the same, drawn over": render_boxes(with_boxes, clip.tracklets()),
    }


# ----------------------------------------------------------------------------------------------------------------- CLI


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--output_dir", help="train: all files go here, the result into its tiny_svd/")
    parser.add_argument("--vae_steps", type=int, default=1100, help="default: %(default)s")
    parser.add_argument("--unet_steps", type=int, default=2800, help="default: %(default)s")
    parser.add_argument("--evaluate", metavar="FOLDER", help="evaluate this SVD on validation clips instead of training")
    parser.add_argument("--lora", help="evaluate it with this LoRA")
    parser.add_argument("--tracklet_weights", help="evaluate how well boxes are followed with this box control")
    parser.add_argument("--domain", default="pointed", help="clips to evaluate on: pointed or fall; default: %(default)s")
    parser.add_argument("--clips", type=int, default=64, help="number of clips; default: %(default)s")
    parser.add_argument("--picture", help="PNG of the first six clips, ground truth above model; with --tracklet_weights a file name without suffix, for a .png and a .gif")
    # fmt: on
    return parser


def train_tiny(output_dir: str | Path, vae_steps: int, unet_steps: int) -> None:
    """Train VAE and UNet, and write the result to <output_dir>/tiny_svd."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    vae = train_vae(output_dir, vae_steps)
    psnr_by_domain = {
        domain: round(vae_psnr(vae, domain), 2) for domain in ("shapes", "pointed", "fall")
    }
    print("PSNR of the VAE on validation clips, in dB:", psnr_by_domain)
    pipe = train_unet(output_dir, vae, unet_steps)
    save_pipeline(pipe, Path(output_dir, "tiny_svd"))


def main() -> None:
    """Train or evaluate the embedded SVD."""
    parser = build_parser()
    args = parser.parse_args()
    if args.evaluate and args.tracklet_weights:
        metrics = evaluate_control(
            args.evaluate, args.tracklet_weights, args.picture, args.clips, args.lora
        )
        print(json.dumps(metrics, indent=1))
    elif args.evaluate:
        metrics = evaluate_tiny(args.evaluate, args.picture, args.domain, args.clips, args.lora)
        print(json.dumps(metrics, indent=1))
    elif args.output_dir:
        train_tiny(args.output_dir, args.vae_steps, args.unet_steps)
    else:
        parser.error("pass --output_dir to train, or --evaluate to evaluate")


if __name__ == "__main__":
    main()
