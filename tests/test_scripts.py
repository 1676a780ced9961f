"""Guard rails: what keeps the project readable in an evening."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import sample_videos
import pytest
import torch

import train_svd_lora
import train_svd_tracklet
from svd_xtend.demo.tiny_svd import TINY_SVD

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    "prepare_data.py",
    "train_svd.py",
    "train_svd_lora.py",
    "train_svd_tracklet.py",
    "infer_svd.py",
    "cache_latents.py",
    "estimate_memory.py",
    "evaluate_svd.py",
]
README = (ROOT / "README.md").read_text()


ROOMS = {
    "data": 0,
    "models": 0,
    "training": 1,
    "evaluation": 1,
    "inference": 1,
    "export": 1,
    "demo": 2,
}


def imported_modules(path):
    """Yield the names of the modules that a file imports, at its head or within a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", sorted(ROOT.glob("svd_xtend/*/*.py")), ids=lambda p: p.stem)
def test_imports_point_from_scripts_to_the_package_and_never_between_data_and_models(path):
    scripts = {script.removesuffix(".py") for script in SCRIPTS}
    room = path.parent.name
    for module in imported_modules(path):
        first, *rest = module.split(".")
        assert first not in scripts, f"{path} imports a script"
        if first == "svd_xtend" and rest and rest[0] != room:
            assert ROOMS[rest[0]] <= ROOMS[room], f"{path} imports {module}"
            assert ROOMS[room] > 0, f"{path}: data/ and models/ import nothing of other folders"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_fast_because_torch_is_not_imported(script):
    code = f"import sys, runpy; sys.argv = ['{script}', '-h']\ntry: runpy.run_path('{script}', run_name='__main__')\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    assert (
        f"usage: {script}"
        in subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
    )


def flags(parser):
    return {o for a in parser._actions for o in a.option_strings if o.startswith("--")} - {"--help"}


def test_no_flag_is_unread():
    text = "".join(
        p.read_text() for p in [*ROOT.glob("train_*.py"), *ROOT.glob("svd_xtend/*/*.py")]
    )
    for flag in flags(train_svd_lora.script_parser()) | flags(train_svd_tracklet.script_parser()):
        name = flag[2:]
        read = rf"((args|options)\.{name}\b|\"{name}\")(?!,? (type|help|action))"
        assert re.search(read, text.replace(f'"{flag}"', "")), flag


def test_flags_equal_the_readmes_table():
    table = set(
        re.findall(r"`(--\w+)`", README[README.index("## Flags") : README.index("## Files")])
    )
    assert table == flags(train_svd_lora.script_parser()) | flags(
        train_svd_tracklet.script_parser()
    )


def test_the_readmes_tree_names_every_file():
    tree = README[README.index("## Files") :]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("svd_xtend/*/[a-z]*.py")]:
        assert path.name in tree, path.name


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [
        line.strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]
    return [line for line in lines if "run_tests.sh" not in line]


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory, clips):
    """A LoRA of one step."""
    out = tmp_path_factory.mktemp("lora")
    flags = [
        "--width=64",
        "--height=48",
        "--max_train_steps=1",
        "--validation_steps=0",
        f"--base_folder={clips}",
    ]
    subprocess.run(
        [sys.executable, "train_svd_lora.py", *flags, f"--output_dir={out}"], cwd=ROOT, check=True
    )
    return out


@pytest.fixture(scope="module")
def box_folder(tmp_path_factory):
    """Box control that was never trained."""
    from svd_xtend.models.box_control import new_box_control, save_box_control
    from svd_xtend.models.loading import load_svd

    folder = tmp_path_factory.mktemp("boxes")
    save_box_control(new_box_control(load_svd(str(TINY_SVD), torch.float32).unet), folder)
    return folder


@pytest.fixture(scope="module")
def latent_cache(tmp_path_factory, boxed_clips):
    """A cache of the roaming clips."""
    folder = tmp_path_factory.mktemp("cache")
    flags = [
        f"--base_folder={boxed_clips}",
        f"--latent_cache={folder}",
        "--width=64",
        "--height=48",
    ]
    subprocess.run([sys.executable, "cache_latents.py", *flags], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A folder with a video file."""
    return sample_videos.write_video(tmp_path_factory.mktemp("films") / "film.mp4", frames=30).parent


@pytest.mark.parametrize("command", readme_commands(), ids=lambda c: re.sub(r"\W+", "_", c)[:50])
def test_every_readme_command_runs(
    command, tmp_path, clips, boxed_clips, lora_folder, box_folder, latent_cache, film, farm
):
    """As printed, but: paths that stand for a user's own are real ones, one process on the CPU, and the size, the
    length and the output folder of a test."""
    swap = {
        "/path/to/weight": TINY_SVD, "/path/to/frames": boxed_clips, "/path/to/annotations": boxed_clips,
        "photo.jpg": clips / "fall0000" / "000.png", "path.json": boxed_clips / "roam0000" / "tracklets.json",
        "outputs/lora": lora_folder, "outputs/tracklet/stage3": box_folder, "outputs/tracklet/stage1": box_folder,
        "gt/gt.txt": boxed_clips / "roam0000" / "tracklets.json", "img1": boxed_clips / "roam0000",
        '--mixed_precision="fp16"': "", "/path/to/more": clips,
    }  # fmt: skip
    for file in re.findall(r"configs/\S+", command):
        assert (ROOT / file).exists(), file
    command = re.sub(
        r"^(accelerate launch( --\w+ \S+)*|sbatch \S+)", sys.executable, command
    )  # see test_processes.py
    for old, new in swap.items():
        command = command.replace(old, str(new))
    command = re.sub("^python ", f"{sys.executable} ", command)
    if "estimate_memory.py" in command:  # writes nothing, and has to tell of the size as printed
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and re.search(r"need(s|ed) +[\d.]+ GiB", done.stdout), (
            done.stdout + done.stderr
        )
        return
    if "svd_xtend.evaluation.report" in command:
        subprocess.run(command, shell=True, cwd=ROOT, check=True)
        assert (lora_folder / "report.html").stat().st_size > 10_000
        return
    if "evaluate_svd.py" in command:
        command += f" --width=64 --height=48 --num_frames=8 --num_clips=1 --num_inference_steps=1 --output_dir={tmp_path}"
        command += f" --validation_folder={boxed_clips}" * ("validation_folder" not in command)
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        told = (
            done.stdout.endswith("PASS\n")
            if "--parity" in command
            else (tmp_path / "evaluation.json").is_file()
        )
        assert done.returncode == 0 and told, done.stdout + done.stderr
        return
    if "prepare_data.py" in command:
        command = re.sub(r"data/(extracted|halves)", str(tmp_path / "made"), command).replace(
            "/path/to/videos", str(film)
        )
        command += f" --output_dir={tmp_path / 'made'}" * (" check " in command)
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and list((tmp_path / "made").iterdir()), (
            done.stdout + done.stderr
        )
        return
    caching = "cache_latents.py" in command
    command = command.replace("/path/to/cache", str(tmp_path if caching else latent_cache))
    flags = "" if caching else f" --output_dir={tmp_path}"
    if "-m svd_xtend" not in command:
        flags += " --width=64 --height=48" + " --num_frames=8 --num_inference_steps=1" * (
            not caching
        )
    if "train_svd_tracklet.sh" in command:  # it renders at its end
        flags += " --validation_steps=0"
    if "train_" in command:
        flags += " --max_train_steps=1"
    if command.startswith(sys.executable) and "train_" in command:
        farm.run(*shlex.split(command + flags)[1:], output_dir=tmp_path)
        return
    env = {**os.environ, "CLIPS": "1"}  # that train_svd_tracklet.sh measures at its end
    done = subprocess.run(
        command + flags, shell=True, cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.iterdir())
