"""The same UNet, cheaper: what diffusers' SVD computes for nothing is left out, the output stays as it is.

    speed_up(pipe.unet)         # in place; weights, names and state_dict are untouched

Cross-attention in SVD sees one token, the CLIP embedding. A softmax over one key is 1 whatever the query, hence
attn2(x) = to_out(to_v(embedding)) at every position: norm2, to_q, to_k and the attention have neither effect nor gradient.
"""

import re
from types import MethodType

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
