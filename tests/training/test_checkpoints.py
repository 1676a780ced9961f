"""Checkpoints survive kills at random moments, full and read-only disks, and damaged files."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train_svd
from svd_xtend.training import checkpoints
from svd_xtend.training.checkpoints import find_checkpoints, find_damage, pick_checkpoint

SMALL = ["--train_params", "conv_out", "mid_block.attentions"]

# Saving is slowed down, so that many kills hit it. The script writes what it is doing to a file.
SCRIPT = """
import sys, time
import train_svd
from svd_xtend.training import checkpoints

def write_activity(activity):
    with open({activity_file!r}, "w") as f:
        f.write(activity)

def flush_slowly(*paths, flush=checkpoints.flush_to_disk):
    time.sleep(0.1)
    flush(*paths)

def validate(pipe, unet, step, args):
    write_activity("validating")
    if step:
        train_svd.render_validation(pipe, unet, step, args)
    write_activity("stepping")
    return []

checkpoints.flush_to_disk = flush_slowly
args = train_svd.parse(train_svd.build_parser())
train_svd.train(args, train_svd.Recipe(validate=validate))
"""


def read_losses(out):
    return [json.loads(row)["loss"] for row in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_trained(checkpoint, other):
    """The parameters of two checkpoints are equal, bit by bit."""
    tensors = load_file(checkpoint / checkpoints.TRAINED_FILE)
    other_tensors = load_file(other / checkpoints.TRAINED_FILE)
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)


def test_25_kills_at_random_moments_lose_nothing(farm, clips, tmp_path):
    """kill -9 during steps, saves and validations. After each, the last checkpoint is whole.

    In the end the weights are, bit by bit, those of a run that was never killed."""
    activity_file = tmp_path / "activity"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(activity_file=str(activity_file)))
    flags = [
        *SMALL,
        f"--base_folder={clips}",
        "--width=64",
        "--height=48",
        "--num_workers=0",
        "--vae_encode_chunk=8",
        "--seed=3",
        "--mixed_precision=no",
        "--num_inference_steps=1",
        "--validation_steps=3",
        "--checkpointing_steps=1",
        "--checkpoints_total_limit=1",
        "--use_ema",
        "--lr_scheduler=cosine",
        "--max_train_steps=52",
    ]
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    rng = random.Random()
    kills = {"saving": 0, "validating": 0, "stepping": 0}
    last_step = 0
    farm.run("train_svd.py", *flags, output_dir=whole)
    while True:
        is_enough = sum(kills.values()) >= 25 and all(kills.values())
        kill = None if is_enough else rng.uniform(0, 0.5)
        (code,), printed, _ = farm.run(script, *flags, output_dir=killed, kill=kill, ok=False)
        if code == 0:
            break
        assert code == -9, printed[-3000:]
        step = 0
        saved = find_checkpoints(killed)
        if saved:
            assert find_damage(saved[-1]) is None
            step = checkpoints.read_progress(saved[-1])["step"]
        assert step >= last_step  # no kill destroyed an earlier checkpoint
        last_step = step
        was_saving = bool(list(killed.glob("partial-*")))
        kills["saving" if was_saving else activity_file.read_text()] += 1
    print("kills:", kills)
    assert sum(kills.values()) >= 25
    assert min(kills.values()) > 0
    for name in (checkpoints.TRAINED_FILE, checkpoints.EMA_FILE):
        expected = (whole / "checkpoint-52" / name).read_bytes()
        assert (killed / "checkpoint-52" / name).read_bytes() == expected
    assert len(read_losses(whole)) == 52
    assert read_losses(killed) == read_losses(whole)
    assert not list(killed.glob("partial-*"))


# -------------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def small_disk(folder, size):
    """Mount a file system in memory of that size, such as "64m"."""
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount).returncode != 0:
        pytest.skip("cannot mount a file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_error_and_the_run_resumes_when_there_is_space(run, tmp_path):
    flags = [*SMALL, "--checkpointing_steps=1", "--checkpoints_total_limit=1"]
    with small_disk(tmp_path / "disk", "64m") as disk:
        out = run("--max_train_steps=1", *flags, output_dir=disk / "out")
        size = sum(f.stat().st_size for f in (out / "checkpoint-1").iterdir())
        free = shutil.disk_usage(disk).free
        (disk / "full").write_bytes(bytes(free - size // 2))
        message = (
            "^--output_dir .*could not be written.*(No space|os error 28).*the checkpoint of step 1"
        )
        with pytest.raises(OSError, match=message):
            run("--max_train_steps=3", *flags, output_dir=out)
        assert [p.name for p in find_checkpoints(out)] == ["checkpoint-1"]
        assert find_damage(out / "checkpoint-1") is None
        assert not list(out.glob("partial-*"))  # it would keep the disk full
        (disk / "full").unlink()
        run("--max_train_steps=3", *flags, output_dir=out)
        assert [p.name for p in find_checkpoints(out)] == ["checkpoint-3"]
        run("--max_train_steps=3", *flags, output_dir=tmp_path / "never_full")
        assert_same_trained(out / "checkpoint-3", tmp_path / "never_full" / "checkpoint-3")


def test_a_folder_that_became_read_only_is_one_error(run, tmp_path):
    flags = [*SMALL, "--checkpointing_steps=1"]
    with small_disk(tmp_path / "disk", "64m") as disk:
        out = run("--max_train_steps=1", *flags, output_dir=disk / "out")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(
            OSError, match="^--output_dir .*: cannot be written .Read-only file system"
        ):
            run("--max_train_steps=4", *flags, output_dir=out)
        assert find_damage(out / "checkpoint-1") is None


# ------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory, clips):
    """A folder of three checkpoints."""
    out = tmp_path_factory.mktemp("saved")
    flags = [
        *SMALL,
        f"--base_folder={clips}",
        f"--output_dir={out}",
        "--width=64",
        "--height=48",
        "--num_workers=0",
        "--seed=1",
        "--validation_steps=0",
        "--max_train_steps=3",
        "--checkpointing_steps=1",
        "--learning_rate=1e-3",
        "--vae_encode_chunk=8",
    ]
    args = train_svd.parse(train_svd.build_parser(), flags)
    train_svd.train(args, train_svd.Recipe(export=lambda *_: None))
    return out


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "harm, name, damage",
    [
        (
            truncate,
            checkpoints.TRAINED_FILE,
            r"trained.safetensors is truncated or was changed: \d+ of \d+ bytes",
        ),
        (flip_a_bit, checkpoints.TRAINED_FILE, "trained.safetensors is corrupt"),
        (flip_a_bit, checkpoints.STATE_FILE, "state.pt is corrupt"),
        (Path.unlink, checkpoints.STATE_FILE, "state.pt is missing"),
        (truncate, checkpoints.PROGRESS_FILE, "progress.json cannot be read"),
    ],
)
def test_damaged_checkpoints_are_refused_with_the_path_and_latest_skips_them(
    saved, tmp_path, caplog, harm, name, damage
):
    out = tmp_path / "out"
    shutil.copytree(saved, out)
    damaged = out / "checkpoint-3"
    harm(damaged / name)
    message = f"^--resume_from_checkpoint {re.escape(str(damaged))}: {damage}"
    with pytest.raises(ValueError, match=message):
        pick_checkpoint(str(damaged), out)
    assert pick_checkpoint("latest", out) == out / "checkpoint-2"
    assert re.search(f"checkpoint-3 is skipped: {damage}", caplog.text)
    harm(out / "checkpoint-2" / name)
    harm(out / "checkpoint-1" / name)
    with pytest.raises(ValueError, match="^--output_dir .*: all checkpoints in it are damaged"):
        pick_checkpoint("latest", out)
    assert pick_checkpoint("latest", tmp_path / "new") is None


def test_a_run_resumes_before_a_damaged_checkpoint_and_replaces_it(run, saved, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(saved, out)
    flip_a_bit(out / "checkpoint-3" / checkpoints.TRAINED_FILE)
    run("--max_train_steps=3", *SMALL, output_dir=out)
    assert find_damage(out / "checkpoint-3") is None
    names = {p.name for p in out.glob("*checkpoint*")}
    assert names == {"checkpoint-1", "checkpoint-2", "checkpoint-3", "abandoned-checkpoint-3"}
    assert_same_trained(out / "checkpoint-3", saved / "checkpoint-3")


def test_fp16s_scaler_resumes_where_it_was(tmp_path):
    """fp16 does not train on CPUs, but its scaler is the same there."""
    model = torch.nn.Linear(2, 2)
    optimizer = SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1 / (1 + step))

    def make_manager(scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        accelerator = SimpleNamespace(
            is_main_process=True, scaler=scaler, wait_for_everyone=lambda: None
        )
        manager = checkpoints.CheckpointManager(
            accelerator, tmp_path, None, model, optimizer, schedule, None
        )
        return manager, scaler

    first, scaler = make_manager(64.0)
    for _ in range(4):
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizer.optimizer)
        scaler.update()
        schedule.step()
    with first:
        first.save({"step": 4, "samples": 4, "seed": 0})
    saved_state = scaler.state_dict()
    second, scaler = make_manager(1.0)
    assert scaler.state_dict() != saved_state
    assert second.resume(tmp_path / "checkpoint-4") == {"step": 4, "samples": 4, "seed": 0}
    assert scaler.state_dict() == saved_state
    assert saved_state["scale"] == 128
    assert saved_state["_growth_tracker"] == 1


# ------------------------------------------------------------------------ outside the training step


@pytest.mark.parametrize("where", ["validation", "tracker"])
def test_a_crash_outside_the_training_step_loses_no_checkpoint(run, tmp_path, where, monkeypatch):
    flags = [*SMALL, "--checkpointing_steps=2", "--validation_steps=2", "--num_inference_steps=1"]

    def crash(*_, **__):
        raise ConnectionError("tracker or picture gone")

    def validate(pipe, unet, step, args):
        return crash() if step else train_svd.render_validation(pipe, unet, step, args)

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        if where == "tracker":
            patch.setattr(
                "accelerate.Accelerator.log",
                lambda self, values, step: crash() if step == 3 else None,
            )
        hooks = {"validate": validate} if where == "validation" else {}
        run("--max_train_steps=4", *flags, **hooks)
    assert find_damage(tmp_path / "out" / "checkpoint-2") is None
    out = run("--max_train_steps=4", *flags)
    whole = run("--max_train_steps=4", *flags, output_dir=tmp_path / "whole")
    assert_same_trained(out / "checkpoint-4", whole / "checkpoint-4")


def test_saving_in_the_background_copies_first(run, saved, monkeypatch):
    """The checkpoint has the weights of the end of its step, though training continues."""
    steps = []
    steps_at_save = {}

    def loss(model, pipe, batch, options):
        steps.append(1)
        return train_svd.training_loss(model, pipe, batch, options)

    def save_slowly(tensors, file, save=checkpoints.save_tensors):
        deadline = time.time() + 60
        while len(steps) < 2 and time.time() < deadline:
            time.sleep(0.01)
        steps_at_save[file.parent.name] = len(steps)
        time.sleep(1)  # meanwhile step 2 changes the weights
        save(tensors, file)

    monkeypatch.setattr(checkpoints, "save_tensors", save_slowly)
    out = run("--max_train_steps=3", *SMALL, "--checkpointing_steps=1", loss=loss)
    assert steps_at_save["partial-checkpoint-1"] == 2  # step 2 had begun
    assert_same_trained(out / "checkpoint-1", saved / "checkpoint-1")
