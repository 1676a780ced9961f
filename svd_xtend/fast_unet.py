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
ATTENTION_BATCH = 65535  # sequences; the grids of CUDA kernels end there, and temporal attention has b h w of them
COMPILED_GRAPHS = 128  # of one kind of block; torch's own limit of 8 is less than SVD's resnets have shapes
OFFLOAD_BYTES = 2**20  # smaller tensors are not worth the way to the CPU

DEAD = r"transformer_blocks\.\d+\.(norm2|attn2\.to_[qk])(\.|$)"  # modules and parameters without effect or gradient


def is_dead(name):
    """Whether a parameter or module of SVD's UNet has no effect on its output."""
    return re.search(DEAD, name) is not None


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
            module.norm2.forward = MethodType(lambda norm2, hidden_states: hidden_states, module.norm2)
            module.attn1.forward = MethodType(in_batches(module.attn1.forward.__func__), module.attn1)
            if type(module).__name__ == TEMPORAL:
                module.forward = MethodType(one_context_a_clip(module.forward.__func__), module)
        elif type(module).__name__ == "AlphaBlender":
            module.forward = MethodType(blend, module)
        elif isinstance(module, torch.nn.Conv3d):
            module.forward = MethodType(layer, module)
    return unet


def one_token_attention(attn2, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
    """attn2(norm2(hidden_states), encoder_hidden_states), broadcast over the positions where there is one token."""
    if encoder_hidden_states is None or encoder_hidden_states.shape[1] != 1 or attention_mask is not None:
        queries = type(attn2.query_norm).forward(attn2.query_norm, hidden_states)
        return type(attn2).forward(attn2, queries, encoder_hidden_states, attention_mask, **kwargs)
    out = attn2.to_out[0](attn2.to_v(encoder_hidden_states)) / attn2.rescale_output_factor
    each = len(hidden_states) // len(out)  # positions of a clip, in temporal attention
    return out if each == 1 or len(out) == 1 else out.repeat_interleave(each, 0)


@cache  # one function for all blocks: compiled once
def one_context_a_clip(forward):
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
        return torch.cat([forward(attn1, part, *args, **kwargs) for part in hidden_states.split(ATTENTION_BATCH)])

    return attend


def blend(mixer, x_spatial, x_temporal, image_only_indicator=None):
    """AlphaBlender's alpha x_spatial + (1 - alpha) x_temporal, in one pass. A clip of one frame is a picture: SVD's own
    indicator, which diffusers always sets to zeros, then says so, and alpha is 1."""
    import torch

    if image_only_indicator is not None and image_only_indicator.shape[-1] == 1:
        image_only_indicator = torch.ones_like(image_only_indicator)
    alpha = mixer.get_alpha(image_only_indicator, x_spatial.ndim).to(x_spatial.dtype)
    alpha = 1 - alpha if mixer.switch_spatial_to_temporal_mix else alpha
    return torch.lerp(x_temporal, x_spatial, alpha)


# ------------------------------------------------------------------------------------------------------------ precision


def dtype_of(precision):
    """What is frozen is kept in, and layers compute in, at precision no, fp16 or bf16."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def train_in(model, unet, dtype, master):
    """Keep what trains in `master`, the rest in `dtype`, and let all compute in that. model: the UNet, or what holds it."""
    import torch

    for p in model.parameters():
        p.data = p.data.to(master if p.requires_grad else dtype)
    if dtype != torch.float32:
        cast_inputs(unet, dtype)
        compute_in(model, dtype)


def compute_in(unet, dtype):
    """Let all layers compute in `dtype` (half precision), as inference does. Parameters keep their own: those that train in
    float32 are cast on their way in. Autocast would run every norm in float32, at 1.35 times the memory."""
    import torch

    for module in unet.modules():
        kind = type(module)
        if kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.LayerNorm, torch.nn.GroupNorm):
            if any(p.dtype != dtype for p in module.parameters(recurse=False)) and not is_shortened(module):
                module.forward = MethodType(layer, module)
                module.__dict__["compute_dtype"] = dtype
    return unet


def is_shortened(module):
    """Whether speed_up took a module, a dead norm, out of the computation."""
    return "forward" in module.__dict__ and module.forward.__func__ is not layer


def cast_inputs(unet, dtype):
    """Have latents and image embedding come in as `dtype`; the time ids and noise level stay exact."""

    def cast(module, args, kwargs):
        args = [x.to(dtype) if i in (0, 2) else x for i, x in enumerate(args)]
        return tuple(args), {
            k: x.to(dtype) if k in ("sample", "encoder_hidden_states") else x for k, x in kwargs.items()
        }

    unet.register_forward_pre_hook(cast, with_kwargs=True)


def layer(module, x):
    """A layer's own forward with weights in the compute dtype. A convolution over time alone, (3, 1, 1), runs as the 2-D one
    that it is: torch 2.9 on GPUs takes up to 17 times the memory for Conv3d in bf16 (pytorch #166643)."""
    import torch
    from torch.nn import functional as F

    dtype = module.__dict__.get("compute_dtype") or x.dtype
    x, weight, bias = (p if p is None else p.to(dtype) for p in (x, module.weight, module.bias))
    if isinstance(module, torch.nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(module, torch.nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    if isinstance(module, torch.nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)
    how = module.stride, module.padding, module.dilation, module.groups
    if isinstance(module, torch.nn.Conv2d):
        return F.conv2d(x, weight, bias, *how)
    if weight.shape[3:] == (1, 1) and set(module.stride + module.dilation) == {1} and module.padding[1:] == (0, 0):
        flat = F.conv2d(x.flatten(3), weight.squeeze(-1), bias, padding=(module.padding[0], 0), groups=module.groups)
        return flat.unflatten(3, x.shape[3:])
    return F.conv3d(x, weight, bias, *how)


# -------------------------------------------------------------------------------------------------------- checkpointing


def checkpoint(unet, policy):
    """Recompute activations in backward, by one of POLICIES; exact. diffusers' own checkpointing leaves the temporal
    transformer blocks out, which hold most of the memory. Under `nested` feed-forwards also run in chunks of tokens."""
    last = max(
        int(name.split(".")[-1]) for name, _ in unet.named_modules() if re.search(r"(^|\.)up_blocks\.\d+$", name)
    )
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


def offloaded(model, function):
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

    weights = {p.untyped_storage()._cdata for p in model.parameters()}  # private, but the storage's identity

    def pack(x):
        if x.untyped_storage().nbytes() < OFFLOAD_BYTES or x.untyped_storage()._cdata in weights:
            return x, None
        away = torch.empty_like(x, device="cpu", pin_memory=x.device.type == "cuda")  # with its strides
        return away.copy_(x, non_blocking=True), x.device

    def unpack(kept):
        x, device = kept
        return x if device is None else x.to(device, non_blocking=True, copy=True)

    return pack, unpack


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
