"""LoRA on the stock UNet: inject, save, load, merge.

    pipe = StableVideoDiffusionPipeline.from_pretrained(...)
    load_lora(pipe.unet, "outputs/lora/pytorch_lora_weights.safetensors")            # one line; scale=0.7 for less of it

    python -m svd_xtend.models.lora --pretrained_model_name_or_path BASE --lora FILE --output_dir MERGED     # a full export

diffusers has no LoRA loader for SVD: its UNet lacks the PEFT mixin. PEFT's own functions do all of it.
"""

import argparse
import json
import re
from pathlib import Path
from types import MethodType

from svd_xtend.models.unet_optimizations import has_effect

LORA_FILE = "pytorch_lora_weights.safetensors"
TARGETS = {
    "attention": r"\.attn[12]\.to_(q|k|v|out\.0)$",
    "temporal": r"temporal_transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$",
    "feed_forward": r"\.ff(_in)?\.net\.(0\.proj|2)$",
    "projection": r"\.proj_(in|out)$",
    "conv": r"_res_block\.(conv[12]|conv_shortcut|time_emb_proj)$",
}


def target_modules(unet, targets):
    """Names of the layers that `targets` (keys of TARGETS, or parts of module names) mean. Not attn2.to_q and to_k, a
    fifth of all attention: adapters there would never have a gradient."""
    import torch

    patterns = [TARGETS.get(target, re.escape(target)) for target in targets]
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    names = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, kinds)
        and has_effect(name)
        and any(re.search(p, name) for p in patterns)
    ]
    if not names:
        raise ValueError(
            f"--lora_targets {' '.join(targets)}: no layer of the UNet has such a name. Expected {', '.join(TARGETS)}, "
            "or a part of a layer's name."
        )
    return names


def inject_lora(unet, rank, lora_alpha, targets, use_dora=False, seed=0):
    """Add fresh adapters, which leave the output as it is, and freeze all else. Returns the same UNet."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ValueError(f"--rank {rank}: must be at least 1")
    config = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,
        target_modules=target_modules(unet, targets),
        use_dora=use_dora,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, unet)
    from peft.tuners.lora import Linear

    for module in unet.modules():
        if type(module) is Linear and not use_dora:
            module.forward = MethodType(fused_forward, module)
    return unet


def fused_forward(layer, x, *args, **kwargs):
    """PEFT's base(x) + scale B A x, added by the second product itself: three passes over the output less. The adapter's
    weights are cast to the dtype of x."""
    import torch

    if layer.disable_adapters or layer.merged or layer.active_adapters != ["default"]:
        return type(layer).forward(layer, x, *args, **kwargs)
    out = layer.base_layer(x, *args, **kwargs)
    A, B = (half["default"].weight.to(x.dtype) for half in (layer.lora_A, layer.lora_B))
    low = torch.nn.functional.linear(x, A).flatten(0, -2)
    return torch.addmm(out.flatten(0, -2), low, B.t(), alpha=layer.scaling["default"]).view(
        out.shape
    )


def save_lora(unet, folder):
    """Write `folder`/pytorch_lora_weights.safetensors: diffusers' keys, float32, with rank, alpha and targets inside."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # not state_dict, which under FSDP2 gives each process its part
    own = get_peft_model_state_dict(unet, dict(unet.named_parameters()))
    tensors = {f"unet.{k}": v.detach().float().cpu().contiguous() for k, v in own.items()}
    config = {
        k: sorted(v) if isinstance(v, set) else v
        for k, v in unet.peft_config["default"].to_dict().items()
    }
    kept = {f"unet.{k}": config[k] for k in ("r", "lora_alpha", "target_modules", "use_dora")}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(
        tensors,
        Path(folder, LORA_FILE),
        {"format": "pt", "lora_adapter_metadata": json.dumps(kept)},
    )


def load_lora(unet, file, scale=1.0):
    """Load adapters into a stock UNet, at `scale` times their trained strength. `file`: safetensors, or its folder.

    Files without metadata are taken as alpha = rank, as diffusers does.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors import SafetensorError, safe_open

    file = Path(file, LORA_FILE) if Path(file).is_dir() else Path(file)
    if not file.is_file():
        raise ValueError(f"--lora {file}: no such file")
    try:
        with safe_open(file, "pt") as f:
            metadata, tensors = (
                f.metadata() or {},
                {k.removeprefix("unet."): f.get_tensor(k) for k in f.keys()},
            )
    except SafetensorError as error:
        raise ValueError(f"--lora {file}: damaged or not safetensors ({error})") from error
    told = {
        k.removeprefix("unet."): v
        for k, v in json.loads(metadata.get("lora_adapter_metadata", "{}")).items()
    }
    ranks = {k.split(".lora_A")[0]: len(v) for k, v in tensors.items() if ".lora_A" in k}
    rank = told.get("r", next(iter(ranks.values()), None))
    own = {name for name, _ in unet.named_modules()}
    if rank is None or not ranks.keys() <= own:
        unknown = sorted(ranks.keys() - own)
        raise ValueError(
            f"--lora {file}: not a LoRA of this UNet; {unknown[0] + ' is not in it' if unknown else 'no lora_A key'}"
        )
    config = LoraConfig(
        r=rank, lora_alpha=told.get("lora_alpha", rank), target_modules=told.get("target_modules", sorted(ranks)),
        use_dora=told.get("use_dora", any("magnitude" in k for k in tensors)),
    )  # fmt: skip
    inject_adapter_in_model(config, unet)
    result = set_peft_model_state_dict(unet, tensors)
    if result.unexpected_keys:
        raise ValueError(
            f"--lora {file}: keys that this UNet does not take: {result.unexpected_keys[:3]}"
        )
    scale_lora(unet, scale)
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
                getattr(module, name).to(
                    module.get_base_layer().weight
                )  # device and dtype, for inference


def scale_lora(unet, scale):
    """Let adapters act at `scale` times their trained strength."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", scale)


def merge_lora(unet):
    """Fold the adapters into the weights and take them out again: a stock UNet that gives the adapted output."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [
        (name, module)
        for name, module in unet.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    for name, module in adapted:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, module.get_base_layer())
    del unet.peft_config
    return unet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="the SVD that the LoRA was trained on",
    )
    parser.add_argument(
        "--lora", required=True, help="pytorch_lora_weights.safetensors, or its folder"
    )
    parser.add_argument("--lora_scale", type=float, default=1.0)
    parser.add_argument("--output_dir", required=True, help="where the merged SVD goes")
    args = parser.parse_args()

    import torch

    from svd_xtend.models.loading import load_svd

    pipe = load_svd(args.pretrained_model_name_or_path, torch.float32)
    load_lora(pipe.unet, args.lora, args.lora_scale)
    merge_lora(pipe.unet)
    pipe.save_pretrained(args.output_dir)
