"""The predicted memory adds up, its advice fits, and trainers and estimate_memory.py agree."""

import argparse
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import estimate_memory
import train_svd
import train_svd_lora
from svd_xtend.models import activation_checkpointing
from svd_xtend.training import memory_count, memory_estimate
from svd_xtend.training.memory_estimate import fit_to_budget

ROOT = Path(__file__).parents[2]
SIZE = ["--width=1024", "--height=576", "--num_frames=25", "--mixed_precision=bf16"]


def make_job(*flags, script="train_svd_lora.py"):
    return estimate_memory.make_job(script, [*SIZE, *flags], exact=False)


def ask(script, fit=None):
    """Run estimate_memory.py in this process."""
    estimate_memory.main(argparse.Namespace(trainer=script, fit=fit, exact=False), SIZE)


# ---------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("kind", ["full", "full_bf16", "lora", "boxes"])
def test_each_policy_keeps_less_than_the_one_before(kind):
    table = memory_estimate.STEP_GIB
    rows = [table[(kind, policy, False)] for policy in activation_checkpointing.POLICIES]
    for faster, smaller in pairwise(rows):
        assert all(a >= b for a, b in zip(faster, smaller))


@pytest.mark.parametrize("kind", ["full", "full_bf16", "lora", "boxes"])
@pytest.mark.parametrize("policy", ["blocks", "nested"])
def test_offloading_keeps_less_on_the_gpu(kind, policy):
    table = memory_estimate.STEP_GIB
    kept, offloaded = table[(kind, policy, False)], table[(kind, policy, True)]
    assert all(a >= b for a, b in zip(kept, offloaded))


# ----------------------------------------------------------------------------- estimate_memory.py


@pytest.mark.parametrize("card", [8, 12, 16, 24, 40, 48, 80])
def test_fit_prints_a_command_that_the_trainer_takes_and_that_fits(card, capsys):
    ask("train_svd_lora.py", fit=card)
    lines = capsys.readouterr().out.splitlines()
    (command,) = (line for line in lines if "train_svd_lora.py" in line)
    flags = command.split("train_svd_lora.py ")[1].split()
    args = train_svd.parse(train_svd_lora.script_parser(), flags)
    num_trained = 16 * memory_estimate.LORA_PARAMETERS_PER_RANK
    num_parameters = memory_estimate.UNET_PARAMETERS + num_trained
    job = memory_estimate.TrainingJob(args, "lora", num_trained, num_parameters)
    assert job.estimate().total <= card * memory_estimate.USABLE_FRACTION


def test_a_card_that_is_too_small_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"^--fit 8GB: the run does not fit.*(--num_frames|LoRA)"):
        ask("train_svd.py", fit=8.0)


def test_the_report_adds_up_and_names_every_card(capsys):
    ask("train_svd.py")
    out = capsys.readouterr().out
    gib = {name.strip(): float(x) for name, x in re.findall(r"^(\D{16}) *([\d.]+) GiB", out, re.M)}
    at_one_time = ("weights", "optimizer", "VAE and CLIP", "gradients", "activations")
    assert sum(gib[name] for name in at_one_time) == pytest.approx(gib["peak allocated"], abs=0.03)
    cards = [int(card) for card in re.findall(r"^ *(\d+) GB ", out, re.M)]
    assert cards == list(memory_estimate.CARD_SIZES)


def test_a_latent_cache_saves_the_encoders():
    base = make_job("--gradient_checkpointing=blocks").estimate()
    cached = make_job("--gradient_checkpointing=blocks", "--latent_cache=x").estimate()
    assert cached.encoders < 0.1 * base.encoders


def test_the_checkpointing_flag_alone_is_blocks():
    blocks = make_job("--gradient_checkpointing=blocks").estimate()
    assert make_job("--gradient_checkpointing").estimate().peak == blocks.peak


def test_small_optimizers_and_ema_change_the_memory_by_what_they_keep():
    needs = {}
    for name in ("adamw", "adamw8bit", "adamw_bf16_sr"):
        needs[name] = make_job(f"--optimizer={name}", script="train_svd.py").estimate()
    assert needs["adamw8bit"].optimizer == needs["adamw"].optimizer / 4
    assert needs["adamw_bf16_sr"].optimizer == needs["adamw"].optimizer / 2
    assert needs["adamw_bf16_sr"].weights < 0.6 * needs["adamw"].weights
    ema = make_job("--use_ema", script="train_svd.py").estimate()
    ema_gib = memory_estimate.TRAINABLE_PARAMETERS * 4 / 2**30
    assert ema.optimizer - needs["adamw"].optimizer == pytest.approx(ema_gib)


def test_what_is_not_in_the_table_is_counted(pipe):
    folder = "--pretrained_model_name_or_path=svd_xtend/demo/weights/svd"
    flags = [folder, "--width=64", "--height=48"]
    job = estimate_memory.make_job("train_svd.py", flags, exact=False)
    assert job.kind is None
    assert job.num_parameters == memory_estimate.count_parameters(pipe.unet)
    assert job.encoders.clip == memory_estimate.count_parameters(pipe.image_encoder)
    assert 0 < job.estimate().peak < 1
    assert fit_to_budget(job, 0.01) is None


def test_an_estimate_takes_no_library_that_is_slow_to_import():
    code = (
        "import argparse, sys, estimate_memory\n"
        "own_args = argparse.Namespace(trainer='train_svd.py', fit=None, exact=False)\n"
        "estimate_memory.main(own_args, [])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_a_cache_is_proposed_only_if_the_run_can_use_it():
    """Stages 1 and 2 of box control draw boxes into the frames; a cache has frames without them."""
    for stage, can_cache in ((1, False), (2, False), (3, True)):
        job = make_job(f"--stage={stage}", script="train_svd_tracklet.py")
        plans = memory_estimate.memory_plans(job)
        assert any("latent_cache" in plan.flags for plan in plans) == can_cache


@pytest.mark.parametrize(
    "argv, error",
    [
        (["train.py"], "train.py: expected the name of a trainer"),
        (
            ["train_svd.py", "--fit=24QB"],
            "expected the memory of a GPU, for example 24GB; got 24QB",
        ),
        (["train_svd.py", "--fit=0"], "expected the memory of a GPU, for example 24GB; got 0"),
        (["train_svd.py", "--widht=64"], "--widht"),
        (["train_svd.py", "--num_frames=0"], "--num_frames: expected a whole number of at least 1"),
        (["train_svd_lora.py", "--rank=-1"], "--rank: expected a whole number of at least 1"),
        (
            ["train_svd.py", "--pretrained_model_name_or_path=/no/such"],
            "/no/such: there is no such folder",
        ),
        (["train_svd.py", "--optimizer=adamw_bf16_sr"], "needs --mixed_precision bf16"),
        (["train_svd.py", "--offload_activations"], "--gradient_checkpointing blocks"),
    ],
)
def test_wrong_questions_are_one_clear_error(argv, error):
    done = subprocess.run(
        [sys.executable, "estimate_memory.py", *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert error in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------- in training


def test_auto_takes_the_fastest_policy_that_fits(monkeypatch):
    job = make_job()
    policies = {500: "none", 70: "level0", 40: "level01", 20: "blocks", 13.2: "nested", 1: "nested"}
    for free, policy in policies.items():
        monkeypatch.setattr(memory_estimate, "free_memory", lambda device, free=free: free)
        assert memory_estimate.choose_policy(job, torch.device("cpu")) == policy


def test_auto_on_a_model_that_is_not_svds_size_counts_it(run, tmp_path, monkeypatch):
    """The embedded SVD in 0.6 GiB: `blocks` fits, keeping more does not. args.json says so."""
    monkeypatch.setattr(memory_estimate, "free_memory", lambda device: 0.6)
    flags = ["--max_train_steps=1", "--gradient_checkpointing=auto", "--vae_encode_chunk=1"]
    out = run(*flags, output_dir=tmp_path)
    assert '"gradient_checkpointing": "blocks"' in (out / "args.json").read_text()


def test_out_of_memory_ends_with_one_message_of_flags_to_add(clips, tmp_path):
    code = f"""
import torch, train_svd
def loss(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has ...")
flags = ["--width=64", "--height=48", "--num_workers=0", "--validation_steps=0",
         "--base_folder={clips}", "--output_dir={tmp_path}"]
train_svd.train(train_svd.parse(train_svd.build_parser(), flags), train_svd.Recipe(loss=loss))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert re.match(
        r"Out of memory on cpu, when 2.25 GiB more were requested. "
        r"The predicted peak is [\d.]+ GiB, .* Add --",
        last,
    ), last


@pytest.mark.parametrize(
    "script, flags, kind",
    [
        ("train_svd.py", [], "full"),
        ("train_svd.py", ["--train_params", "temporal_transformer_blocks"], None),
        ("train_svd_lora.py", ["--rank=8"], "lora"),
        ("train_svd_lora.py", ["--lora_targets", "conv"], None),
        ("train_svd_tracklet.py", [], "boxes"),
        ("train_svd_tracklet.py", ["--enhancer=none"], None),
    ],
)
def test_trainer_and_estimate_see_the_same_job(pipe, script, flags, kind):
    """At full size, without data: the trainer's job of its model is the estimate's of the flags."""
    parse, prepare = estimate_memory.TRAINERS[script]
    args = parse([*SIZE, *flags])
    with FakeTensorMode():
        unet, model = memory_count.make_fake_model(memory_count.svd_config(), prepare, args, "none")
        fake_pipe = SimpleNamespace(unet=unet, vae=pipe.vae, image_encoder=pipe.image_encoder)
        trainer_job = memory_estimate.job_of_model(args, model, prepare, fake_pipe)
    assert estimate_memory.find_table_kind(script, args) == kind
    assert trainer_job.kind == kind
    if kind:
        estimate_job = estimate_memory.make_job(script, [*SIZE, *flags], exact=False)
        assert estimate_job.num_trained == trainer_job.num_trained
        assert estimate_job.num_parameters == trainer_job.num_parameters


def test_a_run_reports_what_it_measured_beside_what_was_predicted(monkeypatch, caplog):
    """With a GPU's counter played back: 3 GiB in validation, steps of 5 and 6, 4 at the end."""
    peaks = iter([3, 5, 0, 6, 4])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks) * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monitor = object.__new__(memory_estimate.MemoryMonitor)
    monitor.job = make_job()
    monitor.need = monitor.job.estimate()
    monitor.device = torch.device("cuda")
    monitor.step_peak = 0.0
    monitor.other_peak = 0.0
    steps = []
    for _ in range(2):
        monitor.begin_step()
        steps.append(monitor.end_step())
    with caplog.at_level("INFO", "svd_xtend"):
        monitor.report()
    assert steps == [5, 6]
    assert "at most 6.0 GiB in a step, 4.0 outside of steps; 86." in caplog.text
