"""Count what each of 8, 64 or 512 GPUs sends per training step, and what it holds, by strategy.

    python benchmarks/count_communication.py       # the table of docs/multi-gpu.md; 12 min, 2 cores
    python benchmarks/count_communication.py --gpus 8 --method lora

FSDP2 is counted: a training step of SVD's full-size UNet runs as one of N simulated processes, on
tensors without data and a process group that sends nothing. The bytes of each collective are
counted, padding included. DDP and ZeRO-2 are calculated from the same parameters: DDP reduces all
gradients in float32 (an all-reduce is a reduce-scatter and an all-gather); ZeRO-2 reduces gradients
to their owners and gathers the new weights. In a ring of N GPUs each sends S (N - 1) / N of S
bytes. The seconds assume a speed per GPU, see --within and --between; nothing here was measured.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode  # private; torch's way to run without data
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore  # and to be one process of many
from torch.utils._python_dispatch import TorchDispatchMode

from svd_xtend.demo.tiny_svd import build_unet
from svd_xtend.training import distributed, memory_count

GIB = 2**30
GPUS_PER_MACHINE = 8
STRATEGIES = ("DDP", "ZeRO-2", "FSDP2")


class CountCollectives(TorchDispatchMode):
    """Count the bytes of all-gathers and reduce-scatters: of whole tensors, not of shards."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = 0
        self.reduced = 0
        self.largest_gathered = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            output, source = args[:2]
            if name == "_allgather_base_":
                size = output.numel() * output.element_size()
                self.gathered += size
                self.largest_gathered = max(self.largest_gathered, size)
            elif name == "_reduce_scatter_base_":
                self.reduced += source.numel() * source.element_size()
            else:
                raise RuntimeError(f"a training step should not call {name}")
        return func(*args, **(kwargs or {}))


def unet_config(model: str) -> Any:
    """Return the configuration of SVD's UNet ("svd") or of the embedded one ("tiny")."""
    return memory_count.svd_config() if model == "svd" else build_unet().config


def count_communication(method: str, gpus: int, model: str = "svd") -> dict[str, Any]:
    """Return, per strategy, the bytes that one GPU sends per step and holds as training state."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    # The size of a clip changes nothing in what is sent.
    args = argparse.Namespace(
        width=64,
        height=64,
        num_frames=2,
        per_gpu_batch_size=1,
        mixed_precision="bf16",
        max_objects=8 if method == "boxes" else 0,
    )
    config = unet_config(model)
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    mesh = init_device_mesh("cpu", (gpus,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet, whole = memory_count.make_fake_model(
            config, memory_count.PREPARE_BY_KIND[method], args, "blocks"
        )
        trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
        frozen_bytes = sum(
            p.numel() * p.element_size() for p in whole.parameters() if not p.requires_grad
        )
        for module in reversed(list(whole.modules())):  # children first, as accelerate does it
            if type(module).__name__ in distributed.FSDP_UNITS or module is whole:
                fully_shard(module, mesh=mesh)
        shard_bytes = 0
        for p in whole.parameters():
            shard = p.to_local()
            # With each weight that trains: its gradient and the two moments of Adam.
            copies = 4 if p.requires_grad else 1
            shard_bytes += copies * shard.numel() * shard.element_size()
        inputs, control = memory_count.make_fake_inputs(unet, args)
        with CountCollectives() as counted:
            whole(*inputs, **control).sample.float().square().mean().backward()
    dist.destroy_process_group()
    ring = (gpus - 1) / gpus  # of S bytes each GPU sends this share
    weight_bytes = 4 * trained  # weights that train are in float32; so are gradients and moments
    return {
        "DDP": {
            "sent": 2 * ring * weight_bytes,
            "held": frozen_bytes + 4 * weight_bytes,
        },
        "ZeRO-2": {
            "sent": 2 * ring * weight_bytes,
            "held": frozen_bytes + weight_bytes + 4 * weight_bytes / gpus,
        },
        "FSDP2": {
            "sent": ring * (counted.gathered + counted.reduced),
            "held": shard_bytes + counted.largest_gathered,
        },
        "trained": trained,
        "frozen_bytes": frozen_bytes,
        "gathered": counted.gathered,
        "reduced": counted.reduced,
    }


def main(args: argparse.Namespace) -> None:
    """Count and print."""
    results = {}
    print("| | " + " | ".join(STRATEGIES) + " |\n|---" + "|---" * len(STRATEGIES) + "|")
    for method in args.method:
        for gpus in args.gpus:
            result = count_communication(method, gpus, args.model)
            results[f"{method} {gpus}"] = result
            speed = args.within if gpus <= GPUS_PER_MACHINE else args.between
            cells = []
            for strategy in STRATEGIES:
                sent = result[strategy]["sent"] / 1e9
                held = result[strategy]["held"] / GIB
                cells.append(f"{sent:.2f} GB, {sent / speed:.3f} s; {held:.1f} GiB")
            print(f"| {method}, {gpus} GPUs | " + " | ".join(cells) + " |", flush=True)
    print(
        json.dumps(
            {
                "within": args.within,
                "between": args.between,
                "model": args.model,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpus",
        type=int,
        nargs="+",
        default=[8, 64, 512],
        help="numbers of GPUs; default: 8 64 512",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=list(memory_count.PREPARE_BY_KIND),
        default=["full", "lora"],
        help="what trains; default: full lora",
    )
    parser.add_argument(
        "--model",
        choices=["svd", "tiny"],
        default="svd",
        help="the UNet of SVD, or the embedded one; default: %(default)s",
    )
    parser.add_argument(
        "--within",
        type=float,
        default=200,
        help="GB/s that a GPU sends within a machine of 8; default: %(default)s (NVLink)",
    )
    parser.add_argument(
        "--between",
        type=float,
        default=20,
        help="GB/s that a GPU sends between machines; default: %(default)s (200 Gb/s InfiniBand)",
    )
    main(parser.parse_args())
