"""Count the memory of a training step by running it on tensors that have shapes but no data.

    weights, step = count_step_memory(config, prepare, args, policy="blocks")      # GiB, in seconds
    python -m svd_xtend.training.memory_count         # count the table of memory_estimate.py anew

The count adds up the bytes of all tensors that are alive at the same time, in a real forward and
backward pass of the UNet. It needs no GPU and no weights. It does not see what a GPU needs beside
tensors: the CUDA context, the workspaces of libraries and fragmentation.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch

# private, but torch's own way to run a model without data
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svd_xtend.models import activation_checkpointing, unet_optimizations
from svd_xtend.models.precision import compute_dtype, set_precision
from svd_xtend.training.memory_estimate import GIB, TABLE_SIZES

if TYPE_CHECKING:
    from diffusers import UNetSpatioTemporalConditionModel

Prepare = Callable[[Any, argparse.Namespace], Any]  # (UNet, args) -> the model that is trained

ALLOCATOR_BLOCK_BYTES = 512  # CUDA's allocator rounds each tensor up to a multiple of this


class CountedMemory(NamedTuple):
    """GiB of a training step of a UNet."""

    weights: float
    step: float  # gradients and activations, at their peak


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors that operations in this context create and that are alive.

    now: bytes that are alive at present. peak: the largest value of `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known: dict[int, tuple[weakref.ref, int]] = {}  # {storage: (reference, bytes)}

    def watch(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now on, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # private, but the identity of a storage
        if key in self.known:
            return
        blocks = -(-storage.nbytes() // ALLOCATOR_BLOCK_BYTES)
        size = blocks * ALLOCATOR_BLOCK_BYTES
        self.known[key] = weakref.ref(storage, lambda _: self.forget(key)), size
        self.now += size
        self.peak = max(self.peak, self.now)

    def forget(self, key: int) -> None:
        """Stop counting a storage, if it is counted."""
        _, size = self.known.pop(key, (None, 0))
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if hasattr(leaf, "untyped_storage"):
                self.watch(leaf)
        return out


def make_fake_model(
    config: Mapping[str, Any],
    prepare: Prepare,
    args: argparse.Namespace,
    policy: str,
    master: str = "float32",
) -> tuple[UNetSpatioTemporalConditionModel, Any]:
    """Return (UNet, trained model) as a trainer has them. Call it inside a FakeTensorMode.

    policy: of --gradient_checkpointing. master: name of the dtype of trained weights.
    """
    from diffusers import UNetSpatioTemporalConditionModel

    # Files hold data, which fake tensors cannot take. The seed is never used, because no data are
    # drawn.
    without_files = argparse.Namespace(
        **{**vars(args), "tracklet_weights": None, "lora": None, "seed": 0}
    )
    unet = UNetSpatioTemporalConditionModel.from_config(config).requires_grad_(False)
    unet = unet_optimizations.speed_up(unet)
    # PEFT moves its new layers to the UNet's device, which fails for fake tensors
    with patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
        model = prepare(unet, without_files)
    activation_checkpointing.checkpoint_activations(model, policy)
    set_precision(model, unet, compute_dtype(args.mixed_precision), getattr(torch, master))
    return unet, model.train()


def make_fake_inputs(
    unet: UNetSpatioTemporalConditionModel, args: argparse.Namespace, scale: int = 8
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return (positional, keyword) arguments of a UNet's forward.

    scale: pixels per latent pixel. The keyword arguments are those of box control, if
    `args.max_objects` is not 0.
    """
    batch, frames = args.per_gpu_batch_size, args.num_frames
    height, width = args.height // scale, args.width // scale
    sample = torch.randn(batch, frames, 8, height, width)
    c_noise = torch.randn(batch)
    image_embeds = torch.randn(batch, 1, unet.config.cross_attention_dim)
    added_time_ids = torch.randn(batch, 3)
    inputs = [sample, c_noise, image_embeds, added_time_ids]

    max_objects = getattr(args, "max_objects", 0)
    if not max_objects:
        return inputs, {}
    valid = torch.zeros(batch, frames, max_objects)
    control = {
        "boxes": torch.rand(batch, frames, max_objects, 4),
        "valid": valid,
        "hard": valid.clone(),
        "colors": torch.rand(batch, max_objects, 3),
    }
    return inputs, control


def count_step_memory(
    config: Mapping[str, Any],
    prepare: Prepare,
    args: argparse.Namespace,
    policy: str,
    offload: bool = False,
    master: str = "float32",
    scale: int = 8,
) -> CountedMemory:
    """Count the memory of one training step of a UNet of this configuration. Takes seconds.

    args: the flags of a trainer. policy: of --gradient_checkpointing. offload:
    --offload_activations. master: name of the dtype of trained weights. scale: pixels per latent
    pixel.
    """
    with FakeTensorMode():
        unet, model = make_fake_model(config, prepare, args, policy, master)
        inputs, control = make_fake_inputs(unet, args, scale)
        live = LiveBytes()
        for tensor in [*model.parameters(), *model.buffers(), *inputs, *control.values()]:
            live.watch(tensor)
        weights = live.now
        with live:
            with offload_uncounted(live, model) if offload else contextlib.nullcontext():
                loss = model(*inputs, **control).sample.float().square().mean()
            loss.backward()
    return CountedMemory(weights=weights / GIB, step=(live.peak - weights) / GIB)


def step_counter(
    config: Mapping[str, Any], prepare: Prepare, args: argparse.Namespace, scale: int
) -> Callable[[str, bool, str], float]:
    """Return a function (policy, offload, master) -> GiB of gradients and activations.

    It counts each combination once. Its parameters are those of `count_step_memory`.
    """

    @cache
    def count(policy: str, offload: bool, master: str) -> float:
        return count_step_memory(config, prepare, args, policy, offload, master, scale).step

    return count


def offload_uncounted(live: LiveBytes, model: Any) -> contextlib.AbstractContextManager:
    """Return the context of --offload_activations for a count, which skips what lies on the CPU."""
    pack, unpack = activation_checkpointing.offload_hooks(model)

    def pack_uncounted(tensor: torch.Tensor) -> Any:
        peak = live.peak
        kept = pack(tensor)
        stored, device = kept
        if device is not None:  # `stored` lies on the CPU, but was counted
            live.forget(stored.untyped_storage()._cdata)
            live.peak = peak
        return kept

    return torch.autograd.graph.saved_tensors_hooks(pack_uncounted, unpack)


# --------------------------------------------------------------- the UNet of Stable Video Diffusion


def svd_config() -> dict[str, Any]:
    """Return the configuration of SVD's UNet, which is the default of diffusers."""
    from diffusers import UNetSpatioTemporalConditionModel

    parameters = inspect.signature(UNetSpatioTemporalConditionModel.__init__).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


def prepare_full(unet: Any, args: argparse.Namespace) -> Any:
    """Train all parameters of the UNet that have an effect."""
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(unet_optimizations.has_effect(name))
    return unet


def prepare_lora(unet: Any, args: argparse.Namespace) -> Any:
    """Train a LoRA of rank 16 on all attention layers."""
    from svd_xtend.models.lora import inject_lora

    return inject_lora(unet, 16, 16, ["attention"])


def prepare_boxes(unet: Any, args: argparse.Namespace) -> Any:
    """Train box control with its default enhancer."""
    from svd_xtend.models.box_control import ControlledUNet, new_box_control

    return ControlledUNet(unet, new_box_control(unet))


PREPARE_BY_KIND: dict[str, Prepare] = {
    "full": prepare_full,
    "lora": prepare_lora,
    "boxes": prepare_boxes,
}


def count_kind_memory(
    kind: str,
    policy: str,
    offload: bool,
    width: int,
    height: int,
    frames: int,
    clips: int = 1,
    precision: str = "bf16",
) -> CountedMemory:
    """Count the memory of one training step of SVD's own UNet.

    kind: full, lora, boxes, or full_bf16, which keeps trained weights in bfloat16.
    """
    args = argparse.Namespace(
        width=width,
        height=height,
        num_frames=frames,
        per_gpu_batch_size=clips,
        mixed_precision=precision,
        max_objects=8 if kind == "boxes" else 0,
    )
    master = "bfloat16" if kind == "full_bf16" else "float32"
    prepare = PREPARE_BY_KIND[kind.removesuffix("_bf16")]
    return count_step_memory(svd_config(), prepare, args, policy, offload, master)


def main() -> None:
    """Print STEP_GIB of memory_estimate.py, counted anew."""
    for kind in ("full", "full_bf16", "lora", "boxes"):
        for policy in activation_checkpointing.POLICIES:
            offload_choices = (False, True) if policy in ("blocks", "nested") else (False,)
            for offload in offload_choices:
                row = []
                for size in TABLE_SIZES:
                    step = count_kind_memory(kind, policy, offload, *size).step
                    row.append(f"{step:.3f}")
                print(f'    ("{kind}", "{policy}", {offload}): ({", ".join(row)}),', flush=True)


if __name__ == "__main__":
    main()
