"""The benchmarks' own instruments."""

import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import count_step


def test_attention_counts_as_its_two_products_forward_and_five_backward():
    q, k, v = (torch.randn(1, 2, length, 64, requires_grad=True) for length in (30, 50, 50))
    with FlopCounterMode(display=False, custom_mapping=count_step.ATTENTION) as flops:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        product = 2 * 2 * 30 * 50 * 64
        assert flops.get_total_flops() == 2 * product
        out.sum().backward()
    assert flops.get_total_flops() == 7 * product
