"""Fine-tune Stable Video Diffusion on a folder of videos.

    accelerate launch train_svd.py --pretrained_model_name_or_path=/path/to/weight --per_gpu_batch_size=1 \\
        --gradient_accumulation_steps=1 --max_train_steps=50000 --width=512 --height=320 --checkpointing_steps=1000 \\
        --checkpoints_total_limit=1 --learning_rate=1e-5 --lr_warmup_steps=0 --seed=123 --mixed_precision="fp16" \\
        --validation_steps=200

    accelerate launch train_svd.py --max_train_steps=20       # no GPU, no weights: the embedded SVD

Way of a frame to the loss: DummyDataset -> encode_video -> condition -> drop_conditioning -> svd_loss -> train.
A killed run goes on when the same command is given again. Next: train_svd_lora.py, the same loop with adapters.
"""

import argparse
import logging
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
from einops import rearrange, repeat

from svd_xtend.data import images, latent_cache, sampler, split
from svd_xtend.data.clip import load_picture
from svd_xtend.demo.synthetic_clips import ensure_demo
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.evaluation import report
from svd_xtend.evaluation.model_card import push_to_hub
from svd_xtend.inference import video_writer
from svd_xtend.models import activation_checkpointing, loading, unet_optimizations
from svd_xtend.training import (
    checkpoints,
    distributed,
    flag_types,
    memory_estimate,
    optimizers,
    run_record,
    safety,
    validation,
    validation_loss,
)

base_folder = "data/demo"  # <- your folder of videos, files or folders of frames; data/demo is drawn at first use

logger = logging.getLogger("svd_xtend")


# ---------------------------------------------------------------------------------------------------------------- data


class DummyDataset:
    """Clips from a folder of videos, each a folder of frames or a file, sampled by time at `fps`.

        base_folder/
            video_name1/  frame_1.jpg  frame_2.jpg  ...  [clip.json: {"fps": 24, "motion_bucket_id": 127, "caption": ""}]
            video_name2.mp4  [video_name2.txt: its caption]
            ...

    base_folder may be several, drawn by `weights`. Item `index`, a global sample index without end: each pass over a
    folder is a fresh permutation keyed by (seed, pass), the window in the video is keyed by (seed, index). Holds
    `pixel_values` (f, 3, h, w) uint8, `fps` and `motion_bucket_id` of the clip, its `caption` or "", `index`, and `failed`:
    how many unreadable clips others stood in for. buckets: not 0, in a size of at most as many pixels and the clip's aspect
    ratio, of multiples of this; image_ratio: so many samples are pictures of the folders, of one frame. `batch` samples on
    end are then of one size.
    """

    def __init__(
        self, base_folder, width, height, num_frames, fps, motion_bucket_id, resize_mode, seed=0, cached=None, weights=None,
        source_fps=None, buckets=0, image_ratio=0.0, batch=1,
    ):  # fmt: skip
        self.sample_frames, self.resize_mode, self.seed, self.latent_cache = (
            num_frames,
            resize_mode,
            seed,
            cached,
        )
        told = fps, motion_bucket_id, source_fps, (width, height), buckets, image_ratio > 0
        self.clips = sampler.ClipCollection(base_folder, num_frames, *told)
        self.order = sampler.ClipSampler(self.clips.pools(weights, image_ratio), seed, batch)
        if cached:
            latent_cache.check_cached_videos(cached, self.clips)

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        for failed, number in enumerate(self.order.choices(index)):
            try:
                still = number >= len(self.clips)
                clip, length = (
                    (self.clips.picture(number), 1)
                    if still
                    else (self.clips[number], self.sample_frames)
                )
                start = np.random.default_rng((self.seed, index)).integers(
                    clip.num_starts(length, clip.metadata["fps"])
                )
                frames = clip.frame_indices(start, length, clip.metadata["fps"])
                return {
                    **self.read_window(clip, frames, index),
                    "index": index,
                    "failed": failed,
                    **clip.metadata,
                }
            except ValueError as error:
                logger.warning("%s; another clip takes its place", error)
        raise ValueError(
            "--base_folder: not one clip can be read; the warnings above name the files"
        )

    def read_window(self, clip, frames, index):
        """What an item holds of these `frames` of a clip, by their numbers; a subclass adds to it, `cond` for one. With a latent
        cache: of the frames only the first, and in place of the others `moments` and `image_embeds`."""
        pixels = clip.read(frames[: 1 if self.latent_cache else None], *clip.size, self.resize_mode)
        cached = (
            latent_cache.read_cached_window(self.latent_cache, clip, frames)
            if self.latent_cache
            else {}
        )
        return {"pixel_values": rearrange(pixels, "f h w c -> f c h w"), **cached}


# ----------------------------------------------------------------------------------------------------------------- EDM


def scalings(sigma):
    """(c_skip, c_out, c_in, c_noise) of D(x) = c_skip x + c_out F(c_in x; c_noise), Karras et al. 2022, Eq. 7.

    SVD predicts v, so sigma_data = 1 and c_out is negative (SVD paper, App. D.2).
    """
    c_skip = 1 / (sigma**2 + 1)
    c_out = -sigma / (sigma**2 + 1) ** 0.5
    c_in = 1 / (sigma**2 + 1) ** 0.5
    c_noise = 0.25 * sigma.log()
    return c_skip, c_out, c_in, c_noise


def loss_weight(sigma):
    """lambda(sigma) of |D - x|^2 (Karras et al. 2022, Table 1, sigma_data = 1). It is 1 / c_out^2, so that the
    loss is a plain mean square on what the network predicts. Edit this line to weight noise levels differently."""
    return (sigma**2 + 1) / sigma**2


def default_P(width, height):
    """(P_mean, P_std) of log sigma by size: SVD paper, App. D.2 (image-to-video, base and high resolution)."""
    return (0.7, 1.6) if width * height <= 576 * 320 else (1.0, 1.6)


class SampleNoise:
    """Random draws of a batch, each sample's from a generator of its own keyed by (seed, global sample index)."""

    def __init__(self, seed, indices, device):
        import torch

        keys = [
            int(np.random.SeedSequence((seed, int(i))).generate_state(1, np.uint64)[0])
            for i in indices
        ]
        self.generators, self.device = (
            [torch.Generator(device).manual_seed(key) for key in keys],
            device,
        )

    def normal(self, *shape):
        """(b, *shape) from N(0, 1), float32."""
        import torch

        return torch.stack(
            [torch.randn(shape, generator=g, device=self.device) for g in self.generators]
        )

    def uniform(self):
        """(b,) from U[0, 1)."""
        import torch

        return torch.stack(
            [torch.rand((), generator=g, device=self.device) for g in self.generators]
        )


# -------------------------------------------------------------------------------------------------------- conditioning


def posterior(vae, pixel_values, chunk=1):
    """(b, f, 3, h, w) in [-1, 1] -> mean and std of the VAE's posterior (b, 2, f, 4, h/8, w/8) in float32.

    Frames are encoded `chunk` at a time: the same result, 25 times less memory."""
    import torch

    with torch.no_grad():
        frames = rearrange(pixel_values, "b f c h w -> (b f) c h w").to(vae.dtype)
        parts = [vae.encode(part).latent_dist for part in frames.split(chunk)]
    moments = torch.stack(
        [torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])]
    ).float()
    return rearrange(moments, "m (b f) c h w -> b m f c h w", b=len(pixel_values))


def encode_video(vae, pixel_values, noise, chunk=1, moments=None):
    """(b, f, 3, h, w) in [-1, 1] -> latents (b, f, 4, h/8, w/8) in float32, scaled to about unit variance.

    Samples the posterior. moments: what `posterior` says, from a cache; nothing is encoded then."""
    mean, std = (posterior(vae, pixel_values, chunk) if moments is None else moments).unbind(1)
    return (mean + std * noise.normal(*mean.shape[1:])) * vae.config.scaling_factor


def embed_image(pipe, first_frame):
    """CLIP embedding (b, 1, d) of clean frames (b, 3, h, w) in [-1, 1], resized as the pipeline does."""
    import torch
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as stock

    # private, but the sampler's own: any other resize would train on embeddings that inference never shows
    pixels = (stock._resize_with_antialiasing(first_frame.float(), (224, 224)) + 1) / 2
    # channel by channel, by numbers: a tensor of them would have to be sent to the GPU, and wait
    mean, std = pipe.feature_extractor.image_mean, pipe.feature_extractor.image_std
    pixels = torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    with torch.no_grad():
        return pipe.image_encoder(pixels.to(pipe.image_encoder.dtype)).image_embeds[:, None]


def encode_ahead(pipe, batch, args):
    """The batch with what the frozen models say of it, for losses to come: only the noised first frame is left to encode."""
    frames = batch["pixel_values"]
    moments = posterior(pipe.vae, frames, args.vae_encode_chunk)
    return {**batch, "moments": moments, "image_embeds": embed_image(pipe, frames[:, 0])}


def condition(pipe, first_frame, fps, motion_bucket_id, noise, image_embeds=None):
    """What SVD is told: image_embeds (b, 1, d), image_latents (b, 4, h/8, w/8), added_time_ids (b, 3).

    CLIP sees the clean frame; the VAE a frame with noise of log sigma ~ N(-3, 0.5^2), by its mean and *unscaled*
    (SVD paper, App. D.4); the ids are (fps - 1, motion_bucket_id, noise_aug_strength) of each sample. image_embeds: from a
    cache, instead of asking CLIP.
    """
    import torch

    noise_aug_strength = (noise.normal() * 0.5 - 3).exp()
    noised = first_frame + noise_aug_strength[:, None, None, None] * noise.normal(
        *first_frame.shape[1:]
    )
    with torch.no_grad():
        parts = [
            pipe.vae.encode(frame).latent_dist.mode()
            for frame in noised.to(pipe.vae.dtype).split(1)
        ]
    added_time_ids = torch.stack(
        [fps.float() - 1, motion_bucket_id.float(), noise_aug_strength], dim=1
    )
    image_embeds = embed_image(pipe, first_frame) if image_embeds is None else image_embeds
    return image_embeds, torch.cat(parts).float(), added_time_ids


def drop_conditioning(image_embeds, image_latents, u, p_clip, p_latents, p_both):
    """Zero conditions for classifier-free guidance, by u (b,) in [0, 1):

    u in    [0, p_clip)   ... + p_latents)   ... + p_both)   beyond
    drops   embedding     latents            both            nothing
    """
    clip = (u < p_clip) | ((u >= p_clip + p_latents) & (u < p_clip + p_latents + p_both))
    latents = (u >= p_clip) & (u < p_clip + p_latents + p_both)
    return image_embeds * ~clip[:, None, None], image_latents * ~latents[:, None, None, None]


# ---------------------------------------------------------------------------------------------------------------- loss


def svd_loss(model, pipe, batch, args):
    """EDM loss of each clip (b,). batch: pixel_values (b, f, 3, h, w) in [-1, 1], fps (b,), motion_bucket_id (b,),
    index (b,), and optionally `cond`, keyword arguments of the model, `pixel_weight` (b, f, 1, h/8, w/8), and `noise` in place of
    SampleNoise."""
    import torch

    pixel_values = batch["pixel_values"]
    noise = batch.get("noise") or SampleNoise(args.seed, batch["index"], pixel_values.device)
    latents = encode_video(
        pipe.vae, pixel_values, noise, args.vae_encode_chunk, batch.get("moments")
    )
    image_embeds, image_latents, added_time_ids = condition(
        pipe,
        pixel_values[:, 0],
        batch["fps"],
        batch["motion_bucket_id"],
        noise,
        batch.get("image_embeds"),
    )
    image_embeds, image_latents = drop_conditioning(
        image_embeds, image_latents, noise.uniform(), *args.conditioning_dropout_prob
    )
    image_latents = repeat(image_latents, "b c h w -> b f c h w", f=latents.shape[1])

    sigma = (noise.normal() * args.P_std + args.P_mean).exp()[:, None, None, None, None]
    _, c_out, c_in, c_noise = scalings(sigma)
    eps = noise.normal(*latents.shape[1:])
    inputs = torch.cat([c_in * (latents + sigma * eps), image_latents], dim=2)
    F_x = model(
        inputs, c_noise.flatten(), image_embeds, added_time_ids, **batch.get("cond", {})
    ).sample.float()
    # lambda |c_skip x + c_out F - y|^2 with c_out^2 in front: the bracket is then F - v, free of cancellation
    v = c_in * (eps - sigma * latents)
    return (loss_weight(sigma) * c_out**2 * (F_x - v) ** 2 * batch.get("pixel_weight", 1)).mean(
        (1, 2, 3, 4)
    )


# ------------------------------------------------------------------------------------------------- validate and export


def sample(pipe, image, told, seed, args):
    """Frames that follow an image, told its clip's `fps` and `motion_bucket_id`: the stock pipeline, its own guidance."""
    import torch

    def as_decoder(
        pipe, i, t, tensors
    ):  # the UNet answers in float32 or half, the decoder may be in the other
        return (
            {"latents": tensors["latents"].to(pipe.vae.dtype)}
            if i + 1 == args.num_inference_steps
            else tensors
        )

    return pipe(
        image, image.height, image.width, args.num_frames, args.num_inference_steps, fps=told["fps"],
        motion_bucket_id=told["motion_bucket_id"], noise_aug_strength=args.noise_aug_strength,
        decode_chunk_size=args.decode_chunk_size, generator=torch.Generator().manual_seed(seed), callback_on_step_end=as_decoder,
    ).frames[0]  # fmt: skip


def validate(pipe, unet, step, args):
    """Render each --validation_image with fixed seeds into <output_dir>/validation; returns [(name, image, frames)]."""
    clips = []
    for path, told in zip(args.validation_image, args.validation):
        image, name = (
            load_picture(path, args.width, args.height, args.resize_mode),
            images.clip_name(path),
        )
        frames = sample(pipe, image, told, args.validation_seed, args)
        video_writer.write_clip(
            Path(args.output_dir, "validation", f"step{step:06d}_{name}"), frames, told["fps"]
        )
        clips.append((name, image, frames))
    return clips


def export(pipe, unet, args):
    """Write the trained SVD as a folder that StableVideoDiffusionPipeline.from_pretrained loads: the weights as they
    were loaded, not as rounded for training, with the trained parameters over them."""
    import torch

    full = loading.load_svd(
        args.pretrained_model_name_or_path, torch.float32, args.revision, args.pretrain_unet
    )
    for name, p in loading.trainable_parameters(unet).items():
        full.unet.get_parameter(name).data.copy_(p)
    full.save_pretrained(args.output_dir)


# --------------------------------------------------------------------------------------------------------------- train


def start(args):
    """Check precision and resume point, settle the seed; returns (accelerator, checkpoint folder or None)."""
    import torch
    from accelerate.utils import broadcast_object_list

    accelerator = distributed.create_accelerator(args)
    logging.basicConfig(
        level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s"
    )
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    # convolutions: under fp16 the VAE alone computes in float32, which TF32 makes several times faster
    torch.backends.cudnn.allow_tf32 = args.allow_tf32 or args.mixed_precision != "no"
    checkpoint = None
    if accelerator.is_main_process:  # it alone reads all of them
        checkpoint = checkpoints.pick_checkpoint(args.resume_from_checkpoint, args.output_dir)
    (checkpoint,) = broadcast_object_list([checkpoint])
    if checkpoint:
        seed = checkpoints.read_progress(checkpoint)["seed"]
        if args.seed not in (None, seed):
            raise ValueError(
                f"--seed {args.seed}: {checkpoint} was trained with seed {seed}; pass that, or none"
            )
        args.seed = seed
        run_record.check_resumed_args(args)
    if args.seed is None:  # the same one on every process
        args.seed = broadcast_object_list([random.SystemRandom().randrange(2**31)])[0]
    logger.info("seed %d, log sigma ~ N(%g, %g^2), precision %s, %s, %d process(es)", args.seed, args.P_mean,
                args.P_std, args.mixed_precision, accelerator.device, accelerator.num_processes)  # fmt: skip
    return accelerator, checkpoint


def select_parameters(unet, args):
    """Mark what trains: parameters whose names contain one of --train_params, by default all that have an effect."""
    live = {
        name: p
        for name, p in unet.requires_grad_(False).named_parameters()
        if unet_optimizations.has_effect(name)
    }
    for part in args.train_params:
        if not any(part in name for name in live):
            raise ValueError(
                f"--train_params {part}: in no parameter's name. Try temporal_transformer_blocks, attn1, conv_in"
            )
    for name, p in live.items():
        p.requires_grad_(not args.train_params or any(part in name for part in args.train_params))
    return unet


def load_data(args, dataset, accelerator):
    """(the clips to train on, those held out or None), each a `dataset`."""
    folders, apart, ratio, held = (
        args.base_folder,
        args.validation_folder,
        args.validation_ratio,
        None,
    )
    step = args.buckets and loading.pixel_step(args.pretrained_model_name_or_path, args.revision)
    size, told = (
        (args.width, args.height, args.num_frames),
        (args.fps, args.motion_bucket_id, args.resize_mode),
    )
    with accelerator.main_process_first():  # it lists the folder, the others read the list
        ensure_demo(folders)
        data = dataset(
            split.training_part(folders, ratio) if ratio else folders, *size, *told, args.seed, args.latent_cache,
            args.folder_weights, args.source_fps, step, args.image_ratio, args.per_gpu_batch_size * accelerator.num_processes,
        )  # fmt: skip
        if args.validation_steps and (apart or ratio):
            apart = split.validation_part(data.clips.indexes) if ratio else apart
            with split.errors_name_flag("--validation_ratio" if ratio else "--validation_folder"):
                held = dataset(
                    apart, *size, *told, args.validation_seed, None, None, args.source_fps, step
                )
    distributed.check_same_on_all_processes("--base_folder", data.clips.digest())
    if held:
        distributed.check_same_on_all_processes("--validation_folder", held.clips.digest())
        # the same list: an evaluation that does not have the clips that trained
        split.prepare_validation_set(
            held, data, args.validation_seed, check=not (ratio or apart is folders)
        )
    return data, held


def train(args, dataset, prepare_unet, export, validate, loss=svd_loss):
    """The loop of every trainer. dataset, prepare_unet, export, validate and loss are what a kind of training brings:
    see the last lines of each script."""
    import torch
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from tqdm import tqdm

    accelerator, checkpoint = start(args)
    device, world = accelerator.device, accelerator.num_processes
    pipe = loading.load_svd(
        args.pretrained_model_name_or_path, torch.float32, args.revision, args.pretrain_unet
    )
    unet = prepare_unet(unet_optimizations.speed_up(pipe.unet), args)
    args.num_frames = args.num_frames or pipe.unet.config.num_frames
    loss = (
        activation_checkpointing.offload_activations(unet, loss)
        if args.offload_activations
        else loss
    )
    watch = memory_estimate.MemoryMonitor(args, unet, prepare_unet, pipe, device)
    activation_checkpointing.checkpoint_activations(
        unet_optimizations.compile_blocks(unet) if args.compile else unet,
        args.gradient_checkpointing,
    )
    latent_cache.check_cache(
        args.latent_cache, pipe, args.mixed_precision, args.width, args.height, args.resize_mode
    )
    master = optimizers.OPTIMIZERS[args.optimizer][0]
    trained = loading.move_models(
        pipe, unet, args.mixed_precision, device, not args.latent_cache, master
    )

    # data
    data, held = load_data(args, dataset, accelerator)
    step_samples = args.per_gpu_batch_size * world * args.gradient_accumulation_steps
    args.max_train_steps = args.max_train_steps or math.ceil(
        args.num_train_epochs * len(data) / step_samples
    )
    args.learning_rate *= step_samples if args.scale_lr else 1
    validation.choose_validation_inputs(args, data.clips, held and held.clips)
    run_record.record_run(accelerator, args, data.clips)

    # optimizer
    optimizer = optimizers.make_optimizer(trained, args)
    model, optimizer, trained = distributed.prepare_for_engine(accelerator, unet, optimizer, args)
    schedule = get_scheduler(
        args.lr_scheduler.replace("constant", "constant_with_warmup"), distributed.torch_optimizer(optimizer),
        num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps,
    )  # fmt: skip
    ema = EMAModel([p.float() for p in trained], decay=0.9999) if args.use_ema else None
    saved = (
        accelerator,
        args.output_dir,
        args.checkpoints_total_limit,
        unet,
        optimizer,
        schedule,
        ema,
    )
    saver = checkpoints.CheckpointManager(*saved)

    held = held and validation_loss.ValidationLoss(
        held, args, loss, encode_ahead, pipe, accelerator
    )

    def look(step):
        clips, losses = [], {}
        if held:
            with distributed.gathered_weights(accelerator, unet):
                losses["raw"] = held.losses(unet)
        with (
            torch.no_grad(),
            optimizers.ema_weights(ema, trained),
            distributed.gathered_weights(accelerator, unet),
        ):
            if held and ema:
                losses["ema"] = held.losses(unet)
            if accelerator.is_main_process:
                with loading.encoders_on_device(pipe, device):
                    clips = validate(pipe, unet, step, args)
                validation.log_validation(
                    accelerator, args, step, clips, held and held.compare(step, losses)
                )
        accelerator.wait_for_everyone()
        return clips

    # before: rendered ahead of loading a checkpoint, so that a resumed run compares with the same base
    before = look(0) if args.validation_steps else []
    progress = {"step": 0, "samples": 0, "seed": args.seed}
    if checkpoint:
        progress = saver.resume(checkpoint)
        logger.info("resumed from %s", checkpoint)
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=sampler.BatchIndexSampler(progress["samples"], args.per_gpu_batch_size, accelerator.process_index, world),
        num_workers=args.num_workers, pin_memory=device.type == "cuda", persistent_workers=args.num_workers > 0,
        worker_init_fn=safety.ignore_signals,
    )  # fmt: skip
    batches, failed, first = iter(loader), 0, progress["step"]
    metrics = (
        run_record.MetricsWriter(args.output_dir, first) if accelerator.is_main_process else None
    )
    bar = tqdm(initial=first, total=args.max_train_steps, disable=not accelerator.is_main_process)

    with safety.StopSignals() as signals, saver, bar:
        for step in range(first + 1, args.max_train_steps + 1):
            began, sums = watch.begin_step(), torch.zeros(4, device=device)
            for _ in range(args.gradient_accumulation_steps):
                batch = distributed.batch_to_device(next(batches), device)
                with accelerator.accumulate(model):
                    value = loss(model, pipe, batch, args).mean()
                    accelerator.backward(value)
                    grad_norm = distributed.clip_grad_norm(
                        accelerator, trained, args.max_grad_norm or math.inf
                    )
                    optimizer.step()
                    optimizer.zero_grad()
                sums[0] += value.detach() / args.gradient_accumulation_steps / world
                sums[1] += batch["failed"].sum()
            lr, skipped = (
                float(schedule.get_last_lr()[0]),
                distributed.step_was_skipped(accelerator),
            )
            if not skipped:  # fp16: the scaler met an overflow
                schedule.step()
                if ema:
                    ema.step(trained)
            sums[2], sums[3] = signals.caught, grad_norm / world
            mean_loss, new_failed, stop, norm = accelerator.reduce(
                sums
            ).tolist()  # here the step waits for the GPU

            progress = {
                "step": step,
                "samples": progress["samples"] + step_samples,
                "seed": args.seed,
            }
            failed += new_failed
            safety.check_finite(step, mean_loss, norm, skipped, lr, saver.step)
            safety.check_unreadable_clips(failed, (step - first) * step_samples)
            saver.check()
            if accelerator.is_main_process:
                row = metrics.write(
                    step, mean_loss, lr, norm, time.perf_counter() - began, watch.end_step()
                )
                bar.update()
                told = {k: v for k, v in row.items() if v is not None}
                bar.set_postfix(
                    {k: f"{v:.3g}" for k, v in told.items() if k != "step"}, refresh=False
                )
                accelerator.log(told, step=step)

            last = stop or step == args.max_train_steps
            if last or step % args.checkpointing_steps == 0:
                saver.save(progress)
            if stop:
                saver.finish()
                logger.warning("stopped at step %d; the same command goes on from there", step)
                accelerator.end_training()
                sys.exit(143)
            if args.validation_steps and step % args.validation_steps == 0 and not last:
                look(step)
    after = look(args.max_train_steps) if args.validation_steps else []
    with optimizers.ema_weights(ema, trained), distributed.gathered_weights(accelerator, unet):
        if accelerator.is_main_process:
            export(pipe, unet, args)
    if accelerator.is_main_process:
        if after:
            rows = [
                {"init image": i, "before": b, "after": a}
                for (_, i, b), (*_, a) in zip(before, after)
            ]
            video_writer.write_comparison(
                Path(args.output_dir, "comparison"), rows, args.validation[0]["fps"]
            )
        page = report.write_report(args.output_dir)
        if args.push_to_hub:
            push_to_hub(args)
        watch.report()
        logger.info("done: weights in %s; look at %s", args.output_dir, page)
    accelerator.end_training()


# ----------------------------------------------------------------------------------------------------------------- CLI


def build_parser(description=__doc__, **defaults):
    """The flags that all trainers share, in the order in which the file uses them; `defaults` are a script's own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    g = parser.add_argument_group("model")
    g.add_argument("--pretrained_model_name_or_path", default=str(TINY_SVD), help="Hub name or folder of an SVD; by default the embedded one")
    g.add_argument("--revision", help="Hub revision of it")
    g.add_argument("--pretrain_unet", help="folder of another UNet to start from")
    g.add_argument("--train_params", nargs="+", default=[], help="train only parameters whose names contain one of these; default: all")
    g.add_argument("--gradient_checkpointing", nargs="?", const="blocks", default="none", choices=[*activation_checkpointing.POLICIES, "auto"], help="recompute activations, from least to most: none (default), level0 (the highest resolution), level01, blocks (the flag alone), nested; auto: the fastest that fits the free memory; first thing to try when out of memory")
    g.add_argument("--offload_activations", action="store_true", help="what backward needs waits in the CPU's memory; least of all with --gradient_checkpointing nested, and slower")
    g.add_argument("--compile", action="store_true", help="torch.compile the UNet's repeated blocks: minutes at the start, faster steps")
    g.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: what accelerate is configured for")
    g.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products in float32 layers (Ampere and newer)")

    g = parser.add_argument_group("data")
    g.add_argument("--base_folder", nargs="+", default=[base_folder], metavar="FOLDER", help=f"folder of videos, files or folders of frames, or several; default: {base_folder}")
    g.add_argument("--folder_weights", nargs="+", type=float, metavar="WEIGHT", help="of several folders, how many samples each has, relative to the others; default: each clip counts the same")
    g.add_argument("--fps", type=flag_types.number_or_word("native"), default=7, help="frames a second at which clips are sampled, by time, and of validation; native: each clip's own; a clip that has fewer keeps its own; default: %(default)s")
    g.add_argument("--source_fps", type=float, help="frames a second of frame folders without clip.json; default: --fps, or 7")
    g.add_argument("--motion_bucket_id", type=flag_types.number_or_word("auto"), default="auto", help="of clips that do not tell theirs: auto, 1 to 255 by how much moves in each, or a number, SVD's own 127 for one; of validation; default: %(default)s")
    g.add_argument("--image_ratio", type=float, default=0.0, help="fraction of samples that are pictures lying in the folders, as clips of one frame; default: %(default)s")
    g.add_argument("--buckets", action="store_true", help="sample each clip in the aspect ratio nearest to its own, at about as many pixels; a batch is of one size")
    g.add_argument("--width", type=int, default=512, help="pixels, a multiple of 8; default: %(default)s")
    g.add_argument("--height", type=int, default=320, help="pixels, a multiple of 8; lower both when out of memory; default: %(default)s")
    g.add_argument("--num_frames", type=int, help="frames of a clip; default: the model's (14, or 25 for XT)")
    g.add_argument("--resize_mode", choices=["crop", "stretch"], default="crop", help="cover and crop the centre, or ignore the aspect ratio")
    g.add_argument("--latent_cache", metavar="FOLDER", help="output of cache_latents.py for this folder, size and SVD: no step then runs CLIP, and the VAE for one frame only")
    g.add_argument("--num_workers", type=int, default=2, help="loader processes on each GPU; 0: load in the training process")

    g = parser.add_argument_group("objective")
    g.add_argument("--P_mean", type=float, help="mean of log sigma; default: 0.7 up to 576x320, 1.0 above")
    g.add_argument("--P_std", type=float, help="std of log sigma; default: 1.6")
    g.add_argument("--conditioning_dropout_prob", type=float, nargs="+", default=[0.0, 0.0, 0.1], metavar="P", help="probability of dropping CLIP only, image latents only, both (three numbers), or one number for each of the three; default: 0 0 0.1")
    g.add_argument("--vae_encode_chunk", type=int, default=1, help="frames that the VAE encodes at once; 1 needs least memory, the result is the same")

    g = parser.add_argument_group("optimization")
    g.add_argument("--per_gpu_batch_size", type=int, default=1, help="clips on each GPU; default: %(default)s")
    g.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches of a step; default: %(default)s")
    g.add_argument("--max_train_steps", type=int, help="optimizer steps; default: from --num_train_epochs")
    g.add_argument("--num_train_epochs", type=int, default=100, help="passes over the folder, where --max_train_steps is not given")
    g.add_argument("--learning_rate", type=float, default=1e-5, help="default: %(default)s")
    g.add_argument("--scale_lr", action="store_true", help="multiply the learning rate by the clips of a step")
    g.add_argument("--lr_scheduler", default="constant", choices=["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"], help="after the warm-up; default: %(default)s")
    g.add_argument("--lr_warmup_steps", type=int, default=0, help="optimizer steps; default: %(default)s")
    g.add_argument("--optimizer", choices=optimizers.OPTIMIZERS, default="adamw", help="adamw8bit keeps Adam's averages in 8 bit; adamw_bf16_sr weights, gradients and averages in bf16, rounded stochastically (both by torchao); default: %(default)s")
    g.add_argument("--adam_beta1", type=float, default=0.9)
    g.add_argument("--adam_beta2", type=float, default=0.999)
    g.add_argument("--adam_weight_decay", type=float, default=1e-2)
    g.add_argument("--adam_epsilon", type=float, help="default: 1e-8; of adamw8bit 1e-6")
    g.add_argument("--max_grad_norm", type=float, default=1.0, help="clip gradients to this norm; 0: do not")
    g.add_argument("--use_ema", action="store_true", help="keep a moving average of what trains; it is what is rendered and exported")
    g.add_argument("--seed", type=int, help="default: one is drawn, printed and kept")

    g = parser.add_argument_group("validation")
    g.add_argument("--validation_steps", type=int, default=500, help="render every so many steps, before and after; 0: never")
    g.add_argument("--validation_folder", nargs="+", metavar="FOLDER", help="clips to hold out: each validation tells the loss on them, of the model and of the one that the run began with, on the same draws")
    g.add_argument("--validation_ratio", type=float, default=0.0, help="hold out about this fraction of --base_folder's clips instead, by name, so that none that trained is held out when more come; none of a film that trains")
    g.add_argument("--validation_clips", type=int, default=16, help="how many of them count; default: %(default)s")
    g.add_argument("--validation_image", nargs="+", default=[], metavar="IMAGE", help="pictures, or videos of which the first frame, to animate; default: the first video's, of those held out where there are some")
    g.add_argument("--noise_aug_strength", type=float, default=0.0, help="noise on the validation image")
    g.add_argument("--num_inference_steps", type=int, default=25, help="sampling steps")
    g.add_argument("--decode_chunk_size", type=int, default=8, help="frames decoded at once; lower when validation runs out of memory")
    g.add_argument("--validation_seed", type=int, default=111)

    g = parser.add_argument_group("output")
    g.add_argument("--output_dir", default="outputs/svd", help="default: %(default)s")
    g.add_argument("--checkpointing_steps", type=int, default=500, help="default: %(default)s")
    g.add_argument("--checkpoints_total_limit", type=int, help="keep only so many; default: all")
    g.add_argument("--resume_from_checkpoint", default="latest", metavar="WHICH", help="latest (default; starts anew where there is none), none, or a checkpoint folder")
    g.add_argument("--report_to", choices=["wandb", "tensorboard", "none"], default="none", help="tracker, beside metrics.jsonl")
    g.add_argument("--push_to_hub", action="store_true", help="upload the result, without checkpoints")
    g.add_argument("--hub_model_id", help="default: the name of --output_dir")
    g.add_argument("--hub_token", help="default: the one of `hf auth login`")
    # fmt: on
    parser.set_defaults(**defaults)
    return parser


def parse(parser, argv=None):
    """Parse and check what can be checked before anything is loaded."""
    args = parser.parse_args(argv)
    counts = ("per_gpu_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "vae_encode_chunk", "validation_clips",
              "decode_chunk_size", "num_frames", "rank")  # fmt: skip
    if wrong := flag_types.find_wrong_number(args, dict.fromkeys(counts, 1)):
        parser.error(wrong)
    if args.offload_activations and args.gradient_checkpointing not in ("blocks", "nested"):
        parser.error(
            "--offload_activations: pass --gradient_checkpointing blocks or nested, too; else it moves far too much"
        )
    p = args.conditioning_dropout_prob
    args.conditioning_dropout_prob = p = p * 3 if len(p) == 1 else p
    if len(p) != 3 or min(p) < 0 or sum(p) > 1:
        p = " ".join(map(str, p))
        parser.error(
            f"--conditioning_dropout_prob {p}: one number up to 1/3, or three whose sum is at most 1"
        )
    if args.folder_weights and (
        len(args.folder_weights) != len(args.base_folder) or min(args.folder_weights) <= 0
    ):
        parser.error(
            f"--folder_weights: one above 0 for each --base_folder, which are {len(args.base_folder)}"
        )
    for flag in ("image_ratio", "validation_ratio"):
        if not 0 <= getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: from 0 to less than 1")
    if args.validation_folder and args.validation_ratio:
        parser.error(
            "--validation_ratio: not with --validation_folder, which has the held-out clips already"
        )
    if args.image_ratio and args.latent_cache:
        parser.error("--image_ratio: not with --latent_cache, which holds videos alone")
    for path in args.validation_image:
        if not Path(path).is_file():
            parser.error(f"--validation_image {path}: no such file")
    for name, value in zip(("P_mean", "P_std"), default_P(args.width, args.height)):
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    return args


if __name__ == "__main__":
    args = parse(build_parser())
    train(
        args, dataset=DummyDataset, prepare_unet=select_parameters, export=export, validate=validate
    )
