"""Checkpoints survive: kills at random moments, full and read-only disks, files that were damaged since."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_svd
from svd_xtend.training import checkpoints
from svd_xtend.training.checkpoints import find_checkpoints, find_damage, pick_checkpoint

SMALL = ["--train_params", "conv_out", "mid_block.attentions"]

# Saving takes a fifth of a second longer than it does, so that many kills fall into it; tells what the process is at.
SCRIPT = """
import sys, time
import train_svd
from svd_xtend.training import checkpoints

def at(what):
    with open({at!r}, "w") as f:
        f.write(what)

def slow(*paths, flush=checkpoints.flush_to_disk):
    time.sleep(0.1)
    flush(*paths)

def validate(pipe, unet, step, args):
    at("validating")
    if step:
        train_svd.render_validation(pipe, unet, step, args)
    at("stepping")
    return []

checkpoints.flush_to_disk = slow
args = train_svd.parse(train_svd.build_parser())
train_svd.train(args, train_svd.Recipe(validate=validate))
"""


def test_25_kills_at_random_moments_lose_nothing(farm, clips, tmp_path):
    """kill -9 in steps, while saving, while validating; each time the last checkpoint is whole, and in the end the weights
    are to the bit those of a run that was never killed."""
    (tmp_path / "script.py").write_text(SCRIPT.format(at=str(tmp_path / "at")))
    flags = [
        tmp_path / "script.py", *SMALL, f"--base_folder={clips}", "--width=64", "--height=48", "--num_workers=0",
        "--vae_encode_chunk=8", "--seed=3", "--mixed_precision=no", "--num_inference_steps=1", "--validation_steps=3",
        "--checkpointing_steps=1", "--checkpoints_total_limit=1", "--use_ema", "--lr_scheduler=cosine",
        "--max_train_steps=52",
    ]  # fmt: skip
    rng, out = random.Random(), tmp_path / "killed"
    kills, moments, last = 0, {"saving": 0, "validating": 0, "stepping": 0}, 0
    farm.run("train_svd.py", *flags[1:], output_dir=tmp_path / "whole")
    while True:
        kill = rng.uniform(0, 0.5) if kills < 25 or not all(moments.values()) else None
        (code,), printed, _ = farm.run(*flags, output_dir=out, kill=kill, ok=False)
        if code == 0:
            break
        assert code == -9, printed[-3000:]
        kills += 1
        if found := find_checkpoints(out):
            assert find_damage(found[-1]) is None
        step = checkpoints.read_progress(found[-1])["step"] if found else 0
        assert step >= last  # no kill took away what was saved before
        last = step
        moments["saving" if list(out.glob("partial-*")) else (tmp_path / "at").read_text()] += 1
    print(kills, "kills:", moments)
    assert kills >= 25 and min(moments.values()) > 0
    for name in (checkpoints.TRAINED_FILE, checkpoints.EMA_FILE):
        ends = [
            (tmp_path / run / "checkpoint-52" / name).read_bytes() for run in ("whole", "killed")
        ]
        assert ends[0] == ends[1]
    files = [tmp_path / run / "metrics.jsonl" for run in ("whole", "killed")]
    rows = [[json.loads(row)["loss"] for row in file.read_text().splitlines()] for file in files]
    assert rows[0] == rows[1] and len(rows[0]) == 52
    assert not list(out.glob("partial-*"))


# --------------------------------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of its own in memory, of so many bytes."""
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        ).returncode
    ):
        pytest.skip("may not mount a file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_error_and_the_run_goes_on_when_there_is_room(run, tmp_path):
    flags = [*SMALL, "--checkpointing_steps=1", "--checkpoints_total_limit=1"]
    with small_disk(tmp_path / "disk", "64m") as disk:
        out = run("--max_train_steps=1", *flags, output_dir=disk / "out")
        size = sum(f.stat().st_size for f in (out / "checkpoint-1").iterdir())
        free = shutil.disk_usage(disk).free
        (disk / "full").write_bytes(bytes(free - size // 2))
        told = "^--output_dir .*could not be written.*(No space|os error 28).*the checkpoint of step 1"
        with pytest.raises(OSError, match=told):
            run("--max_train_steps=3", *flags, output_dir=out)
        assert [p.name for p in find_checkpoints(out)] == ["checkpoint-1"] and find_damage(
            out / "checkpoint-1"
        ) is None
        assert not list(out.glob("partial-*"))  # it would keep the disk full
        (disk / "full").unlink()
        run("--max_train_steps=3", *flags, output_dir=out)
        assert [p.name for p in find_checkpoints(out)] == ["checkpoint-3"]
        ended = load_file(out / "checkpoint-3" / checkpoints.TRAINED_FILE)
    run("--max_train_steps=3", *flags, output_dir=tmp_path / "never_full")
    whole = load_file(tmp_path / "never_full" / "checkpoint-3" / checkpoints.TRAINED_FILE)
    assert all(torch.equal(whole[name], ended[name]) for name in whole)


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


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory, clips):
    """A folder of three checkpoints."""
    out = tmp_path_factory.mktemp("saved")
    flags = [
        f"--base_folder={clips}", f"--output_dir={out}", "--width=64", "--height=48", "--num_workers=0", "--seed=1",
        "--validation_steps=0", "--max_train_steps=3", "--checkpointing_steps=1", "--learning_rate=1e-3",
        "--vae_encode_chunk=8", *SMALL,
    ]  # fmt: skip
    args = train_svd.parse(train_svd.build_parser(), flags)
    train_svd.train(args, train_svd.Recipe(export=lambda *_: None))
    return out


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "harm, name, told",
    [
        (
            truncate,
            checkpoints.TRAINED_FILE,
            r"trained.safetensors is truncated or was changed: \d+ of \d+ bytes",
        ),
        (flip, checkpoints.TRAINED_FILE, "trained.safetensors is corrupt"),
        (flip, checkpoints.STATE_FILE, "state.pt is corrupt"),
        (Path.unlink, checkpoints.STATE_FILE, "state.pt is missing"),
        (truncate, checkpoints.PROGRESS_FILE, "progress.json cannot be read"),
    ],
)
def test_damaged_checkpoints_are_refused_with_the_path_and_latest_goes_past_them(
    saved, tmp_path, caplog, harm, name, told
):
    shutil.copytree(saved, tmp_path / "out")
    out = tmp_path / "out"
    harm(out / "checkpoint-3" / name)
    with pytest.raises(
        ValueError,
        match=f"^--resume_from_checkpoint {re.escape(str(out / 'checkpoint-3'))}: {told}",
    ):
        pick_checkpoint(str(out / "checkpoint-3"), out)
    assert pick_checkpoint("latest", out) == out / "checkpoint-2"
    assert re.search(f"checkpoint-3 is skipped: {told}", caplog.text)
    harm(out / "checkpoint-2" / name)
    harm(out / "checkpoint-1" / name)
    with pytest.raises(ValueError, match="^--output_dir .*: all checkpoints in it are damaged"):
        pick_checkpoint("latest", out)
    assert pick_checkpoint("latest", tmp_path / "new") is None


def test_a_run_goes_on_before_a_damaged_checkpoint_and_replaces_it(run, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "out")
    flip(tmp_path / "out" / "checkpoint-3" / checkpoints.TRAINED_FILE)
    run("--max_train_steps=3", *SMALL, output_dir=tmp_path / "out")
    assert find_damage(tmp_path / "out" / "checkpoint-3") is None
    names = {p.name for p in (tmp_path / "out").glob("*checkpoint*")}
    assert names == {"checkpoint-1", "checkpoint-2", "checkpoint-3", "abandoned-checkpoint-3"}
    ends = [
        load_file(folder / "checkpoint-3" / checkpoints.TRAINED_FILE)
        for folder in (saved, tmp_path / "out")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_fp16s_scaler_goes_on_where_it_was(tmp_path):
    """fp16 does not train on CPUs, but its scaler is the same there."""
    from types import SimpleNamespace

    model = torch.nn.Linear(2, 2)
    optimizer = SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1 / (1 + step))

    def saver(scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        accelerator = SimpleNamespace(
            is_main_process=True, scaler=scaler, wait_for_everyone=lambda: None
        )
        return checkpoints.CheckpointManager(
            accelerator, tmp_path, None, model, optimizer, schedule, None
        ), scaler

    first, scaler = saver(64.0)
    for _ in range(4):
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizer.optimizer)
        scaler.update()
        schedule.step()
    with first:
        first.save({"step": 4, "samples": 4, "seed": 0})
    kept = scaler.state_dict()
    second, scaler = saver(1.0)
    assert scaler.state_dict() != kept
    assert second.resume(tmp_path / "checkpoint-4") == {"step": 4, "samples": 4, "seed": 0}
    assert scaler.state_dict() == kept and kept["scale"] == 128 and kept["_growth_tracker"] == 1


# ---------------------------------------------------------------------------------------------------- beside the steps


@pytest.mark.parametrize("where", ["validation", "tracker"])
def test_a_crash_beside_training_loses_no_saved_step(run, tmp_path, where, monkeypatch):
    flags = [*SMALL, "--checkpointing_steps=2", "--validation_steps=2", "--num_inference_steps=1"]

    def crash(*_, **__):
        raise ConnectionError("tracker or picture gone")

    def validate(pipe, unet, step, args):
        return crash() if step else train_svd.render_validation(pipe, unet, step, args)

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        if where == "tracker":
            patch.setattr(
                "accelerate.Accelerator.log",
                lambda self, told, step: crash() if step == 3 else None,
            )
        run(
            "--max_train_steps=4",
            *flags,
            **({"validate": validate} if where == "validation" else {}),
        )
    assert find_damage(tmp_path / "out" / "checkpoint-2") is None
    out = run("--max_train_steps=4", *flags)
    whole = run("--max_train_steps=4", *flags, output_dir=tmp_path / "whole")
    ends = [
        load_file(folder / "checkpoint-4" / checkpoints.TRAINED_FILE) for folder in (out, whole)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_saving_in_the_background_copies_first(run, saved, monkeypatch):
    """What is written is what the weights were when the step ended, though training goes on while it is written."""
    steps, seen = [], {}

    def loss(model, pipe, batch, args):
        steps.append(1)
        return train_svd.training_loss(model, pipe, batch, args)

    def slow(tensors, file, save=checkpoints.save_tensors):
        deadline = time.time() + 60
        while len(steps) < 2 and time.time() < deadline:
            time.sleep(0.01)
        seen[file.parent.name] = len(steps)
        time.sleep(1)  # step 2 moves the weights
        save(tensors, file)

    monkeypatch.setattr(checkpoints, "save_tensors", slow)
    out = run("--max_train_steps=3", *SMALL, "--checkpointing_steps=1", loss=loss)
    assert seen["partial-checkpoint-1"] == 2  # step 2 had begun
    ends = [
        load_file(folder / "checkpoint-1" / checkpoints.TRAINED_FILE) for folder in (out, saved)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
