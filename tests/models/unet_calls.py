"""Inputs for the embedded UNet, and its gradients, for the tests of this folder."""

import torch


def make_inputs(tokens=1, clips=2):
    """Return sample, c_noise, encoder_hidden_states and added_time_ids, always the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(clips, 8, 8, 12, 16), (clips,), (clips, tokens, 64), (clips, 3)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def compute_gradients(unet, inputs):
    """Return {name: gradient or None} of the mean square of the output."""
    unet.zero_grad()
    unet(*inputs).sample.square().mean().backward()
    return {name: p.grad for name, p in unet.named_parameters()}


def assert_gradients_close(actual, expected, rtol=1e-3, atol=1e-6):
    """Compare the gradients that `expected` has."""
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(actual[name], gradient, rtol=rtol, atol=atol)


def open_adapters(unet, std):
    """Give lora_B, which starts at 0, random values that depend only on the parameter's name."""
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, std, generator=torch.Generator().manual_seed(len(name)))
