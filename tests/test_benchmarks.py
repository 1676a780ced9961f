"""The benchmarks' own instruments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import count_step

ROOT = Path(__file__).parents[1]


def test_attention_counts_as_its_two_products_forward_and_five_backward():
    q, k, v = (torch.randn(1, 2, length, 64, requires_grad=True) for length in (30, 50, 50))
    with FlopCounterMode(display=False, custom_mapping=count_step.ATTENTION) as flops:
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
    variants = json.loads(done.stdout.splitlines()[-1])["variants"]
    assert list(variants) == ["original", "ours"] and variants["original"]["x_faster"] == 1
    for told in variants.values():
        parts = [
            told[phase]
            for phase in ("VAE", "VAE, first frame", "CLIP", "forward", "backward", "optimizer")
        ]
        assert told["seconds"] == pytest.approx(sum(parts)) and told["data"] > 0
