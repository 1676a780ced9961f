"""Fine-tune Stable Video Diffusion (SVD) on a folder of videos.

    accelerate launch train_svd.py --max_train_steps=20       # no GPU, no weights: the embedded SVD

    accelerate launch train_svd.py --pretrained_model_name_or_path=/path/to/weight \\
        --per_gpu_batch_size=1 --gradient_accumulation_steps=1 --max_train_steps=50000 \\
        --width=512 --height=320 --checkpointing_steps=1000 --checkpoints_total_limit=1 \\
        --learning_rate=1e-5 --lr_warmup_steps=0 --seed=123 --mixed_precision="fp16" \\
        --validation_steps=200

DummyDataset reads the frames of a clip. train_step calls training_loss, which calls encode_video,
encode_conditioning and drop_conditioning, and at last denoising_loss, the method itself.
To continue a stopped run, give the same command again.
train_svd_lora.py and train_svd_tracklet.py use the same loop with a `Recipe` of their own.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange, repeat

from svd_xtend.data import images, latent_cache, sampler, split
from svd_xtend.data.clip import Clip, ClipSpec, load_picture
from svd_xtend.data.sampler import ClipCollection, ClipSampler
from svd_xtend.demo.synthetic_clips import ensure_demo
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.evaluation import report
from svd_xtend.evaluation.model_card import push_to_hub
from svd_xtend.inference import video_writer
from svd_xtend.models import activation_checkpointing, loading, precision, unet_optimizations
from svd_xtend.training import (
    checkpoints,
    distributed,
    memory_estimate,
    optimizers,
    run_record,
    safety,
    validation,
    validation_loss,
)
from svd_xtend.training.flag_types import (
    fraction_below_one,
    multiple_of_8,
    non_negative_float,
    non_negative_int,
    number_or_word,
    positive_float,
    positive_int,
    replace_args,
)
from svd_xtend.training.validation import RenderedClip

if TYPE_CHECKING:  # `-h` answers at once because torch is imported only where it is used
    import torch
    from accelerate import Accelerator
    from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
    from PIL import Image
    from torch import Tensor

# Your folder of videos: video files, or folders of frames. data/demo is drawn when it is first used.
base_folder = "data/demo"

EMA_DECAY = 0.9999  # of the trained weights, per step

logger = logging.getLogger("svd_xtend")


# ------------------------------------------------------------------------------------------- data


class DummyDataset:
    """Clips from a folder of videos, each a folder of frames or a video file.

        base_folder/
            video_name1/  frame_1.jpg  frame_2.jpg  ...  [clip.json]
            video_name2.mp4  [video_name2.txt: its caption]
            ...

    clip.json is optional: {"fps": 24, "motion_bucket_id": 127, "caption": "a dog"}.

    Items are asked for by a global sample index, which has no end. `sampler` says which clip an
    index shows; a generator keyed by (seed, index) draws where in the video the clip begins, so a
    sample does not depend on the number of processes or on when a run was resumed.

    An item holds `pixel_values` (f, 3, h, w) uint8, the clip's `fps`, `motion_bucket_id` and
    `caption` ("" if it has none), its `index`, and `failed`, the number of unreadable clips that were
    replaced by this one. With a latent cache it holds only the first frame, and the cached `moments`
    (2, f, 4, h/8, w/8) and `image_embeds` (1, d).
    """

    def __init__(
        self,
        clips: ClipCollection,
        sampler: ClipSampler,
        spec: ClipSpec,
        *,
        seed: int = 0,
        latent_cache: str | None = None,
    ) -> None:
        self.clips = clips
        self.sampler = sampler
        self.spec = spec
        self.seed = seed
        self.latent_cache = latent_cache

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for failed, clip_index in enumerate(self.sampler.choices(index)):
            try:
                item = self.read_clip(clip_index, index)
            except ValueError as error:
                logger.warning("%s; another clip is used in its place", error)
                continue
            return {**item, "index": index, "failed": failed}
        raise ValueError(
            "--base_folder: no clip can be read. The warnings above name the files; "
            "prepare_data.py check lists all that are damaged."
        )

    def read_clip(self, clip_index: int, index: int) -> dict[str, Any]:
        """Read a window of one clip, at a random start keyed by (seed, index)."""
        if clip_index < len(self.clips):
            clip = self.clips[clip_index]
            num_frames = self.spec.num_frames
        else:  # pictures are numbered behind the videos
            clip = self.clips.picture(clip_index)
            num_frames = 1
        fps = clip.metadata["fps"]
        rng = np.random.default_rng((self.seed, index))
        start = int(rng.integers(clip.num_starts(num_frames, fps)))
        frame_indices = clip.frame_indices(start, num_frames, fps)
        return {**self.read_window(clip, frame_indices, index), **clip.metadata}

    def read_window(self, clip: Clip, frame_indices: np.ndarray, index: int) -> dict[str, Any]:
        """Return the part of an item that comes from these frames of a clip.

        Override this to add to an item. A `control` entry, a dict of arrays, reaches the model as
        keyword arguments. index: the global sample index, to key the random draws of a subclass.
        """
        width, height = clip.size or (self.spec.width, self.spec.height)
        if self.latent_cache:
            pixels = clip.read(frame_indices[:1], width, height, self.spec.resize_mode)
            cached = latent_cache.read_cached_window(self.latent_cache, clip, frame_indices)
        else:
            pixels = clip.read(frame_indices, width, height, self.spec.resize_mode)
            cached = {}
        return {"pixel_values": rearrange(pixels, "f h w c -> f c h w"), **cached}


# -------------------------------------------------------------------------------------------- EDM


def scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (c_skip, c_out, c_in, c_noise) of D(x) = c_skip x + c_out F(c_in x; c_noise).

    Karras et al. 2022, Eq. 7. SVD predicts v, so sigma_data = 1 and c_out is negative (SVD paper,
    App. D.2).
    """
    c_skip = 1 / (sigma**2 + 1)
    c_out = -sigma / (sigma**2 + 1) ** 0.5
    c_in = 1 / (sigma**2 + 1) ** 0.5
    c_noise = 0.25 * sigma.log()
    return c_skip, c_out, c_in, c_noise


def loss_weight(sigma: Tensor) -> Tensor:
    """Return lambda(sigma), the weight of |D - x|^2 (Karras et al. 2022, Table 1, sigma_data = 1).

    It equals 1 / c_out^2, so the loss is a plain mean square of F - v. Edit this line to weight
    noise levels differently.
    """
    return (sigma**2 + 1) / sigma**2


def default_P(width: int, height: int) -> tuple[float, float]:
    """Return (P_mean, P_std) of log sigma for a size in pixels.

    SVD paper, App. D.2: image-to-video at base resolution, and at high resolution.
    """
    if width * height <= 576 * 320:
        return 0.7, 1.6
    return 1.0, 1.6


class SampleNoise:
    """Random draws of a batch. Each sample has a generator keyed by (seed, global sample index)."""

    def __init__(self, seed: int, indices, device: torch.device | str) -> None:
        import torch

        self.device = device
        self.generators = []
        for index in indices:
            sequence = np.random.SeedSequence((seed, int(index)))
            key = int(sequence.generate_state(1, np.uint64)[0])
            self.generators.append(torch.Generator(device).manual_seed(key))

    def normal(self, *shape: int) -> Tensor:
        """Draw (b, *shape) from N(0, 1), float32."""
        import torch

        draws = [torch.randn(shape, generator=g, device=self.device) for g in self.generators]
        return torch.stack(draws)

    def uniform(self) -> Tensor:
        """Draw (b,) from U[0, 1), float32."""
        import torch

        draws = [torch.rand((), generator=g, device=self.device) for g in self.generators]
        return torch.stack(draws)


# ----------------------------------------------------------------------------------- conditioning


@dataclass(frozen=True)
class Conditioning:
    """The inputs of the UNet besides the noisy latents.

    image_embeds: (b, 1, d) CLIP embedding of the clean first frame.
    image_latents: (b, 4, h/8, w/8) first frame with a little noise, the VAE's mean, *not* scaled.
    added_time_ids: (b, 3) fps - 1, motion_bucket_id, noise_aug_strength.
    control: keyword arguments of the model, for adapters such as box control.
    """

    image_embeds: Tensor
    image_latents: Tensor
    added_time_ids: Tensor
    control: dict[str, Any] = field(default_factory=dict)


def vae_posterior(vae, pixel_values: Tensor, chunk: int = 1) -> Tensor:
    """Return mean and standard deviation of the VAE's posterior, (b, 2, f, 4, h/8, w/8) float32.

    pixel_values: (b, f, 3, h, w) in [-1, 1]. Frames are encoded `chunk` at a time: the result is the
    same, and one frame at a time takes a twenty-fifth of the memory of a clip of 25.
    """
    import torch

    frames = rearrange(pixel_values, "b f c h w -> (b f) c h w").to(vae.dtype)
    with torch.no_grad():
        parts = [vae.encode(part).latent_dist for part in frames.split(chunk)]
    mean = torch.cat([part.mean for part in parts])
    std = torch.cat([part.std for part in parts])
    moments = torch.stack([mean, std]).float()
    return rearrange(moments, "m (b f) c h w -> b m f c h w", b=len(pixel_values))


def encode_video(
    vae,
    pixel_values: Tensor,
    noise: SampleNoise,
    chunk: int = 1,
    moments: Tensor | None = None,
) -> Tensor:
    """Sample latents (b, f, 4, h/8, w/8) float32 of pixel_values (b, f, 3, h, w) in [-1, 1].

    They are scaled to about unit variance. moments: the output of `vae_posterior` from a cache;
    nothing is encoded then.
    """
    if moments is None:
        moments = vae_posterior(vae, pixel_values, chunk)
    mean, std = moments.unbind(1)
    return (mean + std * noise.normal(*mean.shape[1:])) * vae.config.scaling_factor


def embed_image(pipe: StableVideoDiffusionPipeline, first_frame: Tensor) -> Tensor:
    """Return the CLIP embedding (b, 1, d) of clean frames (b, 3, h, w) in [-1, 1]."""
    import torch
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as stock

    # Private, but it is the resizing of inference: with any other, training would see embeddings
    # that inference never shows.
    pixels = (stock._resize_with_antialiasing(first_frame.float(), (224, 224)) + 1) / 2
    # Channel by channel, with Python numbers: a tensor of them would be copied to the GPU, and the
    # step would wait for the copy.
    mean = pipe.feature_extractor.image_mean
    std = pipe.feature_extractor.image_std
    pixels = torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    with torch.no_grad():
        return pipe.image_encoder(pixels.to(pipe.image_encoder.dtype)).image_embeds[:, None]


def add_encodings(pipe: StableVideoDiffusionPipeline, batch: dict, chunk: int = 1) -> dict:
    """Add VAE moments and CLIP embeddings to a batch, so that repeated losses skip encoding.

    Only the first frame, which is noised anew for each loss, is still encoded then.
    """
    pixel_values = batch["pixel_values"]
    moments = vae_posterior(pipe.vae, pixel_values, chunk)
    image_embeds = embed_image(pipe, pixel_values[:, 0])
    return {**batch, "moments": moments, "image_embeds": image_embeds}


def encode_conditioning(
    pipe: StableVideoDiffusionPipeline, batch: dict, noise: SampleNoise
) -> Conditioning:
    """Return the conditioning of a batch.

    CLIP sees the clean first frame. The VAE sees it with noise of log sigma ~ N(-3, 0.5^2) (SVD
    paper, App. D.4). A batch from a cache brings its `image_embeds`.
    """
    import torch

    first_frame = batch["pixel_values"][:, 0]
    noise_aug_strength = (noise.normal() * 0.5 - 3).exp()
    image_noise = noise.normal(*first_frame.shape[1:])
    noised = first_frame + noise_aug_strength[:, None, None, None] * image_noise
    with torch.no_grad():
        frames = noised.to(pipe.vae.dtype).split(1)
        image_latents = [pipe.vae.encode(frame).latent_dist.mode() for frame in frames]
    fps = batch["fps"].float()
    motion_bucket_id = batch["motion_bucket_id"].float()
    image_embeds = batch.get("image_embeds")
    if image_embeds is None:
        image_embeds = embed_image(pipe, first_frame)
    return Conditioning(
        image_embeds=image_embeds,
        image_latents=torch.cat(image_latents).float(),
        added_time_ids=torch.stack([fps - 1, motion_bucket_id, noise_aug_strength], dim=1),
        control=batch.get("control", {}),
    )


def drop_conditioning(
    conditioning: Conditioning, u: Tensor, dropout: tuple[float, float, float]
) -> Conditioning:
    """Set parts of the conditioning to zero, for classifier-free guidance.

    dropout: the probabilities (p_clip, p_latents, p_both). u: (b,) uniform draws in [0, 1):

    u in    [0, p_clip)    then p_latents    then p_both    beyond
    drops   embedding      latents           both           nothing
    """
    p_clip, p_latents, p_both = dropout
    drops_both = (u >= p_clip + p_latents) & (u < p_clip + p_latents + p_both)
    drops_embeds = (u < p_clip) | drops_both
    drops_latents = (u >= p_clip) & (u < p_clip + p_latents + p_both)
    return replace(
        conditioning,
        image_embeds=conditioning.image_embeds * ~drops_embeds[:, None, None],
        image_latents=conditioning.image_latents * ~drops_latents[:, None, None, None],
    )


# ------------------------------------------------------------------------------------------- loss


def denoising_loss(
    unet,
    latents: Tensor,
    conditioning: Conditioning,
    sigma: Tensor,
    eps: Tensor,
    pixel_weight: Tensor | float = 1,
) -> Tensor:
    """Return the EDM loss (b,) of clean latents at noise levels sigma (b,) under noise eps.

    lambda(sigma) |D(latents + sigma eps) - latents|^2, Karras et al. 2022, Eq. 8. latents and eps:
    (b, f, 4, h/8, w/8). pixel_weight: (b, f, 1, h/8, w/8) of mean 1, or 1.
    """
    import torch

    sigma = sigma[:, None, None, None, None]
    _, c_out, c_in, c_noise = scalings(sigma)
    image_latents = repeat(conditioning.image_latents, "b c h w -> b f c h w", f=latents.shape[1])
    inputs = torch.cat([c_in * (latents + sigma * eps), image_latents], dim=2)
    output = unet(
        inputs,
        c_noise.flatten(),
        conditioning.image_embeds,
        conditioning.added_time_ids,
        **conditioning.control,
    )
    F_x = output.sample.float()
    # D - latents = c_out (F - v). It is computed in this form because at small sigma the difference
    # of D and the latents would lose digits to cancellation.
    v = c_in * (eps - sigma * latents)
    return (loss_weight(sigma) * c_out**2 * (F_x - v) ** 2 * pixel_weight).mean((1, 2, 3, 4))


@dataclass(frozen=True)
class LossOptions:
    """The settings of `training_loss`.

    seed: keys all noise. P_mean, P_std: log sigma ~ N(P_mean, P_std^2). dropout: see
    `drop_conditioning`. vae_encode_chunk: frames that the VAE encodes at once.
    """

    seed: int
    P_mean: float
    P_std: float
    dropout: tuple[float, float, float] = (0.0, 0.0, 0.0)
    vae_encode_chunk: int = 1

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> LossOptions:
        dropout = tuple(args.conditioning_dropout_prob)
        return cls(args.seed, args.P_mean, args.P_std, dropout, args.vae_encode_chunk)


def training_loss(
    unet,
    pipe: StableVideoDiffusionPipeline,
    batch: dict,
    options: LossOptions,
    noise: SampleNoise | None = None,
) -> Tensor:
    """Return the loss (b,) of a batch at random noise levels, with random dropout.

    batch: pixel_values (b, f, 3, h, w) in [-1, 1], fps (b,), motion_bucket_id (b,), index (b,), and
    optionally `control`, keyword arguments of the model, `pixel_weight` (b, f, 1, h/8, w/8), and
    `moments` and `image_embeds` from a cache. noise: draws to use instead of the keyed ones.
    """
    pixel_values = batch["pixel_values"]
    if noise is None:
        noise = SampleNoise(options.seed, batch["index"], pixel_values.device)
    latents = encode_video(
        pipe.vae, pixel_values, noise, options.vae_encode_chunk, batch.get("moments")
    )
    conditioning = encode_conditioning(pipe, batch, noise)
    conditioning = drop_conditioning(conditioning, noise.uniform(), options.dropout)
    sigma = (noise.normal() * options.P_std + options.P_mean).exp()
    eps = noise.normal(*latents.shape[1:])
    return denoising_loss(unet, latents, conditioning, sigma, eps, batch.get("pixel_weight", 1))


def loss_at_sigma(
    unet, pipe: StableVideoDiffusionPipeline, batch: dict, sigma: Tensor, seed: int
) -> Tensor:
    """Return the loss (b,) of a batch at given noise levels (b,), without dropout.

    The validation loss. Its noise is keyed by (seed, batch["index"]); `batch` comes from
    `add_encodings`.
    """
    noise = SampleNoise(seed, batch["index"], batch["pixel_values"].device)
    latents = encode_video(pipe.vae, batch["pixel_values"], noise, moments=batch["moments"])
    conditioning = encode_conditioning(pipe, batch, noise)
    # Draw and discard what training_loss draws here. eps is then the one of older runs, so that their
    # validation losses stay comparable.
    noise.uniform()
    noise.normal()
    eps = noise.normal(*latents.shape[1:])
    return denoising_loss(unet, latents, conditioning, sigma, eps, batch.get("pixel_weight", 1))


# --------------------------------------------------------------------------- validation and export


def sample(
    pipe: StableVideoDiffusionPipeline,
    image: Image.Image,
    args: argparse.Namespace,
    *,
    fps: float,
    motion_bucket_id: float,
    seed: int,
) -> list[Image.Image]:
    """Animate an image with the stock pipeline and its own guidance. Return the frames."""
    import torch

    def match_decoder(pipe, step, timestep, tensors):
        # The UNet may answer in another dtype than the VAE's.
        if step + 1 == args.num_inference_steps:
            return {"latents": tensors["latents"].to(pipe.vae.dtype)}
        return tensors

    return pipe(
        image,
        image.height,
        image.width,
        args.num_frames,
        args.num_inference_steps,
        fps=fps,
        motion_bucket_id=motion_bucket_id,
        noise_aug_strength=args.noise_aug_strength,
        decode_chunk_size=args.decode_chunk_size,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=match_decoder,
    ).frames[0]


def render_validation(
    pipe: StableVideoDiffusionPipeline, unet, step: int, args: argparse.Namespace
) -> list[RenderedClip]:
    """Animate each --validation_image with a fixed seed, and write it to <output_dir>/validation."""
    clips = []
    for validation_input in args.validation:
        path = validation_input.image
        name = images.clip_name(path)
        image = load_picture(path, args.width, args.height, args.resize_mode)
        frames = sample(
            pipe,
            image,
            args,
            fps=validation_input.fps,
            motion_bucket_id=validation_input.motion_bucket_id,
            seed=args.validation_seed,
        )
        stem = Path(args.output_dir, "validation", f"step{step:06d}_{name}")
        video_writer.write_clip(stem, frames, validation_input.fps)
        clips.append(RenderedClip(name, image, frames))
    return clips


def export_pipeline(pipe: StableVideoDiffusionPipeline, unet, args: argparse.Namespace) -> None:
    """Write the trained SVD as a folder that StableVideoDiffusionPipeline.from_pretrained loads.

    Frozen weights are loaded again in float32, because training may have rounded them.
    """
    import torch

    exported = loading.load_svd(
        args.pretrained_model_name_or_path, torch.float32, args.revision, args.pretrain_unet
    )
    for name, parameter in loading.trainable_parameters(unet).items():
        exported.unet.get_parameter(name).data.copy_(parameter)
    exported.save_pretrained(args.output_dir)


# ----------------------------------------------------------------------------------------- set up


def select_parameters(
    unet: UNetSpatioTemporalConditionModel, args: argparse.Namespace
) -> UNetSpatioTemporalConditionModel:
    """Train the parameters whose names contain one of --train_params; by default all.

    Parameters without an effect on the output are never trained.
    """
    unet.requires_grad_(False)
    effective = {
        name: parameter
        for name, parameter in unet.named_parameters()
        if unet_optimizations.has_effect(name)
    }
    for part in args.train_params:
        if not any(part in name for name in effective):
            raise ValueError(
                f"--train_params {part}: no parameter of the UNet that has an effect contains this "
                "name. Try temporal_transformer_blocks, attn1 or conv_in."
            )
    for name, parameter in effective.items():
        is_selected = not args.train_params or any(part in name for part in args.train_params)
        parameter.requires_grad_(is_selected)
    return unet


@dataclass(frozen=True)
class Recipe:
    """The functions that a kind of training brings to `train`. Defaults: full fine-tuning.

    make_dataset: (clips, sampler, spec, seed=, latent_cache=) -> dataset.
    prepare_unet: (unet, args) -> model, with requires_grad set on what trains.
    prepare_batch: (batch, pipe) -> batch on the device, with further entries for the loss.
    loss: (model, pipe, batch, LossOptions) -> (b,). The validation loss stays `loss_at_sigma`.
    validate: (pipe, model, step, args) -> rendered clips.
    export: (pipe, model, args) -> None, writes the result to args.output_dir.
    """

    make_dataset: Callable = DummyDataset
    prepare_unet: Callable = select_parameters
    prepare_batch: Callable = lambda batch, pipe: batch
    loss: Callable = training_loss
    validate: Callable = render_validation
    export: Callable = export_pipeline


def set_up(args: argparse.Namespace) -> tuple[Accelerator, Path | None, argparse.Namespace]:
    """Start accelerate, find the checkpoint to resume from, resolve precision and seed."""
    from accelerate.utils import broadcast_object_list

    args = replace_args(args, mixed_precision=precision.check_precision(args.mixed_precision))
    accelerator = distributed.create_accelerator(args)
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    precision.set_tf32(args.allow_tf32, args.mixed_precision)

    checkpoint = None
    if accelerator.is_main_process:  # only one process reads all checkpoints
        checkpoint = checkpoints.pick_checkpoint(args.resume_from_checkpoint, args.output_dir)
    (checkpoint,) = broadcast_object_list([checkpoint])
    seed = args.seed
    if checkpoint:
        seed = checkpoints.read_progress(checkpoint)["seed"]
        if args.seed not in (None, seed):
            raise ValueError(
                f"--seed {args.seed}: {checkpoint} was trained with seed {seed}. "
                "Pass that seed, or leave the flag out."
            )
        run_record.check_resumed_args(args)
    if seed is None:  # the same on every process
        (seed,) = broadcast_object_list([random.SystemRandom().randrange(2**31)])
    logger.info(
        "seed %d, log sigma ~ N(%g, %g^2), precision %s, %s, %d process(es)",
        seed,
        args.P_mean,
        args.P_std,
        args.mixed_precision,
        accelerator.device,
        accelerator.num_processes,
    )
    return accelerator, checkpoint, replace_args(args, seed=seed)


@dataclass
class Models:
    """The pipeline, its UNet with adapters, and the parameters that train.

    num_frames: of a clip, by --num_frames or else by the model.
    """

    pipe: StableVideoDiffusionPipeline
    unet: torch.nn.Module
    trained_by_name: dict[str, torch.nn.Parameter]
    num_frames: int
    memory: memory_estimate.MemoryMonitor


def load_models(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> Models:
    """Load SVD, let the recipe prepare its UNet, and move everything to the device."""
    import torch

    pipe = loading.load_svd(
        args.pretrained_model_name_or_path, torch.float32, args.revision, args.pretrain_unet
    )
    unet = recipe.prepare_unet(unet_optimizations.speed_up(pipe.unet), args)
    num_frames = args.num_frames or pipe.unet.config.num_frames
    args = replace_args(args, num_frames=num_frames)
    memory = memory_estimate.MemoryMonitor(args, unet, recipe.prepare_unet, pipe, device)
    if args.compile:
        unet_optimizations.compile_blocks(unet)
    activation_checkpointing.checkpoint_activations(unet, memory.policy)
    latent_cache.check_cache(
        args.latent_cache, pipe, args.mixed_precision, args.width, args.height, args.resize_mode
    )
    loading.move_models(
        pipe,
        unet,
        args.mixed_precision,
        device,
        whole_encoders=not args.latent_cache,
        master_dtype=optimizers.OPTIMIZERS[args.optimizer].weight_dtype,
    )
    return Models(pipe, unet, loading.trainable_parameters(unet), num_frames, memory)


def clip_spec(args: argparse.Namespace) -> ClipSpec:
    """Return the size, length and frame rate of the clips that the flags ask for."""
    return ClipSpec(args.width, args.height, args.num_frames, args.fps, args.resize_mode)


def load_training_set(
    args: argparse.Namespace, make_dataset: Callable, spec: ClipSpec, num_processes: int = 1
):
    """Return the dataset of --base_folder, without the clips that --validation_ratio holds out."""
    folders = args.base_folder
    if args.validation_ratio:
        folders = split.select_training_clips(folders, args.validation_ratio)
    clips = ClipCollection(
        folders,
        spec,
        motion_bucket_id=args.motion_bucket_id,
        source_fps=args.source_fps,
        bucket_step=bucket_step(args),
        with_pictures=args.image_ratio > 0,
    )
    pools = clips.pools(args.folder_weights, args.image_ratio)
    clip_sampler = ClipSampler(pools, args.seed, args.per_gpu_batch_size * num_processes)
    if args.latent_cache:
        latent_cache.check_cached_videos(args.latent_cache, clips)
    return make_dataset(clips, clip_sampler, spec, seed=args.seed, latent_cache=args.latent_cache)


def load_validation_set(
    args: argparse.Namespace,
    make_dataset: Callable,
    spec: ClipSpec,
    training_clips: ClipCollection,
    *,
    check_overlap: bool = True,
):
    """Return the dataset of the validation clips, each once, or None if no flag asks for one.

    check_overlap: raise ValueError if a clip of --validation_folder is a training clip.
    """
    if args.validation_ratio:
        flag = "--validation_ratio"
        folders = split.select_validation_clips(training_clips.indexes)
    elif args.validation_folder:
        flag = "--validation_folder"
        folders = args.validation_folder
    else:
        return None
    with split.errors_name_flag(flag):
        clips = ClipCollection(
            folders,
            spec,
            motion_bucket_id=args.motion_bucket_id,
            source_fps=args.source_fps,
            bucket_step=bucket_step(args),
        )
        clip_sampler = ClipSampler([(range(len(clips)), 1)], args.validation_seed)
        dataset = make_dataset(clips, clip_sampler, spec, seed=args.validation_seed)
    if check_overlap and not args.validation_ratio:
        split.check_disjoint(clips, training_clips)
    clips.rank_among(training_clips)
    return dataset


def bucket_step(args: argparse.Namespace) -> int:
    """Return the pixels of which the sides of a bucket are multiples; 0 without --buckets."""
    if not args.buckets:
        return 0
    return loading.read_size_multiple(args.pretrained_model_name_or_path, args.revision)


def load_data(args: argparse.Namespace, recipe: Recipe, accelerator: Accelerator):
    """Return (training set, validation set or None)."""
    spec = clip_spec(args)
    validation_set = None
    with accelerator.main_process_first():  # it lists the folders, the others read its list
        ensure_demo(args.base_folder)
        training_set = load_training_set(args, recipe.make_dataset, spec, accelerator.num_processes)
        if args.validation_steps:
            validation_set = load_validation_set(
                args, recipe.make_dataset, spec, training_set.clips
            )
    distributed.check_same_on_all_processes("--base_folder", training_set.clips.digest())
    if validation_set:
        distributed.check_same_on_all_processes(
            "--validation_folder", validation_set.clips.digest()
        )
    return training_set, validation_set


# ------------------------------------------------------------------------------------------- train


@dataclass
class TrainState:
    """How far a run is: the content of a checkpoint's progress.json."""

    step: int
    samples: int
    seed: int


@dataclass
class TrainingRun:
    """Everything that the steps of one training run share.

    loss: that of the recipe, with activations offloaded if the flags say so. unet: the model with its
    adapters. model: the same, as DDP, FSDP2 or DeepSpeed wraps it. trained: the parameters that train.
    """

    args: argparse.Namespace
    recipe: Recipe
    loss: Callable
    options: LossOptions
    accelerator: Accelerator
    pipe: StableVideoDiffusionPipeline
    unet: torch.nn.Module
    model: torch.nn.Module
    trained: list[torch.nn.Parameter]
    optimizer: Any
    schedule: Any
    ema: Any
    memory: memory_estimate.MemoryMonitor
    manager: checkpoints.CheckpointManager
    validation_loss: validation_loss.ValidationLoss | None = None

    @property
    def samples_per_step(self) -> int:
        """Clips of an optimizer step, on all processes."""
        return samples_per_step(self.args, self.accelerator.num_processes)


@dataclass(frozen=True)
class StepResult:
    """The report of one optimizer step, the same on all processes.

    unreadable: clips of this step that could not be read. skipped: fp16's scaler met an overflow and
    left the weights as they were. stop: a process was asked to stop.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    unreadable: int
    skipped: bool
    stop: bool


def samples_per_step(args: argparse.Namespace, num_processes: int) -> int:
    """Return the number of clips of an optimizer step."""
    return args.per_gpu_batch_size * num_processes * args.gradient_accumulation_steps


def prepare_run(
    args: argparse.Namespace, recipe: Recipe, accelerator: Accelerator, models: Models
) -> TrainingRun:
    """Make optimizer, schedule and EMA weights, and hand the model to the engine."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    optimizer = optimizers.make_optimizer(models.trained_by_name, args)
    model, optimizer, trained = distributed.prepare_for_engine(
        accelerator, models.unet, optimizer, args
    )
    # diffusers' constant schedule has no warm-up; that of 0 steps is the same
    lr_scheduler = "constant_with_warmup" if args.lr_scheduler == "constant" else args.lr_scheduler
    schedule = get_scheduler(
        lr_scheduler,
        distributed.torch_optimizer(optimizer),
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    ema = None
    if args.use_ema:
        ema = EMAModel([parameter.float() for parameter in trained], decay=EMA_DECAY)
    manager = checkpoints.CheckpointManager(
        accelerator,
        args.output_dir,
        args.checkpoints_total_limit,
        models.unet,
        optimizer,
        schedule,
        ema,
    )
    loss = recipe.loss
    if args.offload_activations:
        loss = activation_checkpointing.offload_activations(models.unet, loss)
    return TrainingRun(
        args=args,
        recipe=recipe,
        loss=loss,
        options=LossOptions.from_args(args),
        accelerator=accelerator,
        pipe=models.pipe,
        unet=models.unet,
        model=model,
        trained=trained,
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        memory=models.memory,
        manager=manager,
    )


def make_loader(run: TrainingRun, training_set, state: TrainState) -> torch.utils.data.DataLoader:
    """Return a loader that begins with the first sample that this run has not seen."""
    import torch

    args = run.args
    accelerator = run.accelerator
    batch_indices = sampler.BatchIndexSampler(
        state.samples,
        args.per_gpu_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    return torch.utils.data.DataLoader(
        training_set,
        batch_sampler=batch_indices,
        num_workers=args.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=args.num_workers > 0,
        worker_init_fn=safety.ignore_signals,
    )


def train_step(
    run: TrainingRun, batches: Iterator[dict], signals: safety.StopSignals
) -> StepResult:
    """Take one optimizer step, on --gradient_accumulation_steps batches."""
    import torch

    args = run.args
    accelerator = run.accelerator
    # Sums over processes of loss, unreadable clips, stop requests and gradient norm: one reduction.
    sums = torch.zeros(4, device=accelerator.device)
    LOSS, UNREADABLE, STOP, GRAD_NORM = range(4)
    for _ in range(args.gradient_accumulation_steps):
        batch = distributed.batch_to_device(next(batches), accelerator.device)
        batch = run.recipe.prepare_batch(batch, run.pipe)
        with accelerator.accumulate(run.model):
            loss = run.loss(run.model, run.pipe, batch, run.options).mean()
            accelerator.backward(loss)
            grad_norm = distributed.clip_grad_norm(
                accelerator, run.trained, args.max_grad_norm or math.inf
            )
            run.optimizer.step()
            run.optimizer.zero_grad()
        sums[LOSS] += loss.detach() / args.gradient_accumulation_steps / accelerator.num_processes
        sums[UNREADABLE] += batch["failed"].sum()
    learning_rate = float(run.schedule.get_last_lr()[0])
    skipped = distributed.step_was_skipped(accelerator)
    if not skipped:
        run.schedule.step()
        if run.ema:
            run.ema.step(run.trained)
    sums[STOP] = signals.caught
    sums[GRAD_NORM] = grad_norm / accelerator.num_processes
    # The only place where a step waits for the GPU.
    mean_loss, unreadable, stop, mean_norm = accelerator.reduce(sums).tolist()
    return StepResult(mean_loss, mean_norm, learning_rate, int(unreadable), skipped, stop > 0)


def run_validation(run: TrainingRun, step: int) -> list[RenderedClip]:
    """Measure the validation loss and render the validation clips, with the EMA weights if there are any."""
    import torch

    accelerator = run.accelerator
    losses = {}
    clips: list[RenderedClip] = []
    if run.validation_loss:
        with distributed.gathered_weights(accelerator, run.unet):
            losses["raw"] = run.validation_loss.losses(run.unet)
    with (
        torch.no_grad(),
        optimizers.ema_weights(run.ema, run.trained),
        distributed.gathered_weights(accelerator, run.unet),
    ):
        if run.validation_loss and run.ema:
            losses["ema"] = run.validation_loss.losses(run.unet)
        if accelerator.is_main_process:
            with loading.encoders_on_device(run.pipe, accelerator.device):
                clips = run.recipe.validate(run.pipe, run.unet, step, run.args)
            comparison = None
            if run.validation_loss:
                comparison = run.validation_loss.compare(step, losses)
            validation.log_validation(accelerator, run.args, step, clips, comparison)
    accelerator.wait_for_everyone()
    return clips


def train_until_done(run: TrainingRun, training_set, state: TrainState) -> None:
    """Repeat: step, checks, log, checkpoint, validation. A signal saves a checkpoint and ends the process."""
    from tqdm import tqdm

    args = run.args
    accelerator = run.accelerator
    first_step = state.step
    unreadable = 0
    batches = iter(make_loader(run, training_set, state))
    metrics = None
    if accelerator.is_main_process:
        metrics = run_record.MetricsWriter(args.output_dir, first_step)
    bar = tqdm(
        initial=first_step, total=args.max_train_steps, disable=not accelerator.is_main_process
    )
    with safety.StopSignals() as signals, run.manager, bar:
        for step in range(first_step + 1, args.max_train_steps + 1):
            began = run.memory.begin_step()
            result = train_step(run, batches, signals)
            state.step = step
            state.samples += run.samples_per_step
            unreadable += result.unreadable
            safety.check_finite(
                step,
                result.loss,
                result.grad_norm,
                result.skipped,
                result.learning_rate,
                run.manager.step,
            )
            safety.check_unreadable_clips(unreadable, (step - first_step) * run.samples_per_step)
            run.manager.check()
            if metrics:
                log_step(run, metrics, bar, step, result, time.perf_counter() - began)

            is_last = result.stop or step == args.max_train_steps
            if is_last or step % args.checkpointing_steps == 0:
                run.manager.save(asdict(state))
            if result.stop:
                end_early(run, step)
            if args.validation_steps and step % args.validation_steps == 0 and not is_last:
                run_validation(run, step)


def log_step(
    run: TrainingRun,
    metrics: run_record.MetricsWriter,
    bar,
    step: int,
    result: StepResult,
    seconds: float,
) -> None:
    """Write a row of metrics.jsonl, show it in the progress bar, and send it to the tracker."""
    row = metrics.write(
        step,
        result.loss,
        result.learning_rate,
        result.grad_norm,
        seconds,
        run.memory.end_step(),
    )
    values = {name: value for name, value in row.items() if value is not None}
    shown = {name: f"{value:.3g}" for name, value in values.items() if name != "step"}
    bar.set_postfix(shown, refresh=False)
    bar.update()
    run.accelerator.log(values, step=step)


def end_early(run: TrainingRun, step: int) -> None:
    """End the process after a signal, once the checkpoint is on disk."""
    run.manager.finish()
    logger.warning("stopped at step %d; the same command continues from there", step)
    run.accelerator.end_training()
    sys.exit(143)  # 128 + SIGTERM


def finish(run: TrainingRun, before: list[RenderedClip], after: list[RenderedClip]) -> None:
    """Export the result, and write the before/after comparison and the report."""
    args = run.args
    accelerator = run.accelerator
    with (
        optimizers.ema_weights(run.ema, run.trained),
        distributed.gathered_weights(accelerator, run.unet),
    ):
        if accelerator.is_main_process:
            run.recipe.export(run.pipe, run.unet, args)
    if accelerator.is_main_process:
        if after:
            rows: list[dict[str, Any]] = [
                {
                    "first frame": base.first_frame,
                    "base": base.frames,
                    f"step {args.max_train_steps}": trained.frames,
                }
                for base, trained in zip(before, after)
            ]
            video_writer.write_comparison(
                Path(args.output_dir, "comparison"), rows, args.validation[0].fps
            )
        page = report.write_report(args.output_dir)
        if args.push_to_hub:
            push_to_hub(args)
        run.memory.report()
        logger.info("done: weights in %s; look at %s", args.output_dir, page)
    accelerator.end_training()


def train(args: argparse.Namespace, recipe: Recipe) -> None:
    """Train, validate, save checkpoints and export the result. The loop of every trainer."""
    accelerator, checkpoint, args = set_up(args)
    models = load_models(args, recipe, accelerator.device)
    args = replace_args(
        args,
        num_frames=models.num_frames,
        gradient_checkpointing=models.memory.policy,
    )
    training_set, validation_set = load_data(args, recipe, accelerator)
    args = resolve_schedule(args, training_set, accelerator.num_processes)
    args = validation.choose_validation_inputs(args, training_set, validation_set)
    run_record.record_run(accelerator, args, training_set.clips)

    run = prepare_run(args, recipe, accelerator, models)
    if validation_set:
        run.validation_loss = validation_loss.ValidationLoss(
            validation_set,
            args,
            models.pipe,
            accelerator,
            loss_at_sigma=loss_at_sigma,
            add_encodings=add_encodings,
            prepare_batch=recipe.prepare_batch,
        )

    # The base model is rendered before a checkpoint is loaded: a resumed run compares with it, too.
    before = run_validation(run, step=0) if args.validation_steps else []
    state = TrainState(step=0, samples=0, seed=args.seed)
    if checkpoint:
        state = TrainState(**run.manager.resume(checkpoint))
        logger.info("resumed from %s", checkpoint)
    train_until_done(run, training_set, state)
    after = run_validation(run, args.max_train_steps) if args.validation_steps else []
    finish(run, before, after)


def resolve_schedule(
    args: argparse.Namespace, training_set, num_processes: int
) -> argparse.Namespace:
    """Return the flags with the number of steps and the learning rate of this run."""
    clips = samples_per_step(args, num_processes)
    steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(training_set) / clips)
    learning_rate = args.learning_rate * clips if args.scale_lr else args.learning_rate
    return replace_args(args, max_train_steps=steps, learning_rate=learning_rate)


# --------------------------------------------------------------------------------------------- CLI


def build_parser(description: str | None = __doc__, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser of the flags that all trainers share, in the order in which the file uses them.

    defaults: those of a script, in place of the ones below.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser.add_argument_group("model"))
    add_data_flags(parser.add_argument_group("data"))
    add_objective_flags(parser.add_argument_group("objective"))
    add_optimization_flags(parser.add_argument_group("optimization"))
    add_validation_flags(parser.add_argument_group("validation"))
    add_output_flags(parser.add_argument_group("output"))
    parser.set_defaults(**defaults)
    return parser


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pretrained_model_name_or_path",
        default=str(TINY_SVD),
        help="Hub name or folder of an SVD; default: the embedded one",
    )
    group.add_argument("--revision", help="revision of the model on the Hub")
    group.add_argument("--pretrain_unet", help="folder of another UNet to start from")
    group.add_argument(
        "--train_params",
        nargs="+",
        default=[],
        help="train only the parameters whose names contain one of these; default: all",
    )
    group.add_argument(
        "--gradient_checkpointing",
        nargs="?",
        const="blocks",
        default="none",
        choices=[*activation_checkpointing.POLICIES, "auto"],
        help="recompute activations in the backward pass; the first flag to try when out of memory. "
        "From least to most: none (default), level0 (the highest resolution), level01, blocks "
        "(the flag alone), nested. auto: the fastest that fits the free memory",
    )
    group.add_argument(
        "--offload_activations",
        action="store_true",
        help="keep activations in CPU memory until the backward pass: slower, and the least GPU "
        "memory together with --gradient_checkpointing nested",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the repeated blocks of the UNet: the first step takes minutes, later "
        "steps are faster",
    )
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="default: what accelerate is configured for, otherwise the best that the GPU has; "
        "no on a CPU",
    )
    group.add_argument(
        "--allow_tf32",
        action="store_true",
        help="TF32 matrix products in float32 layers (Ampere and newer)",
    )


def add_data_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--base_folder",
        nargs="+",
        default=[base_folder],
        metavar="FOLDER",
        help=f"folders of videos: video files, or folders of frames; default: {base_folder}",
    )
    group.add_argument(
        "--folder_weights",
        nargs="+",
        type=positive_float,
        metavar="WEIGHT",
        help="how many samples each folder gets, relative to the others; default: as many as it "
        "has clips",
    )
    group.add_argument(
        "--fps",
        type=number_or_word("native", positive_float),
        default=7,
        help="frames per second of the clips, taken by time; native: each video's own. A slower "
        "video keeps its own frame rate; default: %(default)s",
    )
    group.add_argument(
        "--source_fps",
        type=positive_float,
        help="frames per second of frame folders without clip.json; default: --fps, or 7",
    )
    group.add_argument(
        "--motion_bucket_id",
        type=number_or_word("auto"),
        default="auto",
        help="bucket of clips without one: auto ranks them by their motion, 1 to 255; or a number, "
        "SVD's own is 127; default: %(default)s",
    )
    group.add_argument(
        "--image_ratio",
        type=fraction_below_one,
        default=0.0,
        help="fraction of samples that are pictures in the folders, as clips of one frame; "
        "default: %(default)s",
    )
    group.add_argument(
        "--buckets",
        action="store_true",
        help="sample each clip in the aspect ratio nearest to its own, at about as many pixels; "
        "all clips of a batch have one size",
    )
    group.add_argument(
        "--width",
        type=multiple_of_8,
        default=512,
        help="pixels, a multiple of 8; default: %(default)s",
    )
    group.add_argument(
        "--height",
        type=multiple_of_8,
        default=320,
        help="pixels, a multiple of 8; lower both when out of memory; default: %(default)s",
    )
    group.add_argument(
        "--num_frames",
        type=positive_int,
        help="frames of a clip; default: the model's (14, or 25 for XT)",
    )
    group.add_argument(
        "--resize_mode",
        choices=["crop", "stretch"],
        default="crop",
        help="crop: fill the size and crop the centre (default); stretch: ignore the aspect ratio",
    )
    group.add_argument(
        "--latent_cache",
        metavar="FOLDER",
        help="output of cache_latents.py for this folder, size and model: training then runs the "
        "VAE for one frame only, and CLIP not at all",
    )
    group.add_argument(
        "--num_workers",
        type=non_negative_int,
        default=2,
        help="loader processes of each GPU; 0 loads in the training process; default: %(default)s",
    )


def add_objective_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--P_mean",
        type=float,
        help="mean of log sigma; default: 0.7 up to 576x320, 1.0 above",
    )
    group.add_argument(
        "--P_std", type=non_negative_float, help="standard deviation of log sigma; default: 1.6"
    )
    group.add_argument(
        "--conditioning_dropout_prob",
        type=float,
        nargs="+",
        default=[0.0, 0.0, 0.1],
        metavar="P",
        help="probability of dropping the CLIP embedding only, the image latents only, and both; or "
        "one number for each of the three; default: 0 0 0.1",
    )
    group.add_argument(
        "--vae_encode_chunk",
        type=positive_int,
        default=1,
        help="frames that the VAE encodes at once: 1 takes the least memory, 8 is faster on a large "
        "GPU, the result is the same; default: %(default)s",
    )


def add_optimization_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--per_gpu_batch_size",
        type=positive_int,
        default=1,
        help="clips on each GPU; default: %(default)s",
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=1,
        help="batches of an optimizer step; default: %(default)s",
    )
    group.add_argument(
        "--max_train_steps",
        type=positive_int,
        help="optimizer steps; default: from --num_train_epochs",
    )
    group.add_argument(
        "--num_train_epochs",
        type=positive_int,
        default=100,
        help="passes over the clips, used without --max_train_steps; default: %(default)s",
    )
    group.add_argument(
        "--learning_rate", type=non_negative_float, default=1e-5, help="default: %(default)s"
    )
    group.add_argument(
        "--scale_lr",
        action="store_true",
        help="multiply the learning rate by the number of clips of a step",
    )
    group.add_argument(
        "--lr_scheduler",
        default="constant",
        choices=["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"],
        help="learning rate after the warm-up; default: %(default)s",
    )
    group.add_argument(
        "--lr_warmup_steps",
        type=non_negative_int,
        default=0,
        help="optimizer steps of the linear warm-up; default: %(default)s",
    )
    group.add_argument(
        "--optimizer",
        choices=optimizers.OPTIMIZERS,
        default="adamw",
        help="adamw8bit keeps Adam's moments in 8 bits; adamw_bf16_sr keeps weights, gradients and "
        "moments in bf16 with stochastic rounding; both need torchao; default: %(default)s",
    )
    group.add_argument(
        "--adam_beta1", type=fraction_below_one, default=0.9, help="default: %(default)s"
    )
    group.add_argument(
        "--adam_beta2", type=fraction_below_one, default=0.999, help="default: %(default)s"
    )
    group.add_argument(
        "--adam_weight_decay", type=non_negative_float, default=1e-2, help="default: %(default)s"
    )
    group.add_argument(
        "--adam_epsilon", type=positive_float, help="default: 1e-8, and 1e-6 with adamw8bit"
    )
    group.add_argument(
        "--max_grad_norm",
        type=non_negative_float,
        default=1.0,
        help="largest norm of the gradient; 0: do not clip; default: %(default)s",
    )
    group.add_argument(
        "--use_ema",
        action="store_true",
        help="keep an exponential moving average of the trained weights; validation and export use it",
    )
    group.add_argument(
        "--seed", type=int, help="default: drawn, printed, and kept when the run is resumed"
    )


def add_validation_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--validation_steps",
        type=non_negative_int,
        default=500,
        help="steps between validations, which also happen before and after training; 0: never; "
        "default: %(default)s",
    )
    group.add_argument(
        "--validation_folder",
        nargs="+",
        metavar="FOLDER",
        help="clips that do not train: each validation measures the loss on them, beside the base "
        "model's on the same noise",
    )
    group.add_argument(
        "--validation_ratio",
        type=fraction_below_one,
        default=0.0,
        help="hold out about this fraction of --base_folder for that instead. The split is by source "
        "video and by name, and stays as it is when videos are added",
    )
    group.add_argument(
        "--validation_clips",
        type=positive_int,
        default=16,
        help="validation clips that the loss is measured on; default: %(default)s",
    )
    group.add_argument(
        "--validation_image",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="pictures to animate, or videos of which the first frame is animated; default: the "
        "first validation video, or else the first training video",
    )
    group.add_argument(
        "--noise_aug_strength",
        type=non_negative_float,
        default=0.0,
        help="noise on the validation image; default: %(default)s",
    )
    group.add_argument(
        "--num_inference_steps",
        type=positive_int,
        default=25,
        help="sampling steps; default: %(default)s",
    )
    group.add_argument(
        "--decode_chunk_size",
        type=positive_int,
        default=8,
        help="frames that the VAE decodes at once; lower it when validation runs out of memory; "
        "default: %(default)s",
    )
    group.add_argument("--validation_seed", type=int, default=111, help="default: %(default)s")


def add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output_dir",
        default="outputs/svd",
        help="everything is written here; default: %(default)s",
    )
    group.add_argument(
        "--checkpointing_steps",
        type=positive_int,
        default=500,
        help="steps between checkpoints; default: %(default)s",
    )
    group.add_argument(
        "--checkpoints_total_limit",
        type=positive_int,
        help="checkpoints to keep; default: all",
    )
    group.add_argument(
        "--resume_from_checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest (default; a run without checkpoints starts from the base model), none, or a "
        "checkpoint folder",
    )
    group.add_argument(
        "--report_to",
        choices=["wandb", "tensorboard", "none"],
        default="none",
        help="tracker, beside metrics.jsonl; default: %(default)s",
    )
    group.add_argument(
        "--push_to_hub",
        action="store_true",
        help="upload the result, without checkpoints, as the user of `hf auth login` or HF_TOKEN",
    )
    group.add_argument("--hub_model_id", help="default: the name of --output_dir")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags and check what can be checked before anything is loaded."""
    args = parser.parse_args(argv)
    if args.offload_activations and args.gradient_checkpointing not in ("blocks", "nested"):
        parser.error(
            "--offload_activations: also pass --gradient_checkpointing blocks or nested; without it "
            "too much would be moved"
        )
    given = " ".join(map(str, args.conditioning_dropout_prob))
    if len(args.conditioning_dropout_prob) == 1:
        args.conditioning_dropout_prob = args.conditioning_dropout_prob * 3
    dropout = args.conditioning_dropout_prob
    if len(dropout) != 3 or min(dropout) < 0 or sum(dropout) > 1:
        parser.error(
            f"--conditioning_dropout_prob {given}: expected one number up to 1/3, which is then the "
            "probability of each of three cases, or three numbers whose sum is at most 1"
        )
    if args.folder_weights and len(args.folder_weights) != len(args.base_folder):
        parser.error(
            f"--folder_weights: expected {len(args.base_folder)} positive numbers, one per "
            f"--base_folder; got {len(args.folder_weights)}"
        )
    if args.validation_folder and args.validation_ratio:
        parser.error(
            "--validation_ratio: cannot be used with --validation_folder, which already names the "
            "validation clips"
        )
    if args.image_ratio and args.latent_cache:
        parser.error("--image_ratio: cannot be used with --latent_cache, which holds only videos")
    for path in args.validation_image:
        if not Path(path).is_file():
            parser.error(f"--validation_image {path}: no such file")
    P_mean, P_std = default_P(args.width, args.height)
    if args.P_mean is None:
        args.P_mean = P_mean
    if args.P_std is None:
        args.P_std = P_std
    return args


if __name__ == "__main__":
    train(parse(build_parser()), Recipe())
