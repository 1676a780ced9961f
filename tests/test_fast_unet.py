"""The same function, cheaper: outputs and gradients are diffusers' own."""

import copy
import json

import pytest
import torch

from svd_xtend import fast_unet
from svd_xtend.fast_unet import POLICIES, checkpoint, is_dead, speed_up
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


@pytest.mark.parametrize("policy", POLICIES)
def test_lora_has_the_gradients_that_it_has_on_diffusers_unet(pipe, policy):
    stock, fast = copy.deepcopy(pipe.unet), checkpoint(speed_up(pipe.unet), policy)
    for unet in (stock, fast):
        unet.requires_grad_(False)
        inject_lora(unet, 4, 4, ["attention"])
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    x = inputs(clips=1)
    expected, got = (
        {n: g for n, g in gradients(u, x).items() if g is not None} for u in (stock.train(), fast.train())
    )
    assert expected.keys() == got.keys() and all(".lora_" in name for name in got)
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


# ------------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("policy", list(POLICIES)[1:])
def test_recomputed_gradients_are_the_kept_ones(pipe, policy, monkeypatch):
    """Chunks of 100 tokens, so that feed-forwards do fall into pieces."""
    monkeypatch.setattr(fast_unet, "FEED_FORWARD_TOKENS", 100)
    kept, again = copy.deepcopy(pipe.unet), checkpoint(speed_up(pipe.unet), policy)
    x = inputs()
    expected, got = gradients(speed_up(kept), x), gradients(again, x)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(again(*x).sample, kept(*x).sample)


def recomputations(unet, x):
    """How often each kind of module runs in one forward and backward."""
    counts = {}
    for module in unet.modules():
        inner, kind = getattr(type(module), "forward", None), type(module).__name__
        if kind in ("LayerNorm", "GroupNorm", "Conv3d", "GEGLU") and inner:
            module.register_forward_hook(lambda *_, kind=kind: counts.__setitem__(kind, counts.get(kind, 0) + 1))
    unet(*x).sample.square().mean().backward()
    return counts


def test_policies_recompute_more_and_more_and_blocks_covers_the_temporal_ones(pipe):
    runs = {
        policy: recomputations(checkpoint(copy.deepcopy(pipe.unet), policy), inputs(clips=1)) for policy in POLICIES
    }
    total = [sum(counts.values()) for counts in runs.values()]
    assert total == sorted(total) and len(set(total)) >= 4  # the embedded UNet has two levels: level01 is all of them
    for kind in ("LayerNorm", "Conv3d", "GEGLU"):
        assert runs["blocks"][kind] == 2 * runs["none"][kind]
    stock = copy.deepcopy(pipe.unet)
    stock.enable_gradient_checkpointing()
    assert (
        recomputations(stock.train(), inputs(clips=1))["GEGLU"] < runs["blocks"]["GEGLU"]
    )  # diffusers' leaves them out


def test_the_flag_alone_means_blocks_and_nothing_means_none():
    import train_svd

    def parsed(*flags):
        return train_svd.parse(train_svd.build_parser(), list(flags)).gradient_checkpointing

    assert (parsed(), parsed("--gradient_checkpointing"), parsed("--gradient_checkpointing", "nested")) == (
        "none", "blocks", "nested"
    )  # fmt: skip


def test_a_run_under_checkpointing_has_the_same_losses_and_gradients(run, tmp_path):
    told = {}
    for policy in ("none", "nested"):
        out = run("--max_train_steps=2", "--train_params", "conv_in", "temporal_transformer_blocks",
                  f"--gradient_checkpointing={policy}", output_dir=tmp_path / policy)  # fmt: skip
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        told[policy] = [row[key] for row in rows for key in ("loss", "grad_norm")]
    assert told["nested"] == pytest.approx(told["none"], rel=1e-4)
