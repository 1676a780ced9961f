"""Fine-tune Stable Video Diffusion with LoRA: the loop of train_svd.py, adapters in place of the UNet.

    bash train_svd_lora.sh                                                    # the embedded SVD, minutes on a CPU
    bash train_svd_lora.sh --pretrained_model_name_or_path=/path/to/weight    # 1024x576 x 25 frames

All flags of train_svd.py work here too. A checkpoint holds only the adapters.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from svd_xtend.models.lora import TARGETS, inject_lora, save_lora
from svd_xtend.training.flag_types import positive_int
from train_svd import Recipe, build_parser, parse, train

if TYPE_CHECKING:
    from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel


def add_lora(
    unet: UNetSpatioTemporalConditionModel, args: argparse.Namespace
) -> UNetSpatioTemporalConditionModel:
    """Add adapters to the layers that --lora_targets names. Only they train, in float32."""
    alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    return inject_lora(unet, args.rank, alpha, args.lora_targets, args.use_dora, args.seed)


def export_lora(
    pipe: StableVideoDiffusionPipeline,
    unet: UNetSpatioTemporalConditionModel,
    args: argparse.Namespace,
) -> None:
    """Write pytorch_lora_weights.safetensors, which svd_xtend.models.lora.load_lora loads."""
    save_lora(unet, args.output_dir)


def script_parser() -> argparse.ArgumentParser:
    """Return a parser of the shared flags and of LoRA's own."""
    parser = build_parser(__doc__, output_dir="outputs/lora", learning_rate=1e-4)
    group = parser.add_argument_group("lora")
    group.add_argument(
        "--rank", type=positive_int, default=16, help="rank of the adapters; default: %(default)s"
    )
    group.add_argument(
        "--lora_alpha",
        type=float,
        help="the adapters' output is scaled by lora_alpha / rank; default: the rank",
    )
    group.add_argument(
        "--lora_targets",
        nargs="+",
        default=["attention"],
        metavar="TARGET",
        help=f"layers that get an adapter: any of {', '.join(TARGETS)}, or parts of layer names; "
        "temporal suits camera motion; default: attention",
    )
    group.add_argument(
        "--use_dora",
        action="store_true",
        help="DoRA: each adapter also learns a magnitude",
    )
    return parser


RECIPE = Recipe(prepare_unet=add_lora, export=export_lora)

if __name__ == "__main__":
    train(parse(script_parser()), RECIPE)
