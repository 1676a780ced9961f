"""The same UNet, cheaper: what diffusers' SVD computes for nothing is left out, the output stays as it is.

    speed_up(pipe.unet)                 # in place; weights, names and state_dict are untouched
    checkpoint(pipe.unet, "blocks")     # activations are recomputed in backward instead of kept, temporal blocks' too

Cross-attention in SVD sees one token, the CLIP embedding. A softmax over one key is 1 whatever the query, hence
attn2(x) = to_out(to_v(embedding)) at every position: norm2, to_q, to_k and the attention have neither effect nor gradient.
"""

import re
from types import MethodType

RESNET, TRANSFORMER = "SpatioTemporalResBlock", "TransformerSpatioTemporalModel"
SPATIAL, TEMPORAL = "BasicTransformerBlock", "TemporalBasicTransformerBlock"
HIGHEST, NEXT = r"^(down_blocks\.0|up_blocks\.{last})\.", r"^(down_blocks\.[01]|up_blocks\.({last}|{but_one}))\."
POLICIES = {  # what is recomputed as one segment: kinds of module, within which paths; cheapest first
    "none": [],
    "level0": [((RESNET, TRANSFORMER), HIGHEST)],
    "level01": [((RESNET, TRANSFORMER), NEXT)],
    "blocks": [((RESNET, SPATIAL, TEMPORAL), "")],
    "nested": [((RESNET, TRANSFORMER), ""), (("ResnetBlock2D", "TemporalResnetBlock", SPATIAL, TEMPORAL), "")],
}
FEED_FORWARD_TOKENS = 32768  # of a chunk, under `nested`

DEAD = r"transformer_blocks\.\d+\.(norm2|attn2\.to_[qk])(\.|$)"  # modules and parameters without effect or gradient


def is_dead(name):
    """Whether a parameter or module of SVD's UNet has no effect on its output."""
    return re.search(DEAD, name) is not None


def speed_up(unet):
    """Short-circuit cross-attention to one token; with more tokens it is diffusers' own. Returns the same UNet."""
    for name, block in unet.named_modules():
        if re.search(r"transformer_blocks\.\d+$", name):
            block.attn2.__dict__["query_norm"] = block.norm2  # in __dict__: not a child of attn2
            # methods, not closures: a deep copy of the UNet then computes with its own weights
            block.attn2.forward = MethodType(one_token_attention, block.attn2)
            block.norm2.forward = MethodType(lambda norm2, hidden_states: hidden_states, block.norm2)
    return unet


def one_token_attention(attn2, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
    """attn2(norm2(hidden_states), encoder_hidden_states), broadcast over the positions where there is one token."""
    if encoder_hidden_states is None or encoder_hidden_states.shape[1] != 1 or attention_mask is not None:
        queries = type(attn2.query_norm).forward(attn2.query_norm, hidden_states)
        return type(attn2).forward(attn2, queries, encoder_hidden_states, attention_mask, **kwargs)
    return attn2.to_out[0](attn2.to_v(encoder_hidden_states)) / attn2.rescale_output_factor


def checkpoint(unet, policy):
    """Recompute activations in backward, by one of POLICIES; exact. diffusers' own checkpointing leaves the temporal
    transformer blocks out, which hold most of the memory. Under `nested` feed-forwards also run in chunks of tokens."""
    last = len(unet.up_blocks) - 1
    for kinds, where in POLICIES[policy]:
        path = where.format(last=last, but_one=last - 1) if where else ""
        for name, module in unet.named_modules():
            if type(module).__name__ in kinds and re.search(path, name):
                module.forward = MethodType(recomputed(module.forward.__func__), module)
    if policy == "nested":
        for module in unet.modules():
            if type(module).__name__ == "FeedForward":
                module.forward = MethodType(chunked(recomputed(module.forward.__func__)), module)
    return unet


def recomputed(forward):
    """`forward` that keeps its inputs only, where there are gradients. SVD has no randomness to replay."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def recompute(module, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(module, *args, **kwargs)
        return checkpoint(forward, module, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recompute


def chunked(forward):
    """`forward` of what treats each token (..., c) alone, a number of tokens at a time."""
    import torch

    def chunk(module, hidden_states, *args, **kwargs):
        tokens = hidden_states.flatten(0, -2)
        parts = [forward(module, part, *args, **kwargs) for part in tokens.split(FEED_FORWARD_TOKENS)]
        return torch.cat(parts).unflatten(0, hidden_states.shape[:-1])

    return chunk
