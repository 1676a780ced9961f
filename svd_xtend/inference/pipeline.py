"""Load a Stable Video Diffusion pipeline with trained weights, ready to render.

    pipe, box_control = load_pipeline("/path/to/weight", lora="outputs/lora")
    pipe, _ = load_pipeline("/path/to/weight", checkpoint="outputs/svd/checkpoint-1000", ema=True)
    frames = pipe(image, height=320, width=512).frames[0]

The base model is any SVD, a full export included. A checkpoint of a training run, a LoRA or box
control can be loaded over it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from svd_xtend.models import loading, unet_optimizations
from svd_xtend.models.lora import inject_lora, load_lora, scale_lora
from svd_xtend.training import checkpoints

if TYPE_CHECKING:
    from diffusers import StableVideoDiffusionPipeline
    from torch import nn

    from svd_xtend.models.box_control import BoxAdapter


def load_pipeline(
    model: str,
    *,
    revision: str | None = None,
    checkpoint: str | Path | None = None,
    ema: bool = False,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    tracklet_weights: str | Path | None = None,
    box_guidance_scale: float = 1.0,
    cpu_offload: bool = False,
) -> tuple[StableVideoDiffusionPipeline, BoxAdapter | None]:
    """Return the pipeline with all weights, and its box control or None.

    The pipeline is on the GPU in float16 if there is one, otherwise on the CPU in float32.

    Args:
        model: Hub name or folder of the base model, at `revision`.
        checkpoint: checkpoint folder of a training run; with `ema`, its EMA weights are loaded.
        lora: pytorch_lora_weights.safetensors, or its folder.
        lora_scale: strength of the adapters of `lora` or `checkpoint`; 0 is the base model, 1 is
            as trained.
        tracklet_weights: output folder of train_svd_tracklet.py.
        box_guidance_scale: strength of guidance by boxes; 1 is none.
        cpu_offload: keep on the GPU only the module that is running.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = loading.load_svd(model, dtype, revision)
    if checkpoint:
        load_checkpoint(pipe.unet, checkpoint, ema, lora_scale)
    if lora:
        load_lora(pipe.unet, lora, lora_scale)
    unet_optimizations.speed_up(pipe.unet).to(pipe.image_encoder.dtype)
    box_control = None
    if tracklet_weights:
        from svd_xtend.models.box_control import load_box_control

        box_control = load_box_control(pipe.unet, tracklet_weights).to(device)
        box_control.box_guidance_scale = box_guidance_scale
    if cpu_offload and device == "cuda":
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)
    return pipe, box_control


def load_checkpoint(
    unet: nn.Module,
    folder: str | Path,
    ema: bool = False,
    lora_scale: float = 1.0,
    flag: str = "--checkpoint",
) -> None:
    """Load the trained parameters of a checkpoint into `unet`, which is the base model of that run.

    With `ema`, load their EMA weights instead. If the run trained LoRA or DoRA adapters, inject
    them first, in the shape that the run's args.json gives, at `lora_scale` times their trained
    strength. Errors name `flag`.

    Raises:
        ValueError: the checkpoint does not have these weights, or they do not fit `unet`.
    """
    from safetensors import safe_open

    folder = Path(folder)
    file = folder / (checkpoints.EMA_FILE if ema else checkpoints.TRAINED_FILE)
    if not file.is_file():
        message = f"{flag} {folder}: no {file.name} in it"
        if ema and (folder / checkpoints.TRAINED_FILE).exists():
            message += "; the run was trained without --use_ema"
        raise ValueError(message)
    with safe_open(file, "pt") as tensors:
        has_adapters = any(".lora_A." in name for name in tensors.keys())
    if has_adapters:
        options_file = folder.resolve().parent / "args.json"
        if not options_file.exists():
            raise ValueError(
                f"{flag} {folder}: holds LoRA adapters, but {options_file} is missing, which has "
                "their rank, alpha and targets"
            )
        options = json.loads(options_file.read_text())
        rank = options["rank"]
        alpha = rank if options["lora_alpha"] is None else options["lora_alpha"]
        inject_lora(unet, rank, alpha, options["lora_targets"], options["use_dora"])
    checkpoints.load_trained(unet, file)
    if has_adapters:
        scale_lora(unet, lora_scale)
