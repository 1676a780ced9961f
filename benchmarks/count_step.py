"""Arithmetic and memory of a training step of SVD's full-size UNet, by counting: no GPU, no weights, some minutes.

    python benchmarks/count_step.py --width 512 --height 320 --num_frames 14 --method boxes lora
    python benchmarks/count_step.py --width 1024 --height 576 --num_frames 25 --method lora --policy blocks nested

The step runs over tensors that have shapes but no data, in bf16 throughout. Counted are the operations of matrix products,
convolutions and attention, and the bytes that are alive at once: weights, gradients, activations. Not counted: optimizer
state, VAE and CLIP, autocast's copies, workspaces and fragmentation; a GPU needs more. The last line is one JSON document.
"""

import argparse
import json
import sys
import weakref
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # private, but torch's own way to run without data
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from svd_xtend import fast_unet
from svd_xtend.boxes import ControlledUNet, new_boxes
from svd_xtend.lora import inject_lora

aten = torch.ops.aten
ATTENTION = {  # torch counts attention on GPUs only
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, `now` and at their `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def watch(self, tensor):
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self.forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def forget(self, key, size):
        del self.known[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.watch(leaf)
        return out


def make_model(method):
    """SVD's UNet in bf16 with what trains: all of it, LoRA of rank 16, or box control. `base`: as diffusers has it."""
    from diffusers import UNetSpatioTemporalConditionModel

    unet = UNetSpatioTemporalConditionModel().requires_grad_(method in ("full", "base"))
    if method == "lora":
        with patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):  # peft; nothing has to move
            inject_lora(unet, 16, 16, ["attention"])
    model = ControlledUNet(unet, new_boxes(unet)) if method == "boxes" else unet
    return unet, model.train()


def boxes_of_a_clip(frames, slots=8):
    """`cond` of two objects."""
    valid = torch.zeros(1, frames, slots)
    valid[..., :2] = 1
    boxes = torch.tensor([0.2, 0.3, 0.5, 0.7]).expand(1, frames, slots, 4)
    return {"boxes": boxes, "valid": valid, "hard": valid.clone(), "colors": torch.rand(1, slots, 3)}


def count(method, policy, width, height, frames):
    """{forward and step in TFLOP, peak GiB, trained parameters in millions}."""
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode():
        unet, model = make_model(method)
        if method != "base":
            fast_unet.checkpoint(fast_unet.speed_up(unet), policy)
        shapes = (1, frames, 8, height // 8, width // 8), (1,), (1, 1, 1024), (1, 3)
        inputs = [torch.randn(shape) for shape in shapes]
        cond = boxes_of_a_clip(frames) if method == "boxes" else {}
        live, flops = LiveBytes(), FlopCounterMode(display=False, custom_mapping=ATTENTION)
        for tensor in [*model.parameters(), *model.buffers(), *inputs]:
            live.watch(tensor)
        weights = live.now
        with live:
            model(*inputs, **cond).sample.float().square().mean().backward()
        with flops:  # apart: it keeps tensors alive
            loss = model(*inputs, **cond).sample.float().square().mean()
            forward = flops.get_total_flops()
            loss.backward()
    return {
        "method": method, "policy": policy, "size": f"{width}x{height}x{frames}",
        "trained_M": sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6,
        "forward_TFLOP": forward / 1e12, "step_TFLOP": flops.get_total_flops() / 1e12,
        "weights_GiB": weights / 2**30, "peak_GiB": live.peak / 2**30,
    }  # fmt: skip


def main(args):
    """Count each method under each policy, print a table and the same as JSON."""
    rows = []
    print(
        f"{'size':14}{'method':8}{'policy':9}{'trained M':>10}{'forward TF':>12}{'step TF':>10}{'weights GiB':>13}{'peak GiB':>10}"
    )
    for method in args.method:
        for policy in args.policy:
            r = count(method, policy, args.width, args.height, args.num_frames)
            rows.append(r)
            print(
                f"{r['size']:14}{method:8}{policy:9}{r['trained_M']:10.1f}{r['forward_TFLOP']:12.2f}{r['step_TFLOP']:10.2f}"
                f"{r['weights_GiB']:13.2f}{r['peak_GiB']:10.2f}", flush=True,
            )  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--method", nargs="+", choices=["base", "full", "lora", "boxes"], default=["lora", "boxes"], help="base: full training of diffusers' own UNet, without this project's changes")
    parser.add_argument("--policy", nargs="+", choices=fast_unet.POLICIES, default=["blocks"])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--num_frames", type=int, default=14)
    # fmt: on
    main(parser.parse_args())
