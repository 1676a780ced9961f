"""TODO training.safety."""

import atexit
import logging
import math
import multiprocessing
import signal

logger = logging.getLogger("svd_xtend")


def check_finite(step, loss, grad_norm, skipped, lr, saved):
    """Stop a run whose loss or gradient is not finite before it is saved; `skipped`: fp16's scaler saw to the gradient."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value) and not (skipped and name == "gradient norm"):
            raise FloatingPointError(
                f"step {step}: the {name} is {value} at learning rate {lr:g}. Lower --learning_rate, raise "
                "--lr_warmup_steps, or pass --mixed_precision bf16 or no. The checkpoint of step "
                f"{saved} is whole; the same command resumes there, with the new rate."
            )


def check_unreadable_clips(failed, samples):
    """Stop a run that cannot read more than 1 % of its samples."""
    if failed > max(2, 0.01 * samples):
        raise ValueError(
            f"--base_folder: {failed:.0f} of {samples} clips cannot be read, over 1 %; the warnings name those of the main process. "
            "Run prepare_data.py check on the folder: it reads every frame, and what it finds damaged is left out from then on"
        )


class StopSignals:
    """SIGTERM and Ctrl-C end the run after the step in flight; a second Ctrl-C at once."""

    def __enter__(self):
        self.caught, self.before = False, {}
        atexit.register(end_workers)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self.catch)
        return self

    def catch(self, number, frame):
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = True
        logger.warning(
            "%s: will save a checkpoint after this step and stop", signal.Signals(number).name
        )

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_signals(worker_id):
    """For loader workers: a Ctrl-C or SIGTERM meant for the run reaches them too, and must not take the batch along."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """When Python ends: where an error, or a cycle of frames, has kept the loader until then, Python would wait without end for its
    workers, which ignore the signal that it sends them."""
    signal.signal(
        signal.SIGCHLD, signal.SIG_DFL
    )  # torch's handler would take it for a failure of theirs
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
