"""What each GPU sends in a step and holds of the training state, by strategy, for 8, 64, 512 GPUs that are not there.

    python benchmarks/count_communication.py                              # the table of docs/multi-gpu.md; 12 minutes on 2 cores
    python benchmarks/count_communication.py --gpus 8 --method lora

FSDP2 is counted: a step of SVD's full-size UNet runs as one process of so many, over tensors without data and a process
group that sends nothing, and each collective is noted with its bytes, padding and all. DDP and ZeRO-2 are worked out on
paper from the same parameters: DDP reduces all trained gradients in float32 (an all-reduce is a reduce-scatter and an
all-gather), ZeRO-2 reduces them to their owners and gathers the new weights. Counted as in a ring: of S bytes a GPU of N
sends S (N - 1) / N. Seconds assume a speed for every GPU, see --within and --between; nothing here was measured.
The last line is one JSON document.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import distributed as dist
from torch._subclasses.fake_tensor import (
    FakeTensorMode,  # private, but torch's own way to run without data
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import (
    FakeStore,  # and its own way to be one process of many
)
from torch.utils._python_dispatch import TorchDispatchMode

from svd_xtend.demo.tiny_svd import build_unet
from svd_xtend.training import distributed, memory_count

GIB = 2**30
STRATEGIES = ("DDP", "ZeRO-2", "FSDP2")


class Collectives(TorchDispatchMode):
    """Notes the bytes of every collective, whole: what is gathered, or reduced."""

    def __init__(self):
        super().__init__()
        self.gathered, self.reduced, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            output, source = (x.numel() * x.element_size() for x in args[:2])
            if name == "_allgather_base_":
                self.gathered += output
                self.largest = max(self.largest, output)
            elif name == "_reduce_scatter_base_":
                self.reduced += source
            else:
                raise RuntimeError(f"a step is not expected to call {name}")
        return func(*args, **(kwargs or {}))


def config_of(model):
    """Of SVD's UNet, or of the embedded one."""
    return memory_count.svd_config() if model == "svd" else build_unet().config


def count(method, gpus, model="svd"):
    """{strategy: {bytes sent in a step, bytes held of weights, gradients and averages}} of one GPU."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    told = argparse.Namespace(width=64, height=64, num_frames=2, per_gpu_batch_size=1, mixed_precision="bf16",
                              max_objects=8 * (method == "boxes"))  # fmt: skip
    config = config_of(model)
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    mesh = init_device_mesh("cpu", (gpus,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet, whole = memory_count.make_fake_model(
            config, memory_count.PREPARE_BY_KIND[method], told, "blocks"
        )
        trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
        frozen = sum(
            p.numel() * p.element_size() for p in whole.parameters() if not p.requires_grad
        )
        for module in reversed(list(whole.modules())):  # as accelerate does it, children first
            if type(module).__name__ in distributed.FSDP_UNITS or module is whole:
                fully_shard(module, mesh=mesh)
        own = [(p.to_local(), p.requires_grad) for p in whole.parameters()]
        x, cond = memory_count.make_fake_inputs(unet, told)
        with Collectives() as seen:
            whole(*x, **cond).sample.float().square().mean().backward()
    dist.destroy_process_group()
    ring, weights = (
        (gpus - 1) / gpus,
        4 * trained,
    )  # bytes; trained weights, their gradients, each average: float32
    shard = sum(p.numel() * p.element_size() * (4 if trains else 1) for p, trains in own)
    return {
        "DDP": {"sent": 2 * ring * weights, "held": frozen + 4 * weights},
        "ZeRO-2": {"sent": 2 * ring * weights, "held": frozen + weights + 4 * weights / gpus},
        "FSDP2": {"sent": ring * (seen.gathered + seen.reduced), "held": shard + seen.largest},
        "trained": trained, "frozen_bytes": frozen, "gathered": seen.gathered, "reduced": seen.reduced,
    }  # fmt: skip


def main(args):
    """Count and print."""
    results = {}
    print("| | " + " | ".join(STRATEGIES) + " |\n|---" + "|---" * len(STRATEGIES) + "|")
    for method in args.method:
        for gpus in args.gpus:
            result = results[f"{method} {gpus}"] = count(method, gpus, args.model)
            speed = args.within if gpus <= 8 else args.between
            cells = [
                f"{s['sent'] / 1e9:.2f} GB, {s['sent'] / 1e9 / speed:.3f} s; {s['held'] / GIB:.1f} GiB"
                for s in map(result.get, STRATEGIES)
            ]
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
        "--gpus", type=int, nargs="+", default=[8, 64, 512], help="default: 8 64 512"
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=list(memory_count.PREPARE_BY_KIND),
        default=["full", "lora"],
        help="default: full lora",
    )
    parser.add_argument(
        "--model", choices=["svd", "tiny"], default="svd", help="SVD's UNet, or the embedded one"
    )
    parser.add_argument(
        "--within",
        type=float,
        default=200,
        help="GB/s that a GPU sends within a machine of 8; assumed: %(default)s (NVLink)",
    )
    parser.add_argument(
        "--between",
        type=float,
        default=20,
        help="GB/s that it sends between machines; assumed: %(default)s (200 Gb/s InfiniBand for each GPU)",
    )
    main(parser.parse_args())
