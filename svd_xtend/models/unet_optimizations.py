"""Exact shortcuts in diffusers' UNet of SVD: the same output, with less computation and memory.

    speed_up(unet)                           # in place; weights, names and state_dict are unchanged
    compile_blocks(unet)                     # optional; before checkpoint_activations
    checkpoint_activations(unet, "blocks")   # optional; see activation_checkpointing.py
    set_precision(unet, unet, ...)           # see precision.py

SVD's cross-attention sees one token, the CLIP image embedding. The softmax over one key is 1
whatever the query, so attn2(x) = to_out(to_v(embedding)) at every position: norm2, attn2.to_q,
attn2.to_k and the attention itself have no effect on the output and no gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

from svd_xtend.models.activation_checkpointing import (
    INNER_BLOCKS,
    TEMPORAL_BLOCK,
    unbound_forward,
)
from svd_xtend.models.precision import cast_forward

if TYPE_CHECKING:
    import torch
    from torch import nn

# Sequences that attention takes at once. The grid of a CUDA kernel has at most this many blocks in
# one dimension, and temporal attention has one sequence per position: b * h * w.
ATTENTION_BATCH = 65535
# Graphs per kind of block. torch's default of 8 is less than the shapes that SVD's resnets have.
COMPILED_GRAPHS = 128
# Modules and parameters that one-token cross-attention bypasses; see the module docstring.
BYPASSED_BY_ONE_TOKEN = r"transformer_blocks\.\d+\.(norm2|attn2\.to_[qk])(\.|$)"


def has_effect(name: str, context_tokens: int = 1) -> bool:
    """Return whether a parameter or module of SVD's UNet affects its output, and so has a gradient.

    `context_tokens` is the number of tokens that cross-attention sees. SVD passes one, the CLIP
    image embedding. With more tokens, as under text, every parameter has an effect. Training, LoRA
    targets and the memory model all ask this function.
    """
    return context_tokens > 1 or re.search(BYPASSED_BY_ONE_TOKEN, name) is None


# ---------------------------------------------------------------------------------- exact shortcuts


def speed_up(unet: nn.Module) -> nn.Module:
    """Install the shortcuts in `unet`. Return the same UNet.

    - Cross-attention to one token is computed once and broadcast. With more tokens it is
      diffusers' own.
    - Self-attention runs on at most ATTENTION_BATCH sequences at once, which CUDA requires.
    - Convolutions over time run in 2-D (see precision.cast_forward).
    - Spatial and temporal features are blended in one pass.

    New forwards are methods, not closures, so that a deep copy of the UNet computes with its own
    weights.
    """
    import torch

    module: Any
    for name, module in unet.named_modules():
        if re.search(r"transformer_blocks\.\d+$", name):
            # In __dict__, so that norm2 does not become a child module of attn2 with a second name.
            module.attn2.__dict__["query_norm"] = module.norm2
            module.attn2.forward = MethodType(one_token_attention, module.attn2)
            module.norm2.forward = MethodType(return_input, module.norm2)
            attention = unbound_forward(module.attn1)
            module.attn1.forward = MethodType(in_batches(attention), module.attn1)
            if type(module).__name__ == TEMPORAL_BLOCK:
                block = unbound_forward(module)
                module.forward = MethodType(one_context_per_clip(block), module)
        elif type(module).__name__ == "AlphaBlender":
            module.forward = MethodType(blend_in_one_pass, module)
        elif isinstance(module, torch.nn.Conv3d):
            module.forward = MethodType(cast_forward, module)  # type: ignore[method-assign]
    return unet


def return_input(norm2: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Skip norm2: `one_token_attention` applies it in the case that needs it."""
    return hidden_states


def one_token_attention(
    attn2: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Return attn2(norm2(hidden_states), encoder_hidden_states).

    With one token, encoder_hidden_states (n, 1, c), the result is (b, 1, c): the same for all
    positions, to be broadcast over them.
    """
    if (
        encoder_hidden_states is None
        or encoder_hidden_states.shape[1] != 1
        or attention_mask is not None
    ):
        queries = type(attn2.query_norm).forward(attn2.query_norm, hidden_states)
        return type(attn2).forward(attn2, queries, encoder_hidden_states, attention_mask, **kwargs)
    out = attn2.to_out[0](attn2.to_v(encoder_hidden_states)) / attn2.rescale_output_factor
    # Temporal attention has a sequence per position, and here one token per clip.
    positions_per_clip = len(hidden_states) // len(out)
    if positions_per_clip == 1 or len(out) == 1:
        return out
    return out.repeat_interleave(positions_per_clip, 0)


@cache  # one function for all blocks, so that it is compiled once
def one_context_per_clip(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the forward of a temporal block that takes the embedding once per clip.

    diffusers repeats the embedding for each of the h * w positions; this passes on one per clip.
    """

    def forward_with_one_context(
        block: nn.Module,
        hidden_states: torch.Tensor,
        num_frames: int,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = encoder_hidden_states
        num_positions = hidden_states.shape[1]
        if context is not None and context.shape[1] == 1:
            context = context[::num_positions].contiguous()
        return forward(block, hidden_states, num_frames=num_frames, encoder_hidden_states=context)

    return forward_with_one_context


@cache
def in_batches(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the forward of an attention that takes at most ATTENTION_BATCH sequences at once."""
    import torch

    def forward_in_batches(
        attn1: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if len(hidden_states) <= ATTENTION_BATCH:
            return forward(attn1, hidden_states, *args, **kwargs)
        batches = hidden_states.split(ATTENTION_BATCH)
        return torch.cat([forward(attn1, batch, *args, **kwargs) for batch in batches])

    return forward_in_batches


def blend_in_one_pass(
    mixer: Any,
    x_spatial: torch.Tensor,
    x_temporal: torch.Tensor,
    image_only_indicator: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return AlphaBlender's alpha x_spatial + (1 - alpha) x_temporal, in one pass.

    A clip of one frame is a picture, so alpha is 1. SVD's image_only_indicator (b, f) is meant to
    say so, but diffusers always sets it to zeros.
    """
    import torch

    if image_only_indicator is not None and image_only_indicator.shape[-1] == 1:
        image_only_indicator = torch.ones_like(image_only_indicator)
    alpha = mixer.get_alpha(image_only_indicator, x_spatial.ndim).to(x_spatial.dtype)
    if mixer.switch_spatial_to_temporal_mix:
        alpha = 1 - alpha
    return torch.lerp(x_temporal, x_spatial, alpha)


# ------------------------------------------------------------------------------------------ compile


def compile_blocks(unet: nn.Module, backend: str = "inductor") -> nn.Module:
    """Compile the UNet's repeated blocks with torch.compile. Return the same UNet.

    One graph per kind and shape of block takes minutes less to compile than the whole UNet. torch
    raises an error where it would otherwise silently run a block without compilation.
    """
    import torch

    torch._dynamo.config.recompile_limit = COMPILED_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled_forwards: dict[Callable[..., Any], Callable[..., Any]] = {}
    for module in unet.modules():
        if type(module).__name__ not in INNER_BLOCKS:
            continue
        forward = unbound_forward(module)
        if forward not in compiled_forwards:
            compiled_forwards[forward] = torch.compile(
                forward, fullgraph=True, dynamic=False, backend=backend
            )
        module.forward = MethodType(compiled_forwards[forward], module)
    return unet
