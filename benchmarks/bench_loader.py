"""Measure the loader's CPU time per clip by picture format and size: full decode, ours, and cached.

    python benchmarks/bench_loader.py
    python benchmarks/bench_loader.py --formats jpeg --sizes 512x320 --rounds 9

full decode   each frame is decoded at its own size, cropped and resized with Pillow
ours          DummyDataset, which decodes a JPEG at a smaller size where that is enough
cached        DummyDataset with a latent cache, which decodes only frame 0

A JPEG stores frequencies: at half its size all codes are still read, but only a quarter of the
pixels are computed. PNG is bound by zlib, and WebP predicts each block from its neighbours; both
are decoded whole. A clip of bytes takes a quarter of the memory of floats; training scales it to
[-1, 1] on its own device.

The frames are smooth noise under a panning window, with grain: about the bytes of a photograph, but
fewer edges, so the PSNR is optimistic. Times are the CPU time of the process on one thread, without
collating. The variants run in turn, round after round; ratios are medians of the ratios of each
round. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from svd_xtend.data import images
from svd_xtend.data.clip import Clip, ClipSpec
from svd_xtend.data.latent_cache import clip_digest, write_cached_clip
from svd_xtend.data.sampler import ClipCollection, ClipSampler
from train_svd import DummyDataset

SOURCE_WIDTH = 1280  # pixels of the frames on disk
SOURCE_HEIGHT = 720
FORMATS: dict[str, dict[str, int]] = {  # options with which Pillow saves them
    "jpeg": {"quality": 90},
    "png": {},
    "webp": {"quality": 90},
}
PAN = 8  # pixels per frame
GRAIN = 3  # standard deviation, of 255
NUM_OCTAVES = 7
EMBEDDING_SIZE = 1024  # of CLIP in SVD

Reader = Callable[[], dict[str, Any]]


def write_frames(folder: str | Path, suffix: str, num_frames: int) -> None:
    """Write a base folder with one video.

    The scene is a sum of octaves of noise, each half as strong as the next coarser one.
    """
    rng = np.random.default_rng(0)
    scene_size = (SOURCE_WIDTH + PAN * num_frames, SOURCE_HEIGHT)
    scene: Any = 128
    for octave in range(NUM_OCTAVES):
        shape = (3, 4 << octave, 6 << octave)
        noise = rng.normal(0, 64 / 2**octave, shape).astype(np.float32)
        channels = []
        for channel in noise:
            enlarged = Image.fromarray(channel).resize(scene_size, Image.Resampling.BICUBIC)
            channels.append(np.asarray(enlarged))
        scene = scene + np.stack(channels, axis=-1)
    Path(folder, "pan").mkdir(parents=True)
    for f in range(num_frames):
        grain = rng.normal(0, GRAIN, (SOURCE_HEIGHT, SOURCE_WIDTH, 3))
        window = scene[:, PAN * f : PAN * f + SOURCE_WIDTH] + grain
        picture = Image.fromarray(window.round().clip(0, 255).astype(np.uint8))
        picture.save(Path(folder, "pan", f"{f:03}.{suffix}"), **FORMATS[suffix])  # type: ignore


def write_cache(folder: Path, clip: Clip, width: int, height: int) -> Path:
    """Write a latent cache of random values, in SVD's shapes and half precision; return its
    folder."""
    folder.mkdir(parents=True)
    latent_shape = (len(clip), 4, height // 8, width // 8)
    tensors = {
        "mean": torch.randn(latent_shape).half(),
        "std": torch.randn(latent_shape).half(),
        "image_embeds": torch.randn(len(clip), EMBEDDING_SIZE).half(),
    }
    write_cached_clip(folder, clip, clip_digest(clip), tensors)
    return folder


def full_decode(paths: Sequence[Path], width: int, height: int) -> dict[str, torch.Tensor]:
    """Return pixel_values (f, 3, h, w) in [-1, 1], float32, read as the original SVD Xtend reads
    them.

    Unlike there, frames are cropped, so that the pixels are those of the loader.
    """
    pixel_values = torch.empty(len(paths), 3, height, width)
    for f, path in enumerate(paths):
        with Image.open(path) as image:
            resized = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
            normalized = torch.from_numpy(np.array(resized)).float() / 127.5 - 1
            pixel_values[f] = normalized.permute(2, 0, 1)
    return {"pixel_values": pixel_values}


def make_readers(
    folder: Path, cache_folder: Path, width: int, height: int, num_frames: int
) -> dict[str, Reader]:
    """Return {variant: function that reads the clip}, the full decode first."""
    spec = ClipSpec(width, height, num_frames, fps=7)
    clips = ClipCollection(folder, spec)
    sampler = ClipSampler(clips.pools(), seed=0)
    write_cache(cache_folder, clips[0], width, height)
    ours = DummyDataset(clips, sampler, spec)
    cached = DummyDataset(clips, sampler, spec, latent_cache=str(cache_folder))
    paths = images.list_frames(folder / "pan")
    return {
        "full decode": partial(full_decode, paths, width, height),
        "ours": partial(ours.__getitem__, 0),
        "cached": partial(cached.__getitem__, 0),
    }


def psnr(pixel_values: np.ndarray, reference: torch.Tensor) -> float | None:
    """Return the PSNR in dB of uint8 pixel_values against a reference in [-1, 1]; None if equal."""
    wanted = ((np.asarray(reference, np.float64) + 1) * 127.5).round()
    mean_squared_error = np.square(pixel_values - wanted).mean()
    if mean_squared_error == 0:
        return None
    return 10 * math.log10(255**2 / mean_squared_error)


def count_megabytes(item: dict[str, Any]) -> float:
    """Return the size of the arrays and tensors of an item."""
    return sum(value.nbytes for value in item.values() if hasattr(value, "nbytes")) / 1e6


def measure_readers(readers: dict[str, Reader], rounds: int) -> dict[str, dict[str, Any]]:
    """Return {variant: row of the table} for one format and size."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    items = {}
    for round_number in range(rounds + 1):
        for name, read in readers.items():
            began = time.process_time()
            items[name] = read()  # replaces the item of the round before, as training does
            elapsed = time.process_time() - began
            if round_number > 0:  # the first round warms up
                seconds[name].append(elapsed)
    rows: dict[str, dict[str, Any]] = {}
    for name in readers:
        median = statistics.median(seconds[name])
        ratios = [own / full for own, full in zip(seconds[name], seconds["full decode"])]
        rows[name] = {
            "cpu_ms": 1e3 * median,
            "clips_per_cpu_second": 1 / median,
            "x_full": statistics.median(ratios),
            "MB": count_megabytes(items[name]),
        }
    rows["ours"]["psnr_dB"] = psnr(
        items["ours"]["pixel_values"], items["full decode"]["pixel_values"]
    )
    return rows


def format_psnr(row: dict[str, Any]) -> str:
    """Return the last column of the table."""
    if "psnr_dB" not in row:
        return ""
    return "equal" if row["psnr_dB"] is None else f"{row['psnr_dB']:.1f}"


def main(args: argparse.Namespace) -> None:
    """Measure each format at each size; print a table, and the same as JSON."""
    print(
        f"{args.num_frames} frames of {SOURCE_WIDTH}x{SOURCE_HEIGHT}, Pillow {PIL.__version__}, "
        "CPU time of one thread"
    )
    print(
        f"{'format':8}{'size':10}{'variant':13}{'CPU ms':>9}{'clips/s':>9}{'x full':>8}"
        f"{'MB':>9}{'PSNR dB':>9}"
    )
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        for suffix in args.formats:
            base_folder = Path(temporary, suffix)
            write_frames(base_folder, suffix, args.num_frames)
            for size in args.sizes:
                width, height = map(int, size.split("x"))
                cache_folder = Path(temporary, "cache", suffix, size)
                readers = make_readers(base_folder, cache_folder, width, height, args.num_frames)
                for name, row in measure_readers(readers, args.rounds).items():
                    table.append({"format": suffix, "size": size, "variant": name, **row})
                    print(
                        f"{suffix:8}{size:10}{name:13}{row['cpu_ms']:9.1f}"
                        f"{row['clips_per_cpu_second']:9.2f}{row['x_full']:8.3f}"
                        f"{row['MB']:9.2f}{format_psnr(row):>9}",
                        flush=True,
                    )
    document = {
        "num_frames": args.num_frames,
        "rounds": args.rounds,
        "pillow": PIL.__version__,
        "rows": table,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="picture formats; default: all")
    parser.add_argument("--sizes", nargs="+", default=["512x320", "1024x576"], help="width x height that the loader resizes to; default: %(default)s")
    parser.add_argument("--num_frames", type=int, default=25, help="frames of the clip; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per variant; default: %(default)s")
    # fmt: on
    torch.set_num_threads(1)
    main(parser.parse_args())
