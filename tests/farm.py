"""Starts trainers for tests: imports once what they import, then forks. A start costs a fork instead of ten seconds.

Run as a program it reads jobs, one JSON a line: {argv, env, world, log, kill: seconds after the first new step, or null},
and answers each with {codes, seconds}. FSDP2 and DeepSpeed run on the CPU over gloo; accelerate keeps them to GPUs by name.
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
WARM = (
    "train_svd", "train_svd_lora", "train_svd_tracklet", "accelerate.data_loader", "diffusers.optimization", "peft",
    "diffusers.training_utils", "diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion",
    "svd_xtend.models.box_control",
)  # fmt: skip


def engine_env(engine):
    """What `accelerate launch --config_file configs/accelerate/<engine>.yaml` sets; for DDP on the CPU one flag."""
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
    own = {
        k: v
        for k, v in env.items()
        if os.environ.get(k) != v and not k.startswith(("MASTER_", "PYTHON"))
    }
    return {
        **own,
        **({"ACCELERATE_USE_CPU": "true"} if engine == "ddp" else {}),
        "DS_ACCELERATOR": "cpu",
    }


class Farm:
    """The program, from a test's side."""

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
        """Run to the end, or until killed; returns (codes, what was printed, seconds)."""
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        log = Path(output_dir).with_name(f"{Path(output_dir).name}.log")
        argv = [*map(str, argv), f"--output_dir={output_dir}"]
        job = {
            "argv": argv,
            "env": {**engine_env(engine), **(env or {})},
            "world": world,
            "log": str(log),
            "kill": kill,
        }
        job["metrics"] = str(Path(output_dir, "metrics.jsonl"))
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        printed = log.read_text()
        if ok:
            assert f"{world} process(es)" in printed, printed[
                -3000:
            ]  # before all else: there were that many
            assert answer["codes"] == [0] * world, printed[-3000:]
        return answer["codes"], printed, answer["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def rows(file):
    return Path(file).read_text().count("\n") if Path(file).exists() else 0


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def become(job, rank, port):
    """In the forked process: the trainer, until it ends or raises."""
    handle = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(job["env"])
    if job["world"] > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]), LOCAL_WORLD_SIZE=str(job["world"]),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    if job["world"] > 1 and "ACCELERATE_USE_CPU" not in job["env"]:
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    if "ACCELERATE_USE_DEEPSPEED" in job["env"]:
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # else it compiles, for half a minute, what gloo does as well
    sys.argv = job["argv"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def serve():
    """The program."""
    for name in WARM:
        importlib.import_module(name)
    for name in (
        "CLIPImageProcessor",
        "CLIPVisionModelWithProjection",
    ):  # which transformers imports when asked
        getattr(importlib.import_module("transformers"), name)
    for line in sys.stdin:
        job, began, port = json.loads(line), time.monotonic(), free_port()
        Path(job["log"]).unlink(missing_ok=True)
        before, children = rows(job["metrics"]), []
        for rank in range(job["world"]):
            pid = os.fork()
            if not pid:
                return become(job, rank, port)
            children.append(pid)
        codes = [None] * len(children)
        if job["kill"] is not None:
            while rows(job["metrics"]) <= before and os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:  # fmt: skip
                time.sleep(0.002)
            time.sleep(job["kill"])
            os.kill(random.choice(children), signal.SIGKILL)
        for i, pid in enumerate(children):
            codes[i] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    serve()
