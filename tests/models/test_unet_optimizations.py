"""The same function, cheaper: outputs and gradients are diffusers' own."""

import copy
import json

import pytest
import torch

from svd_xtend.models import activation_checkpointing, precision, unet_optimizations
from svd_xtend.models.activation_checkpointing import POLICIES, checkpoint_activations
from svd_xtend.models.lora import inject_lora
from svd_xtend.models.unet_optimizations import has_effect, speed_up


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
        if not has_effect(name, tokens):
            assert gradient.abs().max() < 1e-6 and got[name] is None
        else:
            torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)
    blocks = sum(name.endswith(".attn2") for name, _ in stock.named_modules())
    assert (
        sum(not has_effect(name) for name in expected) == 4 * blocks > 0
    )  # norm2's two, to_q and to_k


@pytest.mark.parametrize("policy", POLICIES)
def test_lora_has_the_gradients_that_it_has_on_diffusers_unet(pipe, policy):
    stock, fast = copy.deepcopy(pipe.unet), checkpoint_activations(speed_up(pipe.unet), policy)
    for unet in (stock, fast):
        unet.requires_grad_(False)
        inject_lora(unet, 4, 4, ["attention"])
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    x = inputs(clips=1)
    expected, got = (
        {n: g for n, g in gradients(u, x).items() if g is not None}
        for u in (stock.train(), fast.train())
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
    monkeypatch.setattr(activation_checkpointing, "FEED_FORWARD_TOKENS", 100)
    kept, again = copy.deepcopy(pipe.unet), checkpoint_activations(speed_up(pipe.unet), policy)
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
            module.register_forward_hook(
                lambda *_, kind=kind: counts.__setitem__(kind, counts.get(kind, 0) + 1)
            )
    unet(*x).sample.square().mean().backward()
    return counts


def test_policies_recompute_more_and_more_and_blocks_covers_the_temporal_ones(pipe):
    runs = {
        policy: recomputations(
            checkpoint_activations(copy.deepcopy(pipe.unet), policy), inputs(clips=1)
        )
        for policy in POLICIES
    }
    total = [sum(counts.values()) for counts in runs.values()]
    assert (
        total == sorted(total) and len(set(total)) >= 4
    )  # the embedded UNet has two levels: level01 is all of them
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


# ------------------------------------------------------------------------------------------- precision, compile, offload


def half_of(unet, dtype):
    """A copy whose frozen weights are in `dtype`, which computes in it."""
    unet = unet_optimizations.speed_up(copy.deepcopy(unet))
    precision.set_precision(unet, unet, dtype, torch.float32)
    return unet


BF16, FP16 = (torch.bfloat16, 2e-3, 0.99), (torch.float16, 3e-4, 0.9999)  # how far off they may be


@pytest.mark.parametrize(
    "dtype, loss_off, angle, lora", [(*BF16, False), (*BF16, True), (*FP16, True)]
)
def test_half_precision_has_the_loss_and_the_gradients_direction_of_float32(
    pipe, dtype, loss_off, angle, lora
):
    """fp16 too: it needs no GPU here. Gradients arrive in float32 and are used as they are, without a scaler."""
    unet = pipe.unet.requires_grad_(not lora)
    if lora:
        inject_lora(unet, 8, 8, ["attention", "feed_forward", "conv"])
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    half, x, target = half_of(unet, dtype), inputs(), torch.randn(2, 8, 4, 12, 16)
    told = []
    for model in (unet_optimizations.speed_up(unet), half):
        loss = (model(*x).sample.float() - target).square().mean()
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        told.append((loss.item(), grads))
    (expected, gradient), (got, own) = told
    assert got == pytest.approx(expected, rel=loss_off)
    assert own.keys() == gradient.keys() and all(g.dtype == torch.float32 for g in own.values())
    flat = [torch.cat([grads[name].flatten() for name in gradient]) for grads in (gradient, own)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > angle


def test_nothing_is_computed_in_float32_in_half_precision(pipe):
    """Autocast would: every norm."""
    half, seen = half_of(pipe.unet.requires_grad_(True), torch.bfloat16), {}
    for name, module in half.named_modules():
        if type(module).__name__ in ("Linear", "Conv2d", "Conv3d", "LayerNorm", "GroupNorm"):
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.__setitem__(name, out.dtype)
            )
    half(*inputs())
    assert len(seen) > 200 and set(seen.values()) == {torch.bfloat16}


def test_attention_over_more_sequences_than_cuda_takes_is_done_in_parts(pipe, monkeypatch):
    whole, parts, x = speed_up(copy.deepcopy(pipe.unet)), speed_up(pipe.unet), inputs()
    expected = gradients(whole, x)
    monkeypatch.setattr(unet_optimizations, "ATTENTION_BATCH", 100)
    sizes, plain = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention",
        lambda q, *args, **kwargs: (sizes.append(len(q)), plain(q, *args, **kwargs))[1],
    )  # fmt: skip
    for name, gradient in gradients(parts, x).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)
    assert max(sizes) == 100


@pytest.mark.parametrize("policy", ["nested"])  # which has all that others have
def test_compiled_blocks_give_the_same_and_never_fall_back(pipe, policy):
    """By a backend that captures and differentiates as inductor does, and makes no kernels: fullgraph fails at any break."""
    kept, compiled = speed_up(copy.deepcopy(pipe.unet)), speed_up(pipe.unet)
    for unet in (kept, compiled):
        inject_lora(unet, 4, 4, ["attention"])
    checkpoint_activations(unet_optimizations.compile_blocks(compiled, backend="aot_eager"), policy)
    assert (
        torch._dynamo.config.fail_on_recompile_limit_hit
        and torch._dynamo.config.recompile_limit >= 32
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected, got = (gradients(unet, inputs(clips=1)) for unet in (kept, compiled))
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 4 and not counters["graph_break"]


@pytest.mark.parametrize("policy", ["none", "nested"])
def test_offloaded_activations_come_back_unchanged(pipe, policy, monkeypatch):
    monkeypatch.setattr(activation_checkpointing, "OFFLOAD_BYTES", 2**12)
    unet, x = checkpoint_activations(speed_up(pipe.unet), policy), inputs(clips=1)
    expected = gradients(unet, x)
    unet.zero_grad()
    activation_checkpointing.offload_activations(
        unet, lambda: unet(*x).sample.square().mean()
    )().backward()
    for name, p in unet.named_parameters():
        assert (p.grad is None) == (expected[name] is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-7)


def test_offloading_takes_activations_away_and_leaves_weights(pipe):
    pack, _ = activation_checkpointing.offload_hooks(pipe.unet)
    weight = max(pipe.unet.parameters(), key=torch.numel)
    assert pack(weight.t() if weight.ndim == 2 else weight)[1] is None
    large, small = torch.zeros(2**19), torch.zeros(10)
    assert pack(large)[0].data_ptr() != large.data_ptr() and pack(small) == (small, None)
