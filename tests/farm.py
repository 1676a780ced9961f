"""Start training scripts for tests quickly: import what they need once, then fork for each start.

Run as a program, it reads jobs from standard input, one JSON document per line:

    {argv, env, world: number of processes, log: file, metrics: file,
     kill: seconds after the first new row of `metrics` until a process is killed, or null}

and answers each with {codes: exit codes, seconds}. FSDP2 and DeepSpeed run on the CPU over gloo,
which accelerate itself does not allow.
"""

import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED_ONCE = (
    "train_svd",
    "train_svd_lora",
    "train_svd_tracklet",
    "accelerate.data_loader",
    "diffusers.optimization",
    "diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion",
    "diffusers.training_utils",
    "peft",
    "svd_xtend.models.box_control",
)
LOADED_ON_ACCESS = ("CLIPImageProcessor", "CLIPVisionModelWithProjection")  # of transformers
PRINTED = 3000  # characters of a log in an assertion


def engine_env(engine):
    """Return the environment that `accelerate launch` sets for configs/accelerate/<engine>.yaml."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    if engine == "none":
        return {}
    file = str(ROOT / "configs" / "accelerate" / f"{engine}.yaml")
    args = launch_command_parser().parse_args(
        ["--config_file", file, "--main_process_port=0", "train_svd.py"]
    )
    args, *_ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = getattr(
        args, "deepspeed_fields_from_accelerate_config", ""
    )
    env = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    settings = {
        name: value
        for name, value in env.items()
        if os.environ.get(name) != value and not name.startswith(("MASTER_", "PYTHON"))
    }
    if engine == "ddp":
        settings["ACCELERATE_USE_CPU"] = "true"
    settings["DS_ACCELERATOR"] = "cpu"
    return settings


class Farm:
    """The program, as a test uses it. `path` is put on its PYTHONPATH."""

    def __init__(self, path=""):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{path}",
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            env.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env,
        )

    def run(self, *argv, engine="none", world=1, output_dir, kill=None, ok=True, env=None):
        """Run a script to its end, or until it is killed. Return (exit codes, its output, seconds).

        `engine` is a file of configs/accelerate/, or "none". With `ok`, all processes must succeed.
        """
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        log = Path(output_dir).with_name(f"{Path(output_dir).name}.log")
        argv = [*map(str, argv), f"--output_dir={output_dir}"]
        job = {
            "argv": argv,
            "env": {**engine_env(engine), **(env or {})},
            "world": world,
            "log": str(log),
            "kill": kill,
            "metrics": str(Path(output_dir, "metrics.jsonl")),
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        printed = log.read_text()
        if ok:
            assert f"{world} process(es)" in printed, printed[-PRINTED:]
            assert answer["codes"] == [0] * world, printed[-PRINTED:]
        return answer["codes"], printed, answer["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def count_rows(file):
    """Return the number of lines of a file, 0 if it does not exist."""
    return Path(file).read_text().count("\n") if Path(file).exists() else 0


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_job(job, rank, port):
    """In the forked process: run the script until it ends or raises."""
    handle = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(job["env"])
    if job["world"] > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job["world"]),
            LOCAL_WORLD_SIZE=str(job["world"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    if job["world"] > 1 and "ACCELERATE_USE_CPU" not in job["env"]:
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    if "ACCELERATE_USE_DEEPSPEED" in job["env"]:
        import deepspeed

        # Otherwise it compiles kernels for half a minute, which gloo replaces.
        deepspeed.ops.__compatible_ops__.clear()
    sys.argv = job["argv"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def has_ended(pid):
    """Return whether a child process has ended, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def serve():
    """Import everything, then run jobs until standard input ends."""
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    for name in LOADED_ON_ACCESS:
        getattr(importlib.import_module("transformers"), name)
    for line in sys.stdin:
        job = json.loads(line)
        began = time.monotonic()
        port = find_free_port()
        Path(job["log"]).unlink(missing_ok=True)
        rows_before = count_rows(job["metrics"])
        children = []
        for rank in range(job["world"]):
            pid = os.fork()
            if pid == 0:
                run_job(job, rank, port)
                return
            children.append(pid)
        if job["kill"] is not None:
            while count_rows(job["metrics"]) <= rows_before and not has_ended(children[0]):
                time.sleep(0.002)
            time.sleep(job["kill"])
            os.kill(random.choice(children), signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    serve()
