"""Merge a LoRA into its base model and write the result as a full SVD.

    python -m svd_xtend.export.merged_lora --pretrained_model_name_or_path BASE --lora FILE \\
        --output_dir MERGED
"""

from __future__ import annotations

import argparse
import logging

from svd_xtend.models.lora import load_lora, merge_lora

logger = logging.getLogger("svd_xtend")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="the base model that the LoRA was trained on",
    )
    parser.add_argument(
        "--lora", required=True, help="pytorch_lora_weights.safetensors, or its folder"
    )
    parser.add_argument(
        "--lora_scale",
        type=float,
        default=1.0,
        help="strength of the LoRA; 1 is as trained; default: %(default)s",
    )
    parser.add_argument("--output_dir", required=True, help="folder for the merged SVD")
    return parser


def export_merged_lora(base: str, lora: str, output_dir: str, scale: float = 1.0) -> None:
    """Write the SVD `base` with a LoRA merged into its UNet, in float32, to `output_dir`."""
    import torch

    from svd_xtend.models.loading import load_svd

    pipe = load_svd(base, torch.float32)
    load_lora(pipe.unet, lora, scale)
    merge_lora(pipe.unet)
    pipe.save_pretrained(output_dir)
    logger.info("merged SVD in %s", output_dir)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = build_parser().parse_args()
    export_merged_lora(
        args.pretrained_model_name_or_path, args.lora, args.output_dir, args.lora_scale
    )
