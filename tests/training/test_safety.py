"""Runs end in good order."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from svd_xtend.training import safety

ROOT = Path(__file__).parents[2]

FAILING_LOOP = """
import torch
from svd_xtend.training import safety

loader = torch.utils.data.DataLoader(range(9), num_workers=1, worker_init_fn=safety.ignore_signals)
with safety.StopSignals():
    batches = iter(loader)
    next(batches)
    raise ValueError("as a loss that is not finite")
"""


def test_a_run_that_fails_ends_though_its_loader_has_workers():
    """The workers ignore SIGTERM, and the traceback keeps the loader alive."""
    done = subprocess.run(
        [sys.executable, "-c", FAILING_LOOP], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: as a loss that is not finite\n"), done.stderr


def test_a_signal_is_only_noted_and_a_second_ctrl_c_interrupts():
    previous = signal.getsignal(signal.SIGTERM)
    with safety.StopSignals() as signals:
        assert not signals.caught
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.caught
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is previous


def test_a_gradient_that_the_scaler_skipped_may_be_infinite_but_a_loss_may_not():
    safety.check_finite(3, loss=0.1, grad_norm=math.inf, skipped=True, lr=1e-5, saved_step=2)
    with pytest.raises(FloatingPointError, match="step 3: the gradient norm is inf.*step 2 is"):
        safety.check_finite(3, loss=0.1, grad_norm=math.inf, skipped=False, lr=1e-5, saved_step=2)
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
        safety.check_finite(3, loss=math.nan, grad_norm=1.0, skipped=True, lr=1e-5, saved_step=2)
