"""Encode every frame of a folder once: training then needs neither the VAE's decoder nor CLIP, and hardly the encoder.

    accelerate launch cache_latents.py --base_folder=/path/to/frames --latent_cache=/path/to/cache --pretrained_model_name_or_path=/path/to/weight
    accelerate launch train_svd.py --base_folder=/path/to/frames --latent_cache=/path/to/cache --pretrained_model_name_or_path=/path/to/weight

Size, crop and weights must be those of the training. Killed, or frames have changed? The same command does what is
missing. Several processes share the work. Next: svd_xtend/cache.py.
"""

import argparse
import logging
import shutil
from pathlib import Path

from svd_xtend import cache, fast_unet, processes, runs, video
from svd_xtend.shapes import ensure_demo
from svd_xtend.tiny import TINY_SVD
from train_svd import DummyDataset, base_folder, embed_image

logger = logging.getLogger("svd_xtend")


class Frames:
    """The frames of a list of files, each (3, h, w) uint8: what a loader's processes decode."""

    def __init__(self, files, width, height, resize_mode):
        self.files, self.how = files, (width, height, resize_mode)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):

        return video.load_frame(self.files[i], *self.how).transpose(2, 0, 1).copy()


def encode(pipe, files, args, device):
    """{mean, std (f, 4, h/8, w/8), image_embeds (f, d)} of a video, in the encoders' precision. Of one that cannot be read
    nothing: training names it and lets another clip stand in."""
    import torch

    frames = Frames(files, args.width, args.height, args.resize_mode)
    parts = {"mean": [], "std": [], "image_embeds": []}
    loader = iter(torch.utils.data.DataLoader(frames, args.vae_encode_chunk, num_workers=args.num_workers))
    for _ in range(len(loader)):
        try:
            batch = next(loader)
        except ValueError as error:
            logger.warning("%s; its video is left out", str(error).strip().splitlines()[-1])
            return {}
        pixel_values = batch.to(device).float() / 127.5 - 1
        with torch.no_grad():
            posterior = pipe.vae.encode(pixel_values.to(pipe.vae.dtype)).latent_dist
        parts["mean"].append(posterior.mean.cpu())
        parts["std"].append(posterior.std.cpu())
        parts["image_embeds"].append(embed_image(pipe, pixel_values)[:, 0].cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def start(args):
    """(accelerator, pipeline without a UNet, videos, what cache.json says)."""
    from datetime import timedelta

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    from svd_xtend.checkpoints import load_svd, place_encoders

    accelerator = Accelerator(
        mixed_precision=runs.check_precision(args.mixed_precision),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))],  # who is done waits for the others
    )
    if accelerator.num_processes > 1:
        processes.fail_together(accelerator.process_index)
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    with accelerator.main_process_first():
        ensure_demo(args.base_folder)
        data = DummyDataset(args.base_folder, args.width, args.height, 1, 0, 0, args.resize_mode)
    cache.check_names(args.latent_cache, data.clips)
    pipe = load_svd(args.pretrained_model_name_or_path, torch.float32, args.revision, unet=False)
    how = accelerator.mixed_precision, args.width, args.height, args.resize_mode
    if Path(args.latent_cache, cache.INFO).exists():
        cache.check(args.latent_cache, pipe, *how)
    description = cache.describe(pipe, *how)
    half = fast_unet.dtype_of(accelerator.mixed_precision)
    place_encoders(pipe, half, accelerator.device)
    return accelerator, pipe, data.clips, description


def main(args):
    """Check, tell the size, encode what is not there."""
    from tqdm import tqdm

    accelerator, pipe, clips, description = start(args)
    folder, count = Path(args.latent_cache), accelerator.num_processes
    missing = [i for i, (frames, _) in enumerate(clips) if not cache.is_fresh(folder, frames)]
    accelerator.wait_for_everyone()  # all must have counted before one begins to write
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    values = 8 * (args.width // scale) * (args.height // scale) + pipe.image_encoder.config.projection_dim
    need = sum(len(clips[i][0]) for i in missing) * values * pipe.vae.dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    logger.info("%d videos, %d to do: %.2f GB, %.1f GB free, %d process(es)", len(clips), len(missing), need / 1e9, free / 1e9, count)  # fmt: skip
    if need > free:
        raise ValueError(f"--latent_cache {folder}: needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    if accelerator.is_main_process:
        cache.write_description(folder, description)
    own = sorted(missing, key=lambda i: len(clips[i][0]))[accelerator.process_index :: count]
    for i in tqdm(own, desc="caching", disable=not accelerator.is_main_process):
        frames, _ = clips[i]
        digest = cache.digest_of_frames(frames)
        cache.write(folder, frames, digest, encode(pipe, frames, args, accelerator.device))
    accelerator.wait_for_everyone()
    logger.info("done: train with --latent_cache=%s", folder)
    accelerator.end_training()


def build_parser():
    """Flags: what is encoded, by what, where to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--pretrained_model_name_or_path", default=str(TINY_SVD), help="Hub name or folder of an SVD; by default the embedded one")
    parser.add_argument("--revision", help="Hub revision of it")
    parser.add_argument("--base_folder", nargs="+", default=[base_folder], metavar="FOLDER", help=f"folders of video folders of frames; default: {base_folder}")
    parser.add_argument("--latent_cache", required=True, help="where the cache goes")
    parser.add_argument("--width", type=int, default=512, help="pixels, a multiple of 8; default: %(default)s")
    parser.add_argument("--height", type=int, default=320, help="pixels, a multiple of 8; default: %(default)s")
    parser.add_argument("--resize_mode", choices=["crop", "stretch"], default="crop", help="cover and crop the centre, or ignore the aspect ratio")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="of the encoders; default: what accelerate is configured for")
    parser.add_argument("--vae_encode_chunk", type=int, default=8, help="frames encoded at once; lower when out of memory; default: %(default)s")
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes; default: %(default)s")
    # fmt: on
    return parser


if __name__ == "__main__":
    parser = build_parser()
    args = parser.parse_args()
    if args.width % 8 or args.height % 8:
        parser.error(f"--width {args.width} --height {args.height}: must be multiples of 8")
    main(args)
