"""The same UNet, cheaper: what diffusers' SVD computes for nothing is left out, the output stays as it is.

    speed_up(unet)                       # in place; weights, names and state_dict are untouched
    compile_blocks(unet)                 # if at all, before `checkpoint`: its repeated parts as compiled kernels
    checkpoint(unet, "blocks")           # activations are recomputed in backward instead of kept, temporal blocks' too
    compute_in(unet, torch.bfloat16)     # all layers in bf16, those too whose weights train in float32; instead of autocast

Cross-attention in SVD sees one token, the CLIP embedding. A softmax over one key is 1 whatever the query, hence
attn2(x) = to_out(to_v(embedding)) at every position: norm2, to_q, to_k and the attention have neither effect nor gradient.
"""

import re
from functools import cache
from types import MethodType

from svd_xtend.models.activation_checkpointing import PARTS, TEMPORAL
from svd_xtend.models.precision import cast_forward

ATTENTION_BATCH = 65535  # sequences; the grids of CUDA kernels end there, and temporal attention has b h w of them
COMPILED_GRAPHS = (
    128  # of one kind of block; torch's own limit of 8 is less than SVD's resnets have shapes
)
WITHOUT_EFFECT = r"transformer_blocks\.\d+\.(norm2|attn2\.to_[qk])(\.|$)"  # modules and parameters without effect or gradient


def has_effect(name: str, context_tokens: int = 1) -> bool:
    """Return whether a parameter or module of SVD's UNet has an effect on its output, and so a gradient.

    `context_tokens` is the number of tokens that cross-attention sees. SVD passes one, the CLIP image
    embedding: the softmax over one key is 1, so norm2, attn2.to_q and attn2.to_k change nothing. With
    more tokens, as under text, every parameter has an effect."""
    return context_tokens > 1 or re.search(WITHOUT_EFFECT, name) is None


# --------------------------------------------------------------------------------------------------- exact short cuts


def speed_up(unet):
    """Short-circuit cross-attention to one token (with more tokens it is diffusers' own), convolve over time in 2-D, blend
    in one pass, keep attention's batch within what CUDA takes. Returns the same UNet."""
    import torch

    # methods, not closures: a deep copy of the UNet then computes with its own weights
    for name, module in unet.named_modules():
        if re.search(r"transformer_blocks\.\d+$", name):
            module.attn2.__dict__["query_norm"] = module.norm2  # in __dict__: not a child of attn2
            module.attn2.forward = MethodType(one_token_attention, module.attn2)
            module.norm2.forward = MethodType(
                lambda norm2, hidden_states: hidden_states, module.norm2
            )
            module.attn1.forward = MethodType(
                in_batches(module.attn1.forward.__func__), module.attn1
            )
            if type(module).__name__ == TEMPORAL:
                module.forward = MethodType(one_context_per_clip(module.forward.__func__), module)
        elif type(module).__name__ == "AlphaBlender":
            module.forward = MethodType(blend_in_one_pass, module)
        elif isinstance(module, torch.nn.Conv3d):
            module.forward = MethodType(cast_forward, module)
    return unet


def one_token_attention(
    attn2, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs
):
    """attn2(norm2(hidden_states), encoder_hidden_states), broadcast over the positions where there is one token."""
    if (
        encoder_hidden_states is None
        or encoder_hidden_states.shape[1] != 1
        or attention_mask is not None
    ):
        queries = type(attn2.query_norm).forward(attn2.query_norm, hidden_states)
        return type(attn2).forward(attn2, queries, encoder_hidden_states, attention_mask, **kwargs)
    out = attn2.to_out[0](attn2.to_v(encoder_hidden_states)) / attn2.rescale_output_factor
    each = len(hidden_states) // len(out)  # positions of a clip, in temporal attention
    return out if each == 1 or len(out) == 1 else out.repeat_interleave(each, 0)


@cache  # one function for all blocks: compiled once
def one_context_per_clip(forward):
    """`forward` of a temporal block that is handed the embedding once a clip, not once for each of its h w positions, as
    diffusers writes it out."""

    def run(block, hidden_states, num_frames, encoder_hidden_states=None):
        context, positions = encoder_hidden_states, hidden_states.shape[1]
        if context is not None and context.shape[1] == 1:
            context = context[::positions].contiguous()
        return forward(block, hidden_states, num_frames=num_frames, encoder_hidden_states=context)

    return run


@cache
def in_batches(forward):
    """`forward` of an attention, no more than ATTENTION_BATCH sequences at a time."""
    import torch

    def attend(attn1, hidden_states, *args, **kwargs):
        if len(hidden_states) <= ATTENTION_BATCH:
            return forward(attn1, hidden_states, *args, **kwargs)
        return torch.cat(
            [forward(attn1, part, *args, **kwargs) for part in hidden_states.split(ATTENTION_BATCH)]
        )

    return attend


def blend_in_one_pass(mixer, x_spatial, x_temporal, image_only_indicator=None):
    """AlphaBlender's alpha x_spatial + (1 - alpha) x_temporal, in one pass. A clip of one frame is a picture: SVD's own
    indicator, which diffusers always sets to zeros, then says so, and alpha is 1."""
    import torch

    if image_only_indicator is not None and image_only_indicator.shape[-1] == 1:
        image_only_indicator = torch.ones_like(image_only_indicator)
    alpha = mixer.get_alpha(image_only_indicator, x_spatial.ndim).to(x_spatial.dtype)
    alpha = 1 - alpha if mixer.switch_spatial_to_temporal_mix else alpha
    return torch.lerp(x_temporal, x_spatial, alpha)


# -------------------------------------------------------------------------------------------------------------- compile


def compile_blocks(unet, backend="inductor"):
    """Compile the repeated parts, one graph for a kind and shape, rather than the whole: minutes less to wait. An error where
    torch would give up and fall back to what it was asked to replace."""
    import torch

    torch._dynamo.config.recompile_limit = COMPILED_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled = {}
    for module in unet.modules():
        if type(module).__name__ in PARTS:
            forward = module.forward.__func__
            compiled[forward] = compiled.get(forward) or torch.compile(
                forward, fullgraph=True, dynamic=False, backend=backend
            )
            module.forward = MethodType(compiled[forward], module)
    return unet
