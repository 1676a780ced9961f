"""TODO training.optimizers."""

import contextlib
import importlib.metadata
import importlib.util
import logging

import numpy as np

logger = logging.getLogger("svd_xtend")

# At the common rate gates, which start shut, stay almost shut for hundreds of steps, and all behind them waits.
GATE_RATE = 10
OPTIMIZERS = {  # what trained weights are kept in; bytes a parameter of the optimizer's two averages; default epsilon
    "adamw": ("float32", 8, 1e-8),
    # 8 bit round the second moment of a rare gradient, as dropped conditions make them, to 0: at 1e-8 single weights of
    # conv_in and attn2 then took steps of 200 times the learning rate
    "adamw8bit": ("float32", 2, 1e-6),
    "adamw_bf16_sr": ("bfloat16", 4, 1e-8),
}


def make_optimizer(named, args):
    """AdamW on {name: parameter}: torch's, or torchao's with averages of 8 bit, or in bf16 throughout with stochastic
    rounding. Gates, whose names have `alpha_`, have no weight decay and a higher rate."""
    import torch

    if args.optimizer == "adamw":
        # where fused it sees to overflows itself, and accelerate would not know of the steps that it skipped
        fused = torch.cuda.is_available() and args.mixed_precision != "fp16"
        # foreach, the default on GPUs, would need temporary copies of all trained weights: 5.5 GiB of the full UNet
        optimizer_class, how = torch.optim.AdamW, {"fused": fused, "foreach": False}
    else:
        if not importlib.util.find_spec("torchao"):
            raise ValueError(
                f"--optimizer {args.optimizer}: needs torchao. Run: pip install torchao"
            )
        from torchao import optim

        optimizer_class, how = optim.AdamW8bit, {}
        if args.optimizer == "adamw_bf16_sr":
            # private, but the only AdamW that rounds so; all public ones build on it
            optimizer_class, how = optim._AdamW, {"bf16_stochastic_round": True}
    gates = {
        "params": [p for name, p in named.items() if "alpha_" in name],
        "lr": GATE_RATE * args.learning_rate,
        "weight_decay": 0.0,
    }
    epsilon = OPTIMIZERS[args.optimizer][2] if args.adam_epsilon is None else args.adam_epsilon
    rest = {"params": [p for name, p in named.items() if "alpha_" not in name]}
    groups = [rest] + [gates] * bool(gates["params"])
    optimizer = optimizer_class(
        groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay, eps=epsilon, **how,
    )  # fmt: skip
    if args.optimizer == "adamw_bf16_sr":
        optimizer.register_step_pre_hook(Rounding(args.seed))
    return optimizer


class Rounding:
    """Before each optimizer step: key the rounding's noise by (seed, step). All processes round alike, and a resumed run as
    one that never stopped."""

    def __init__(self, seed):
        self.seed, self.done = seed, None

    def __call__(self, optimizer, *_):
        import torch

        if self.done is None:  # once: it may be on a GPU
            self.done = max(
                (int(state.get("step", 0)) for state in optimizer.state.values()), default=0
            )
        torch.manual_seed(
            int(np.random.SeedSequence((self.seed, self.done)).generate_state(1, np.uint64)[0])
        )
        self.done += 1


def check_optimizer(args):
    """Raise where --optimizer and the precision do not go together."""
    if OPTIMIZERS[args.optimizer][0] == "bfloat16" and args.mixed_precision != "bf16":
        raise ValueError(
            f"--optimizer {args.optimizer}: needs --mixed_precision bf16; this run has {args.mixed_precision}"
        )


# ---------------------------------------------------------------------------------------------------- metrics, signals


@contextlib.contextmanager
def ema_weights(ema, parameters):
    """Moving averages in the parameters' place, where there are any."""
    if ema:
        ema.store(parameters)
        ema.copy_to(parameters)
    yield
    if ema:
        ema.restore(parameters)
