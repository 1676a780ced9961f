"""Load a Stable Video Diffusion pipeline, and move its models to the training device.

pipe = load_svd("stabilityai/stable-video-diffusion-img2vid", torch.float32)
pipe.unet.requires_grad_(True)
move_models(pipe, pipe.unet, "bf16", device)
optimizer = AdamW(trainable_parameters(pipe.unet).values())
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svd_xtend.models.precision import compute_dtype, set_precision

if TYPE_CHECKING:
    import torch
    from diffusers import StableVideoDiffusionPipeline
    from torch import nn

# The output file of svd_xtend/models/box_control.py, whose import takes seconds.
BOX_CONTROL_FILE = "tracklet_weights.safetensors"


# ----------------------------------------------------------------------------------------- load SVD


def load_svd(
    path: str,
    dtype: torch.dtype,
    revision: str | None = None,
    unet_path: str | None = None,
    unet: bool = True,
) -> StableVideoDiffusionPipeline:
    """Return the pipeline of a Hub name or a folder, on the CPU, all its models in `dtype`.

    Takes files of the fp16 variant or plain ones, whichever exist; for float32, plain ones first.

    Args:
        unet_path: another folder, whose UNet replaces the pipeline's. The UNet is in its unet/, or
            in the folder itself.
        unet: False loads the pipeline without its UNet.

    Raises:
        ValueError: no usable weights there. The message names the flag,
            --pretrained_model_name_or_path or --pretrain_unet.
    """
    import diffusers
    import transformers
    from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel

    # Both libraries warn of choices that are made here on purpose.
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()

    components: dict[str, Any] = {} if unet else {"unet": None}
    if unet_path:
        subfolder = "unet" if Path(unet_path, "unet").is_dir() else None
        components["unet"] = load_any_variant(
            UNetSpatioTemporalConditionModel,
            unet_path,
            "--pretrain_unet",
            dtype,
            subfolder=subfolder,
        )
    if Path(path).is_dir() and not Path(path, "model_index.json").exists():
        raise ValueError(
            f"--pretrained_model_name_or_path {path}: no model_index.json in this folder. Expected "
            "an SVD of diffusers, with unet/, vae/, image_encoder/, feature_extractor/ and "
            "scheduler/ beside it."
        )
    pipe = load_any_variant(
        StableVideoDiffusionPipeline,
        path,
        "--pretrained_model_name_or_path",
        dtype,
        revision=revision,
        **components,
    )
    pipe.set_progress_bar_config(leave=False, desc="sampling")
    return pipe


def read_size_multiple(path: str, revision: str | None = None) -> int:
    """Return the number of pixels of which width and height must be multiples: 64 for SVD.

    Reads only the configurations of VAE and UNet, not their weights.
    """
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel

    vae = AutoencoderKLTemporalDecoder.load_config(path, subfolder="vae", revision=revision)
    unet = UNetSpatioTemporalConditionModel.load_config(path, subfolder="unet", revision=revision)
    vae_halvings = len(vae["block_out_channels"]) - 1
    unet_halvings = len(unet["down_block_types"]) - 1
    return 2 ** (vae_halvings + unet_halvings)


def load_any_variant(
    model_class: Any, path: str, flag: str, dtype: torch.dtype, **kwargs: Any
) -> Any:
    """Return model_class.from_pretrained(path), from files of the fp16 variant or plain ones.

    Raises:
        ValueError: neither can be loaded. The message names `flag` and `path`.
    """
    import torch

    # Training starts from weights that were not rounded to float16, if there are any.
    variants = [None, "fp16"] if dtype == torch.float32 else ["fp16", None]
    if Path(path).is_dir():
        # A folder, unlike the Hub, shows at once which variants it has.
        folder = Path(path, kwargs.get("subfolder") or "")
        names = [file.name for file in folder.rglob("*.safetensors")]
        is_available = {
            "fp16": any(".fp16." in name for name in names),
            None: any(".fp16." not in name for name in names),
        }
        variants = [variant for variant in variants if is_available[variant]] or variants
    errors = {}
    for variant in variants:
        try:
            return model_class.from_pretrained(path, variant=variant, dtype=dtype, **kwargs)
        except (OSError, ValueError) as error:
            errors[variant or "plain"] = str(error).strip().splitlines()[0]
    kind = "folder" if Path(path).exists() else "folder or reachable Hub name"
    reasons = "; ".join(f"{variant} files: {reason}" for variant, reason in errors.items())
    raise ValueError(f"{flag} {path}: not a {kind} with usable weights. {reasons}")


# ------------------------------------------------------------------- trained parameters and devices


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return {name: parameter} of the parameters that train.

    Names are those of the base UNet, or of the modules that a trainer added to it.
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def move_models(
    pipe: StableVideoDiffusionPipeline,
    unet: nn.Module,
    precision: str,
    device: torch.device,
    whole_encoders: bool = True,
    master_dtype: str = "float32",
) -> None:
    """Set the precision of all models of the pipeline, and move them to `device`.

    Args:
        unet: pipe.unet, or a module that holds it.
        precision: no, fp16 or bf16. Frozen weights and all computation are in that precision.
        whole_encoders: see `move_encoders`.
        master_dtype: torch's name of the dtype of the parameters that train.
    """
    import torch

    dtype = compute_dtype(precision)
    set_precision(unet, pipe.unet, dtype, getattr(torch, master_dtype))
    for tensor in [*unet.parameters(), *unet.buffers()]:
        tensor.data = tensor.data.to(device)
    move_encoders(pipe, dtype, device, whole_encoders)


def move_encoders(
    pipe: StableVideoDiffusionPipeline,
    dtype: torch.dtype,
    device: torch.device,
    whole: bool = True,
) -> None:
    """Freeze VAE and CLIP, set them to `dtype` and move them to `device`.

    If not `whole`, only the encoder of the VAE is moved: with a latent cache, CLIP and the decoder
    of the VAE are needed only for validation (see `encoders_on_device`).
    """
    import torch

    # SVD's VAE overflows in float16; the pipeline, too, runs it in float32 (force_upcast).
    needs_float32 = dtype == torch.float16 and pipe.vae.config.force_upcast
    vae_dtype = torch.float32 if needs_float32 else dtype
    pipe.image_encoder.requires_grad_(False).to(dtype=dtype)
    pipe.vae.requires_grad_(False).to(dtype=vae_dtype)
    if whole:
        modules = (pipe.image_encoder, pipe.vae)
    else:
        modules = (pipe.vae.encoder, pipe.vae.quant_conv)
    for module in modules:
        module.to(device)


@contextlib.contextmanager
def encoders_on_device(pipe: StableVideoDiffusionPipeline, device: torch.device) -> Iterator[None]:
    """Move CLIP and the decoder of the VAE to `device` and back, if `move_encoders` left them."""
    modules = [
        module
        for module in (pipe.image_encoder, pipe.vae.decoder)
        if next(module.parameters()).device.type != device.type
    ]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module in modules:
            module.to("cpu")
