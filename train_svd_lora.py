"""Fine-tune Stable Video Diffusion with LoRA: the loop of train_svd.py, adapters instead of the UNet.

    bash train_svd_lora.sh                                                    # the embedded SVD, a few minutes on a CPU
    bash train_svd_lora.sh --pretrained_model_name_or_path=/path/to/weight    # 1024x576 x 25 frames

All flags of train_svd.py hold; a checkpoint holds only the adapters. Next: svd_xtend/models/lora.py.
"""

from svd_xtend.models.lora import TARGETS, inject_lora, save_lora
from train_svd import DummyDataset, build_parser, parse, train, validate


def add_lora(unet, args):
    """Adapters on --lora_targets; they alone train, in float32."""
    alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    return inject_lora(unet, args.rank, alpha, args.lora_targets, args.use_dora, args.seed)


def export_lora(pipe, unet, args):
    """Write pytorch_lora_weights.safetensors, which svd_xtend.models.lora.load_lora puts into a stock pipeline."""
    save_lora(unet, args.output_dir)


def script_parser():
    """The shared flags and LoRA's own."""
    parser = build_parser(__doc__, output_dir="outputs/lora", learning_rate=1e-4)
    # fmt: off
    g = parser.add_argument_group("lora")
    g.add_argument("--rank", type=int, default=16, help="default: %(default)s")
    g.add_argument("--lora_alpha", type=float, help="the adapters' output is scaled by lora_alpha / rank; default: the rank")
    g.add_argument("--lora_targets", nargs="+", default=["attention"], metavar="TARGET", help=f"any of {', '.join(TARGETS)}, or parts of layers' names; temporal for camera motion; default: attention")
    g.add_argument("--use_dora", action="store_true", help="DoRA: learn a magnitude beside each adapter")
    # fmt: on
    return parser


if __name__ == "__main__":
    train(
        parse(script_parser()),
        dataset=DummyDataset,
        prepare_unet=add_lora,
        export=export_lora,
        validate=validate,
    )
