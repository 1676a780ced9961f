"""LoRA on the stock UNet."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from svd_xtend.inference.pipeline import load_checkpoint
from svd_xtend.models.lora import inject_lora, load_lora, merge_lora, save_lora, target_modules
from svd_xtend.models.unet_optimizations import has_effect


def forward(unet):
    generator = torch.Generator().manual_seed(0)
    dtype = unet.conv_in.weight.dtype
    sample, t, embeds, ids = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((1, 8, 8, 12, 16), (1,), (1, 1, 64), (1, 3))
    )
    with torch.no_grad():
        return unet(sample, t, embeds, ids).sample


def adapted(unet, targets=("attention",), use_dora=False):
    """Adapters that do something."""
    inject_lora(unet, 4, 8, targets, use_dora)
    generator = torch.Generator().manual_seed(1)
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return unet


def test_fresh_adapter_leaves_svd_unchanged(pipe):
    before = forward(pipe.unet)
    inject_lora(pipe.unet, 16, 16, ["attention", "feed_forward", "projection", "conv"])
    torch.testing.assert_close(
        forward(pipe.unet), before, rtol=0, atol=1e-5
    )  # adding 0 may change a memory layout


@pytest.mark.parametrize("use_dora", [False, True])
def test_saved_and_loaded_equals_trained(pipe, tmp_path, use_dora):
    base = copy.deepcopy(pipe.unet)
    unloaded, trained = forward(base), forward(adapted(pipe.unet, use_dora=use_dora))
    save_lora(pipe.unet, tmp_path)
    load_lora(base, tmp_path)
    assert (trained - unloaded).abs().max() > 0.01
    torch.testing.assert_close(forward(base), trained, rtol=0, atol=1e-6)


def test_scale_zero_is_the_base_and_half_is_between(pipe, tmp_path):
    base, zero, half = (copy.deepcopy(pipe.unet) for _ in range(3))
    full = forward(adapted(pipe.unet))
    save_lora(pipe.unet, tmp_path)
    load_lora(zero, tmp_path, scale=0.0)
    load_lora(half, tmp_path, scale=0.5)
    torch.testing.assert_close(forward(zero), forward(base))
    assert (forward(half) - forward(base)).norm() < (full - forward(base)).norm()


@pytest.mark.parametrize(
    "targets", [["attention"], ["attention", "feed_forward", "projection", "conv"]]
)
def test_merged_equals_adapted_and_has_the_stock_layout(pipe, tmp_path, targets):
    stock = set(pipe.unet.state_dict())
    expected = forward(adapted(pipe.unet, targets))
    merge_lora(pipe.unet)
    assert set(pipe.unet.state_dict()) == stock
    torch.testing.assert_close(forward(pipe.unet), expected, rtol=1e-3, atol=1e-4)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    torch.testing.assert_close(forward(again.unet), expected, rtol=1e-3, atol=1e-4)


def test_the_file_has_diffusers_keys_and_tells_rank_alpha_and_targets(pipe, tmp_path):
    save_lora(adapted(pipe.unet), tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as f:
        metadata, keys = f.metadata(), list(f.keys())
    assert all(
        key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight"))
        for key in keys
    )
    assert (
        '"unet.r": 4' in metadata["lora_adapter_metadata"]
        and "unet.target_modules" in metadata["lora_adapter_metadata"]
    )


def test_the_dead_projections_get_no_adapter_since_they_have_no_gradient(pipe):
    """One key: softmax is 1 whatever the query."""
    names = target_modules(pipe.unet, ["attention"])
    assert names and not [n for n in names if not has_effect(n)]
    assert any("attn1.to_q" in n for n in names) and any("attn2.to_v" in n for n in names)
    pipe.unet.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 8, 8, 12, 16), (1,), (1, 1, 64), (1, 3))
    pipe.unet(
        *(torch.randn(s, generator=generator) for s in shapes)
    ).sample.square().mean().backward()
    norms = {n: p.grad.abs().max() for n, p in pipe.unet.named_parameters()}
    dead = [v for n, v in norms.items() if not has_effect(n)]
    assert dead and max(dead) < 1e-6 * max(norms.values())


def test_temporal_targets_are_in_temporal_blocks_only(pipe):
    assert all("temporal_transformer_blocks" in n for n in target_modules(pipe.unet, ["temporal"]))


def test_unknown_targets_and_foreign_files_are_clear_errors(pipe, tmp_path):
    with pytest.raises(ValueError, match="^--lora_targets nonsense: no layer"):
        target_modules(pipe.unet, ["nonsense"])
    with pytest.raises(ValueError, match="^--rank 0"):
        inject_lora(pipe.unet, 0, 1, ["attention"])
    with pytest.raises(ValueError, match="^--lora .*no such file"):
        load_lora(pipe.unet, tmp_path / "missing.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="^--lora .*cut.safetensors: damaged or not safetensors"):
        load_lora(pipe.unet, tmp_path / "cut.safetensors")
    from safetensors.torch import save_file

    save_file({"unet.mid.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="^--lora .*mid is not in it"):
        load_lora(pipe.unet, tmp_path / "foreign.safetensors")


def test_lora_checkpoint_holds_only_lora_and_infers_like_the_export(run, pipe):
    out = run(
        "--max_train_steps=2", "--rank=4", "--lora_targets", "attention", "projection", lora=True
    )
    kept = load_file(out / "checkpoint-2" / "trained.safetensors")
    assert kept and all(".lora_" in name for name in kept)
    assert all(tensor.dtype == torch.float32 for tensor in kept.values())
    weights = sum(f.stat().st_size for f in (out / "checkpoint-2").iterdir())
    assert weights < 2e6  # three times the adapters; the UNet has 15 MB
    base = copy.deepcopy(pipe.unet)
    load_checkpoint(pipe.unet, out / "checkpoint-2")
    load_lora(base, out)
    torch.testing.assert_close(forward(pipe.unet), forward(base), rtol=0, atol=1e-6)
    assert not torch.equal(forward(base), forward(type(pipe.unet).from_config(base.config)))


def test_adapters_stay_float32_in_every_precision(pipe):
    """bf16 rounds small updates away: facts of the original."""
    from svd_xtend.models.loading import trainable_parameters

    pipe.unet.to(torch.bfloat16)
    inject_lora(pipe.unet, 4, 4, ["attention"])
    for p in trainable_parameters(pipe.unet).values():  # what train() does
        p.data = p.data.float()
    assert forward(pipe.unet).dtype == torch.bfloat16
    assert {p.dtype for p in trainable_parameters(pipe.unet).values()} == {torch.float32}
