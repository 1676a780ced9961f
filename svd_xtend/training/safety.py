"""Stop a training run in good order: on a signal, a loss that is not finite, unreadable data."""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
import signal
from types import FrameType
from typing import Any

logger = logging.getLogger("svd_xtend")

MAX_UNREADABLE_FRACTION = 0.01
MAX_UNREADABLE_CLIPS = 2  # always allowed, however short the run is


def check_finite(
    step: int, loss: float, grad_norm: float, skipped: bool, lr: float, saved_step: int
) -> None:
    """Raise FloatingPointError if the loss or the gradient norm of a step is not finite.

    skipped: fp16's gradient scaler met an overflow and skipped the step, so the gradient norm may
    be infinite. saved_step: the step of the last checkpoint, which the error names.
    """
    checked = {"loss": loss}
    if not skipped:
        checked["gradient norm"] = grad_norm
    for name, value in checked.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"step {step}: the {name} is {value} at learning rate {lr:g}. Lower "
                "--learning_rate, raise --lr_warmup_steps, or pass --mixed_precision bf16 or no. "
                f"The checkpoint of step {saved_step} is complete; the same command resumes there, "
                "with the new rate."
            )


def check_unreadable_clips(failed: float, samples: int) -> None:
    """Raise ValueError if more than 1 % of the samples of this launch could not be read."""
    if failed > max(MAX_UNREADABLE_CLIPS, MAX_UNREADABLE_FRACTION * samples):
        raise ValueError(
            f"--base_folder: {failed:.0f} of {samples} clips could not be read, which is more "
            "than 1 %. The warnings above name those of the main process. Run `prepare_data.py "
            "check` on the folder: it reads every frame, and training skips the clips that it "
            "finds damaged"
        )


class StopSignals:
    """A context in which SIGTERM and Ctrl-C only set `caught`, so that the loop can save.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.caught = False
        self.previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        atexit.register(end_workers)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous_handlers[number] = signal.signal(number, self.catch)
        return self

    def catch(self, number: int, frame: FrameType | None) -> None:
        """Handle one signal."""
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = True
        name = signal.Signals(number).name
        logger.warning("%s: saving a checkpoint after this step, then stopping", name)

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)


def ignore_signals(worker_id: int) -> None:
    """Make a loader worker ignore SIGTERM and Ctrl-C; a `worker_init_fn`.

    They reach the workers too, and the step in flight still needs its batch.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill loader workers that are still alive when Python exits.

    A traceback or a reference cycle can keep the loader until then. Python would send its workers
    SIGTERM, which they ignore, and wait for them forever.
    """
    # torch's handler of SIGCHLD would report the killed workers as a failure
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
