"""Measure how long a training step waits for a checkpoint: for a copy to CPU memory, not the disk.

    python benchmarks/bench_save.py              # 0.5 GiB of weights; with moments and EMA 2 GiB
    python benchmarks/bench_save.py --GiB 5.5    # SVD's UNet; needs 8 times that in memory

Alternates between the copy alone and CheckpointManager.save. Prints a table, and one JSON document
on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import Accelerator

from svd_xtend.training import checkpoints, distributed

GIB = 2**30
WIDTH = 1280  # of a square weight: the widest layers of SVD's UNet


class FakeEMA:
    """The attributes of diffusers' EMAModel that CheckpointManager reads."""

    def __init__(self, parameters: Any) -> None:
        self.shadow_params = [p.detach().clone() for p in parameters]
        self.optimization_step = 1


def make_training_state(gib: float) -> tuple[Accelerator, Any, Any, Any, FakeEMA]:
    """Return (accelerator, model, optimizer, schedule, EMA) with `gib` GiB of float32 weights."""
    accelerator = Accelerator()
    count = max(1, round(gib * GIB / (4 * WIDTH * WIDTH)))
    model = torch.nn.ParameterList(
        [torch.randn(WIDTH, WIDTH, device=accelerator.device) for _ in range(count)]
    )
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer)
    return accelerator, accelerator.unwrap_model(model), optimizer, schedule, FakeEMA(model)


def copy_all(model: Any, optimizer: Any, ema: FakeEMA) -> list[torch.Tensor | None]:
    """Copy everything to CPU memory: the part of a save that a step has to wait for."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [distributed.gather_tensor(tensor) for tensor in [*model, *states, *ema.shadow_params]]


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    accelerator, model, optimizer, schedule, ema = make_training_state(args.GiB)
    seconds: dict[str, list[float]] = {"copy": [], "save": [], "written": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as out:
        manager = checkpoints.CheckpointManager(
            accelerator,
            out,
            1,
            model,
            optimizer,
            schedule,
            ema,  # type: ignore[arg-type]
        )
        for i in range(args.rounds + 1):
            copy_start = time.perf_counter()
            copies = copy_all(model, optimizer, ema)
            copy_end = time.perf_counter()
            del copies
            save_start = time.perf_counter()
            manager.save({"step": i + 1, "samples": i, "seed": 0})
            save_end = time.perf_counter()
            manager.finish()
            written = time.perf_counter()
            if i > 0:  # the first round is the warm-up
                seconds["copy"].append(copy_end - copy_start)
                seconds["save"].append(save_end - save_start)
                seconds["written"].append(written - save_start)
        files = Path(out, f"checkpoint-{args.rounds + 1}").iterdir()
        size = sum(file.stat().st_size for file in files) / GIB
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{os.cpu_count()} CPU cores"
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [save / copy for save, copy in zip(seconds["save"], seconds["copy"])]
    ratio = statistics.median(ratios)
    print(f"{size:.2f} GiB, {device}, median of {args.rounds}")
    print(f"  copy to CPU memory          {median['copy']:8.3f} s")
    print(f"  a step waits for a save     {median['save']:8.3f} s, {ratio:.2f} of the copy")
    print(f"  until it is on disk         {median['written']:8.3f} s")
    print(json.dumps({"GiB": size, "device": device, "ratio": ratio, **seconds}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--GiB", type=float, default=0.5, help="weights, in GiB; default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=9, help="measurements; default: %(default)s")
    parser.add_argument(
        "--folder", help="folder to write to; default: the system's temporary folder"
    )
    main(parser.parse_args())
