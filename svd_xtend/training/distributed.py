"""Training on several processes: DDP, FSDP2 or DeepSpeed ZeRO-2, set up by configs/accelerate/.

    accelerator = create_accelerator(args)
    model, optimizer, trained = prepare_for_engine(accelerator, unet, optimizer, args)
    with gathered_weights(accelerator, unet):
        ...        # under FSDP2 every process has all weights here: one can run the model alone

Checkpoints get whole tensors from here, as one process would have them, and hand them back. No
engine's own format reaches the disk, so a checkpoint of one engine can be resumed under any other.

If one process fails, all end within seconds, and each prints the cause (see `fail_together`).
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from svd_xtend.training import optimizers

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn
    from torch.distributed import TCPStore

logger = logging.getLogger("svd_xtend")

# Classes of modules whose weights FSDP2 gathers together, as one unit.
FSDP_UNITS = ("SpatioTemporalResBlock", "TransformerSpatioTemporalModel", "BoxLayer")
# Keys of Adam's moments in DeepSpeed's flat optimizer.
ZERO_MOMENTS = ("exp_avg", "exp_avg_sq")
# Other processes wait at most this long while the main process validates and exports.
COLLECTIVE_TIMEOUT = timedelta(hours=6)
# Name of the thread that writes a checkpoint, see checkpoints.CheckpointManager.
CHECKPOINT_THREAD = "checkpoint"
CHECKPOINT_TIMEOUT = 300  # seconds that a failing process waits for that thread


# ------------------------------------------------------------------------------------------- set up


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """Return the Accelerator of this process. From here on, all processes fail together.

    args.mixed_precision must be resolved (see precision.check_precision).

    Raises:
        ValueError: a flag does not work with the engine or the optimizer.
    """
    from accelerate import (
        Accelerator,
        AutocastKwargs,
        DistributedDataParallelKwargs,
        InitProcessGroupKwargs,
    )

    # Layers compute in half precision by themselves (see precision.compute_in): accelerate only
    # provides the gradient scaler of fp16.
    accelerator = Accelerator(
        mixed_precision="fp16" if args.mixed_precision == "fp16" else "no",
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=Path(args.output_dir, "logs"),
        kwargs_handlers=[
            AutocastKwargs(enabled=False),
            InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            # Without this, DDP holds a second copy of all gradients.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    optimizers.check_optimizer(args)
    check_engine(accelerator, args)
    if accelerator.num_processes > 1:
        fail_together(accelerator.process_index)
    return accelerator


def check_engine(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Raise a ValueError if a flag does not work with the engine."""
    if is_deepspeed(accelerator):
        if args.mixed_precision == "fp16":
            raise ValueError(
                "--mixed_precision fp16: not with DeepSpeed, which has a gradient scaler of its "
                "own. Pass bf16 or no."
            )
        if args.optimizer != "adamw":
            raise ValueError(
                f"--optimizer {args.optimizer}: not with DeepSpeed. Pass adamw, or use fsdp2.yaml."
            )
    if is_fsdp(accelerator):
        if args.mixed_precision == "fp16":
            raise ValueError(
                "--mixed_precision fp16: not with FSDP2, which would reduce gradients in fp16. "
                "Pass bf16."
            )
        if args.optimizer == "adamw8bit":
            raise ValueError(
                "--optimizer adamw8bit: not with FSDP2, under which torchao cannot resume it. "
                "Pass adamw."
            )
        if args.offload_activations:
            raise ValueError(
                "--offload_activations: not with FSDP2, because it would also move the gathered "
                "weights. Leave the flag out."
            )


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Return whether the engine is DeepSpeed ZeRO-2."""
    return accelerator.distributed_type == "DEEPSPEED"


def is_fsdp(accelerator: Accelerator) -> bool:
    """Return whether the engine is FSDP2."""
    return accelerator.distributed_type == "FSDP"


def prepare_for_engine(
    accelerator: Accelerator, unet: Any, optimizer: Any, args: argparse.Namespace
) -> tuple[Any, Any, list[nn.Parameter]]:
    """Hand model and optimizer to the engine.

    Returns (the model to call, the optimizer, the parameters that train). Under FSDP2 these
    parameters are not the tensors that they were before.
    """
    if is_fsdp(accelerator):
        class_names = {type(module).__name__ for module in unet.modules()}
        # The attribute that accelerate reads. diffusers sets it to None.
        unet._no_split_modules = [name for name in FSDP_UNITS if name in class_names]
        # The UNet's blocks return views, which is harmless because nothing writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    if is_deepspeed(accelerator):
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.per_gpu_batch_size
        config["gradient_clipping"] = args.max_grad_norm or 0.0
    model, optimizer = accelerator.prepare(unet, optimizer)
    if is_fsdp(accelerator):
        # Private, but it is what the first forward does. If that were a forward of validation,
        # which calls a UNet inside the model, that UNet would become the root of FSDP2.
        model._get_fsdp_state()._lazy_init()
    return model, optimizer, [p for p in unet.parameters() if p.requires_grad]


# -------------------------------------------------------------------------------------------- steps


def batch_to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch to the device, and convert pixel_values from uint8 to float32 in [-1, 1].

    `index` stays where it is: reading it on a GPU would wait for the GPU.
    """
    from accelerate.utils import send_to_device

    tensors = {name: value for name, value in batch.items() if name != "index"}
    moved = send_to_device(tensors, device, non_blocking=True)
    moved["index"] = batch["index"]
    moved["pixel_values"] = moved["pixel_values"].float() / 127.5 - 1
    return moved


def clip_grad_norm(
    accelerator: Accelerator, trained: list[nn.Parameter], max_norm: float
) -> torch.Tensor | None:
    """Scale the gradients to a norm of at most `max_norm`, and return the norm before.

    It is the norm of the whole gradient, the same on every process. None while gradients are still
    being accumulated.
    """
    if not accelerator.sync_gradients:
        return None
    norm = accelerator.clip_grad_norm_(trained, max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def step_was_skipped(accelerator: Accelerator) -> bool:
    """Return whether fp16's gradient scaler skipped the step, because of an overflow.

    DeepSpeed skips steps that are not finite in any precision. That is an error, not counted here.
    """
    return accelerator.scaler is not None and accelerator.optimizer_step_was_skipped


def check_same_on_all_processes(flag: str, value: Any) -> None:
    """Raise a ValueError that names `flag` if `value` is not the same on all processes."""
    from accelerate.utils import gather_object

    if len(set(gather_object([value]))) > 1:
        raise ValueError(
            f"{flag}: the processes see different files there. Make sure that nothing writes to it "
            "while a run starts, and that all machines see the same folder; then start again."
        )


@contextlib.contextmanager
def gathered_weights(accelerator: Accelerator, unet: nn.Module) -> Iterator[None]:
    """Under FSDP2, gather all weights on every process until the end of the context.

    Under other engines every process has all weights anyway.
    """
    units: list[Any] = []
    if is_fsdp(accelerator):
        from torch.distributed.fsdp import FSDPModule

        units = [module for module in unet.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    yield
    for unit in units:
        # As accelerate has set it up: the root stays gathered between forward and backward.
        reshard = accelerator.state.fsdp_plugin.reshard_after_forward and unit is not unet
        unit.set_reshard_after_forward(reshard, recurse=False)
        unit.reshard()


# ------------------------------------------------------------------- whole tensors of all processes


# Why not get_optimizer_state_dict and set_optimizer_state_dict of torch.distributed.checkpoint:
# - set_ fills a new optimizer by calling its step() once. That advances the noise of stochastic
#   rounding (optimizers.RoundingSeeder), and gives parameters that had no gradient yet a step of 1.
# - get_ with cpu_offload does not copy tensors that are in CPU memory already, such as Adam's
#   `step`, but the thread that writes the checkpoint needs copies. set_ keeps tensors that are
#   mapped from the file, which may be deleted.
# - set_ restores the options of the checkpoint's run (learning rate, betas). Here this run's stay.


def gather_tensor(tensor: Any, keep: bool = True) -> torch.Tensor | None:
    """Return a copy, in CPU memory, of a tensor that may be sharded. All processes must call this.

    Without `keep`, take part in the gathering and return None.
    """
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().to("cpu", copy=True) if keep else None


def scatter_tensor(value: torch.Tensor, like: Any) -> torch.Tensor:
    """Return a whole tensor in CPU memory as `like` is: on its device, and sharded if it is.

    All processes must call this with the same `value`.
    """
    if not hasattr(like, "full_tensor"):
        # Copy: what was read from a file is mapped into memory, and the file may be deleted.
        return value.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    # All processes have read the same file, so no data needs to be sent: src_data_rank is None.
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def zero_optimizer(optimizer: Any) -> Any | None:
    """Return DeepSpeed's ZeRO optimizer inside accelerate's wrapper; None under other engines."""
    return optimizer.optimizer if hasattr(optimizer.optimizer, "optimizer") else None


def optimizer_states(
    optimizer: Any, parameters: dict[str, nn.Parameter], keep: bool = True
) -> dict[str, dict[str, Any]]:
    """Return {parameter name: {exp_avg, exp_avg_sq, step}}, whole tensors in CPU memory.

    All processes must call this; without `keep`, the tensors are None. Parameters are gathered one
    after the other, so that the GPU never holds the whole state of more than one.
    """
    zero = zero_optimizer(optimizer)
    if zero:
        return zero_states(zero, parameters, keep)
    state_by_parameter = torch_optimizer(optimizer).state
    states = {}
    for name, parameter in parameters.items():
        state = state_by_parameter.get(parameter, {})
        states[name] = {
            key: gather_tensor(value, keep) if hasattr(value, "device") else value
            for key, value in state.items()
        }
    return states


def load_optimizer_states(
    optimizer: Any, parameters: dict[str, nn.Parameter], states: dict[str, dict[str, Any]]
) -> None:
    """Load what `optimizer_states` returned. The options of this run, such as betas, are kept."""
    import torch

    zero = zero_optimizer(optimizer)
    if zero:
        load_zero_states(zero, parameters, states)
        return
    inner = torch_optimizer(optimizer)
    names = {parameter: name for name, parameter in parameters.items()}
    in_order = [parameter for group in inner.param_groups for parameter in group["params"]]
    state_by_index = {}
    for index, parameter in enumerate(in_order):
        state = {}
        for key, value in states[names[parameter]].items():
            # Moments have the shape of the parameter and are sharded like it; the step is a number.
            if getattr(value, "shape", None) == parameter.shape:
                state[key] = scatter_tensor(value, parameter)
            else:
                state[key] = torch.as_tensor(value).clone()
        state_by_index[index] = state
    groups = inner.state_dict()["param_groups"]
    inner.load_state_dict({"state": state_by_index, "param_groups": groups})


# ---------------------------------------------------------------------- DeepSpeed's optimizer state


def zero_states(
    zero: Any, parameters: dict[str, nn.Parameter], keep: bool
) -> dict[str, dict[str, Any]]:
    """Return the same as `optimizer_states`, from the flat shards that DeepSpeed keeps."""
    from deepspeed.utils import safe_get_full_optimizer_state

    link_zero_state(zero)
    step = next(iter(torch_optimizer(zero).state.values()))["step"]
    states = {}
    for name, parameter in parameters.items():
        state = {}
        for key in ZERO_MOMENTS:
            moment = safe_get_full_optimizer_state(parameter, key)
            state[key] = gather_tensor(moment, keep)
        state["step"] = gather_tensor(step, keep) if hasattr(step, "device") else step
        states[name] = state
    return states


def load_zero_states(
    zero: Any, parameters: dict[str, nn.Parameter], states: dict[str, dict[str, Any]]
) -> None:
    """Load the same as `load_optimizer_states`: each process fills in its own flat shards."""
    import torch
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    inner = torch_optimizer(zero)
    step = float(next(iter(states.values()))["step"])
    # DeepSpeed's Adam for the CPU counts its steps in integers, torch's in tensors.
    counts_in_tensors = isinstance(inner, torch.optim.AdamW)
    for group in inner.param_groups:
        for flat in group["params"]:
            state: dict[str, Any] = {key: torch.zeros_like(flat) for key in ZERO_MOMENTS}
            if counts_in_tensors:
                step_device = flat.device if group.get("fused") else "cpu"
                state["step"] = torch.tensor(step, device=step_device)
            else:
                state["step"] = int(step)
            inner.state[flat] = state
    link_zero_state(zero)
    for name, parameter in parameters.items():
        safe_set_full_fp32_param(parameter, parameter.data)
        for key in ZERO_MOMENTS:
            moment = states[name][key].to(parameter.device)
            safe_set_full_optimizer_state(parameter, moment, key)


def link_zero_state(zero: Any) -> None:
    """Let DeepSpeed find Adam's moments by parameter.

    Private, but DeepSpeed itself does this only after the first step of its first group, when the
    moments of the other groups do not exist yet.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


# ------------------------------------------------------------------------------------ fail together


def fail_together(process_index: int, interval: float = 1.0) -> None:
    """Let an uncaught exception on one process end all processes within seconds.

    Each process prints the cause. Without this, the others would wait in a collective for hours.
    The message goes through the store at which the processes met; each process looks into it every
    `interval` seconds.
    """
    watch = FailureWatch(process_index, interval)
    sys.excepthook = watch.handle_exception
    watch.thread.start()
    # A thread that is inside C++ when Python ends would crash the process: end it first.
    atexit.register(watch.stop)


class FailureWatch:
    """Report the failure of this process to the others, and end this process if another failed."""

    def __init__(self, process_index: int, interval: float) -> None:
        from torch.distributed import TCPStore

        self.process_index = process_index
        self.interval = interval
        # A connection of its own: the main thread may hold the other one while it waits.
        self.store: TCPStore = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=60),
        )
        # Launchers may start a run again with the same store.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self.key = f"svd_xtend/failed/{restart}"
        self.previous_hook = sys.excepthook
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def read_cause(self) -> str | None:
        """Return which process failed first, and why; None if none did, or if the store is gone."""
        with contextlib.suppress(RuntimeError):
            if self.store.check([self.key]):
                return self.store.get(self.key).decode()
        return None

    def print_cause(self, cause: str) -> None:
        """Print the cause, unless it is this process, which has printed its traceback."""
        if not cause.startswith(f"process {self.process_index} "):
            sys.stderr.write(f"\n{cause}\nprocess {self.process_index} ends with it\n")

    def watch(self) -> None:
        """End this process once another has failed. Runs in a thread."""
        while not self.is_over.wait(self.interval):
            cause = self.read_cause()
            if cause:
                self.print_cause(cause)
                # The process that failed ends first, so that launchers report the cause.
                time.sleep(3 * self.interval)
                end_process()

    def handle_exception(
        self,
        error_type: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        """Print the traceback and report the failure, unless another process has failed before."""
        self.previous_hook(error_type, error, trace)
        cause = self.read_cause()
        if cause:
            # This process failed because a collective broke off.
            self.print_cause(cause)
            return
        message = (
            f"process {self.process_index} on {socket.gethostname()} failed: "
            f"{error_type.__name__}: {error}"
        )
        with contextlib.suppress(RuntimeError):
            self.store.set(self.key, message)
            # The store may end with this process: give the others time to read it.
            time.sleep(2 * self.interval)

    def stop(self) -> None:
        """End the thread."""
        self.is_over.set()
        self.thread.join()


def end_process() -> None:
    """End this process, whatever its main thread waits for, once a checkpoint is written."""
    for thread in threading.enumerate():
        if thread.name == CHECKPOINT_THREAD:
            thread.join(CHECKPOINT_TIMEOUT)
    sys.stderr.flush()
    os._exit(1)
