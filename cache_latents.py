"""Encode every frame of a folder's videos once: training then needs neither the VAE's decoder nor CLIP, and hardly the encoder.

    accelerate launch cache_latents.py --base_folder=/path/to/frames --latent_cache=/path/to/cache --pretrained_model_name_or_path=/path/to/weight
    accelerate launch train_svd.py --base_folder=/path/to/frames --latent_cache=/path/to/cache --pretrained_model_name_or_path=/path/to/weight

Size, crop and weights must be those of the training. Killed, or frames have changed? The same command does what is
missing. Several processes share the work. Next: svd_xtend/cache.py.
"""

import argparse
import collections
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from svd_xtend.data import latent_cache
from svd_xtend.data.clip import ClipSpec
from svd_xtend.data.sampler import ClipCollection
from svd_xtend.demo.synthetic_clips import ensure_demo
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.models import precision
from svd_xtend.training import distributed
from train_svd import base_folder, embed_image

logger = logging.getLogger("svd_xtend")


def encode(pipe, clip, args, device):
    """{mean, std (f, 4, h/8, w/8), image_embeds (f, d)} of a video, in the encoders' precision. Of one that cannot be read
    nothing: training names it and lets another clip stand in."""
    import torch

    parts = {"mean": [], "std": [], "image_embeds": []}
    try:
        reads = clip.chunk_readers(*clip.size, args.resize_mode, args.vae_encode_chunk)
        for frames in ahead(reads, args.num_workers if clip.files else 1):
            pixel_values = (
                torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            )
            with torch.no_grad():
                posterior = pipe.vae.encode(pixel_values.to(pipe.vae.dtype)).latent_dist
            parts["mean"].append(posterior.mean.cpu())
            parts["std"].append(posterior.std.cpu())
            parts["image_embeds"].append(embed_image(pipe, pixel_values)[:, 0].cpu())
    except ValueError as error:
        logger.warning("%s; its video is left out", error)
        return {}
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def ahead(functions, threads):
    """What each answers, in order; so many are called before it is their turn."""
    with ThreadPoolExecutor(threads) as pool:
        coming = collections.deque(pool.submit(function) for function in functions[:threads])
        for function in [*functions[threads:], *[None] * len(coming)]:
            answer = coming.popleft().result()
            if function:
                coming.append(pool.submit(function))
            yield answer


def start(args):
    """(accelerator, pipeline without a UNet, videos, what cache.json says)."""
    from datetime import timedelta

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    from svd_xtend.models.loading import load_svd, move_encoders, read_size_multiple

    accelerator = Accelerator(
        mixed_precision=precision.check_precision(args.mixed_precision),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=24))
        ],  # who is done waits for the others
    )
    if accelerator.num_processes > 1:
        distributed.fail_together(accelerator.process_index)
    logging.basicConfig(
        level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s"
    )
    with accelerator.main_process_first():
        ensure_demo(args.base_folder)
        step = args.buckets and read_size_multiple(args.pretrained_model_name_or_path, args.revision)
        clips = ClipCollection(
            args.base_folder,
            ClipSpec(args.width, args.height, 1, "native", args.resize_mode),
            motion_bucket_id=0,
            bucket_step=step,
        )
    latent_cache.check_cache_names(args.latent_cache, clips)
    pipe = load_svd(args.pretrained_model_name_or_path, torch.float32, args.revision, unet=False)
    how = accelerator.mixed_precision, args.width, args.height, args.resize_mode
    if Path(args.latent_cache, latent_cache.DESCRIPTION_FILE).exists():
        latent_cache.check_cache(args.latent_cache, pipe, *how)
    description = latent_cache.describe_cache(pipe, *how)
    half = precision.compute_dtype(accelerator.mixed_precision)
    move_encoders(pipe, half, accelerator.device)
    return accelerator, pipe, clips, description


def main(args):
    """Check, tell the size, encode what is not there."""
    from tqdm import tqdm

    accelerator, pipe, clips, description = start(args)
    folder, count = Path(args.latent_cache), accelerator.num_processes
    missing = [i for i, clip in enumerate(clips) if not latent_cache.is_cache_fresh(folder, clip)]
    accelerator.wait_for_everyone()  # all must have counted before one begins to write
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    values = (
        8 * (args.width // scale) * (args.height // scale)
        + pipe.image_encoder.config.projection_dim
    )
    need = sum(len(clips[i]) for i in missing) * values * pipe.vae.dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    logger.info("%d videos, %d to do: %.2f GB, %.1f GB free, %d process(es)", len(clips), len(missing), need / 1e9, free / 1e9, count)  # fmt: skip
    if need > free:
        raise ValueError(
            f"--latent_cache {folder}: needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )
    if accelerator.is_main_process:
        latent_cache.write_cache_description(folder, description)
    own = sorted(missing, key=lambda i: len(clips[i]))[accelerator.process_index :: count]
    for i in tqdm(own, desc="caching", disable=not accelerator.is_main_process):
        digest = latent_cache.clip_digest(clips[i])
        latent_cache.write_cached_clip(
            folder, clips[i], digest, encode(pipe, clips[i], args, accelerator.device)
        )
    accelerator.wait_for_everyone()
    logger.info("done: train with --latent_cache=%s", folder)
    accelerator.end_training()


def build_parser():
    """Flags: what is encoded, by what, where to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--pretrained_model_name_or_path", default=str(TINY_SVD), help="Hub name or folder of an SVD; by default the embedded one")
    parser.add_argument("--revision", help="Hub revision of it")
    parser.add_argument("--base_folder", nargs="+", default=[base_folder], metavar="FOLDER", help=f"folders of videos, files or folders of frames; default: {base_folder}")
    parser.add_argument("--latent_cache", required=True, help="where the cache goes")
    parser.add_argument("--width", type=int, default=512, help="pixels, a multiple of 8; default: %(default)s")
    parser.add_argument("--height", type=int, default=320, help="pixels, a multiple of 8; default: %(default)s")
    parser.add_argument("--resize_mode", choices=["crop", "stretch"], default="crop", help="cover and crop the centre, or ignore the aspect ratio")
    parser.add_argument("--buckets", action="store_true", help="for training with --buckets: each video in the size of its aspect ratio")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="of the encoders; default: what accelerate is configured for")
    parser.add_argument("--vae_encode_chunk", type=int, default=8, help="frames encoded at once; lower when out of memory; default: %(default)s")
    parser.add_argument("--num_workers", type=int, default=4, help="threads that decode a folder's frames; default: %(default)s")
    # fmt: on
    return parser


if __name__ == "__main__":
    parser = build_parser()
    args = parser.parse_args()
    if args.num_workers < 1:
        parser.error(f"--num_workers {args.num_workers}: must be at least 1")
    if args.width % 8 or args.height % 8:
        parser.error(f"--width {args.width} --height {args.height}: must be multiples of 8")
    main(args)
