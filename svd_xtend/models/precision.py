"""TODO models.precision."""

import logging
import os
import shutil
import subprocess
import sys
from types import MethodType

logger = logging.getLogger("svd_xtend")


# ------------------------------------------------------------------------------------------------------------ precision


def compute_dtype(precision):
    """What is frozen is kept in, and layers compute in, at precision no, fp16 or bf16."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def set_precision(model, unet, dtype, master):
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
        if kind in (
            torch.nn.Linear,
            torch.nn.Conv2d,
            torch.nn.Conv3d,
            torch.nn.LayerNorm,
            torch.nn.GroupNorm,
        ):
            if any(p.dtype != dtype for p in module.parameters(recurse=False)) and not is_shortened(
                module
            ):
                module.forward = MethodType(cast_forward, module)
                module.__dict__["compute_dtype"] = dtype
    return unet


def is_shortened(module):
    """Whether speed_up took a module, a dead norm, out of the computation."""
    return "forward" in module.__dict__ and module.forward.__func__ is not cast_forward


def cast_inputs(unet, dtype):
    """Have latents and image embedding come in as `dtype`; the time ids and noise level stay exact."""

    def cast(module, args, kwargs):
        args = [x.to(dtype) if i in (0, 2) else x for i, x in enumerate(args)]
        return tuple(args), {
            k: x.to(dtype) if k in ("sample", "encoder_hidden_states") else x
            for k, x in kwargs.items()
        }

    unet.register_forward_pre_hook(cast, with_kwargs=True)


def cast_forward(module, x):
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
    if (
        weight.shape[3:] == (1, 1)
        and set(module.stride + module.dilation) == {1}
        and module.padding[1:] == (0, 0)
    ):
        flat = F.conv2d(
            x.flatten(3),
            weight.squeeze(-1),
            bias,
            padding=(module.padding[0], 0),
            groups=module.groups,
        )
        return flat.unflatten(3, x.shape[3:])
    return F.conv3d(x, weight, bias, *how)


# ------------------------------------------------------------------------------------------------ precision, optimizer


def fast_bf16():
    """Whether bfloat16 is faster than float32 here: on GPUs that have it, and on CPUs with its instructions."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()  # private, but torch's own answer


def best_precision():
    """bf16 where it is fast, else fp16 where there is a GPU, else no."""
    import torch

    return "bf16" if fast_bf16() else "fp16" if torch.cuda.is_available() else "no"


def check_precision(flag):
    """The precision of --mixed_precision, else of accelerate's configuration, or an error that names what to pass."""
    import torch

    precision = flag or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if not flag and precision == "no" and torch.cuda.is_available():
        # `accelerate launch` without a configuration says "no", too: float32 is for those who ask for it by the flag
        precision = best_precision()
        logger.info(
            "--mixed_precision %s: the best that this GPU has; pass --mixed_precision no for float32",
            precision,
        )
    if (precision == "fp16" and not torch.cuda.is_available()) or (
        precision == "bf16" and not fast_bf16()
    ):
        raise ValueError(
            f"--mixed_precision {precision}: not on this machine. Pass --mixed_precision {best_precision()}"
        )
    return precision


if __name__ == "__main__":  # for the .sh files: the precision, or what is wrong with the machine
    import torch

    smi = shutil.which("nvidia-smi")
    if (
        smi
        and not torch.cuda.is_available()
        and b"GPU" in subprocess.run([smi, "-L"], capture_output=True).stdout
    ):
        sys.exit(
            "nvidia-smi sees a GPU and torch does not: install a torch that fits the driver, see pytorch.org"
        )
    print(best_precision())
