"""Time single operations of a training step on a GPU, each in several ways: attention, and the VAE.

    python benchmarks/bench_kernels.py              # SVD's sizes at 1024x576 x 25 frames
    python benchmarks/bench_kernels.py --small      # a rehearsal, also on a CPU

Medians of 5 rounds, in milliseconds, and the largest memory allocated beside the inputs. An
operation that fails is a row with its error. The last line is one JSON document; the exit status is
1 if a whole part failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from svd_xtend.models import unet_optimizations

GIB = 2**30
BACKENDS = {
    "torch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# (batch, heads, tokens, channels) of attention at SVD's highest resolution
ATTENTION_SHAPES = {
    "spatial, 25 frames of 128x72": (25, 5, 9216, 64),
    "temporal, 25 frames": (9216, 5, 25, 64),
    "temporal, 14 frames": (9216, 5, 14, 64),
}
SMALL_ATTENTION_SHAPES = {"spatial": (2, 5, 64, 64), "temporal": (64, 5, 25, 64)}


class Table:
    """A table whose rows are printed as they are measured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: dict[str, dict[str, Any]] = {}

    def measure(self, name: str, function: Callable[[], object], rounds: int = 5) -> None:
        """Time a function after one call that warms up, and add the row. An error is a row, too."""
        try:
            row = self.time_rounds(function, rounds)
        except Exception as error:  # what this machine cannot run is a result
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            self.rows[name] = {"error": message}
            print(f"{name:60}{message[:100]}", flush=True)
            return
        self.rows[name] = row
        line = f"{name:60}{row['ms']:9.2f} ms"
        if row["peak_GiB"] is not None:
            line += f"{row['peak_GiB']:9.3f} GiB"
        print(line, flush=True)

    def time_rounds(self, function: Callable[[], object], rounds: int) -> dict[str, Any]:
        """Return the median milliseconds, and on a GPU the largest GiB beside the inputs."""
        is_cuda = self.device.type == "cuda"
        seconds = []
        peak_gib = None
        for _ in range(rounds + 1):
            self.wait()
            if is_cuda:
                torch.cuda.reset_peak_memory_stats()
                allocated_before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            function()
            self.wait()
            seconds.append(time.perf_counter() - start)
            if is_cuda:
                peak_gib = (torch.cuda.max_memory_allocated() - allocated_before) / GIB
        return {"ms": 1000 * statistics.median(seconds[1:]), "peak_GiB": peak_gib}

    def wait(self) -> None:
        """Wait until the GPU has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def run_attention(
    backend: SDPBackend | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Run forward and backward of attention. backend: None for torch's own choice."""
    attention = torch.nn.functional.scaled_dot_product_attention
    if backend is None:
        out = attention(q, k, v)
    else:
        with sdpa_kernel(backend):
            out = attention(q, k, v)
    out.sum().backward()


def measure_attention(table: Table, half: torch.dtype, small: bool) -> None:
    """Measure forward and backward of attention with each of torch's kernels."""
    shapes = SMALL_ATTENTION_SHAPES if small else ATTENTION_SHAPES
    for place, shape in shapes.items():
        q, k, v = (
            torch.randn(shape, device=table.device, dtype=half, requires_grad=True)
            for _ in range(3)
        )
        for name, backend in BACKENDS.items():
            if name == "math" and place.startswith("spatial") and not small:
                continue  # 25 x 5 matrices of 9216 x 9216 would not fit
            function = partial(run_attention, backend, q, k, v)
            table.measure(f"attention, {place}, {name}", function)


def make_vae(device: torch.device, small: bool) -> Any:
    """Return SVD's VAE with random weights, or a narrow one."""
    from diffusers import AutoencoderKLTemporalDecoder

    channels = (32, 32, 64, 64) if small else (128, 256, 512, 512)
    with torch.device(device):
        return AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4,
            block_out_channels=channels,
            layers_per_block=2,
        ).requires_grad_(False)


@torch.no_grad()
def encode(vae: Any, frames: torch.Tensor, chunk: int) -> None:
    """Encode frames, `chunk` at a time, in the precision of the VAE."""
    for part in frames.to(vae.dtype).split(chunk):
        vae.encode(part).latent_dist.mode()


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor) -> None:
    """Decode the latents of a clip at once, in the precision of the VAE."""
    vae.decode(latents.to(vae.dtype), num_frames=len(latents))


def measure_vae(table: Table, half: torch.dtype, small: bool) -> None:
    """Measure encoding by chunks, and decoding with Conv3d and with the Conv2d that it equals."""
    vae = make_vae(table.device, small)
    height, width = (48, 64) if small else (576, 1024)
    num_encoded = 4 if small else 25
    num_decoded = 4 if small else 8
    frames = torch.rand(num_encoded, 3, height, width, device=table.device) * 2 - 1
    latents = torch.randn(num_decoded, 4, height // 8, width // 8, device=table.device)

    for allow_tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = allow_tf32
        for chunk in (1, 8):
            name = f"VAE encodes {num_encoded} frames, float32, TF32 {allow_tf32}, {chunk} at once"
            table.measure(name, partial(encode, vae, frames, chunk), rounds=2)
    vae.to(half)
    for chunk in (1, 2, 4, 8, 25):
        name = f"VAE encodes {num_encoded} frames, half precision, {chunk} at once"
        table.measure(name, partial(encode, vae, frames, chunk), rounds=3)
    name = f"VAE decodes {num_decoded} frames, half precision"
    table.measure(f"{name}, Conv3d", partial(decode, vae, latents), rounds=3)
    unet_optimizations.speed_up(vae)
    table.measure(f"{name}, its Conv3d as Conv2d", partial(decode, vae, latents), rounds=3)


def main(args: argparse.Namespace) -> int:
    """Measure all parts. Return 1 if one of them failed, else 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table(device)
    status = 0
    for part in (measure_attention, measure_vae):
        print(f"{part.__name__} ...", file=sys.stderr, flush=True)
        try:
            part(table, torch.bfloat16, args.small)
        except Exception as error:  # the other part may still run
            traceback.print_exc()
            print(f"{part.__name__} failed: {type(error).__name__}: {error}", flush=True)
            status = 1
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(json.dumps({"device": name, "torch": torch.__version__, "rows": table.rows}))
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="small sizes, for a rehearsal")
    sys.exit(main(parser.parse_args()))
