"""The shortcuts do not change the function: outputs and gradients are those of diffusers' UNet."""

import copy

import pytest
import torch
from unet_calls import assert_gradients_close, compute_gradients, make_inputs

from svd_xtend.models import unet_optimizations
from svd_xtend.models.activation_checkpointing import checkpoint_activations
from svd_xtend.models.lora import inject_lora
from svd_xtend.models.unet_optimizations import has_effect, speed_up


@pytest.mark.parametrize("tokens", [1, 3])
def test_output_and_gradients_are_those_of_diffusers(pipe, tokens):
    """With three tokens nothing can be left out, and the shortcut must notice."""
    stock = copy.deepcopy(pipe.unet)
    fast = speed_up(pipe.unet)
    inputs = make_inputs(tokens)
    with torch.no_grad():
        expected_output = stock(*inputs).sample
        torch.testing.assert_close(fast(*inputs).sample, expected_output, rtol=1e-5, atol=1e-6)
    expected = compute_gradients(stock, inputs)
    actual = compute_gradients(fast, inputs)
    for name, gradient in expected.items():
        if has_effect(name, tokens):
            torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6)
        else:
            assert gradient.abs().max() < 1e-6
            assert actual[name] is None


def test_four_parameters_of_each_cross_attention_have_no_effect(pipe):
    """The weight and bias of norm2, and the weights of to_q and to_k."""
    num_blocks = sum(name.endswith(".attn2") for name, _ in pipe.unet.named_modules())
    without_effect = [name for name, _ in pipe.unet.named_parameters() if not has_effect(name)]
    assert num_blocks > 0
    assert len(without_effect) == 4 * num_blocks


def test_names_and_weights_are_unchanged_and_a_copy_computes_with_its_own(pipe):
    keys = list(pipe.unet.state_dict())
    fast = speed_up(pipe.unet)
    assert list(fast.state_dict()) == keys
    other = copy.deepcopy(fast)
    inputs = make_inputs()
    with torch.no_grad():
        before = fast(*inputs).sample
        for name, p in other.named_parameters():
            if ".attn2.to_v" in name:
                p.zero_()
        assert torch.equal(fast(*inputs).sample, before)
        assert not torch.equal(other(*inputs).sample, before)


def test_attention_over_more_sequences_than_cuda_takes_runs_in_batches(pipe, monkeypatch):
    whole = speed_up(copy.deepcopy(pipe.unet))
    batched = speed_up(pipe.unet)
    inputs = make_inputs()
    expected = compute_gradients(whole, inputs)
    monkeypatch.setattr(unet_optimizations, "ATTENTION_BATCH", 100)
    attention = torch.nn.functional.scaled_dot_product_attention
    batch_sizes = []

    def counted_attention(query, *args, **kwargs):
        batch_sizes.append(len(query))
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted_attention)
    actual = compute_gradients(batched, inputs)
    assert {name for name, g in actual.items() if g is not None} == {
        name for name, g in expected.items() if g is not None
    }
    assert_gradients_close(actual, expected)
    assert max(batch_sizes) == 100


@pytest.mark.parametrize("policy", ["nested"])  # it includes what the other policies do
def test_compiled_blocks_give_the_same_and_never_fall_back(pipe, policy):
    """The backend captures and differentiates as inductor does, but makes no kernels.

    With fullgraph, any graph break is an error."""
    plain = speed_up(copy.deepcopy(pipe.unet))
    compiled = speed_up(pipe.unet)
    for unet in (plain, compiled):
        inject_lora(unet, 4, 4, ["attention"])
    unet_optimizations.compile_blocks(compiled, backend="aot_eager")
    checkpoint_activations(compiled, policy)
    assert torch._dynamo.config.fail_on_recompile_limit_hit
    assert torch._dynamo.config.recompile_limit >= 32
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected = compute_gradients(plain, make_inputs(clips=1))
    actual = compute_gradients(compiled, make_inputs(clips=1))
    assert_gradients_close(actual, expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 4
    assert not counters["graph_break"]
