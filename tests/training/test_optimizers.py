"""Optimizers with smaller state: torchao's, installed beside for these tests."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from svd_xtend.models.precision import fast_bf16
from svd_xtend.training import optimizers

SMALL = ["--train_params", "conv_in", "up_blocks.1.attentions.0.temporal_transformer_blocks"]


@pytest.fixture(scope="module")
def torchao(tmp_path_factory):
    """torchao from the package registry, which is not among the project's requirements; eager, not compiled."""
    folder = tmp_path_factory.mktemp("torchao")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
        "torchao",
    ]
    if subprocess.run(pip).returncode:
        pytest.skip("torchao cannot be installed here")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(torch, "compile", lambda f, **_: f)
        import torchao.optim

        yield torchao.optim


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
    averages = load_file(tmp_path / "whole" / "checkpoint-4" / "ema.safetensors")
    assert any(
        not torch.equal(w, w.bfloat16().float()) for w in averages.values()
    )  # they are kept in float32


def test_8_bit_averages_resume_to_the_bit(torchao, run, tmp_path):
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
    states = torch.load(tmp_path / "whole" / "checkpoint-4" / "state.pt", weights_only=True)[
        "optimizer"
    ]
    assert {type(v).__name__ for state in states.values() for v in state.values()} >= {
        "OptimState8bit"
    }


def test_rounding_is_up_or_down_and_right_on_average(torchao):
    """Ten steps of 1e-3 of bf16's spacing each move some weights by all of it, and their mean by what is asked."""
    p = torch.nn.Parameter(torch.ones(64, 1024, dtype=torch.bfloat16))
    rate = 2**-7 / 100
    args = type("args", (), dict(optimizer="adamw_bf16_sr", mixed_precision="bf16", learning_rate=rate, adam_beta1=0.9, adam_beta2=0.999,
                                 adam_weight_decay=0.0, adam_epsilon=1e-8, seed=1))  # fmt: skip
    optimizer = optimizers.make_optimizer({"p": p}, args)
    for _ in range(10):
        p.grad = -torch.ones_like(p)
        optimizer.step()
    assert {1.0, 1 + 2**-7} < set(p.unique().tolist())
    assert p.float().mean().item() - 1 == pytest.approx(10 * rate, rel=0.05)


def test_8_bit_averages_learn_what_32_bit_ones_do(torchao, run, tmp_path):
    """At torch's own epsilon of 1e-8 the largest difference was 0.24: see runs.OPTIMIZERS."""
    for name in ("adamw", "adamw8bit"):
        flags = [f"--optimizer={name}", "--checkpointing_steps=6", "--adam_epsilon=1e-6", *SMALL]
        run("--max_train_steps=6", *flags, output_dir=tmp_path / name)
    named = [weights(tmp_path / name, 6) for name in ("adamw", "adamw8bit")]
    full, small = (torch.cat([w.flatten() for w in tensors.values()]) for tensors in named)
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
    """accelerate learns that a step was skipped from its not being taken; a fused step is always taken, and skips inside."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = dict(optimizer="adamw", learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.999, adam_weight_decay=0.0,
                adam_epsilon=None, seed=1)  # fmt: skip
    for precision, fused in (("bf16", True), ("no", True), ("fp16", False)):
        args = type("args", (), {**told, "mixed_precision": precision})
        optimizer = optimizers.make_optimizer({"p": torch.nn.Parameter(torch.ones(4))}, args)
        assert optimizer.defaults["fused"] == fused
        assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused
