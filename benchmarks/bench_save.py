"""How long a training step waits for a checkpoint: for the copy in the CPU's memory, not for the disk.

    python benchmarks/bench_save.py                 # 0.5 GiB of weights, with their averages and an EMA 2 GiB
    python benchmarks/bench_save.py --GiB 5.5       # as much as all of SVD's UNet has; four times that in memory, twice

The copy alone and Saver.save take turns; on a GPU both read from it. Prints a table, and one JSON document on its last line.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import Accelerator

from svd_xtend.training import checkpoints, distributed


class Averages:
    """What Saver asks of an EMAModel."""

    def __init__(self, parameters):
        self.shadow_params, self.optimization_step = [p.detach().clone() for p in parameters], 1


def made(gib):
    """(accelerator, model, optimizer with its averages, schedule, EMA) of so much weight, in tensors as large as SVD's."""
    accelerator = Accelerator()
    count = max(1, round(gib * 2**30 / (4 * 1280 * 1280)))
    model = torch.nn.ParameterList(
        [torch.randn(1280, 1280, device=accelerator.device) for _ in range(count)]
    )
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer)
    return accelerator, accelerator.unwrap_model(model), optimizer, schedule, Averages(model)


def copy_all(model, optimizer, ema):
    """The copy that no checkpoint can do without."""
    states = [v for state in optimizer.state.values() for v in state.values()]
    return [distributed.gather_tensor(t) for t in [*model, *states, *ema.shadow_params]]


def main(args):
    """Measure and print."""
    accelerator, model, optimizer, schedule, ema = made(args.GiB)
    rows = {"copy": [], "save": [], "written": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as out:
        saver = checkpoints.CheckpointManager(accelerator, out, 1, model, optimizer, schedule, ema)
        for i in range(args.rounds + 1):
            began = time.perf_counter()
            kept = copy_all(model, optimizer, ema)
            copied = time.perf_counter()
            del kept
            started = time.perf_counter()
            saver.save({"step": i + 1, "samples": i, "seed": 0})
            saved = time.perf_counter()
            saver.finish()
            if i:  # the first one warms up
                rows["copy"].append(copied - began)
                rows["save"].append(saved - started)
                rows["written"].append(time.perf_counter() - started)
        size = (
            sum(f.stat().st_size for f in Path(out, f"checkpoint-{args.rounds + 1}").iterdir())
            / 2**30
        )
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    )
    median = {name: statistics.median(values) for name, values in rows.items()}
    ratio = statistics.median(s / c for s, c in zip(rows["save"], rows["copy"]))
    print(f"{size:.2f} GiB, {device}, median of {args.rounds}")
    print(
        f"  copy to the CPU's memory    {median['copy']:8.3f} s\n  the loop waits for a save   {median['save']:8.3f} s, {ratio:.2f} of the copy"
    )
    print(f"  until it is on disk         {median['written']:8.3f} s")
    print(json.dumps({"GiB": size, "device": device, "ratio": ratio, **rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--GiB", type=float, default=0.5, help="of weights; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    main(parser.parse_args())
