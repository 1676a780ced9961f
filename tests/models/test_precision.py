"""Mixed precision: what a machine can compute in."""

import pytest

from svd_xtend.models import precision


def test_precision_falls_back_to_nothing_silently(monkeypatch):
    """What accelerate was configured for counts as asked for."""
    monkeypatch.setattr(precision, "fast_bf16", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="^--mixed_precision bf16"):
        precision.check_precision(None)
    assert precision.check_precision("no") == "no"
