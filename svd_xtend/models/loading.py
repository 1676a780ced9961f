"""TODO models.loading."""

import contextlib
import logging
from pathlib import Path

from svd_xtend.models.precision import compute_dtype, set_precision

logger = logging.getLogger("svd_xtend")

BOX_CONTROL_FILE = (
    "tracklet_weights.safetensors"  # of svd_xtend/models/box_control.py, whose import takes seconds
)


# ----------------------------------------------------------------------------------------------------------- load SVD


def load_svd(path, dtype, revision=None, unet_path=None, unet=True):
    """A StableVideoDiffusionPipeline from a Hub name or a folder, on the CPU, all its modules in `dtype`.

    Takes files of the fp16 variant and plain ones, whichever are there (for float32, plain ones first).
    `unet_path`: another folder whose UNet (itself, or in its unet/) replaces the pipeline's. unet=False: without one.
    """
    import diffusers
    import transformers
    from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel

    for library in (diffusers, transformers):  # they warn of choices made here on purpose
        library.utils.logging.set_verbosity_error()
    extra = {} if unet else {"unet": None}
    if unet_path:
        inside = "unet" if Path(unet_path, "unet").is_dir() else None
        extra["unet"] = load_any_variant(
            UNetSpatioTemporalConditionModel, unet_path, "--pretrain_unet", dtype, subfolder=inside
        )
    if Path(path).is_dir() and not Path(path, "model_index.json").exists():
        raise ValueError(
            f"--pretrained_model_name_or_path {path}: no model_index.json in this folder. Expected a diffusers SVD, with "
            "unet/, vae/, image_encoder/, feature_extractor/ and scheduler/ beside it."
        )
    pipe = load_any_variant(
        StableVideoDiffusionPipeline, path, "--pretrained_model_name_or_path", dtype, revision=revision, **extra
    )  # fmt: skip
    pipe.set_progress_bar_config(leave=False, desc="sampling")
    return pipe


def pixel_step(path, revision=None):
    """Pixels of which an SVD takes whole multiples, by its configuration alone: 64 for Stability's."""
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel

    vae = AutoencoderKLTemporalDecoder.load_config(path, subfolder="vae", revision=revision)
    unet = UNetSpatioTemporalConditionModel.load_config(path, subfolder="unet", revision=revision)
    return 2 ** (len(vae["block_out_channels"]) - 1 + len(unet["down_block_types"]) - 1)


def load_any_variant(cls, path, flag, dtype, **kwargs):
    """cls.from_pretrained with the fp16 variant's files or the plain ones; one error that names the flag."""
    import torch

    errors = {}
    variants = (
        [None, "fp16"] if dtype == torch.float32 else ["fp16", None]
    )  # training starts from unrounded weights
    if Path(path).is_dir():  # no network to ask: take what is there
        files = [p.name for p in Path(path, kwargs.get("subfolder") or "").rglob("*.safetensors")]
        there = {
            "fp16": any(".fp16." in name for name in files),
            None: any(".fp16." not in name for name in files),
        }
        variants = [v for v in variants if there[v]] or variants
    for variant in variants:
        try:
            return cls.from_pretrained(path, variant=variant, dtype=dtype, **kwargs)
        except (OSError, ValueError) as error:
            errors[variant or "plain"] = str(error).strip().splitlines()[0]
    where = "folder" if Path(path).exists() else "folder or reachable Hub name"
    found = "; ".join(f"{name} files: {text}" for name, text in errors.items())
    raise ValueError(f"{flag} {path}: not a {where} with usable weights. {found}")


# -------------------------------------------------------------------------------------------------- trained parameters


def trainable_parameters(model):
    """{name: parameter} of what trains. Names are the base UNet's, or those of the modules a trainer inserted."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def move_models(pipe, unet, precision, device, encoders=True, master="float32"):
    """Move all to `device`: trained parameters in `master` precision; what is frozen, and all that is computed, in half
    where `precision` is fp16 or bf16. Returns {name: parameter} of what trains."""
    import torch

    half = compute_dtype(precision)
    set_precision(unet, pipe.unet, half, getattr(torch, master))
    for tensor in [*unet.parameters(), *unet.buffers()]:
        tensor.data = tensor.data.to(device)
    move_encoders(pipe, half, device, encoders)
    return trainable_parameters(unet)


def move_encoders(pipe, half, device, whole=True):
    """Move VAE and CLIP to `device`, frozen, in `half` precision; where not `whole`, CLIP and the VAE's decoder stay on the CPU
    until they are needed (see at_hand)."""
    import torch

    pipe.image_encoder.requires_grad_(False).to(dtype=half)
    # the pipeline, too, takes SVD's VAE out of fp16, which it is not made for
    pipe.vae.requires_grad_(False).to(
        dtype=torch.float32 if half == torch.float16 and pipe.vae.config.force_upcast else half
    )
    for module in (
        (pipe.image_encoder, pipe.vae) if whole else (pipe.vae.encoder, pipe.vae.quant_conv)
    ):
        module.to(device)


@contextlib.contextmanager
def encoders_on_device(pipe, device):
    """Modules that `place` left on the CPU come to `device`, and go back."""
    away = [
        m
        for m in (pipe.image_encoder, pipe.vae.decoder)
        if next(m.parameters()).device.type != device.type
    ]
    for module in away:
        module.to(device)
    try:
        yield
    finally:
        for module in away:
            module.to("cpu")
