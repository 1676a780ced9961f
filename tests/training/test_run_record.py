"""run.json and the *.jsonl files, without a run. test_trackers.py tests them in whole runs."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from svd_xtend.training import run_record
from svd_xtend.training.run_record import ROOT, describe_start, launch_command

RESOLVED_ARGS = SimpleNamespace(seed=3, mixed_precision="bf16")


def make_accelerator(num_processes, engine="NO"):
    """Return what run_record asks of an Accelerator."""
    return SimpleNamespace(
        num_processes=num_processes,
        device=torch.device("cpu"),
        distributed_type=SimpleNamespace(value=engine),
    )


@pytest.fixture
def plain_launch(monkeypatch):
    """Set the command to `train_svd.py --seed=3`, without a launcher; return the MonkeyPatch."""
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train_svd.py", "--seed=3"])
    monkeypatch.chdir(ROOT)
    return monkeypatch


@pytest.mark.parametrize(
    "num_processes, engine, launcher",
    [
        (1, "NO", "python"),
        (2, "MULTI_GPU", "accelerate launch --num_processes 2"),
        (2, "MULTI_CPU", "ACCELERATE_USE_CPU=true torchrun --nproc_per_node=2"),
        (
            8,
            "FSDP",
            "accelerate launch --num_processes 8 --config_file configs/accelerate/fsdp2.yaml",
        ),
    ],
)
def test_a_command_names_the_launcher_that_ran(plain_launch, num_processes, engine, launcher):
    command = launch_command(make_accelerator(num_processes, engine), RESOLVED_ARGS)
    assert command == f"{launcher} train_svd.py --seed=3 --mixed_precision=bf16"


def test_a_command_names_accelerate_launch_of_one_process(plain_launch):
    plain_launch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    plain_launch.setenv("ACCELERATE_USE_CPU", "True")
    command = launch_command(make_accelerator(1), RESOLVED_ARGS)
    script = "train_svd.py --seed=3 --mixed_precision=bf16"
    assert command == f"accelerate launch --num_processes 1 --cpu {script}"


def test_a_start_holds_no_token_of_the_environment(plain_launch):
    """`hf auth login`, HF_TOKEN and WANDB_API_KEY are how tokens are passed; no flag takes one."""
    plain_launch.setenv("HF_TOKEN", "hf_verysecret")
    plain_launch.setenv("WANDB_API_KEY", "wandb_verysecret")
    start = json.dumps(describe_start(make_accelerator(1), RESOLVED_ARGS))
    assert "verysecret" not in start


def test_outside_of_git_there_is_no_commit(plain_launch, tmp_path):
    """Also if the code lies in another project's checkout without being part of it."""
    plain_launch.setattr(run_record, "ROOT", tmp_path)
    start = describe_start(make_accelerator(1), RESOLVED_ARGS)
    assert start["commit"] is None
    assert start["changed"] is None
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert describe_start(make_accelerator(1), RESOLVED_ARGS)["commit"] is None
    plain_launch.setenv("PATH", str(tmp_path))  # no git at all
    assert describe_start(make_accelerator(1), RESOLVED_ARGS)["commit"] is None


def test_a_changed_checkout_says_so(plain_launch, tmp_path):
    plain_launch.setattr(run_record, "ROOT", tmp_path)
    file = tmp_path / "svd_xtend" / "training" / "run_record.py"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    asked = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    head = asked.stdout.strip()
    (tmp_path / "notes").write_text("not tracked")
    clean = describe_start(make_accelerator(1), RESOLVED_ARGS)
    assert (clean["commit"], clean["changed"]) == (head, False)
    file.write_text("2")
    changed = describe_start(make_accelerator(1), RESOLVED_ARGS)
    assert (changed["commit"], changed["changed"]) == (head, True)


def test_a_damaged_run_json_is_no_reason_not_to_train(tmp_path):
    assert run_record.read_starts(tmp_path) == []
    (tmp_path / "run.json").write_text("{")
    assert run_record.read_starts(tmp_path) == []


def test_rows_are_sorted_by_step_and_a_later_row_replaces_that_of_its_step(tmp_path):
    file = tmp_path / "rows.jsonl"
    for step, loss in ((2, 0.5), (1, 0.7), (2, 0.4)):
        run_record.write_row(file, {"step": step, "loss": loss})
    assert run_record.read_rows(file) == [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.4}]
    with file.open("a") as f:
        f.write('{"step": 3, "lo')  # cut off by a kill
    assert [row["step"] for row in run_record.read_rows(file)] == [1, 2]
