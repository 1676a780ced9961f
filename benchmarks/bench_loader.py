"""CPU seconds per clip of the loader by picture format and size: a full decode, ours, and from a latent cache.

    python benchmarks/bench_loader.py
    python benchmarks/bench_loader.py --formats jpeg --sizes 512x320 --rounds 9

Physics: a JPEG holds frequencies. At half its size all codes are still read, but only a quarter of the pixels are
made. PNG is bound by zlib, WebP predicts each block from its neighbours: both are decoded whole. As bytes a clip is a
quarter of what it is as floats; [-1, 1] is made on the training's device. With a cache only frame 0 is decoded.

Frames are smooth noise under a panning window, with grain: about the bytes of a photograph, but fewer edges, so that
dB are optimistic. Seconds are the process's CPU time on one thread, without the collate. Variants run in turn, round
after round; ratios are medians of the rounds' own. The last line is one JSON document.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from svd_xtend.data import images
from svd_xtend.data.latent_cache import clip_digest, write_cached_clip
from train_svd import DummyDataset

SOURCE = (1280, 720)  # width and height of the frames on disk, pixels
FORMATS = {"jpeg": {"quality": 90}, "png": {}, "webp": {"quality": 90}}  # how Pillow saves them
PAN, GRAIN = 8, 3  # pixels a frame; standard deviation, of 255


def write_frames(folder, suffix, num_frames):
    """A base_folder with one video. The scene: octaves of noise, each of half the strength of the coarser one."""
    g, (width, height) = np.random.default_rng(0), SOURCE
    wide, scene = (width + PAN * num_frames, height), 128
    for octave in range(7):
        noise = g.normal(0, 64 / 2**octave, (3, 4 << octave, 6 << octave)).astype(np.float32)
        scene = scene + np.stack(
            [Image.fromarray(n).resize(wide, Image.Resampling.BICUBIC) for n in noise], axis=-1
        )
    Path(folder, "pan").mkdir(parents=True)
    for f in range(num_frames):
        window = scene[:, PAN * f : PAN * f + width] + g.normal(0, GRAIN, (height, width, 3))
        picture = Image.fromarray(window.round().clip(0, 255).astype(np.uint8))
        picture.save(Path(folder, "pan", f"{f:03}.{suffix}"), **FORMATS[suffix])


def write_cache(folder, clip, width, height):
    """A latent cache of the video in SVD's shapes and half precision; random values, read as fast as true ones."""
    Path(folder).mkdir(parents=True)
    tensors = {
        name: torch.randn(len(clip), 4, height // 8, width // 8).half() for name in ("mean", "std")
    }
    tensors["image_embeds"] = torch.randn(len(clip), 1024).half()
    write_cached_clip(folder, clip, clip_digest(clip), tensors)
    return folder


def full_decode(frames, width, height):
    """pixel_values (f, 3, h, w) in [-1, 1], float32, as the public original read them; but cropped, as ours are."""
    pixel_values = torch.empty(len(frames), 3, height, width)
    for f, frame in enumerate(frames):
        with Image.open(frame) as image:
            resized = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
            normalized = torch.from_numpy(np.array(resized)).float() / 127.5 - 1
            pixel_values[f] = normalized.permute(2, 0, 1)
    return {"pixel_values": pixel_values}


def variants(folder, latent_cache, width, height, num_frames):
    """{name: reads the clip}: the full decode first, what the others are compared with."""
    frames, how = (
        images.list_frames(Path(folder, "pan")),
        (width, height, num_frames, 7, 127, "crop", 0),
    )
    ours = DummyDataset(folder, *how)
    cached = DummyDataset(folder, *how, write_cache(latent_cache, ours.clips[0], width, height))
    full = partial(full_decode, frames, width, height)
    return {
        "full decode": full,
        "ours": partial(ours.__getitem__, 0),
        "cached": partial(cached.__getitem__, 0),
    }


def psnr(pixel_values, reference):
    """dB of uint8 pixel_values against those in [-1, 1]; None where all are equal."""
    wanted = ((np.asarray(reference, np.float64) + 1) * 127.5).round()
    error = np.square(pixel_values - wanted).mean()
    return 10 * math.log10(255**2 / error) if error else None


def measure(reads, rounds):
    """{variant: its row of the table} of one format and size."""
    seconds, items = {name: [] for name in reads}, {}
    for _ in range(rounds + 1):
        for name, read in reads.items():
            began = time.process_time()
            items[name] = read()  # frees the one before it, as a run does
            seconds[name].append(time.process_time() - began)
    seconds, rows = {name: own[1:] for name, own in seconds.items()}, {}  # the first round warms up
    for name, own in seconds.items():
        rows[name] = {
            "cpu_ms": 1e3 * statistics.median(own), "clips_per_cpu_second": 1 / statistics.median(own),
            "x_full": statistics.median(a / b for a, b in zip(own, seconds["full decode"])),
            "MB": sum(value.nbytes for value in items[name].values() if hasattr(value, "nbytes")) / 1e6,
        }  # fmt: skip
    rows["ours"]["psnr_dB"] = psnr(
        items["ours"]["pixel_values"], items["full decode"]["pixel_values"]
    )
    return rows


def main(args):
    """Write the frames of each format, measure them at each size, print a table and the same as JSON."""
    print(
        f"{args.num_frames} frames of {SOURCE[0]}x{SOURCE[1]}, Pillow {PIL.__version__}, CPU time of one thread"
    )
    print(
        f"{'format':8}{'size':10}{'variant':13}{'CPU ms':>9}{'clips/s':>9}{'x full':>8}{'MB':>9}{'PSNR dB':>9}"
    )
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in args.formats:
            base = Path(folder, suffix)
            write_frames(base, suffix, args.num_frames)
            for size in args.sizes:
                width, height = map(int, size.split("x"))
                reads = variants(
                    base, Path(folder, "cache", suffix, size), width, height, args.num_frames
                )
                for name, r in measure(reads, args.rounds).items():
                    table.append({"format": suffix, "size": size, "variant": name, **r})
                    decibel = (
                        "" if name != "ours" else f"{r['psnr_dB']:.1f}" if r["psnr_dB"] else "equal"
                    )
                    print(
                        f"{suffix:8}{size:10}{name:13}{r['cpu_ms']:9.1f}{r['clips_per_cpu_second']:9.2f}"
                        f"{r['x_full']:8.3f}{r['MB']:9.2f}{decibel:>9}", flush=True,
                    )  # fmt: skip
    print(
        json.dumps(
            {
                "num_frames": args.num_frames,
                "rounds": args.rounds,
                "pillow": PIL.__version__,
                "rows": table,
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--sizes", nargs="+", default=["512x320", "1024x576"], help="width x height that the loader resizes to; default: %(default)s")
    parser.add_argument("--num_frames", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    # fmt: on
    torch.set_num_threads(1)
    main(parser.parse_args())
