"""The memory model: its table is what counting gives, counting is what real tensors take, and its advice is followed."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import estimate_memory
import train_svd
import train_svd_lora
from svd_xtend.models import activation_checkpointing, unet_optimizations
from svd_xtend.training import memory_estimate
from svd_xtend.training.memory_estimate import (
    LiveBytes,
    count_kind_memory,
    fit_to_budget,
    look_up_step_memory,
)

ROOT = Path(__file__).parents[2]
SIZE = ["--width=1024", "--height=576", "--num_frames=25", "--mixed_precision=bf16"]


# ------------------------------------------------------------------------------------------------------------ the count


def test_live_bytes_are_those_of_storages_that_are_alive_and_their_peak():
    x = torch.zeros(1000)
    live = LiveBytes()
    live.watch(x)
    with live:
        y = x + 1
        y = y.view(10, 100) * 2  # views are free; for a moment there are three
    assert (live.now, live.peak) == (2 * 4096, 3 * 4096)  # 4000 bytes in blocks of 512
    del y
    assert live.now == 4096


@pytest.mark.parametrize("policy, offload", [("none", False), ("nested", False), ("blocks", True)])
def test_a_step_counted_without_data_is_the_step_of_real_tensors(
    pipe, policy, offload, monkeypatch
):
    monkeypatch.setattr(activation_checkpointing, "OFFLOAD_BYTES", 2**14)
    args = train_svd.parse(
        train_svd.build_parser(), ["--width=64", "--height=48", "--mixed_precision=no", "--seed=0"]
    )
    args.num_frames = 8
    how = dict(policy=policy, offload=offload, scale=4)
    weights, step = memory_estimate.count_step_memory(
        pipe.unet.config, train_svd.select_parameters, args, **how
    )

    unet = activation_checkpointing.checkpoint_activations(
        train_svd.select_parameters(unet_optimizations.speed_up(pipe.unet), args).train(), policy
    )
    x, _ = memory_estimate.make_fake_inputs(unet, args, scale=4)  # here real ones
    live = LiveBytes()
    for tensor in [*unet.parameters(), *unet.buffers(), *x]:
        live.watch(tensor)
    assert live.now == pytest.approx(weights * 2**30)
    with live:
        with memory_estimate.offload_uncounted(live, unet) if offload else torch.enable_grad():
            loss = unet(*x).sample.float().square().mean()
        loss.backward()
    assert live.peak / 2**30 - weights == pytest.approx(step, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize(
    "kind, policy, offload, size",
    [
        ("full", "nested", False, (768, 448, 20)),
        ("lora", "blocks", False, (576, 320, 25, 2)),
        ("full_bf16", "level01", False, (1024, 576, 14)),
        ("boxes", "nested", True, (768, 448, 25)),
    ],
)
def test_the_table_is_within_two_percent_of_the_count(kind, policy, offload, size):
    """Sizes that the table does not hold. Weights count, too: they are what the two per cent are of."""
    weights, counted = count_kind_memory(kind, policy, offload, *size)
    width, height, frames, *clips = size
    tokens = width // 8 * (height // 8) * frames * (clips or [1])[0]
    master = "bfloat16" if kind == "full_bf16" else "float32"
    table = look_up_step_memory(kind.removesuffix("_bf16"), policy, offload, tokens, master, "bf16")
    assert weights + table == pytest.approx(weights + counted, rel=0.02)


def test_float32_is_twice_the_table_of_half_precision():
    weights, counted = count_kind_memory("full", "blocks", False, 512, 320, 14, precision="no")
    table = look_up_step_memory("full", "blocks", False, 64 * 40 * 14, "float32", "no")
    assert weights + table == pytest.approx(weights + counted, rel=0.02)


def test_numbers_of_parameters_are_those_of_the_model():
    args = argparse.Namespace(mixed_precision="bf16")
    from torch._subclasses.fake_tensor import FakeTensorMode

    def sizes(kind):
        _, model = memory_estimate.make_fake_model(
            memory_estimate.svd_config(), memory_estimate.PREPARE_BY_KIND[kind], args, "none"
        )
        return [
            sum(p.numel() for p in model.parameters() if p.requires_grad or not own)
            for own in (True, False)
        ]

    with FakeTensorMode():
        assert sizes("full") == [
            memory_estimate.TRAINABLE_PARAMETERS,
            memory_estimate.UNET_PARAMETERS,
        ]
        assert sizes("lora") == [
            16 * memory_estimate.LORA_PARAMETERS_PER_RANK,
            memory_estimate.UNET_PARAMETERS + 16 * memory_estimate.LORA_PARAMETERS_PER_RANK,
        ]
        assert sizes("boxes") == [
            memory_estimate.BOX_CONTROL_PARAMETERS,
            memory_estimate.UNET_PARAMETERS + memory_estimate.BOX_CONTROL_PARAMETERS,
        ]


def test_each_policy_keeps_less_than_the_one_before():
    for kind in ("full", "full_bf16", "lora", "boxes"):
        rows = [
            memory_estimate.STEP_GIB[(kind, policy, False)]
            for policy in activation_checkpointing.POLICIES
        ]
        for more, less in zip(rows, rows[1:]):
            assert all(a >= b for a, b in zip(more, less))
        for policy in ("blocks", "nested"):
            assert all(
                a >= b
                for a, b in zip(
                    memory_estimate.STEP_GIB[(kind, policy, False)],
                    memory_estimate.STEP_GIB[(kind, policy, True)],
                )
            )


# ------------------------------------------------------------------------------------------------------------- estimate


def job(*flags, script="train_svd_lora.py"):
    return estimate_memory.make_job(script, [*SIZE, *flags], exact=False)


@pytest.mark.parametrize("card", [8, 12, 16, 24, 40, 48, 80])
def test_fit_prints_a_command_that_the_trainer_takes_and_that_fits(card, capsys):
    estimate_memory.main(
        argparse.Namespace(trainer="train_svd_lora.py", fit=card, exact=False), SIZE
    )
    (command,) = (
        line for line in capsys.readouterr().out.splitlines() if "train_svd_lora.py" in line
    )
    flags = command.split("train_svd_lora.py ")[1].split()
    args = train_svd.parse(train_svd_lora.script_parser(), flags)
    again = memory_estimate.TrainingJob(
        args,
        "lora",
        16 * memory_estimate.LORA_PARAMETERS_PER_RANK,
        memory_estimate.UNET_PARAMETERS + 16 * memory_estimate.LORA_PARAMETERS_PER_RANK,
    )
    assert again.need().total <= card * memory_estimate.USABLE_FRACTION


def test_a_card_that_is_too_small_is_an_error_that_says_what_to_do():
    with pytest.raises(
        ValueError, match=r"^--fit 8GB: no lever makes it fit. .*(--num_frames|LoRA)"
    ):
        estimate_memory.main(argparse.Namespace(trainer="train_svd.py", fit=8.0, exact=False), SIZE)


def test_the_report_adds_up_and_names_every_card(capsys):
    estimate_memory.main(argparse.Namespace(trainer="train_svd.py", fit=None, exact=False), SIZE)
    out = capsys.readouterr().out
    gib = {name.strip(): float(x) for name, x in re.findall(r"^(\D{16}) *([\d.]+) GiB", out, re.M)}
    at_once = ("weights", "optimizer", "VAE and CLIP", "gradients", "activations")
    assert sum(gib[name] for name in at_once) == pytest.approx(gib["peak allocated"], abs=0.03)
    assert [int(card) for card in re.findall(r"^ *(\d+) GB ", out, re.M)] == list(
        memory_estimate.CARD_SIZES
    )


def test_levers_each_save_what_they_are_for():
    base = job("--gradient_checkpointing=blocks").need()
    cached, small = (
        job("--gradient_checkpointing=blocks", "--latent_cache=x").need(),
        job("--gradient_checkpointing"),
    )
    assert cached.encoders < 0.1 * base.encoders and small.need().peak == base.peak
    full = {
        name: job(f"--optimizer={name}", script="train_svd.py").need()
        for name in ("adamw", "adamw8bit", "adamw_bf16_sr")
    }
    assert full["adamw8bit"].optimizer == full["adamw"].optimizer / 4
    assert full["adamw_bf16_sr"].optimizer == full["adamw"].optimizer / 2
    assert full["adamw_bf16_sr"].weights < 0.6 * full["adamw"].weights
    ema = job("--use_ema", script="train_svd.py").need()
    assert ema.optimizer - full["adamw"].optimizer == pytest.approx(
        memory_estimate.TRAINABLE_PARAMETERS * 4 / 2**30
    )


def test_what_is_not_in_the_table_is_counted(pipe):
    flags = [
        "--pretrained_model_name_or_path=svd_xtend/demo/weights/svd",
        "--width=64",
        "--height=48",
    ]
    own = estimate_memory.make_job("train_svd.py", flags, exact=False)
    assert own.kind is None and own.parameters == sum(p.numel() for p in pipe.unet.parameters())
    assert own.encoders[2] == sum(p.numel() for p in pipe.image_encoder.parameters())
    assert 0 < own.need().peak < 1
    assert fit_to_budget(own, 0.01) is None


def test_an_estimate_takes_no_library_that_is_slow_to_import():
    code = "import sys, estimate_memory as e, argparse; e.main(argparse.Namespace(trainer='train_svd.py', fit=None, exact=False), []); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# ---------------------------------------------------------------------------------------------------------- in training


def test_auto_takes_the_fastest_policy_that_fits(monkeypatch):
    lora = job()
    for free, policy in (
        (500, "none"),
        (70, "level0"),
        (40, "level01"),
        (20, "blocks"),
        (13.2, "nested"),
        (1, "nested"),
    ):
        monkeypatch.setattr(memory_estimate, "free_memory", lambda device, free=free: free)
        assert memory_estimate.choose_policy(lora, torch.device("cpu")) == policy


def test_auto_on_a_model_that_is_not_svds_size_counts_it(run, tmp_path, monkeypatch):
    """The embedded SVD in 0.6 GiB: `blocks` fits, keeping more does not; the run says so in its args.json."""
    monkeypatch.setattr(memory_estimate, "free_memory", lambda device: 0.6)
    out = run(
        "--max_train_steps=1",
        "--gradient_checkpointing=auto",
        "--vae_encode_chunk=1",
        output_dir=tmp_path,
    )
    assert '"gradient_checkpointing": "blocks"' in (out / "args.json").read_text()


def test_out_of_memory_ends_with_one_message_of_flags_to_add(clips, tmp_path):
    code = f"""
import sys, torch, train_svd as t
def loss(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has ...")
args = t.parse(t.build_parser(), ["--width=64", "--height=48", "--num_workers=0", "--validation_steps=0",
    "--base_folder={clips}", "--output_dir={tmp_path}"])
t.train(args, t.DummyDataset, t.select_parameters, t.export, t.validate, loss)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert re.match(
        r"Out of memory on cpu, for 2.25 GiB more; a peak of [\d.]+ GiB is predicted, .* Add --",
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
    """Full size, of tensors without data: what the trainer makes of its model is what the estimate makes of the flags."""
    from types import SimpleNamespace

    from torch._subclasses.fake_tensor import FakeTensorMode

    parse, prepare = estimate_memory.TRAINERS[script]
    args = parse([*SIZE, *flags])
    with FakeTensorMode():
        unet, model = memory_estimate.make_fake_model(
            memory_estimate.svd_config(), prepare, args, "none"
        )
        seen = memory_estimate.job_of_model(
            args,
            model,
            prepare,
            SimpleNamespace(unet=unet, vae=pipe.vae, image_encoder=pipe.image_encoder),
        )
    assert (estimate_memory.kind_of(script, args), seen.kind) == (kind, kind)
    if kind:
        told = estimate_memory.make_job(script, [*SIZE, *flags], exact=False)
        assert (told.trained, told.parameters) == (seen.trained, seen.parameters)


def test_a_run_reports_what_it_measured_beside_what_was_predicted(monkeypatch, caplog):
    """With a GPU's counter played back: 3 GiB in validation, steps of 5 and 6, 4 at the end."""
    peaks = iter([3, 5, 0, 6, 4])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks) * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    watch = object.__new__(memory_estimate.MemoryMonitor)
    watch.job, watch.device, watch.steps, watch.between = job(), torch.device("cuda"), 0.0, 0.0
    watch.need = watch.job.need()
    steps = []
    for _ in range(2):
        watch.begin_step()
        steps.append(watch.end_step())
    with caplog.at_level("INFO", "svd_xtend"):
        watch.report()
    assert steps == [5, 6]
    assert "at most 6.0 GiB in a step, 4.0 beside steps; 86." in caplog.text


@pytest.mark.parametrize(
    "argv, error",
    [
        (["train.py"], "train.py: name the trainer first"),
        (["train_svd.py", "--fit=24QB"], "24QB: expected a card's memory"),
        (["train_svd.py", "--fit=0"], "0: expected a card's memory"),
        (["train_svd.py", "--widht=64"], "--widht"),
        (["train_svd.py", "--num_frames=0"], "--num_frames 0: must be at least 1"),
        (["train_svd_lora.py", "--rank=-1"], "--rank -1: must be at least 1"),
        (["train_svd.py", "--pretrained_model_name_or_path=/no/such"], "/no/such: no such folder"),
        (["train_svd.py", "--optimizer=adamw_bf16_sr"], "needs --mixed_precision bf16"),
        (
            ["train_svd.py", "--offload_activations"],
            "--offload_activations: pass --gradient_checkpointing blocks",
        ),
    ],
)
def test_wrong_questions_are_one_clear_error(argv, error):
    done = subprocess.run(
        [sys.executable, "estimate_memory.py", *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and error in done.stderr.splitlines()[-1]
        and "Traceback" not in done.stderr
    )


def test_a_cache_is_proposed_to_those_alone_who_can_use_it():
    stages = [["--stage", str(i)] for i in (1, 2, 3)]
    offers = [
        any(
            "latent_cache" in flags
            for _, flags, _ in memory_estimate.memory_plans(job(*s, script="train_svd_tracklet.py"))
        )
        for s in stages
    ]
    assert offers == [False, False, True]
