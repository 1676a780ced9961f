"""LoRA and DoRA adapters on diffusers' UNet of SVD: inject, save, load, merge.

    pipe = StableVideoDiffusionPipeline.from_pretrained(...)
    load_lora(pipe.unet, "outputs/lora/pytorch_lora_weights.safetensors", scale=0.7)

svd_xtend/export/merged_lora.py merges a LoRA into its base model, as a full export.

diffusers has no LoRA loader for SVD, because its UNet lacks the PEFT mixin. PEFT's own functions do
the work here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from svd_xtend.models.unet_optimizations import has_effect

if TYPE_CHECKING:
    import torch
    from torch import nn

LORA_FILE = "pytorch_lora_weights.safetensors"
# The values of --lora_targets, each with the pattern of the layers' names.
TARGETS = {
    "attention": r"\.attn[12]\.to_(q|k|v|out\.0)$",
    "temporal": r"temporal_transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$",
    "feed_forward": r"\.ff(_in)?\.net\.(0\.proj|2)$",
    "projection": r"\.proj_(in|out)$",
    "conv": r"_res_block\.(conv[12]|conv_shortcut|time_emb_proj)$",
}
ADAPTER = "default"  # PEFT's name of the one adapter
KEY_PREFIX = "unet."  # of keys and metadata in a LoRA file of diffusers


# ------------------------------------------------------------------------------------------- inject


def target_modules(unet: nn.Module, targets: list[str]) -> list[str]:
    """Return the names of the layers that `targets` select: keys of TARGETS, or parts of names.

    attn2.to_q and attn2.to_k, a fifth of all attention layers, are left out: an adapter there would
    never have a gradient (see unet_optimizations.has_effect).

    Raises:
        ValueError: no layer is selected.
    """
    import torch

    layer_classes = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    patterns = [TARGETS.get(target, re.escape(target)) for target in targets]
    names = []
    for name, module in unet.named_modules():
        is_selected = any(re.search(pattern, name) for pattern in patterns)
        if is_selected and isinstance(module, layer_classes) and has_effect(name):
            names.append(name)
    if not names:
        raise ValueError(
            f"--lora_targets {' '.join(targets)}: no layer of the UNet has such a name. "
            f"Expected {', '.join(TARGETS)}, or a part of a layer's name."
        )
    return names


def inject_lora(
    unet: nn.Module,
    rank: int,
    lora_alpha: float,
    targets: list[str],
    use_dora: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Add new adapters to `unet` and freeze all other parameters. Return the same UNet.

    New adapters do not change the output: B is 0. `seed` is that of A.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    if rank < 1:
        raise ValueError(f"--rank {rank}: must be at least 1")
    config = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]  # PEFT says int and takes any number
        target_modules=target_modules(unet, targets),
        use_dora=use_dora,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, unet)
    if not use_dora:
        for module in unet.modules():
            if type(module) is Linear:
                module.forward = MethodType(fused_forward, module)  # type: ignore[method-assign]
    return unet


def fused_forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute PEFT's base(x) + scale B A x, with the sum inside the second matrix product.

    This saves three passes over the output. The adapter's weights are cast to the dtype of x.
    """
    import torch

    if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER]:
        return type(layer).forward(layer, x, *args, **kwargs)
    out = layer.base_layer(x, *args, **kwargs)
    A = layer.lora_A[ADAPTER].weight.to(x.dtype)
    B = layer.lora_B[ADAPTER].weight.to(x.dtype)
    A_x = torch.nn.functional.linear(x, A).flatten(0, -2)
    sum_of_both = torch.addmm(out.flatten(0, -2), A_x, B.t(), alpha=layer.scaling[ADAPTER])
    return sum_of_both.view(out.shape)


# ------------------------------------------------------------------------------------ save and load


def save_lora(unet: nn.Module, folder: str | Path) -> None:
    """Write the adapters of `unet` to pytorch_lora_weights.safetensors in `folder`.

    Keys are those of diffusers, tensors are float32. The file's metadata has rank, alpha, targets
    and whether it is DoRA.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # named_parameters, not state_dict: under FSDP2 state_dict gives each process its shard.
    adapters = get_peft_model_state_dict(unet, dict(unet.named_parameters()))
    tensors = {
        KEY_PREFIX + name: tensor.detach().float().cpu().contiguous()
        for name, tensor in adapters.items()
    }
    peft_config: Any = unet.peft_config
    config = peft_config[ADAPTER]
    targets = config.target_modules
    metadata = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(targets) if isinstance(targets, set) else targets,
        "use_dora": config.use_dora,
    }
    metadata = {KEY_PREFIX + key: value for key, value in metadata.items()}
    file_metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder, LORA_FILE), file_metadata)


def load_lora(unet: nn.Module, file: str | Path, scale: float = 1.0) -> None:
    """Load adapters into a UNet of diffusers, at `scale` times their trained strength.

    `file` is a safetensors file, or a folder with pytorch_lora_weights.safetensors. Without
    metadata, alpha is taken to be the rank, as in diffusers.

    Raises:
        ValueError: no such file, damaged, or not a LoRA of this UNet.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    file = Path(file, LORA_FILE) if Path(file).is_dir() else Path(file)
    if not file.is_file():
        raise ValueError(
            f"--lora {file}: no such file. Expected {LORA_FILE}, or the folder that holds it."
        )
    try:
        with safe_open(file, "pt") as opened:
            file_metadata = opened.metadata() or {}
            tensors = {
                key.removeprefix(KEY_PREFIX): opened.get_tensor(key) for key in opened.keys()
            }
    except SafetensorError as error:
        raise ValueError(f"--lora {file}: damaged or not safetensors ({error})") from error
    metadata = {
        key.removeprefix(KEY_PREFIX): value
        for key, value in json.loads(file_metadata.get("lora_adapter_metadata", "{}")).items()
    }
    rank_by_layer = {
        key.split(".lora_A")[0]: len(tensor) for key, tensor in tensors.items() if ".lora_A" in key
    }
    unknown_layers = rank_by_layer.keys() - {name for name, _ in unet.named_modules()}
    if unknown_layers:
        raise ValueError(
            f"--lora {file}: not a LoRA of this UNet; {min(unknown_layers)} is not in it"
        )
    rank = metadata.get("r", next(iter(rank_by_layer.values()), None))
    if rank is None:
        raise ValueError(f"--lora {file}: not a LoRA of this UNet; no lora_A key")
    has_magnitudes = any("magnitude" in key for key in tensors)
    config = LoraConfig(
        r=rank,
        lora_alpha=metadata.get("lora_alpha", rank),
        target_modules=metadata.get("target_modules", sorted(rank_by_layer)),
        use_dora=metadata.get("use_dora", has_magnitudes),
    )
    inject_adapter_in_model(config, unet)
    result: Any = set_peft_model_state_dict(unet, tensors)
    if result.unexpected_keys:
        raise ValueError(
            f"--lora {file}: keys that this UNet does not take: {result.unexpected_keys[:3]}"
        )
    scale_lora(unet, scale)
    for layer in find_adapter_layers(unet).values():
        # For inference: the device and dtype of the layer below.
        base_weight = layer.get_base_layer().weight
        layer.lora_A.to(base_weight)
        layer.lora_B.to(base_weight)
        layer.lora_magnitude_vector.to(base_weight)


def find_adapter_layers(unet: nn.Module) -> dict[str, Any]:
    """Return {name: layer} of the layers that have adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: module for name, module in unet.named_modules() if isinstance(module, BaseTunerLayer)
    }


def scale_lora(unet: nn.Module, scale: float) -> None:
    """Set the strength of the adapters to `scale` times the trained strength."""
    for layer in find_adapter_layers(unet).values():
        layer.set_scale(ADAPTER, scale)


def merge_lora(unet: nn.Module) -> nn.Module:
    """Add the adapters to the weights and remove them. Return the same UNet."""
    for name, layer in find_adapter_layers(unet).items():
        layer.merge()
        parent_name, _, child_name = name.rpartition(".")
        setattr(unet.get_submodule(parent_name), child_name, layer.get_base_layer())
    del unet.peft_config
    return unet
