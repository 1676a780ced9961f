"""Optimizers with small state, by torchao, which these tests install into a folder of their own."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from svd_xtend.models.precision import fast_bf16
from svd_xtend.training import optimizers

SMALL = ["--train_params", "conv_in", "up_blocks.1.attentions.0.temporal_transformer_blocks"]


@pytest.fixture(scope="module")
def torchao(tmp_path_factory):
    """Install torchao, which the project does not require; run it eagerly, not compiled."""
    folder = tmp_path_factory.mktemp("torchao")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    if subprocess.run([*pip, "--target", str(folder), "torchao"]).returncode:
        pytest.skip("torchao cannot be installed here")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(torch, "compile", lambda f, **_: f)
        import torchao.optim

        yield torchao.optim


def make_args(adam_epsilon=None, **flags):
    """Return the flags that an optimizer is made from."""
    return SimpleNamespace(
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_weight_decay=0.0,
        adam_epsilon=adam_epsilon,
        seed=1,
        **flags,
    )


def weights(folder, step):
    return load_file(folder / f"checkpoint-{step}" / "trained.safetensors")


@pytest.mark.skipif(not fast_bf16(), reason="no bf16 on this machine")
def test_bf16_training_resumes_to_the_bit_and_its_rounding_is_keyed_by_the_step(
    torchao, run, tmp_path
):
    flags = [
        "--optimizer=adamw_bf16_sr",
        "--mixed_precision=bf16",
        "--checkpointing_steps=2",
        "--use_ema",
        *SMALL,
    ]
    run("--max_train_steps=4", *flags, output_dir=tmp_path / "whole")
    run("--max_train_steps=2", *flags, output_dir=tmp_path / "halves")
    torch.manual_seed(5)  # whatever else drew random numbers in between
    run("--max_train_steps=4", *flags, output_dir=tmp_path / "halves")
    whole, halves = (weights(tmp_path / name, 4) for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert all(torch.equal(w, w.bfloat16().float()) for w in whole.values())
    ema_weights = load_file(tmp_path / "whole" / "checkpoint-4" / "ema.safetensors")
    is_float32 = [not torch.equal(w, w.bfloat16().float()) for w in ema_weights.values()]
    assert any(is_float32)


def test_8_bit_moments_resume_to_the_bit(torchao, run, tmp_path):
    flags = [
        "--optimizer=adamw8bit",
        "--checkpointing_steps=2",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=1",
        *SMALL,
    ]
    run("--max_train_steps=4", *flags, output_dir=tmp_path / "whole")
    shutil.copytree(
        tmp_path / "whole", tmp_path / "halves", ignore=shutil.ignore_patterns("checkpoint-4")
    )
    run("--max_train_steps=4", *flags, output_dir=tmp_path / "halves")
    whole, halves = (weights(tmp_path / name, 4) for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    saved = torch.load(tmp_path / "whole" / "checkpoint-4" / "state.pt", weights_only=True)
    types = set()
    for state in saved["optimizer"].values():
        types |= {type(value).__name__ for value in state.values()}
    assert "OptimState8bit" in types


def test_rounding_is_up_or_down_and_right_on_average(torchao):
    """Ten steps of 1 % of bf16's spacing move some weights by all of it, and the mean by 10 %."""
    p = torch.nn.Parameter(torch.ones(64, 1024, dtype=torch.bfloat16))
    rate = 2**-7 / 100
    args = make_args(
        optimizer="adamw_bf16_sr", mixed_precision="bf16", learning_rate=rate, adam_epsilon=1e-8
    )
    optimizer = optimizers.make_optimizer({"p": p}, args)
    for _ in range(10):
        p.grad = -torch.ones_like(p)
        optimizer.step()
    assert {1.0, 1 + 2**-7} < set(p.unique().tolist())
    assert p.float().mean().item() - 1 == pytest.approx(10 * rate, rel=0.05)


def test_8_bit_moments_learn_what_32_bit_ones_do(torchao, run, tmp_path):
    """At torch's own epsilon of 1e-8 the largest difference was 0.24: see optimizers.OPTIMIZERS."""
    for name in ("adamw", "adamw8bit"):
        flags = [f"--optimizer={name}", "--checkpointing_steps=6", "--adam_epsilon=1e-6", *SMALL]
        run("--max_train_steps=6", *flags, output_dir=tmp_path / name)
    full = torch.cat([w.flatten() for w in weights(tmp_path / "adamw", 6).values()])
    small = torch.cat([w.flatten() for w in weights(tmp_path / "adamw8bit", 6).values()])
    assert 0 < (full - small).abs().max() < 6e-3  # six steps of 1e-3


def test_an_optimizer_without_its_library_is_one_clear_error(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(
        ValueError, match="^--optimizer adamw8bit: needs torchao. Run: pip install torchao"
    ):
        run("--max_train_steps=1", "--optimizer=adamw8bit")


def test_bf16_weights_need_bf16_arithmetic(run):
    with pytest.raises(
        ValueError,
        match="^--optimizer adamw_bf16_sr: needs --mixed_precision bf16; this run has no",
    ):
        run("--max_train_steps=1", "--optimizer=adamw_bf16_sr", "--mixed_precision=no")


def test_adamw_is_fused_on_a_gpu_but_leaves_overflows_to_fp16s_scaler(monkeypatch):
    """accelerate notices a skipped step by the call that is missing; a fused step skips inside."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for precision, fused in (("bf16", True), ("no", True), ("fp16", False)):
        args = make_args(optimizer="adamw", mixed_precision=precision, learning_rate=1e-3)
        optimizer = optimizers.make_optimizer({"p": torch.nn.Parameter(torch.ones(4))}, args)
        assert optimizer.defaults["fused"] == fused
        assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused
