"""TODO models.activation_checkpointing."""

import re
from types import MethodType

RESNET, TRANSFORMER = "SpatioTemporalResBlock", "TransformerSpatioTemporalModel"
SPATIAL, TEMPORAL = "BasicTransformerBlock", "TemporalBasicTransformerBlock"
PARTS = ("ResnetBlock2D", "TemporalResnetBlock", SPATIAL, TEMPORAL)
HIGHEST, NEXT = (
    r"(^|\.)(down_blocks\.0|up_blocks\.{last})\.",
    r"(^|\.)(down_blocks\.[01]|up_blocks\.({last}|{but_one}))\.",
)
POLICIES = {  # what is recomputed as one segment: kinds of module, within which paths; cheapest first
    "none": [],
    "level0": [((RESNET, TRANSFORMER), HIGHEST)],
    "level01": [((RESNET, TRANSFORMER), NEXT)],
    "blocks": [((RESNET, SPATIAL, TEMPORAL), "")],
    "nested": [((RESNET, TRANSFORMER), ""), (PARTS, "")],
}
FEED_FORWARD_TOKENS = 32768  # of a chunk, under `nested`
OFFLOAD_BYTES = 2**20  # smaller tensors are not worth the way to the CPU


# -------------------------------------------------------------------------------------------------------- checkpointing


def checkpoint_activations(unet, policy):
    """Recompute activations in backward, by one of POLICIES; exact. diffusers' own checkpointing leaves the temporal
    transformer blocks out, which hold most of the memory. Under `nested` feed-forwards also run in chunks of tokens."""
    last = max(
        int(name.split(".")[-1])
        for name, _ in unet.named_modules()
        if re.search(r"(^|\.)up_blocks\.\d+$", name)
    )
    for kinds, where in POLICIES[policy]:
        path = where.format(last=last, but_one=last - 1) if where else ""
        for name, module in unet.named_modules():
            if type(module).__name__ in kinds and re.search(path, name):
                module.forward = MethodType(recompute_in_backward(module.forward.__func__), module)
    if policy == "nested":
        for module in unet.modules():
            if type(module).__name__ == "FeedForward":
                module.forward = MethodType(
                    run_in_chunks(recompute_in_backward(module.forward.__func__)), module
                )
    return unet


def recompute_in_backward(forward):
    """`forward` that keeps its inputs only, where there are gradients. SVD has no randomness to replay."""
    import torch

    def recompute(module, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(module, *args, **kwargs)
        return checkpoint(
            forward, module, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    return recompute


def run_in_chunks(forward):
    """`forward` of what treats each token (..., c) alone, a number of tokens at a time."""
    import torch

    def chunk(module, hidden_states, *args, **kwargs):
        tokens = hidden_states.flatten(0, -2)
        parts = [
            forward(module, part, *args, **kwargs) for part in tokens.split(FEED_FORWARD_TOKENS)
        ]
        return torch.cat(parts).unflatten(0, hidden_states.shape[:-1])

    return chunk


def offload_activations(model, function):
    """`function` whose calls leave what backward will need of them in the CPU's memory. Under checkpointing that is the
    segments' inputs. Copies run in the GPU's own order, so nothing here waits for them."""
    import torch

    def call(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(*offload_hooks(model)):
            return function(*args, **kwargs)

    return call


def offload_hooks(model):
    """(pack, unpack) of what autograd saves: large tensors to the CPU and back; weights, which stay anyway, as they are."""
    import torch

    weights = {
        p.untyped_storage()._cdata for p in model.parameters()
    }  # private, but the storage's identity

    def pack(x):
        if x.untyped_storage().nbytes() < OFFLOAD_BYTES or x.untyped_storage()._cdata in weights:
            return x, None
        away = torch.empty_like(
            x, device="cpu", pin_memory=x.device.type == "cuda"
        )  # with its strides
        return away.copy_(x, non_blocking=True), x.device

    def unpack(kept):
        x, device = kept
        return x if device is None else x.to(device, non_blocking=True, copy=True)

    return pack, unpack
