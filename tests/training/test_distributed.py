"""Several processes train what one process would, under each engine of configs/accelerate/."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from farm import Farm
from PIL import Image
from safetensors.torch import load_file

from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.models.box_control import new_box_control, save_box_control
from svd_xtend.models.loading import load_svd
from svd_xtend.models.precision import fast_bf16
from svd_xtend.training import distributed
from svd_xtend.training.checkpoints import find_checkpoints, read_progress

ROOT = Path(__file__).parents[2]
ENGINES = ["ddp", "fsdp2", "deepspeed_zero2"]
PLAIN = [
    "--width=64", "--height=48", "--num_workers=0", "--vae_encode_chunk=8", "--seed=1", "--mixed_precision=no",
    "--num_inference_steps=1",
]  # fmt: skip
FULL = [
    "train_svd.py", *PLAIN, "--use_ema", "--lr_scheduler=constant", "--lr_warmup_steps=3", "--learning_rate=1e-4",
    "--checkpointing_steps=2",
]  # fmt: skip
PICTURES = ["--max_train_steps=4", "--validation_steps=4"]


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory):
    """Folder with DeepSpeed, from the package registry; None if it cannot be installed."""
    folder = tmp_path_factory.mktemp("deepspeed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    options = ["--no-deps", "--no-build-isolation"]
    packages = ["deepspeed", "hjson", "py-cpuinfo", "msgpack"]
    env = {**os.environ, "DS_BUILD_OPS": "0"}
    result = subprocess.run([*pip, *options, *packages], env=env)
    return folder if result.returncode == 0 else None


@pytest.fixture(scope="module")
def farm(deepspeed):
    farm = Farm(deepspeed or "")
    yield farm
    farm.close()


@pytest.fixture
def needs(deepspeed):
    def check(engine):
        if engine.startswith("deepspeed") and not deepspeed:
            pytest.skip("DeepSpeed cannot be installed here")

    return check


@pytest.fixture(scope="module")
def alone(farm, clips, tmp_path_factory):
    """Output folder of a run of one process with batches of two."""
    out = tmp_path_factory.mktemp("alone") / "run"
    farm.run(*FULL, *PICTURES, f"--base_folder={clips}", "--per_gpu_batch_size=2", output_dir=out)
    return out


def norm_of(tensors):
    return sum(tensor.double().square().sum() for tensor in tensors).sqrt()


def distance(weights, reference):
    """Return the relative distance of two sets of weights."""
    assert weights.keys() == reference.keys()
    differences = [weights[name] - reference[name] for name in weights]
    return float(norm_of(differences) / norm_of(reference.values()))


def read_rows(out):
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(out, expected):
    """Weights and EMA weights are within 1e-6, and training has moved them by much more than that."""
    for file in ("trained.safetensors", "ema.safetensors"):
        weights = load_file(out / "checkpoint-4" / file)
        expected_weights = load_file(expected / "checkpoint-4" / file)
        assert distance(weights, expected_weights) < 1e-6, file
    base = dict(load_svd(str(TINY_SVD), torch.float32).unet.named_parameters())
    trained = load_file(expected / "checkpoint-4" / "trained.safetensors")
    assert distance(trained, {name: base[name].detach() for name in trained}) > 1e-4
    for row, expected_row in zip(read_rows(out)[-2:], read_rows(expected)[-2:]):
        for key in ("step", "loss", "lr", "grad_norm"):
            assert row[key] == pytest.approx(expected_row[key], rel=1e-4), key


# ------------------------------------------------------------------------------------------ engines


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_resumes_what_two_saved(farm, needs, engine, alone, clips, tmp_path):
    """And ends where a run of one process with twice the batch does."""
    needs(engine)
    out = tmp_path / "out"
    flags = [*FULL, "--validation_steps=0", f"--base_folder={clips}"]
    farm.run(*flags, "--max_train_steps=2", engine=engine, world=2, output_dir=out)
    _, printed, _ = farm.run(
        *flags, "--max_train_steps=4", "--per_gpu_batch_size=2", output_dir=out
    )
    assert "resumed from" in printed
    assert_same_run(out, alone)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_resume_what_one_saved_render_and_export(
    farm, needs, engine, alone, clips, tmp_path
):
    needs(engine)
    out = tmp_path / "out"
    shutil.copytree(alone / "checkpoint-2", out / "checkpoint-2")
    _, printed, _ = farm.run(
        *FULL, *PICTURES, f"--base_folder={clips}", engine=engine, world=2, output_dir=out
    )
    assert "resumed from" in printed
    assert_same_run(out, alone)
    exported = load_file(out / "unet/diffusion_pytorch_model.safetensors")
    ema_weights = load_file(out / "checkpoint-4/ema.safetensors")
    assert all(torch.equal(exported[name], ema_weights[name]) for name in ema_weights)
    for name in ("validation/step000004_fall0000_000.png", "comparison.png"):
        picture, expected = (np.asarray(Image.open(run / name)).astype(int) for run in (out, alone))
        assert abs(picture - expected).max() <= 2


@pytest.mark.skipif(not fast_bf16(), reason="no bfloat16 here")
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_half_precision_frozen_in_bf16_trained_in_float32(farm, needs, engine, clips, tmp_path):
    """As in configs/accelerate/. Rounding depends on the batch, so gradients differ a little."""
    needs(engine)
    flags = [
        "train_svd_lora.py",
        *PLAIN[:-2],
        f"--base_folder={clips}",
        "--mixed_precision=bf16",
        "--validation_steps=0",
        "--max_train_steps=2",
        "--learning_rate=1e-3",
    ]
    farm.run(*flags, engine=engine, world=2, output_dir=tmp_path / "two")
    farm.run(*flags, "--gradient_accumulation_steps=2", output_dir=tmp_path / "one")
    one = read_rows(tmp_path / "one")
    two = read_rows(tmp_path / "two")
    for key, tolerance in (("loss", 1e-3), ("grad_norm", 1e-2)):
        expected = pytest.approx([row[key] for row in two], rel=tolerance)
        assert [row[key] for row in one] == expected


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_lora_under_accumulation(farm, engine, clips, tmp_path):
    """Two processes that accumulate two clips each train the LoRA of one process with four at once.

    Also if each resumes what the other saved."""
    flags = [
        "train_svd_lora.py",
        *PLAIN,
        f"--base_folder={clips}",
        "--checkpointing_steps=1",
        "--validation_steps=0",
    ]
    together, apart = ["--per_gpu_batch_size=4"], ["--gradient_accumulation_steps=2"]
    farm.run(*flags, *together, "--max_train_steps=2", output_dir=tmp_path / "one")
    shutil.copytree(tmp_path / "one" / "checkpoint-1", tmp_path / "two" / "checkpoint-1")
    farm.run(
        *flags, *apart, "--max_train_steps=2", engine=engine, world=2, output_dir=tmp_path / "two"
    )
    shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "on" / "checkpoint-2")
    for out in ("one", "on"):
        farm.run(*flags, *together, "--max_train_steps=3", output_dir=tmp_path / out)
    one, on = (
        load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("one", "on")
    )
    assert distance(on, one) < 1e-6
    one, two = (
        load_file(tmp_path / run / "checkpoint-2" / "trained.safetensors") for run in ("one", "two")
    )
    assert distance(two, one) < 1e-6


@pytest.fixture(scope="module")
def boxed_alone(farm, boxed_clips, tmp_path_factory):
    """(flags, output folder) of a run of one process with box control, open gates, batches of two."""
    folder = tmp_path_factory.mktemp("boxed")
    adapter = new_box_control(load_svd(str(TINY_SVD), torch.float32).unet)
    for name, p in adapter.named_parameters():
        if "alpha" in name:
            p.data += 0.5
    save_box_control(adapter, folder)
    flags = ["train_svd_tracklet.py", *PLAIN, f"--base_folder={boxed_clips}", f"--tracklet_weights={folder}",
             "--gradient_checkpointing=nested", "--max_train_steps=2", "--validation_steps=2", "--lr_warmup_steps=0"]  # fmt: skip
    farm.run(*flags, "--per_gpu_batch_size=2", output_dir=folder / "one")
    return flags, folder / "one"


@pytest.mark.parametrize("engine", ENGINES)
def test_box_control(farm, needs, engine, boxed_alone, tmp_path):
    """With activation checkpointing, and a validation that shows the boxes."""
    needs(engine)
    flags, alone = boxed_alone
    farm.run(*flags, engine=engine, world=2, output_dir=tmp_path / "two")
    one, two = (
        load_file(run / "tracklet_weights.safetensors") for run in (alone, tmp_path / "two")
    )
    assert distance(two, one) < 1e-6
    assert (tmp_path / "two" / "comparison.gif").exists()


@pytest.mark.parametrize(
    "engine, precision, flags, message",
    [
        ("DEEPSPEED", "fp16", {}, "--mixed_precision fp16: not with DeepSpeed"),
        (
            "DEEPSPEED",
            "bf16",
            {"optimizer": "adamw_bf16_sr"},
            "--optimizer adamw_bf16_sr: not with DeepSpeed",
        ),
        ("FSDP", "fp16", {}, "--mixed_precision fp16: not with FSDP2"),
        ("FSDP", "bf16", {"optimizer": "adamw8bit"}, "--optimizer adamw8bit: not with FSDP2"),
        ("FSDP", "bf16", {"offload_activations": True}, "--offload_activations: not with FSDP2"),
    ],
)
def test_flags_that_do_not_work_with_an_engine_are_errors(engine, precision, flags, message):
    defaults = {"optimizer": "adamw", "offload_activations": False}
    args = SimpleNamespace(mixed_precision=precision, **{**defaults, **flags})
    with pytest.raises(ValueError, match=f"^{message}"):
        distributed.check_engine(SimpleNamespace(distributed_type=engine), args)
    distributed.check_engine(SimpleNamespace(distributed_type="MULTI_GPU"), args)


# ------------------------------------------------------------------------------------ fail together

SCRIPT = """
import os, sys
import train_svd

def loss(model, pipe, batch, args):
    loss.calls = getattr(loss, "calls", 0) + 1
    if loss.calls == 3 and int(os.environ["RANK"]) == {rank}:
        {what}
    return train_svd.training_loss(model, pipe, batch, args)

train_svd.train(train_svd.parse(train_svd.build_parser()), train_svd.Recipe(loss=loss))
"""


def train_two(farm, tmp_path, clips, rank, what, steps=4):
    """Train on two processes; in the third step, process `rank` runs the statement `what`."""
    (tmp_path / "script.py").write_text(SCRIPT.format(rank=rank, what=what))
    flags = [*PLAIN, f"--base_folder={clips}", "--train_params", "conv_out", "--validation_steps=0"]
    flags += ["--checkpointing_steps=1", f"--max_train_steps={steps}"]
    return farm.run(
        tmp_path / "script.py",
        *flags,
        engine="ddp",
        world=2,
        output_dir=tmp_path / "out",
        ok=False,
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_both_with_its_message(farm, tmp_path, clips, rank):
    what = 'raise ValueError("a broken clip")'
    codes, printed, seconds = train_two(farm, tmp_path, clips, rank, what)
    assert codes == [1, 1] and seconds < 60
    assert "ValueError: a broken clip" in printed
    if rank == 1:
        # Process 0 hosts the store here, and the store ends with it. A launcher would host it.
        assert "process 1 on" in printed and "process 0 ends with it" in printed
    assert [p.name for p in find_checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]


def test_processes_that_see_different_videos_do_not_start(farm, tmp_path, clips):
    """A folder that is being filled, or that differs between machines: samples would repeat or miss."""
    shutil.copytree(clips, tmp_path / "fuller")
    shutil.copytree(clips / "fall0000", tmp_path / "fuller" / "one_more")
    script = SCRIPT.format(rank=0, what="pass").replace(
        "train_svd.train(",
        f"os.environ['RANK'] == '1' and sys.argv.append('--base_folder={tmp_path}/fuller')\ntrain_svd.train(",
    )
    (tmp_path / "script.py").write_text(script)
    flags = [*PLAIN, f"--base_folder={clips}", "--validation_steps=0", "--max_train_steps=1"]
    codes, printed, _ = farm.run(
        tmp_path / "script.py",
        *flags,
        engine="ddp",
        world=2,
        output_dir=tmp_path / "out",
        ok=False,
    )
    assert (
        codes == [1, 1]
        and "ValueError: --base_folder: the processes see different files there" in printed
    )


def test_under_a_launcher_the_others_name_the_one_that_failed(tmp_path, clips):
    (tmp_path / "script.py").write_text(
        SCRIPT.format(rank=0, what='raise ValueError("a broken clip")')
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
               "--rdzv_endpoint=localhost:0", tmp_path / "script.py", *PLAIN, f"--base_folder={clips}", "--train_params",
               "conv_out", "--validation_steps=0", "--max_train_steps=6", f"--output_dir={tmp_path / 'out'}"]  # fmt: skip
    env = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        list(map(str, command)), env=env, capture_output=True, text=True, timeout=120
    )
    assert "2 process(es)" in done.stderr and done.returncode
    assert "process 0 on" in done.stderr and "process 1 ends with it" in done.stderr


def test_a_process_that_waits_for_a_failed_one_that_hangs_is_ended_too(farm, tmp_path, clips):
    """The connection stays open, as a GPU's does: only the message reaches the other process."""
    what = 'sys.excepthook(ValueError, ValueError("stuck"), None); import time; time.sleep(100)'
    codes, printed, seconds = train_two(farm, tmp_path, clips, 1, what)
    assert codes == [1, 1] and seconds < 60
    assert (
        "process 1 on" in printed and "failed: ValueError: stuck\nprocess 0 ends with it" in printed
    )


def test_a_signal_to_one_process_stops_all_at_one_step_with_a_checkpoint(farm, tmp_path, clips):
    codes, printed, _ = train_two(
        farm, tmp_path, clips, 1, f"os.kill(os.getpid(), {int(signal.SIGTERM)})"
    )
    assert (
        codes == [143, 143]
        and "stopped at step 3; the same command continues from there" in printed
    )
    assert read_progress(find_checkpoints(tmp_path / "out")[-1])["step"] == 3
    codes, printed, _ = train_two(farm, tmp_path, clips, 1, "pass")
    assert codes == [0, 0] and "resumed from" in printed


def test_one_process_killed_ends_the_other_and_the_run_resumes_to_the_same_weights(
    farm, tmp_path, clips
):
    codes, *_ = train_two(farm, tmp_path, clips, 1, f"os.kill(os.getpid(), {int(signal.SIGKILL)})")
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    train_two(farm, tmp_path, clips, 1, "pass")
    resumed = load_file(tmp_path / "out" / "checkpoint-4" / "trained.safetensors")
    shutil.rmtree(tmp_path / "out")
    train_two(farm, tmp_path, clips, 1, "pass")
    whole = load_file(tmp_path / "out" / "checkpoint-4" / "trained.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def cpu_config(tmp_path):
    """Write a copy of multi_node.yaml for CPUs, and return its path."""
    config = tmp_path / "cpu.yaml"
    text = (ROOT / "configs/accelerate/multi_node.yaml").read_text()
    config.write_text(text.replace("use_cpu: false", "use_cpu: true"))
    return config


def test_two_machines_train_as_one(tmp_path, clips):
    """Two launchers with one process each find each other, as on two machines."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    flags = ["train_svd.py", *PLAIN, f"--base_folder={clips}", "--train_params", "conv_out", "--validation_steps=0",
             "--max_train_steps=2", f"--output_dir={tmp_path / 'out'}"]  # fmt: skip
    launchers = []
    for rank in range(2):
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            cpu_config(tmp_path),
        ]
        command += ["--num_processes", 2, "--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
        command += ["--main_process_port", port, *flags]
        log = open(tmp_path / f"log{rank}", "w")
        launchers.append(
            subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stdout=log, stderr=log)
        )
    codes = [launcher.wait(120) for launcher in launchers]
    printed = (tmp_path / "log0").read_text()
    assert "2 process(es)" in printed and codes == [0, 0], printed[-3000:]
    assert read_progress(find_checkpoints(tmp_path / "out")[-1])["samples"] == 4


def test_the_slurm_script_saves_before_its_time_is_up_and_queues_itself_again(tmp_path, clips):
    """With stand-ins for SLURM's commands: srun kills its command if it gets a signal itself, scancel
    signals the command, scontrol records its arguments."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(
        f'#!/bin/bash\nshift; "$@" & echo $! > {tmp_path}/step; trap "kill -KILL $!" TERM; wait $!\n'
    )
    (tools / "scontrol").write_text(f'#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" > {tmp_path}/asked; fi\n')  # fmt: skip
    (tools / "scancel").write_text(
        f'#!/bin/bash\n[ "$*" = "--signal=TERM 7" ] && kill -TERM $(cat {tmp_path}/step)\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}", "CONFIG": str(cpu_config(tmp_path)),
           "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "n", "SLURM_NODEID": "0",
           "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
    flags = [
        *PLAIN,
        f"--base_folder={clips}",
        "--train_params",
        "conv_out",
        "--validation_steps=0",
        "--max_train_steps=999",
    ]
    out = tmp_path / "out"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            ["bash", "configs/train.sbatch", "train_svd.py", *flags, f"--output_dir={out}"], cwd=ROOT, env=env, stdout=log, stderr=log
        )  # fmt: skip
        deadline = time.time() + 120
        while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text()):
            assert time.time() < deadline and process.poll() is None, (
                tmp_path / "log"
            ).read_text()[-3000:]
            time.sleep(0.2)
        process.terminate()  # to the batch script alone, as --signal=B: does
        process.wait(120)
    printed = (tmp_path / "log").read_text()
    assert "2 process(es)" in printed and "the same command continues from there" in printed, (
        printed[-3000:]
    )
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert len(find_checkpoints(out)) == 1
