"""The loop: what users rely on when they launch it, kill it, launch it again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_svd
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.models import precision
from svd_xtend.models.loading import load_svd
from svd_xtend.models.precision import fast_bf16
from svd_xtend.models.unet_optimizations import has_effect
from svd_xtend.training import checkpoints
from svd_xtend.training.checkpoints import find_checkpoints

ROOT = Path(__file__).parents[1]
SMALL = ["--train_params", "conv_out", "mid_block.attentions"]  # trains fast, saves fast


def trained(folder, step):
    return load_file(Path(folder, f"checkpoint-{step}", "trained.safetensors"))


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def losses(folder):
    return [
        json.loads(line)["loss"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()
    ]


# ------------------------------------------------------------------------------------------------------- repeat, resume


def test_second_run_with_the_same_seed_is_bit_identical(run, tmp_path):
    for name in "ab":
        run("--max_train_steps=2", "--per_gpu_batch_size=2", output_dir=tmp_path / name)
    assert_same(trained(tmp_path / "a", 2), trained(tmp_path / "b", 2))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_run_equals_uninterrupted_run(run, tmp_path, lora):
    flags = ["--use_ema", "--lr_scheduler=cosine", "--lr_warmup_steps=2", "--checkpointing_steps=3"]
    flags += [] if lora else SMALL
    run("--max_train_steps=6", *flags, output_dir=tmp_path / "whole", lora=lora)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(
        tmp_path / "killed" / "checkpoint-6"
    )  # as if killed in step 5: metrics had run ahead
    run("--max_train_steps=6", *flags, output_dir=tmp_path / "killed", lora=lora)
    assert_same(trained(tmp_path / "whole", 6), trained(tmp_path / "killed", 6))
    for name in ("ema.safetensors", "trained.safetensors"):
        files = [tmp_path / run / "checkpoint-6" / name for run in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_validation_does_not_touch_the_training_stream(run, tmp_path):
    for name, every in (("never", 0), ("often", 1)):
        run(
            "--max_train_steps=2",
            *SMALL,
            f"--validation_steps={every}",
            "--num_inference_steps=1",
            output_dir=tmp_path / name,
        )
    assert_same(trained(tmp_path / "never", 2), trained(tmp_path / "often", 2))


def test_no_seed_means_one_is_drawn_and_kept(run, tmp_path):
    def kept(name):
        return json.loads((tmp_path / name / "args.json").read_text())["seed"]

    for name in "ab":
        run("--max_train_steps=1", *SMALL, seed=None, output_dir=tmp_path / name)
    assert kept("a") != kept("b")
    drawn = kept("a")
    run("--max_train_steps=2", *SMALL, seed=None, output_dir=tmp_path / "a")
    assert (
        kept("a") == drawn
        and checkpoints.read_progress(tmp_path / "a" / "checkpoint-2")["seed"] == drawn
    )
    other = drawn + 1
    with pytest.raises(ValueError, match=f"^--seed {other}: .* was trained with seed {drawn}"):
        run("--max_train_steps=3", *SMALL, seed=other, output_dir=tmp_path / "a")


def test_accumulation_and_batch_give_the_same_step(run, tmp_path):
    """Two of one, and one of two: same samples, same gradient but for rounding."""
    run("--max_train_steps=1", *SMALL, "--per_gpu_batch_size=2", output_dir=tmp_path / "batch")
    run(
        "--max_train_steps=1",
        *SMALL,
        "--gradient_accumulation_steps=2",
        output_dir=tmp_path / "accumulated",
    )
    assert losses(tmp_path / "batch") == pytest.approx(losses(tmp_path / "accumulated"), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_limit_of_one_keeps_the_newest_and_partial_ones_do_not_count(run, tmp_path):
    out = run(
        "--max_train_steps=3", *SMALL, "--checkpointing_steps=1", "--checkpoints_total_limit=1"
    )
    assert [p.name for p in find_checkpoints(out)] == ["checkpoint-3"]
    (out / "partial-checkpoint-9").mkdir()
    (out / "checkpoint-8").mkdir()  # no progress.json: not whole
    assert checkpoints.pick_checkpoint("latest", out).name == "checkpoint-3"
    with pytest.raises(ValueError, match="^--resume_from_checkpoint none: .* holds checkpoint-3"):
        checkpoints.pick_checkpoint("none", out)
    with pytest.raises(
        ValueError, match="^--resume_from_checkpoint elsewhere: no checkpoint there"
    ):
        checkpoints.pick_checkpoint("elsewhere", out)
    assert (
        checkpoints.pick_checkpoint(str(out / "checkpoint-3"), tmp_path / "new").name
        == "checkpoint-3"
    )


def test_what_killed_saves_left_is_cleared_away(run):
    out = run("--max_train_steps=1", *SMALL)
    (out / "partial-checkpoint-9").mkdir()
    run("--max_train_steps=2", *SMALL)
    assert sorted(p.name for p in out.glob("*checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_going_back_sets_later_checkpoints_aside(run):
    """Else a limit of one would keep the branch that was left, and `latest` would return to it."""
    flags = [*SMALL, "--checkpointing_steps=1"]
    out = run("--max_train_steps=3", *flags)
    run(
        "--max_train_steps=2",
        *flags,
        f"--resume_from_checkpoint={out / 'checkpoint-1'}",
        "--checkpoints_total_limit=1",
    )
    assert [p.name for p in find_checkpoints(out)] == ["checkpoint-2"]
    assert (out / "abandoned-checkpoint-3").is_dir()
    run("--max_train_steps=3", *flags)
    run(
        "--max_train_steps=3", *flags, f"--resume_from_checkpoint={out / 'checkpoint-2'}"
    )  # and once more
    assert [p.name for p in find_checkpoints(out)] == ["checkpoint-2", "checkpoint-3"]


def test_a_resumed_run_has_the_learning_rate_and_adams_flags_that_it_is_given(run, optimizers):
    out = run("--max_train_steps=2", *SMALL, "--learning_rate=1e-3")
    run(
        "--max_train_steps=4",
        *SMALL,
        "--learning_rate=1e-5",
        "--adam_beta1=0.5",
        "--adam_weight_decay=0.3",
    )
    rates = [json.loads(line)["lr"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-5, 1e-5])
    (group,) = optimizers[-1].param_groups
    assert (
        group["betas"][0] == 0.5
        and group["weight_decay"] == 0.3
        and group["lr"] == pytest.approx(1e-5)
    )


def test_accumulation_may_change_on_resuming(run):
    flags = [*SMALL, "--checkpointing_steps=1"]
    run("--max_train_steps=1", *flags)
    out = run("--max_train_steps=3", *flags, "--gradient_accumulation_steps=3")
    assert checkpoints.read_progress(out / "checkpoint-3") == {"step": 3, "samples": 7, "seed": 1}


def test_resuming_another_run_is_noticed(run, caplog, tmp_path, clips):
    out = run("--max_train_steps=1", lora=True)
    with pytest.raises(ValueError, match="^--lora_alpha 3.0: the run in .* was trained with None"):
        run("--max_train_steps=2", "--lora_alpha=3", lora=True)
    shutil.copytree(clips, tmp_path / "other")
    run("--max_train_steps=2", f"--base_folder={tmp_path / 'other'}", lora=True)
    assert "--base_folder was" in caplog.text and out.is_dir()


def test_gradients_that_are_not_finite_stop_the_run_before_they_are_saved(run):
    def poison(model, pipe, batch, args):
        value = train_svd.training_loss(model, pipe, batch, args)
        if batch["index"].item() == 1:  # the loss stays what it is
            value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    with pytest.raises(
        FloatingPointError,
        match="step 2: the gradient norm is nan.*checkpoint of step 1 is complete",
    ):
        run("--max_train_steps=3", *SMALL, "--checkpointing_steps=1", loss=poison)


def test_a_save_that_dies_leaves_the_last_checkpoint_whole(run, monkeypatch):
    out = run("--max_train_steps=1", *SMALL)
    before = trained(out, 1)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_tensors", no_space)
    with pytest.raises(
        OSError,
        match="^--output_dir .*No space left on device.*resumes from the checkpoint of step 1",
    ):
        run("--max_train_steps=2", *SMALL, "--checkpoints_total_limit=1")
    assert [p.name for p in find_checkpoints(out)] == ["checkpoint-1"]
    assert_same(trained(out, 1), before)


def test_resuming_with_other_trained_parameters_is_a_clear_error(run):
    run("--max_train_steps=1", "--train_params", "conv_out")
    with pytest.raises(
        ValueError, match="^--resume_from_checkpoint .* does not hold what this run trains"
    ):
        run("--max_train_steps=2", "--train_params", "conv_out", "conv_in")


def test_checkpoint_holds_what_trains_and_nothing_else(run, pipe):
    out = run("--max_train_steps=1", *SMALL)
    names = {
        n for n, _ in pipe.unet.named_parameters() if "conv_out" in n or "mid_block.attentions" in n
    }
    assert trained(out, 1).keys() == {name for name in names if has_effect(name)}


def test_scale_lr_multiplies_by_the_clips_of_a_step(run):
    out = run("--max_train_steps=1", *SMALL, "--scale_lr", "--learning_rate=1e-4", "--gradient_accumulation_steps=2",
              "--per_gpu_batch_size=3")  # fmt: skip
    assert json.loads((out / "args.json").read_text())["learning_rate"] == pytest.approx(6e-4)
    assert json.loads((out / "metrics.jsonl").read_text())["lr"] == pytest.approx(6e-4)


def test_wandb_keeps_curves_and_videos_offline(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    out = run(
        "--max_train_steps=1",
        *SMALL,
        "--report_to=wandb",
        "--validation_steps=1",
        "--num_inference_steps=1",
    )
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert next(folder.glob("*.wandb")).stat().st_size > 0 and (out / "comparison.gif").exists()
    assert list(folder.rglob("media/**/*.*"))


def test_max_grad_norm_clips(run, tmp_path):
    """Under plain gradient size AdamW's first step hardly changes, so look at the gradients themselves."""
    seen = {}

    def loss(model, pipe, batch, args):
        value = train_svd.training_loss(model, pipe, batch, args)
        seen["parameters"] = [p for p in model.parameters() if p.requires_grad]
        return value * 1000

    class Spy(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            seen["norm"] = (
                torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]])
                .norm()
                .item()
            )
            return super().step(*args, **kwargs)

    original, torch.optim.AdamW = torch.optim.AdamW, Spy
    try:
        run("--max_train_steps=1", *SMALL, "--max_grad_norm=0.5", loss=loss)
        assert seen["norm"] == pytest.approx(0.5, rel=1e-3)
        run(
            "--max_train_steps=1",
            *SMALL,
            "--max_grad_norm=0",
            loss=loss,
            output_dir=tmp_path / "free",
        )
        assert seen["norm"] > 1
    finally:
        torch.optim.AdamW = original


def test_non_finite_loss_stops_with_advice_and_keeps_the_checkpoint(run):
    out = run("--max_train_steps=1", *SMALL)

    def loss(model, pipe, batch, args):
        return train_svd.training_loss(model, pipe, batch, args) * float("nan")

    with pytest.raises(
        FloatingPointError,
        match="step 2: the loss is nan at learning rate 0.001.*Lower --learning_rate",
    ):
        run("--max_train_steps=3", *SMALL, loss=loss)
    assert [p.name for p in find_checkpoints(out)] == ["checkpoint-1"]


# ---------------------------------------------------------------------------------------------------- weights in and out


def test_export_loads_in_stock_diffusers_and_is_the_trained_model(run):
    from diffusers import StableVideoDiffusionPipeline

    out = run("--max_train_steps=2", *SMALL)
    stock = StableVideoDiffusionPipeline.from_pretrained(out)
    state, base = dict(stock.unet.named_parameters()), load_svd(str(TINY_SVD), torch.float32).unet
    for name, tensor in trained(out, 2).items():
        assert torch.equal(state[name], tensor)
    frozen = {n: p for n, p in base.named_parameters() if n not in trained(out, 2)}
    assert frozen and all(torch.equal(state[name], p) for name, p in frozen.items())
    again = run(
        "--max_train_steps=1",
        *SMALL,
        f"--pretrained_model_name_or_path={out}",
        output_dir=out / "again",
    )
    run("--max_train_steps=1", *SMALL, f"--pretrain_unet={again}", output_dir=out / "third")


def test_folders_without_weights_are_clear_errors(run, tmp_path):
    with pytest.raises(
        ValueError, match="^--pretrained_model_name_or_path .*: no model_index.json"
    ):
        run("--max_train_steps=1", f"--pretrained_model_name_or_path={tmp_path}")
    with pytest.raises(ValueError, match="^--pretrain_unet .*usable weights"):
        run("--max_train_steps=1", f"--pretrain_unet={tmp_path}")
    with pytest.raises(ValueError, match="^--train_params nonsense: no parameter of the UNet"):
        run("--max_train_steps=1", "--train_params", "nonsense")


def test_all_parameters_train_by_default_and_ema_follows_them(run, pipe):
    out = run("--max_train_steps=3", "--use_ema")
    start, now = dict(pipe.unet.named_parameters()), trained(out, 3)
    assert now.keys() == {
        name for name in start if has_effect(name)
    }  # attn2's queries and keys have no effect
    ema = load_file(out / "checkpoint-3" / "ema.safetensors")
    assert ema.keys() == now.keys()
    for name, value in now.items():
        assert not torch.equal(value, start[name]), name
        assert not torch.equal(value, ema[name]) and (ema[name] - start[name]).abs().max() > 0, name
    assert not list((out / "checkpoint-3").glob("custom_checkpoint_2*"))
    assert (
        sum(f.stat().st_size for f in (out / "checkpoint-3").glob("custom*")) < 1e5
    )  # averages are not kept twice


# ------------------------------------------------------------------------------------------------------------ precision


def test_impossible_precision_is_one_clear_error(run, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        ValueError,
        match="^--mixed_precision fp16: not available on this machine. Pass --mixed_precision",
    ):
        run("--max_train_steps=1", "--mixed_precision=fp16")
    monkeypatch.setattr(precision, "fast_bf16", lambda: False)
    with pytest.raises(
        ValueError,
        match="^--mixed_precision bf16: not available on this machine. Pass --mixed_precision no",
    ):
        run("--max_train_steps=1", "--mixed_precision=bf16")


@pytest.mark.parametrize("by_flag", [True, False])
def test_half_precision_freezes_in_half_and_trains_in_float32(run, monkeypatch, by_flag):
    if not fast_bf16():
        pytest.skip("no bfloat16 instructions here")
    seen = {}

    def loss(model, pipe, batch, args):
        seen["vae"], seen["clip"] = pipe.vae.dtype, pipe.image_encoder.dtype
        seen["unet"] = {(p.requires_grad, p.dtype) for p in pipe.unet.parameters()}
        return train_svd.training_loss(model, pipe, batch, args)

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no" if by_flag else "bf16")
    flags = ["--mixed_precision=bf16"] if by_flag else []
    run(
        "--max_train_steps=1",
        *SMALL,
        *flags,
        "--validation_steps=1",
        "--num_inference_steps=1",
        loss=loss,
    )
    assert seen["vae"] == seen["clip"] == torch.bfloat16
    assert seen["unet"] == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_steps_loss_and_gradients_never_ask_the_device_for_a_number(run):
    """On a GPU each such question waits for all that was launched before. That .item(), bool() and nonzero are noticed is
    checked, too."""
    from torch.utils._python_dispatch import TorchDispatchMode

    asked = []

    class Questions(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in (
                "_local_scalar_dense",
                "nonzero",
                "is_nonzero",
                "equal",
            ):
                asked.append(func)
            return func(*args, **(kwargs or {}))

    def loss(model, pipe, batch, args):
        batch["index"] = batch["index"].tolist()  # which never leaves the CPU
        with Questions():
            value = train_svd.training_loss(model, pipe, batch, args)
            value.mean().backward(retain_graph=True)
        return value

    run(
        "--max_train_steps=1",
        "--conditioning_dropout_prob=0.2",
        "--gradient_checkpointing=nested",
        loss=loss,
    )
    assert asked == []
    with Questions():
        torch.ones(1).item(), torch.ones(1).nonzero()
    assert len(asked) == 2


def test_train_does_not_write_to_the_flags_that_it_is_given(clips, tmp_path):
    """Resolved flags are new copies: what was asked for and what was resolved are never confused."""
    flags = [f"--base_folder={clips}", f"--output_dir={tmp_path}", "--width=64", "--height=48"]
    flags += [
        "--num_workers=0",
        "--max_train_steps=1",
        "--gradient_checkpointing=auto",
        "--scale_lr",
    ]
    args = train_svd.parse(train_svd.build_parser(), [*flags, "--validation_steps=0"])
    before = dict(vars(args))
    AcceleratorState._reset_state(reset_partial_state=True)
    train_svd.train(args, train_svd.Recipe(export=lambda *_: None))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert vars(args) == before
    resolved = json.loads((tmp_path / "args.json").read_text())
    assert resolved["num_frames"] == 8 and resolved["gradient_checkpointing"] != "auto"


# -------------------------------------------------------------------------------------------------------- as users do it


def launch(*flags, **kwargs):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=1",
        *flags,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, **kwargs
    )


def test_accelerate_launch_six_steps_then_resume(clips, tmp_path):
    flags = [
        "train_svd.py", f"--base_folder={clips}", "--width=64", "--height=48", "--per_gpu_batch_size=1", *SMALL,
        "--gradient_accumulation_steps=1", "--checkpointing_steps=2", "--checkpoints_total_limit=1", "--seed=123",
        "--learning_rate=1e-5", "--lr_warmup_steps=0", "--validation_steps=3", "--num_inference_steps=1",
        f"--output_dir={tmp_path}", "--report_to=tensorboard",
    ]  # fmt: skip
    for steps in (4, 6):
        process = launch(*flags, f"--max_train_steps={steps}")
        output = process.communicate()[0]
        assert process.returncode == 0, output
    assert "resumed from" in output
    assert [p.name for p in find_checkpoints(tmp_path)] == ["checkpoint-6"]
    assert len(losses(tmp_path)) == 6
    rendered = {p.name for p in (tmp_path / "validation").iterdir()}
    for step in (0, 3, 4, 6):
        assert {f"step{step:06d}_fall0000_000{s}" for s in (".mp4", ".gif", ".png")} <= rendered
    for name in ("comparison.gif", "comparison.png", "args.json", "model_index.json"):
        assert (tmp_path / name).exists()
    assert list((tmp_path / "logs").rglob("events*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_a_checkpoint_and_leave_with_a_message(clips, tmp_path, number):
    flags = [
        f"--base_folder={clips}",
        "--width=64",
        "--height=48",
        *SMALL,
        "--validation_steps=0",
        "--num_workers=1",
    ]
    process = subprocess.Popen(
        [sys.executable, "train_svd.py", *flags, "--max_train_steps=9999", f"--output_dir={tmp_path}", "--seed=1"],
        cwd=ROOT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and metrics.read_text()) and time.time() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal and SLURM do: the loader's workers get it too
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "the same command continues from there" in output, output
    (kept,) = find_checkpoints(tmp_path)
    assert checkpoints.read_progress(kept)["step"] == len(losses(tmp_path))


TWO = """
import os, torch
import torch.distributed as dist
import train_svd
from svd_xtend.training.checkpoints import save_tensors

seen, rank = [], os.environ.get("RANK", "0")

def loss(model, pipe, batch, args):
    world = dist.get_world_size() if dist.is_initialized() else 1
    assert world == {world}, world
    assert world == 1 or hasattr(model, "module")  # still wrapped: the forward that averages gradients
    seen.append(batch["index"].tolist())
    return train_svd.training_loss(model, pipe, batch, args)

class Spy(torch.optim.AdamW):
    def step(self, *a, **k):
        grads = {{str(i): p.grad for i, p in enumerate(self.param_groups[0]["params"])}}
        save_tensors(grads, f"{{args.output_dir}}/grads-{{rank}}.safetensors")
        open(f"{{args.output_dir}}/seen-{{rank}}.txt", "w").write(str(seen))
        return super().step(*a, **k)

torch.optim.AdamW = Spy
args = train_svd.parse(train_svd.build_parser())
train_svd.train(args, train_svd.Recipe(export=lambda *_: None, loss=loss))
"""


def test_gradients_are_averaged_across_two_processes_and_equal_one_with_twice_the_batch(
    farm, clips, tmp_path
):
    """And the samples are disjoint: together they are those of the one process."""
    for world, batch in ((2, 1), (1, 2)):
        script = tmp_path / f"run{world}.py"
        script.write_text(TWO.format(world=world))
        flags = [
            f"--base_folder={clips}", "--width=64", "--height=48", *SMALL, "--validation_steps=0", "--num_workers=0",
            "--max_train_steps=1", f"--per_gpu_batch_size={batch}", "--seed=1", "--mixed_precision=no",
            "--max_grad_norm=0",
        ]  # fmt: skip
        farm.run(
            script,
            *flags,
            engine="ddp" if world > 1 else "none",
            world=world,
            output_dir=tmp_path / str(world),
        )
    first, second, alone = (load_file(tmp_path / f) for f in ("2/grads-0.safetensors", "2/grads-1.safetensors", "1/grads-0.safetensors"))  # fmt: skip
    assert_same(first, second)
    for name in alone:
        torch.testing.assert_close(first[name], alone[name], rtol=1e-3, atol=1e-6)
    seen = [(tmp_path / f"{w}/seen-{r}.txt").read_text() for w, r in ((2, 0), (2, 1), (1, 0))]
    assert seen == ["[[0]]", "[[1]]", "[[0, 1]]"]
    assert [p.name for p in find_checkpoints(tmp_path / "2")] == ["checkpoint-1"]


def test_validation_images_of_one_name_are_refused(run, clips, tmp_path):
    """The videos of one would be written over those of the other."""
    paths = [tmp_path / side / "a" / "000.png" for side in "xy"]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_bytes((clips / "fall0000" / "000.png").read_bytes())
    with pytest.raises(
        ValueError, match=f"^--validation_image {paths[1]}: .* as those of {paths[0]}"
    ):
        run("--max_train_steps=1", "--validation_steps=1", "--validation_image", *map(str, paths))
