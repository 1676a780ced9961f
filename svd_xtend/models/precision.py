"""Mixed precision: which dtype a model is kept in, and which dtype its layers compute in.

    set_precision(unet, unet, compute_dtype("bf16"), torch.float32)
    python -m svd_xtend.models.precision         # print the best --mixed_precision of this machine

Parameters that train are kept in a master dtype, float32 by default; all others, and every layer's
computation, are in half precision. This takes the place of torch.autocast, which runs every norm in
float32 and needs 1.35 times the memory.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger("svd_xtend")


# --------------------------------------------------------------------- set the precision of a model


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of frozen weights and of computation; `precision` is no, fp16 or bf16."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def set_precision(
    model: nn.Module, unet: nn.Module, dtype: torch.dtype, master_dtype: torch.dtype
) -> None:
    """Keep parameters that train in `master_dtype` and all others in `dtype`; compute in `dtype`.

    `model` is `unet`, or a module that holds it.
    """
    import torch

    for p in model.parameters():
        p.data = p.data.to(master_dtype if p.requires_grad else dtype)
    if dtype != torch.float32:
        cast_inputs(unet, dtype)
        compute_in(model, dtype)


def compute_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Let all layers of `model` compute in half precision, as inference does. Return the model.

    Parameters keep their dtype: those that train in float32 are cast at each use.
    """
    import torch

    layer_classes = (
        torch.nn.Linear,
        torch.nn.Conv2d,
        torch.nn.Conv3d,
        torch.nn.LayerNorm,
        torch.nn.GroupNorm,
    )
    for module in model.modules():
        if type(module) not in layer_classes or is_bypassed(module):
            continue
        if any(p.dtype != dtype for p in module.parameters(recurse=False)):
            module.forward = MethodType(cast_forward, module)
            module.__dict__["compute_dtype"] = dtype
    return model


def is_bypassed(module: Any) -> bool:
    """Return whether unet_optimizations.speed_up replaced this layer's forward, as of norm2."""
    return "forward" in module.__dict__ and module.forward.__func__ is not cast_forward


def cast_inputs(unet: nn.Module, dtype: torch.dtype) -> None:
    """Cast the UNet's sample and encoder_hidden_states to `dtype`.

    The noise level and the time ids stay exact.
    """
    cast_positions = (0, 2)  # sample, timestep, encoder_hidden_states, added_time_ids
    cast_keywords = ("sample", "encoder_hidden_states")

    def cast(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        new_args = [
            value.to(dtype) if position in cast_positions else value
            for position, value in enumerate(args)
        ]
        new_kwargs = {
            name: value.to(dtype) if name in cast_keywords else value
            for name, value in kwargs.items()
        }
        return tuple(new_args), new_kwargs

    unet.register_forward_pre_hook(cast, with_kwargs=True)


def cast_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a linear, convolution or norm layer with its weights cast to the compute dtype.

    The compute dtype is module.compute_dtype, by default the dtype of x. A Conv3d over time alone,
    with a kernel of (k, 1, 1), runs as a 2-D convolution, which is the same: Conv3d in bf16 takes
    up to 17 times the memory on GPUs with torch 2.9 (pytorch issue 166643).
    """
    import torch
    from torch.nn import functional as F

    dtype = module.__dict__.get("compute_dtype") or x.dtype
    x = x.to(dtype)
    weight: Any = None if module.weight is None else module.weight.to(dtype)
    bias = None if module.bias is None else module.bias.to(dtype)
    if isinstance(module, torch.nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(module, torch.nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    if isinstance(module, torch.nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)
    if isinstance(module, torch.nn.Conv2d):
        return F.conv2d(
            x, weight, bias, module.stride, module.padding, module.dilation, module.groups
        )
    is_over_time_alone = weight.shape[3:] == (1, 1) and module.padding[1:] == (0, 0)
    is_dense = set(module.stride + module.dilation) == {1}
    if is_over_time_alone and is_dense:
        time_by_positions = x.flatten(3)  # (b, c, f, h w)
        padding = (module.padding[0], 0)
        out = F.conv2d(
            time_by_positions, weight.squeeze(-1), bias, padding=padding, groups=module.groups
        )
        return out.unflatten(3, x.shape[3:])
    return F.conv3d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)


# ---------------------------------------------------------------- choose the precision of a machine


def fast_bf16() -> bool:
    """Return whether bfloat16 is fast: on GPUs that have it, and on CPUs with AVX512-BF16."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()  # private; torch has no public equivalent


def set_tf32(allow_tf32: bool, precision: str) -> None:
    """Set whether float32 layers may compute in TF32 on a GPU.

    Convolutions may at any precision but `no`: under fp16 only the VAE computes in float32, and TF32
    makes it several times faster.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32 or precision != "no"


def best_precision() -> str:
    """Return bf16 if it is fast on this machine, else fp16 if there is a GPU, else no."""
    import torch

    if fast_bf16():
        return "bf16"
    return "fp16" if torch.cuda.is_available() else "no"


def check_precision(flag: str | None) -> str:
    """Return the precision of --mixed_precision, else that of accelerate's configuration.

    Without either, a GPU computes in its best precision and a CPU in float32.

    Raises:
        ValueError: this machine does not have that precision, or is slow in it.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    precision = flag or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if not flag and precision == "no" and has_gpu:
        # `accelerate launch` without a configuration also sets "no": float32 takes the flag.
        precision = best_precision()
        logger.info(
            "--mixed_precision %s: the best of this GPU; pass --mixed_precision no for float32",
            precision,
        )
    is_missing = (precision == "fp16" and not has_gpu) or (precision == "bf16" and not fast_bf16())
    if is_missing:
        raise ValueError(
            f"--mixed_precision {precision}: not available on this machine. "
            f"Pass --mixed_precision {best_precision()}"
        )
    return precision


def check_gpu_driver() -> None:
    """Exit with a message if the machine has an NVIDIA GPU that torch cannot use."""
    import torch

    nvidia_smi = shutil.which("nvidia-smi")
    if not nvidia_smi or torch.cuda.is_available():
        return
    gpus = subprocess.run([nvidia_smi, "-L"], capture_output=True).stdout
    if b"GPU" in gpus:
        sys.exit(
            "nvidia-smi lists a GPU, but torch cannot use it. Install a torch that fits the "
            "driver, see pytorch.org"
        )


if __name__ == "__main__":  # the .sh files read this output
    check_gpu_driver()
    print(best_precision())
