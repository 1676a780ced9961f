"""Write an SVD with random weights in the exact layout of stable-video-diffusion-img2vid: 4.2 GB.

    python benchmarks/full_size_weights.py /tmp/svd_random

Writes fp16 files alone, like the Hub's fp16 variant. Losses and videos of such a model mean
nothing; memory, seconds and file sizes are those of the real model.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def make_models(device: torch.device, **unet_config: Any) -> SimpleNamespace:
    """Return unet, vae, image_encoder and feature_extractor of SVD with random weights, in float32.

    unet_config: where the UNet differs from SVD's configuration, which is that of diffusers' defaults.
    """
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    vit_huge = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1024,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        hidden_act="gelu",
    )
    with torch.device(device):
        return SimpleNamespace(
            unet=UNetSpatioTemporalConditionModel(**unet_config),
            vae=AutoencoderKLTemporalDecoder(
                down_block_types=["DownEncoderBlock2D"] * 4,
                block_out_channels=[128, 256, 512, 512],
                layers_per_block=2,
                sample_size=768,
                force_upcast=True,
            ),
            image_encoder=CLIPVisionModelWithProjection(vit_huge),
            feature_extractor=CLIPImageProcessor(),
        )


def write_weights(folder: Path, device: torch.device) -> None:
    """Make the pipeline on a device, in half precision, and save it as the fp16 variant."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline

    torch.manual_seed(0)
    models = make_models(device)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    pipe = StableVideoDiffusionPipeline(
        models.vae.half(),
        models.image_encoder.half(),
        models.unet.half(),
        scheduler,
        models.feature_extractor,
    )
    pipe.save_pretrained(folder, variant="fp16")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the pipeline is written")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_weights(args.folder, device)
    print(f"wrote {args.folder}")
