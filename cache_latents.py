"""Encode every frame of a folder's videos once, for training with --latent_cache.

    accelerate launch cache_latents.py --base_folder=data/mine --latent_cache=data/cache
    accelerate launch train_svd.py --base_folder=data/mine --latent_cache=data/cache

Pass the same model, size and crop to both. Training then uses neither the VAE's decoder nor CLIP,
and encodes only one frame per clip. Running the same command again encodes only videos that are
missing or have changed. Several processes share the work.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svd_xtend.data import latent_cache
from svd_xtend.data.clip import Clip, ClipSpec
from svd_xtend.data.sampler import ClipCollection
from svd_xtend.demo.synthetic_clips import ensure_demo
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.models import precision
from svd_xtend.training import distributed, flag_types
from train_svd import base_folder, embed_image

if TYPE_CHECKING:  # `-h` answers at once because torch is imported only where it is used
    import torch
    from accelerate import Accelerator
    from diffusers import StableVideoDiffusionPipeline
    from torch import Tensor

logger = logging.getLogger("svd_xtend")

# A process that has finished waits this long for the others.
MAX_WAIT = timedelta(hours=24)


@dataclass
class CacheJob:
    """The videos to encode and the encoders. pipe: the pipeline without its UNet."""

    accelerator: Accelerator
    pipe: StableVideoDiffusionPipeline
    clips: ClipCollection
    description: dict[str, Any]  # the content of cache.json


# --------------------------------------------------------------------------------------- encoding


def encode_video(
    pipe: StableVideoDiffusionPipeline,
    clip: Clip,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Tensor]:
    """Encode all n frames of a video, in the precision of the encoders.

    Returns `mean` and `std` (n, 4, h/8, w/8) of the VAE's posterior and `image_embeds` (n, d), on
    the CPU. Returns {} for a video that cannot be read; training names it, and shows another clip
    instead.
    """
    import torch

    assert clip.size is not None
    width, height = clip.size
    means = []
    stds = []
    image_embeds = []
    readers = clip.chunk_readers(width, height, args.resize_mode, args.vae_encode_chunk)
    num_threads = args.num_workers if clip.files else 1  # a video file is decoded in order
    try:
        for frames in call_ahead(readers, num_threads):
            pixel_values = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2)
            pixel_values = pixel_values.float() / 127.5 - 1
            with torch.no_grad():
                posterior = pipe.vae.encode(pixel_values.to(pipe.vae.dtype)).latent_dist
            means.append(posterior.mean.cpu())
            stds.append(posterior.std.cpu())
            image_embeds.append(embed_image(pipe, pixel_values)[:, 0].cpu())
    except ValueError as error:
        logger.warning("%s; the video is left out of the cache", error)
        return {}
    return {
        "mean": torch.cat(means),
        "std": torch.cat(stds),
        "image_embeds": torch.cat(image_embeds),
    }


def call_ahead(
    functions: Sequence[Callable[[], np.ndarray]], num_threads: int
) -> Iterator[np.ndarray]:
    """Yield the results of the functions in order, with `num_threads` of them running ahead."""
    remaining = iter(functions)
    with ThreadPoolExecutor(num_threads) as pool:
        first = itertools.islice(remaining, num_threads)
        running = collections.deque(pool.submit(function) for function in first)
        while running:
            result = running.popleft().result()
            following = next(remaining, None)
            if following is not None:
                running.append(pool.submit(following))
            yield result


# -------------------------------------------------------------------------------------------- job


def prepare_job(args: argparse.Namespace) -> CacheJob:
    """Find the videos and load the encoders.

    Raises ValueError if --latent_cache was made with another model, precision, size or crop.
    """
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    from svd_xtend.models.loading import load_svd, move_encoders, read_size_multiple

    model = args.pretrained_model_name_or_path
    accelerator = Accelerator(
        mixed_precision=precision.check_precision(args.mixed_precision),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=MAX_WAIT)],
    )
    if accelerator.num_processes > 1:
        distributed.fail_together(accelerator.process_index)
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    with accelerator.main_process_first():
        ensure_demo(args.base_folder)
        bucket_step = read_size_multiple(model, args.revision) if args.buckets else 0
        spec = ClipSpec(args.width, args.height, 1, "native", args.resize_mode)
        clips = ClipCollection(args.base_folder, spec, motion_bucket_id=0, bucket_step=bucket_step)
    latent_cache.check_cache_names(args.latent_cache, clips)
    pipe = load_svd(model, torch.float32, args.revision, unet=False)
    cache_options = (accelerator.mixed_precision, args.width, args.height, args.resize_mode)
    if Path(args.latent_cache, latent_cache.DESCRIPTION_FILE).exists():
        latent_cache.check_cache(args.latent_cache, pipe, *cache_options)
    description = latent_cache.describe_cache(pipe, *cache_options)
    dtype = precision.compute_dtype(accelerator.mixed_precision)
    move_encoders(pipe, dtype, accelerator.device)
    return CacheJob(accelerator, pipe, clips, description)


def bytes_per_frame(pipe: StableVideoDiffusionPipeline, width: int, height: int) -> int:
    """Return the size of a cached frame: mean and std of its latents, and its CLIP embedding."""
    downscale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    latent_values = pipe.vae.config.latent_channels * (width // downscale) * (height // downscale)
    embedding_values = pipe.image_encoder.config.projection_dim
    return (2 * latent_values + embedding_values) * pipe.vae.dtype.itemsize


def main(args: argparse.Namespace) -> None:
    """Encode the videos that the cache lacks, each on one process.

    Raises ValueError if the disk has too little space.
    """
    from tqdm import tqdm

    job = prepare_job(args)
    accelerator = job.accelerator
    clips = job.clips
    folder = Path(args.latent_cache)
    missing = [i for i in range(len(clips)) if not latent_cache.is_cache_fresh(folder, clips[i])]
    accelerator.wait_for_everyone()  # every process must see the same videos missing
    num_frames = sum(len(clips[i]) for i in missing)
    needed_bytes = num_frames * bytes_per_frame(job.pipe, args.width, args.height)
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    logger.info(
        "%d videos, %d to encode: %.2f GB of %.1f GB free, %d process(es)",
        len(clips),
        len(missing),
        needed_bytes / 1e9,
        free_bytes / 1e9,
        accelerator.num_processes,
    )
    if needed_bytes > free_bytes:
        raise ValueError(
            f"--latent_cache {folder}: needs {needed_bytes / 1e9:.2f} GB, but only "
            f"{free_bytes / 1e9:.2f} GB are free"
        )
    if accelerator.is_main_process:
        latent_cache.write_cache_description(folder, job.description)
    by_length = sorted(missing, key=lambda i: len(clips[i]))
    of_this_process = by_length[accelerator.process_index :: accelerator.num_processes]
    for i in tqdm(of_this_process, desc="caching", disable=not accelerator.is_main_process):
        digest = latent_cache.clip_digest(clips[i])
        tensors = encode_video(job.pipe, clips[i], args, accelerator.device)
        latent_cache.write_cached_clip(folder, clips[i], digest, tensors)
    accelerator.wait_for_everyone()
    logger.info("done: train with --latent_cache=%s", folder)
    accelerator.end_training()


# ----------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--pretrained_model_name_or_path", default=str(TINY_SVD), help="Hub name or folder of an SVD; default: the embedded one")
    parser.add_argument("--revision", help="Hub revision of the model")
    parser.add_argument("--base_folder", nargs="+", default=[base_folder], metavar="FOLDER", help=f"folders of videos: video files, or folders of frames; default: {base_folder}")
    parser.add_argument("--latent_cache", required=True, help="folder for the cache")
    parser.add_argument("--width", type=flag_types.multiple_of_8, default=512, help="pixels, a multiple of 8; default: %(default)s")
    parser.add_argument("--height", type=flag_types.multiple_of_8, default=320, help="pixels, a multiple of 8; default: %(default)s")
    parser.add_argument("--resize_mode", choices=["crop", "stretch"], default="crop", help="crop the centre, or ignore the aspect ratio; default: %(default)s")
    parser.add_argument("--buckets", action="store_true", help="encode each video in the size of its aspect ratio, for training with --buckets")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of the encoders; default: the setting of accelerate")
    parser.add_argument("--vae_encode_chunk", type=flag_types.positive_int, default=8, help="frames encoded at once; lower it when out of memory; default: %(default)s")
    parser.add_argument("--num_workers", type=flag_types.positive_int, default=4, help="threads that read the frames of a folder; default: %(default)s")
    # fmt: on
    return parser


if __name__ == "__main__":
    main(build_parser().parse_args())
