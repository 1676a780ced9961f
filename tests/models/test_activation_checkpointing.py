"""Recomputed and offloaded activations give the same gradients."""

import copy
import json

import pytest
import torch
from unet_calls import assert_gradients_close, compute_gradients, make_inputs, open_adapters

import train_svd
from svd_xtend.models import activation_checkpointing
from svd_xtend.models.activation_checkpointing import (
    POLICIES,
    checkpoint_activations,
    offload_activations,
    offload_hooks,
)
from svd_xtend.models.lora import inject_lora
from svd_xtend.models.unet_optimizations import speed_up


@pytest.mark.parametrize("policy", POLICIES)
def test_lora_has_the_gradients_that_it_has_on_diffusers_unet(pipe, policy):
    stock = copy.deepcopy(pipe.unet)
    fast = checkpoint_activations(speed_up(pipe.unet), policy)
    gradients = []
    for unet in (stock, fast):
        unet.requires_grad_(False)
        inject_lora(unet, 4, 4, ["attention"])
        open_adapters(unet, std=0.1)
        by_name = compute_gradients(unet.train(), make_inputs(clips=1))
        gradients.append({name: g for name, g in by_name.items() if g is not None})
    expected, actual = gradients
    assert expected.keys() == actual.keys()
    assert all(".lora_" in name for name in actual)
    assert_gradients_close(actual, expected)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "none"])
def test_recomputed_gradients_are_those_without_checkpointing(pipe, policy, monkeypatch):
    """Chunks have 100 tokens here, so that feed-forwards run in several chunks."""
    monkeypatch.setattr(activation_checkpointing, "FEED_FORWARD_TOKENS", 100)
    plain = speed_up(copy.deepcopy(pipe.unet))
    checkpointed = checkpoint_activations(speed_up(pipe.unet), policy)
    inputs = make_inputs()
    expected = compute_gradients(plain, inputs)
    actual = compute_gradients(checkpointed, inputs)
    assert expected.keys() == actual.keys()
    assert_gradients_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(checkpointed(*inputs).sample, plain(*inputs).sample)


def count_runs(unet, inputs):
    """Return how often each class of layer runs in one forward and backward pass."""
    counts = {}

    def count(module, *_):
        name = type(module).__name__
        counts[name] = counts.get(name, 0) + 1

    for module in unet.modules():
        if type(module).__name__ in ("LayerNorm", "GroupNorm", "Conv3d", "GEGLU"):
            module.register_forward_hook(count)
    unet(*inputs).sample.square().mean().backward()
    return counts


def test_policies_recompute_more_and_more_and_blocks_covers_the_temporal_blocks(pipe):
    inputs = make_inputs(clips=1)
    runs = {
        policy: count_runs(checkpoint_activations(copy.deepcopy(pipe.unet), policy), inputs)
        for policy in POLICIES
    }
    totals = [sum(counts.values()) for counts in runs.values()]
    assert totals == sorted(totals)
    assert len(set(totals)) >= 4  # the embedded UNet has two levels: level01 is all of them
    for layer in ("LayerNorm", "Conv3d", "GEGLU"):
        assert runs["blocks"][layer] == 2 * runs["none"][layer]
    stock = copy.deepcopy(pipe.unet)
    stock.enable_gradient_checkpointing()
    # diffusers' own checkpointing leaves the temporal blocks out.
    assert count_runs(stock.train(), inputs)["GEGLU"] < runs["blocks"]["GEGLU"]


@pytest.mark.parametrize(
    "flags, policy",
    [
        ([], "none"),
        (["--gradient_checkpointing"], "blocks"),
        (["--gradient_checkpointing", "nested"], "nested"),
    ],
)
def test_the_flag_alone_means_blocks_and_without_it_none(flags, policy):
    args = train_svd.parse(train_svd.build_parser(), flags)
    assert args.gradient_checkpointing == policy


def test_a_run_with_checkpointing_has_the_same_losses_and_gradients(run, tmp_path):
    figures = {}
    for policy in ("none", "nested"):
        out = run(
            "--max_train_steps=2",
            "--train_params",
            "conv_in",
            "temporal_transformer_blocks",
            f"--gradient_checkpointing={policy}",
            output_dir=tmp_path / policy,
        )
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        figures[policy] = [row[key] for row in rows for key in ("loss", "grad_norm")]
    assert figures["nested"] == pytest.approx(figures["none"], rel=1e-4)


@pytest.mark.parametrize("policy", ["none", "nested"])
def test_offloaded_activations_come_back_unchanged(pipe, policy, monkeypatch):
    monkeypatch.setattr(activation_checkpointing, "OFFLOAD_BYTES", 2**12)
    unet = checkpoint_activations(speed_up(pipe.unet), policy)
    inputs = make_inputs(clips=1)
    expected = compute_gradients(unet, inputs)
    unet.zero_grad()
    loss = offload_activations(unet, lambda: unet(*inputs).sample.square().mean())
    loss().backward()
    for name, p in unet.named_parameters():
        assert (p.grad is None) == (expected[name] is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-7)


def test_offloading_moves_activations_and_leaves_weights(pipe):
    pack, _ = offload_hooks(pipe.unet)
    weight = max(pipe.unet.parameters(), key=torch.numel)
    view_of_weight = weight.t() if weight.ndim == 2 else weight
    assert pack(view_of_weight)[1] is None
    large = torch.zeros(2**19)
    small = torch.zeros(10)
    assert pack(large)[0].data_ptr() != large.data_ptr()
    assert pack(small) == (small, None)
