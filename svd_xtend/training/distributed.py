"""Many processes, one run: DDP, FSDP2 or DeepSpeed ZeRO-2 splits the work, as configs/accelerate/ says; one fails, all end.

    accelerator = connect(args)
    model, optimizer, trained = prepare(accelerator, unet, optimizer, args)
    with whole(accelerator, unet): ...          # under FSDP2 all weights on every GPU: one process may run the model alone

Checkpoints ask here for tensors as one process would have them, and hand them back: an engine's own format never
reaches the disk, so that what one engine saved any other resumes.
"""

import atexit
import contextlib
import logging
import os
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

from svd_xtend.models import precision
from svd_xtend.training import optimizers

logger = logging.getLogger("svd_xtend")

SHARDED = (
    "SpatioTemporalResBlock",
    "TransformerSpatioTemporalModel",
    "BoxLayer",
)  # what FSDP2 gathers as one
ZERO_STATES = ("exp_avg", "exp_avg_sq")  # of DeepSpeed's flat optimizer


def create_accelerator(args):
    """The Accelerator of this process; args.mixed_precision is resolved. From here on all processes fail together."""
    from datetime import timedelta

    from accelerate import (
        Accelerator,
        AutocastKwargs,
        DistributedDataParallelKwargs,
        InitProcessGroupKwargs,
    )

    accelerator = Accelerator(
        # layers compute in half precision by themselves, see fast_unet.compute_in: accelerate is to see to fp16's scaler
        mixed_precision="fp16" if args.mixed_precision == "fp16" else "no",
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=Path(args.output_dir, "logs"),
        kwargs_handlers=[
            AutocastKwargs(enabled=False),
            InitProcessGroupKwargs(
                timeout=timedelta(hours=6)
            ),  # the others wait while one validates
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True
            ),  # else gradients are there twice
        ],
    )
    optimizers.check_optimizer(args)
    check_engine(accelerator, args)
    if accelerator.num_processes > 1:
        fail_together(accelerator.process_index)
    return accelerator


def check_engine(accelerator, args):
    """Raise where a flag does not go together with the engine."""
    if is_deepspeed(accelerator) and args.mixed_precision == "fp16":
        raise ValueError(
            "--mixed_precision fp16: not with DeepSpeed, which has a scaler of its own; pass bf16 or no"
        )
    if is_deepspeed(accelerator) and args.optimizer != "adamw":
        raise ValueError(
            f"--optimizer {args.optimizer}: not with DeepSpeed; pass adamw, or take fsdp2.yaml"
        )
    if is_fsdp(accelerator) and args.mixed_precision == "fp16":
        raise ValueError(
            "--mixed_precision fp16: not with FSDP2, under which it would reduce gradients in fp16; pass bf16"
        )
    if is_fsdp(accelerator) and args.optimizer == "adamw8bit":
        raise ValueError(
            "--optimizer adamw8bit: not with FSDP2, under which torchao cannot resume it; pass adamw"
        )
    if is_fsdp(accelerator) and args.offload_activations:
        raise ValueError(
            "--offload_activations: not with FSDP2, whose gathered weights it would move, too"
        )


def is_deepspeed(accelerator):
    return accelerator.distributed_type == "DEEPSPEED"


def is_fsdp(accelerator):
    return accelerator.distributed_type == "FSDP"


def prepare_for_engine(accelerator, unet, optimizer, args):
    """Hand model and optimizer to the engine. Returns (the model to call, optimizer, the trained parameters, which under
    FSDP2 are other tensors than before)."""
    if is_fsdp(accelerator):
        kinds = {type(module).__name__ for module in unet.modules()}
        unet._no_split_modules = [
            kind for kind in SHARDED if kind in kinds
        ]  # accelerate's name; diffusers has None
        # the UNet's blocks answer with views, and nothing writes into them
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    if is_deepspeed(accelerator):
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config.update(
            train_micro_batch_size_per_gpu=args.per_gpu_batch_size,
            gradient_clipping=args.max_grad_norm or 0.0,
        )
    model, optimizer = accelerator.prepare(unet, optimizer)
    if is_fsdp(accelerator):
        # private: what the first forward does; if that were a picture's, of a UNet inside the model, it would be the root
        model._get_fsdp_state()._lazy_init()
    return model, optimizer, [p for p in unet.parameters() if p.requires_grad]


def clip_grad_norm(accelerator, trained, most):
    """Scale gradients to a norm of at most `most`; returns the norm before, of the whole gradient, on every process. Until
    the last micro-step of a step, None."""
    if not accelerator.sync_gradients:
        return None
    norm = accelerator.clip_grad_norm_(trained, most)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def step_was_skipped(accelerator):
    """Whether fp16's scaler left out the step. (DeepSpeed leaves out what is not finite at any precision; that is an error.)"""
    return accelerator.scaler is not None and accelerator.optimizer_step_was_skipped


def check_same_on_all_processes(flag, value):
    """Raise where the processes do not all have the same `value`."""
    from accelerate.utils import gather_object

    if len(set(gather_object([value]))) > 1:
        raise ValueError(
            f"{flag}: processes do not find the same there. Let nothing write to it while a run starts, and start again"
        )


@contextlib.contextmanager
def gathered_weights(accelerator, unet):
    """With FSDP2: gather all weights on every process, and keep them until the end. Elsewhere they always are."""
    shards = []
    if is_fsdp(accelerator):
        from torch.distributed.fsdp import FSDPModule

        shards = [module for module in unet.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    yield
    for module in shards:
        again = accelerator.state.fsdp_plugin.reshard_after_forward and module is not unet
        module.set_reshard_after_forward(again, recurse=False)
        module.reshard()


# --------------------------------------------------------------------------- tensors as one process would have them


def gather_tensor(tensor, keep=True):
    """A copy, in the CPU's memory, of a tensor that may be spread over the processes; all must call this. Where not
    `keep`, None."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().to("cpu", copy=True) if keep else None


def scatter_tensor(value, like):
    """A whole tensor, on the CPU, as `like` is: on its device, of a DTensor this process' part."""
    if not hasattr(like, "full_tensor"):
        return value.to(
            like.device, copy=True
        )  # what is read from a file is mapped, and the file may be deleted
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank: all processes have read the same file, nothing needs to be sent
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def torch_optimizer(optimizer):
    """The torch optimizer inside accelerate's, and DeepSpeed's, wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def zero_optimizer(optimizer):
    """DeepSpeed's ZeRO optimizer, or None."""
    return optimizer.optimizer if hasattr(optimizer.optimizer, "optimizer") else None


def optimizer_states(optimizer, named, keep=True):
    """{name: {exp_avg, exp_avg_sq, step}} of parameters, whole, on the CPU; all processes must call this."""
    zero, own = zero_optimizer(optimizer), torch_optimizer(optimizer).state
    if zero:
        from deepspeed.utils import safe_get_full_optimizer_state

        link_zero_state(zero)
        step = next(iter(own.values()))["step"]
    states = {}
    for name, p in named.items():  # one after the other: under ZeRO-2 each is gathered on the GPU
        state = own.get(p, {})
        if zero:
            state = {key: safe_get_full_optimizer_state(p, key) for key in ZERO_STATES} | {
                "step": step
            }
        states[name] = {
            k: gather_tensor(v, keep) if hasattr(v, "device") else v for k, v in state.items()
        }
    return states


def load_optimizer_states(optimizer, named, states):
    """Give parameters back what `optimizer_states` told of them. Groups keep this run's flags."""
    import torch

    own = torch_optimizer(optimizer)
    if zero_optimizer(optimizer):
        return load_zero_states(zero_optimizer(optimizer), own, named, states)
    order, names = (
        [p for group in own.param_groups for p in group["params"]],
        {p: name for name, p in named.items()},
    )
    state = {}
    for i, p in enumerate(order):
        whole = {k: getattr(v, "shape", None) == p.shape for k, v in states[names[p]].items()}
        state[i] = {
            k: scatter_tensor(v, p) if whole[k] else torch.as_tensor(v).clone()
            for k, v in states[names[p]].items()
        }
    own.load_state_dict({"state": state, "param_groups": own.state_dict()["param_groups"]})


def load_zero_states(zero, own, named, states):
    """The same for DeepSpeed, which trains flat parts of all parameters: each process fills in what is its own."""
    import torch
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    step = float(next(iter(states.values()))["step"])
    for group in own.param_groups:
        for flat in group["params"]:
            own.state[flat] = {key: torch.zeros_like(flat) for key in ZERO_STATES}
            where = flat.device if group.get("fused") else "cpu"
            # DeepSpeed's Adam for the CPU counts in integers
            counts = isinstance(own, torch.optim.AdamW)
            own.state[flat]["step"] = torch.tensor(step, device=where) if counts else int(step)
    link_zero_state(zero)
    for name, p in named.items():
        safe_set_full_fp32_param(p, p.data)
        for key in ZERO_STATES:
            safe_set_full_optimizer_state(p, states[name][key].to(p.device), key)


def link_zero_state(zero):
    """Have DeepSpeed find its averages by parameter. Private, but it does so after its first group's first step alone, when
    those of other groups are not there yet."""
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


# ------------------------------------------------------------------------------------------------------ fail together


def fail_together(rank, every=1.0):
    """Let an uncaught exception on one process end all of them, each with its message, within seconds: without this the
    others would wait in a collective for hours. Told through the store that the processes met at."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    failed = f"svd_xtend/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"  # launchers may start a run again
    # a connection of its own: a main thread that waits in another would keep it
    store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=60))

    def cause():
        """Who failed first, and why; nothing where nobody did, and where the launcher, and with it the store, is gone."""
        with contextlib.suppress(RuntimeError):
            return store.check([failed]) and store.get(failed).decode()

    def tell(told):
        if not told.startswith(f"process {rank} "):
            sys.stderr.write(f"\n{told}\nprocess {rank} ends with it\n")

    def watch():
        while not over.wait(every):
            if told := cause():
                tell(told)
                time.sleep(
                    3 * every
                )  # whoever failed goes first, so that launchers tell of the cause
                end_process()

    def hook(kind, error, trace):
        before(kind, error, trace)
        if told := cause():  # the first one is the cause; then a collective breaks in the others
            return tell(told)
        with contextlib.suppress(RuntimeError):
            store.set(
                failed, f"process {rank} on {socket.gethostname()} failed: {kind.__name__}: {error}"
            )
            time.sleep(2 * every)  # the store may go with this process: let the others read it

    before, sys.excepthook = sys.excepthook, hook
    over, watcher = threading.Event(), threading.Thread(target=watch, daemon=True)
    watcher.start()
    atexit.register(
        lambda: over.set() or watcher.join()
    )  # a thread that is in C++ when Python ends takes it down


def end_process():
    """End this process now, whatever its main thread waits for; a checkpoint that is being written is written."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(300)
    sys.stderr.flush()
    os._exit(1)


def batch_to_device(batch, device):
    """Move a batch, tensors in nested dicts too, and bring frames from uint8 to [-1, 1]. `index` stays: to read it on a
    GPU would wait for the GPU."""
    from accelerate.utils import send_to_device

    moved = send_to_device(
        {k: v for k, v in batch.items() if k != "index"}, device, non_blocking=True
    )
    return {
        **moved,
        "index": batch["index"],
        "pixel_values": moved["pixel_values"].float() / 127.5 - 1,
    }
