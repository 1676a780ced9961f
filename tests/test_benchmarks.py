"""What the benchmarks measure and count with."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_kernels
import count_step

ROOT = Path(__file__).parents[1]


def test_attention_counts_as_its_two_products_forward_and_five_backward():
    q, k, v = (torch.randn(1, 2, length, 64, requires_grad=True) for length in (30, 50, 50))
    with FlopCounterMode(display=False, custom_mapping=count_step.ATTENTION_FLOPS) as flops:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        product = 2 * 2 * 30 * 50 * 64
        assert flops.get_total_flops() == 2 * product
        out.sum().backward()
    assert flops.get_total_flops() == 7 * product


def test_a_step_is_measured_by_phase_and_its_parts_add_up():
    flags = ["--rounds=1", "--num_frames=2", "--method=lora", "--only", "original", "ours"]
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_step.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    variants = json.loads(done.stdout.splitlines()[-1])["variants"]
    assert list(variants) == ["original", "ours"]
    assert variants["original"]["x_faster"] == 1
    for row in variants.values():
        phases = ("VAE", "VAE, first frame", "CLIP", "forward", "backward", "optimizer")
        assert row["seconds"] == pytest.approx(sum(row[phase] for phase in phases))
        assert row["data"] > 0


def test_a_part_of_the_kernels_that_fails_is_shown_and_the_others_still_run(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no memory for a VAE")

    monkeypatch.setattr(bench_kernels, "make_vae", fail)
    assert bench_kernels.main(Namespace(small=True)) == 1
    printed = capsys.readouterr()
    assert "measure_vae failed: RuntimeError: no memory for a VAE" in printed.out
    assert "Traceback" in printed.err
    rows = json.loads(printed.out.splitlines()[-1])["rows"]
    assert rows
    assert all(name.startswith("attention") for name in rows)
