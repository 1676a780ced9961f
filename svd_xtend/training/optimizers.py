"""The optimizers of --optimizer, and the exchange of trained weights for their EMA weights."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch
    from diffusers.training_utils import EMAModel

# Gates start at 0. At the common learning rate they stay almost closed for hundreds of steps, and
# the layers behind them learn nothing in that time.
GATE_RATE = 10


class OptimizerSpec(NamedTuple):
    """The precision and memory that an optimizer keeps for each trained parameter."""

    weight_dtype: str  # name of the torch dtype of trained weights
    moment_bytes: int  # per parameter, of Adam's two moments together
    epsilon: float  # default of --adam_epsilon


OPTIMIZERS = {
    "adamw": OptimizerSpec("float32", moment_bytes=8, epsilon=1e-8),
    # 8 bits round the second moment of a rare gradient to 0, and dropped conditions make gradients
    # rare. With an epsilon of 1e-8, single weights of conv_in and attn2 then took steps of 200
    # times the learning rate.
    "adamw8bit": OptimizerSpec("float32", moment_bytes=2, epsilon=1e-6),
    "adamw_bf16_sr": OptimizerSpec("bfloat16", moment_bytes=4, epsilon=1e-8),
}


def make_optimizer(
    parameters: dict[str, torch.nn.Parameter], args: argparse.Namespace
) -> torch.optim.Optimizer:
    """Make the optimizer of --optimizer for {name: parameter}.

    adamw: torch's AdamW. adamw8bit: torchao's, with moments in 8 bits. adamw_bf16_sr: torchao's, in
    bf16 throughout, with stochastic rounding. Gates, whose names contain `alpha_`, have no weight
    decay and GATE_RATE times the learning rate. Raise ValueError if torchao is needed and missing.
    """
    import torch

    optimizer_class: Any
    options: dict[str, Any]
    if args.optimizer == "adamw":
        # A fused AdamW skips steps with overflows by itself, and accelerate would not notice that
        # it did.
        fused = torch.cuda.is_available() and args.mixed_precision != "fp16"
        # foreach, the default on GPUs, would need temporary copies of all trained weights: 5.5 GiB
        # of the full UNet
        optimizer_class = torch.optim.AdamW
        options = {"fused": fused, "foreach": False}
    else:
        if not importlib.util.find_spec("torchao"):
            raise ValueError(
                f"--optimizer {args.optimizer}: needs torchao. Run: pip install torchao"
            )
        from torchao import optim

        if args.optimizer == "adamw_bf16_sr":
            # private, but the only AdamW of torchao with stochastic rounding; all its public ones
            # build on it
            optimizer_class = optim._AdamW
            options = {"bf16_stochastic_round": True}
        else:
            optimizer_class = optim.AdamW8bit
            options = {}

    gates = [p for name, p in parameters.items() if "alpha_" in name]
    others = [p for name, p in parameters.items() if "alpha_" not in name]
    groups: list[dict[str, Any]] = [{"params": others}]
    if gates:
        gate_rate = GATE_RATE * args.learning_rate
        groups.append({"params": gates, "lr": gate_rate, "weight_decay": 0.0})
    epsilon = args.adam_epsilon
    if epsilon is None:
        epsilon = OPTIMIZERS[args.optimizer].epsilon
    optimizer = optimizer_class(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=epsilon,
        **options,
    )
    if args.optimizer == "adamw_bf16_sr":
        optimizer.register_step_pre_hook(RoundingSeeder(args.seed))
    return optimizer


class RoundingSeeder:
    """A hook that seeds torch's global generator by (seed, step) before each optimizer step.

    Stochastic rounding draws from that generator. So all processes round alike, and a resumed run
    rounds like one that was never stopped.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.steps_done: int | None = None

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        import torch

        if self.steps_done is None:  # read once, because the state may lie on a GPU
            steps = [int(state.get("step", 0)) for state in optimizer.state.values()]
            self.steps_done = max(steps, default=0)
        key = np.random.SeedSequence((self.seed, self.steps_done))
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
        self.steps_done += 1


def check_optimizer(args: argparse.Namespace) -> None:
    """Raise ValueError if --optimizer does not work with --mixed_precision."""
    keeps_bf16 = OPTIMIZERS[args.optimizer].weight_dtype == "bfloat16"
    if keeps_bf16 and args.mixed_precision != "bf16":
        raise ValueError(
            f"--optimizer {args.optimizer}: needs --mixed_precision bf16; "
            f"this run has {args.mixed_precision}"
        )


@contextlib.contextmanager
def ema_weights(ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Use the EMA weights in place of the trained ones in this context, if `ema` is not None."""
    if ema:
        ema.store(parameters)
        ema.copy_to(parameters)
    yield
    if ema:
        ema.restore(parameters)
