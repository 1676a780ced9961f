"""Less memory for activations: recompute them in the backward pass, or keep them in CPU memory.

    checkpoint_activations(unet, "blocks")           # in place; a policy of POLICIES
    loss = offload_activations(unet, loss)           # if "blocks" or "nested" are not enough

Both give the same gradients as without them. The checkpointing of diffusers leaves out the temporal
transformer blocks, which hold most of the memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

# Classes of diffusers, by name.
RESNET = "SpatioTemporalResBlock"
TRANSFORMER = "TransformerSpatioTemporalModel"
SPATIAL_BLOCK = "BasicTransformerBlock"
TEMPORAL_BLOCK = "TemporalBasicTransformerBlock"
FEED_FORWARD = "FeedForward"
INNER_BLOCKS = ("ResnetBlock2D", "TemporalResnetBlock", SPATIAL_BLOCK, TEMPORAL_BLOCK)

# Paths of the UNet's levels of highest resolution. `last` is the index of the last up block.
HIGHEST_LEVEL = r"(^|\.)(down_blocks\.0|up_blocks\.{last})\."
TWO_HIGHEST_LEVELS = r"(^|\.)(down_blocks\.[01]|up_blocks\.({last}|{last_but_one}))\."
ANYWHERE = ""


@dataclass(frozen=True)
class Segments:
    """Which modules are recomputed as one segment each, by class and by a pattern of their path."""

    classes: tuple[str, ...]
    path_pattern: str = ANYWHERE


# From the least recomputation to the most.
POLICIES = {
    "none": [],
    "level0": [Segments((RESNET, TRANSFORMER), HIGHEST_LEVEL)],
    "level01": [Segments((RESNET, TRANSFORMER), TWO_HIGHEST_LEVELS)],
    "blocks": [Segments((RESNET, SPATIAL_BLOCK, TEMPORAL_BLOCK))],
    "nested": [Segments((RESNET, TRANSFORMER)), Segments(INNER_BLOCKS)],
}
FEED_FORWARD_TOKENS = 32768  # tokens per chunk of a feed-forward layer, with the policy "nested"
OFFLOAD_BYTES = 2**20  # smaller tensors stay on the GPU: copying them costs more than they hold


def checkpoint_activations(unet: nn.Module, policy: str) -> nn.Module:
    """Recompute activations in the backward pass, by one of POLICIES. Return the same UNet.

    `unet` may also be a module that holds the UNet. With "nested", feed-forward layers also run in
    chunks of FEED_FORWARD_TOKENS tokens.
    """
    up_block_indices = [
        int(name.split(".")[-1])
        for name, _ in unet.named_modules()
        if re.search(r"(^|\.)up_blocks\.\d+$", name)
    ]
    last = max(up_block_indices)
    for segments in POLICIES[policy]:
        pattern = segments.path_pattern.format(last=last, last_but_one=last - 1)
        for name, module in unet.named_modules():
            if type(module).__name__ in segments.classes and re.search(pattern, name):
                recomputed = recompute_in_backward(unbound_forward(module))
                module.forward = MethodType(recomputed, module)
    if policy == "nested":
        for module in unet.modules():
            if type(module).__name__ == FEED_FORWARD:
                recomputed = recompute_in_backward(unbound_forward(module))
                module.forward = MethodType(run_in_chunks(recomputed), module)
    return unet


def unbound_forward(module: Any) -> Callable[..., Any]:
    """Return the function behind the method module.forward; its first argument is the module."""
    return module.forward.__func__


def recompute_in_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function `forward` of a module, so that only its inputs are kept for backward.

    The rest is computed again in the backward pass. SVD's UNet draws no random numbers (it has no
    dropout), so no generator state is kept.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    def recomputed_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(module, *args, **kwargs)
        return checkpoint(
            forward, module, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    return recomputed_forward


def run_in_chunks(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the function `forward` of a module so that it runs on chunks of the tokens (..., c).

    The module must treat each token alone.
    """
    import torch

    def chunked_forward(
        module: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        chunks = tokens.split(FEED_FORWARD_TOKENS)
        outputs = [forward(module, chunk, *args, **kwargs) for chunk in chunks]
        return torch.cat(outputs).unflatten(0, hidden_states.shape[:-1])

    return chunked_forward


def offload_activations(model: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, changed so that what its backward pass needs waits in CPU memory.

    Under activation checkpointing, that is the inputs of the segments. `model` holds the weights,
    which stay where they are. Copies run in order on the GPU's stream, so nothing waits for them.
    """
    import torch

    def offloaded(*args: Any, **kwargs: Any) -> Any:
        pack, unpack = offload_hooks(model)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return function(*args, **kwargs)

    return offloaded


def offload_hooks(model: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return (pack, unpack) for torch.autograd.graph.saved_tensors_hooks.

    They move tensors of at least OFFLOAD_BYTES to CPU memory and back. Weights of `model` stay in
    GPU memory anyway, so they are left alone.
    """
    import torch

    # _cdata is private, but it is the identity of a storage: views of a weight share it.
    weight_storages = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.device | None]:
        storage = tensor.untyped_storage()
        if storage.nbytes() < OFFLOAD_BYTES or storage._cdata in weight_storages:
            return tensor, None
        on_gpu = tensor.device.type == "cuda"
        cpu_copy = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)  # keeps the strides
        cpu_copy.copy_(tensor, non_blocking=True)
        return cpu_copy, tensor.device

    def unpack(packed: tuple[torch.Tensor, torch.device | None]) -> torch.Tensor:
        tensor, device = packed
        if device is None:
            return tensor
        return tensor.to(device, non_blocking=True, copy=True)

    return pack, unpack
