"""The same function, cheaper: outputs and gradients are diffusers' own."""

import copy

import pytest
import torch

from svd_xtend.fast_unet import is_dead, speed_up
from svd_xtend.lora import inject_lora


def inputs(tokens=1, clips=2):
    g = torch.Generator().manual_seed(0)
    shapes = (clips, 8, 8, 12, 16), (clips,), (clips, tokens, 64), (clips, 3)
    return [torch.randn(shape, generator=g) for shape in shapes]


def gradients(unet, x):
    unet.zero_grad()
    unet(*x).sample.square().mean().backward()
    return {name: p.grad for name, p in unet.named_parameters()}


@pytest.mark.parametrize("tokens", [1, 3])
def test_output_and_gradients_are_those_of_diffusers(pipe, tokens):
    """With three tokens there is nothing to leave out, and it must notice."""
    stock, fast = copy.deepcopy(pipe.unet), speed_up(pipe.unet)
    x = inputs(tokens)
    with torch.no_grad():
        torch.testing.assert_close(fast(*x).sample, stock(*x).sample, rtol=1e-5, atol=1e-6)
    expected, got = gradients(stock, x), gradients(fast, x)
    for name, gradient in expected.items():
        if tokens == 1 and is_dead(name):
            assert gradient.abs().max() < 1e-6 and got[name] is None
        else:
            torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)
    blocks = sum(name.endswith(".attn2") for name, _ in stock.named_modules())
    assert sum(map(is_dead, expected)) == 4 * blocks > 0  # norm2's two, to_q and to_k


def test_checkpointing_and_lora_go_through_it(pipe):
    stock, fast = copy.deepcopy(pipe.unet), speed_up(pipe.unet)
    for unet in (stock, fast):
        unet.requires_grad_(False)
        inject_lora(unet, 4, 4, ["attention"])
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        unet.enable_gradient_checkpointing()
    x = inputs()
    expected, got = (
        {n: g for n, g in gradients(u, x).items() if g is not None} for u in (stock.train(), fast.train())
    )
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)


def test_names_and_weights_are_untouched_and_a_copy_computes_with_its_own(pipe):
    keys = list(pipe.unet.state_dict())
    fast = speed_up(pipe.unet)
    assert list(fast.state_dict()) == keys
    other, x = copy.deepcopy(fast), inputs()
    with torch.no_grad():
        before = fast(*x).sample
        for name, p in other.named_parameters():
            if ".attn2.to_v" in name:
                p.zero_()
        assert torch.equal(fast(*x).sample, before) and not torch.equal(other(*x).sample, before)
