"""Half precision: the losses and gradients of float32, and what a machine can compute in."""

import copy

import pytest
import torch
from unet_calls import make_inputs, open_adapters

from svd_xtend.models import precision
from svd_xtend.models.lora import inject_lora
from svd_xtend.models.unet_optimizations import speed_up


def copy_in_half(unet, dtype):
    """Return a copy that computes in `dtype`, with its frozen weights in `dtype`."""
    unet = speed_up(copy.deepcopy(unet))
    precision.set_precision(unet, unet, dtype, torch.float32)
    return unet


# dtype, relative difference of the loss, cosine of the gradients
BF16 = (torch.bfloat16, 2e-3, 0.99)
FP16 = (torch.float16, 3e-4, 0.9999)


@pytest.mark.parametrize(
    "dtype, loss_tolerance, min_cosine, lora", [(*BF16, False), (*BF16, True), (*FP16, True)]
)
def test_half_precision_has_the_loss_and_the_gradients_direction_of_float32(
    pipe, dtype, loss_tolerance, min_cosine, lora
):
    """Gradients are in float32 and are used without a scaler. fp16 needs no GPU here."""
    unet = pipe.unet.requires_grad_(not lora)
    if lora:
        inject_lora(unet, 8, 8, ["attention", "feed_forward", "conv"])
        open_adapters(unet, std=0.02)
    half = copy_in_half(unet, dtype)
    inputs = make_inputs()
    target = torch.randn(2, 8, 4, 12, 16)
    losses = []
    gradients = []
    for model in (speed_up(unet), half):
        loss = (model(*inputs).sample.float() - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        by_name = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append(by_name)
    expected, actual = gradients
    assert losses[1] == pytest.approx(losses[0], rel=loss_tolerance)
    assert actual.keys() == expected.keys()
    assert all(gradient.dtype == torch.float32 for gradient in actual.values())
    names = list(expected)
    flat_expected = torch.cat([expected[name].flatten() for name in names])
    flat_actual = torch.cat([actual[name].flatten() for name in names])
    cosine = torch.nn.functional.cosine_similarity(flat_actual, flat_expected, dim=0)
    assert cosine > min_cosine


def test_nothing_is_computed_in_float32_in_half_precision(pipe):
    """Autocast would compute every norm in float32."""
    half = copy_in_half(pipe.unet.requires_grad_(True), torch.bfloat16)
    dtypes = {}
    for name, module in half.named_modules():
        if type(module).__name__ in ("Linear", "Conv2d", "Conv3d", "LayerNorm", "GroupNorm"):
            module.register_forward_hook(
                lambda module, args, out, name=name: dtypes.__setitem__(name, out.dtype)
            )
    half(*make_inputs())
    assert len(dtypes) > 200
    assert set(dtypes.values()) == {torch.bfloat16}


def test_a_precision_that_the_machine_lacks_is_an_error_not_a_fallback(monkeypatch):
    """Also if accelerate's configuration asks for it."""
    monkeypatch.setattr(precision, "fast_bf16", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="^--mixed_precision bf16"):
        precision.check_precision(None)
    assert precision.check_precision("no") == "no"
