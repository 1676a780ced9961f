"""Single operations of a training step on a GPU, each way of doing them: attention's kernels, the VAE, convolutions over time.

    python benchmarks/bench_kernels.py                       # SVD's sizes at 1024x576 x 25 frames
    python benchmarks/bench_kernels.py --small               # a rehearsal, also on a CPU

Medians of 5 rounds, in milliseconds, and the memory allocated at most beside the inputs. The last line is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from svd_xtend.models import unet_optimizations

BACKENDS = {
    "torch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Table:
    """Rows that are printed as they are measured."""

    def __init__(self, device: torch.device):
        self.device = device
        self.rows = {}

    def measure(self, name: str, function, rounds: int = 5) -> None:
        """Time a function after one call that warms up; an error is its row."""
        seconds, peak = [], None
        try:
            for _ in range(rounds + 1):
                self.wait()
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                began = time.perf_counter()
                function()
                self.wait()
                seconds.append(time.perf_counter() - began)
            if self.device.type == "cuda":
                peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        except Exception as error:  # what a machine cannot run is a result, too
            print(f"{name:60}{str(error).splitlines()[0][:70]}", flush=True)
            self.rows[name] = {"error": str(error).splitlines()[0]}
            return
        milliseconds = 1000 * statistics.median(seconds[1:])
        self.rows[name] = {"ms": milliseconds, "peak_GiB": peak}
        print(
            f"{name:60}{milliseconds:9.2f} ms" + (f"{peak:9.3f} GiB" if peak is not None else ""),
            flush=True,
        )

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure_attention(table: Table, dtype: torch.dtype, small: bool) -> None:
    """Forward and backward of attention at SVD's highest resolution: (batch, heads, tokens, 64)."""
    shapes = {
        "spatial, 25 frames of 128x72": (25, 5, 9216, 64),
        "temporal, 25 frames": (9216, 5, 25, 64),
        "temporal, 14 frames": (9216, 5, 14, 64),
    }
    if small:
        shapes = {"spatial": (2, 5, 64, 64), "temporal": (64, 5, 25, 64)}
    for place, shape in shapes.items():
        q, k, v = (
            torch.randn(shape, device=table.device, dtype=dtype, requires_grad=True)
            for _ in range(3)
        )
        for name, backend in BACKENDS.items():
            if name == "math" and place.startswith("spatial") and not small:
                continue  # 25 x 5 matrices of 9216 x 9216 would not fit

            def attend(backend=backend, q=q, k=k, v=v):
                if backend is None:
                    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
                else:
                    with sdpa_kernel(backend):
                        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
                out.sum().backward()

            table.measure(f"attention, {place}, {name}", attend)


def make_vae(device: torch.device, small: bool):
    """SVD's VAE with random weights."""
    from diffusers import AutoencoderKLTemporalDecoder

    channels = (32, 32, 64, 64) if small else (128, 256, 512, 512)
    with torch.device(device):
        return AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4,
            block_out_channels=channels,
            layers_per_block=2,
        ).requires_grad_(False)


def measure_vae(table: Table, half: torch.dtype, small: bool) -> None:
    """Encode 25 frames by chunks; decode 8, with Conv3d and with the 2-D convolution that it is."""
    vae = make_vae(table.device, small)
    height, width = (48, 64) if small else (576, 1024)
    frames = torch.rand(4 if small else 25, 3, height, width, device=table.device) * 2 - 1
    latents = torch.randn(4 if small else 8, 4, height // 8, width // 8, device=table.device)

    def encode(chunk, dtype):
        with torch.no_grad():
            for part in frames.to(dtype).split(chunk):
                vae.encode(part).latent_dist.mode()

    def decode(dtype):
        with torch.no_grad():
            vae.decode(latents.to(dtype), num_frames=len(latents))

    for tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = tf32
        for chunk in (1, 8):
            name = f"VAE encodes {len(frames)} frames, float32, TF32 {tf32}, {chunk} at once"
            table.measure(name, lambda chunk=chunk: encode(chunk, torch.float32), 2)
    vae.to(half)
    for chunk in (1, 2, 4, 8, 25):
        name = f"VAE encodes {len(frames)} frames, half precision, {chunk} at once"
        table.measure(name, lambda chunk=chunk: encode(chunk, half), 3)
    table.measure(
        f"VAE decodes {len(latents)} frames, half precision, Conv3d", lambda: decode(half), 3
    )
    unet_optimizations.speed_up(vae)
    table.measure(
        f"VAE decodes {len(latents)} frames, half precision, its Conv3d as Conv2d",
        lambda: decode(half),
        3,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="small sizes")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table(device)
    measure_attention(table, torch.bfloat16, args.small)
    measure_vae(table, torch.bfloat16, args.small)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(json.dumps({"device": name, "torch": torch.__version__, "rows": table.rows}))
