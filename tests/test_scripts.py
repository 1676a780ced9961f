"""Guard rails: import rules, fast --help, documented flags, files and links, and every documented command."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sample_videos
import torch
from farm import Farm

import train_svd_lora
import train_svd_tracklet
from svd_xtend.demo.tiny_svd import TINY_SVD

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
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


# ---------------------------------------------------------------------------------------- imports


# A module may import from folders of its own level and of lower levels.
LEVELS = {
    "data": 0,
    "models": 0,
    "training": 1,
    "evaluation": 1,
    "inference": 1,
    "export": 1,
    "demo": 2,
}


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the names of the modules that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", sorted(ROOT.glob("svd_xtend/*/*.py")), ids=lambda p: p.stem)
def test_imports_point_from_scripts_to_the_package_and_never_between_data_and_models(path):
    scripts = {script.removesuffix(".py") for script in SCRIPTS}
    folder = path.parent.name
    for module in imported_modules(path):
        package, *parts = module.split(".")
        assert package not in scripts, f"{path} imports a script"
        if package != "svd_xtend" or not parts or parts[0] == folder:
            continue
        assert LEVELS[parts[0]] <= LEVELS[folder], f"{path} imports {module}"
        assert LEVELS[folder] > 0, f"{path}: data/ and models/ import nothing from other folders"


HELP_WITHOUT_TORCH = """
import runpy, sys
sys.argv = ["{script}", "-h"]
try:
    runpy.run_path("{script}", run_name="__main__")
except SystemExit:
    pass
assert "torch" not in sys.modules and "diffusers" not in sys.modules
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_fast_because_torch_is_not_imported(script):
    code = HELP_WITHOUT_TORCH.format(script=script)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert f"usage: {script}" in done.stdout


# ------------------------------------------------------------------------------ flags, files, links


def flags(parser):
    """Return the long flags of a parser, without --help."""
    names = {name for action in parser._actions for name in action.option_strings}
    return {name for name in names if name.startswith("--")} - {"--help"}


def test_every_flag_is_read():
    files = [*ROOT.glob("train_*.py"), *ROOT.glob("svd_xtend/*/*.py")]
    text = "".join(path.read_text() for path in files)
    for flag in flags(train_svd_lora.script_parser()) | flags(train_svd_tracklet.script_parser()):
        name = flag.removeprefix("--")
        read = rf"((args|options|first_pass)\.{name}\b|\"{name}\")(?!,? (type|help|action))"
        assert re.search(read, text.replace(f'"{flag}"', "")), flag


def test_the_page_of_flags_is_what_the_parsers_say():
    path = ROOT / "docs" / "make_flags.py"
    spec = importlib.util.spec_from_file_location("make_flags", path)
    make_flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_flags)
    assert make_flags.PAGE.read_text() == make_flags.make_page(), "run python docs/make_flags.py"


def test_the_tree_in_the_architecture_page_names_every_file():
    tree = (ROOT / "docs" / "architecture.md").read_text()
    files = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("svd_xtend/*/[a-z]*.py")]
    for path in files:
        assert path.name in tree, path.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_the_documentation_point_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


# ------------------------------------------------------------------------------ documented commands
#
# Each command in a ```bash block of the README and of docs/ runs as it is printed, with four changes:
# - paths that stand for the user's own are replaced by real ones (`real_paths`);
# - `accelerate launch` and `sbatch` are left out: one process on the CPU;
# - size and number of steps are those of a test (the functions `run_...`);
# - the output goes into a temporary folder.


def documented_commands() -> list[str]:
    """Return every command of the documentation once, each on one line."""
    commands = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            commands += [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip()]
    once = dict.fromkeys(commands)
    return [command for command in once if "run_tests.sh" not in command]


@dataclass(frozen=True)
class Setting:
    """What a command runs with: its output folder, a process that starts trainers, a video, and a LoRA run."""

    output: Path
    farm: Farm
    videos: Path
    lora: Path
    latent_cache: Path
    boxed_clips: Path


TINY_CLIP = "--width=64 --height=48 --num_frames=8"
TINY = f"{TINY_CLIP} --num_inference_steps=1"


def run(command: str, **env: str) -> str:
    """Run a shell command in the root of the project, and return what it printed; fail if it fails."""
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_trainer(command: str, setting: Setting) -> None:
    """Train one step, in a forked process: it starts without importing torch anew."""
    command = command.replace("/path/to/cache", str(setting.latent_cache))
    _, *argv = shlex.split(f"{command} {TINY} --max_train_steps=1")
    setting.farm.run(*argv, output_dir=setting.output)


def run_trainer_script(command: str, setting: Setting) -> None:
    """Train one step with a .sh script. It sets up and launches; one clip is measured at its end."""
    command += f" --output_dir={setting.output} {TINY} --max_train_steps=1"
    if "tracklet" in command:  # it renders at its end
        command += " --validation_steps=0"
    run(command, CLIPS="1")
    assert list(setting.output.iterdir())


def run_cache(command: str, setting: Setting) -> None:
    """Encode the clips."""
    run(command.replace("/path/to/cache", str(setting.output)) + " --width=64 --height=48")
    assert list(setting.output.iterdir())


def run_inference(command: str, setting: Setting) -> None:
    """Animate an image with one sampling step."""
    run(f"{command} --output_dir={setting.output} {TINY}")
    assert list(setting.output.glob("*.mp4"))


def run_evaluation(command: str, setting: Setting) -> None:
    """Evaluate on one clip with one sampling step, or check parity."""
    command += f" {TINY} --num_clips=1 --output_dir={setting.output}"
    if "--validation_folder" not in command:
        command += f" --validation_folder={setting.boxed_clips}"
    printed = run(command)
    if "--parity" in command:
        assert printed.endswith("PASS\n")
    else:
        assert (setting.output / "evaluation.json").is_file()


def run_estimate(command: str, setting: Setting) -> None:
    """Predict memory for exactly the flags in the documentation: this writes nothing."""
    assert re.search(r"need(s|ed) +[\d.]+ GiB", run(command))


def run_data_tool(command: str, setting: Setting) -> None:
    """Check, extract, convert or split."""
    made = setting.output / "made"
    command = re.sub(r"data/(extracted|halves)", str(made), command)
    command = command.replace("/path/to/videos", str(setting.videos))
    if " check " in command:
        command += f" --output_dir={made}"
    run(command)
    assert list(made.iterdir())


def run_report(command: str, setting: Setting) -> None:
    """Write the page of an earlier run."""
    run(command)
    assert (setting.lora / "report.html").stat().st_size > 10_000


def run_module(command: str, setting: Setting) -> None:
    """Run a module of the package that writes into --output_dir."""
    run(f"{command} --output_dir={setting.output}")
    assert list(setting.output.iterdir())


# The first entry whose key is in the command says how to run it.
RUNNERS: dict[str, Callable[[str, Setting], None]] = {
    "estimate_memory.py": run_estimate,
    "prepare_data.py": run_data_tool,
    "evaluate_svd.py": run_evaluation,
    "infer_svd.py": run_inference,
    "cache_latents.py": run_cache,
    "svd_xtend.evaluation.report": run_report,
    "-m svd_xtend": run_module,
    ".sh": run_trainer_script,
    "train_svd": run_trainer,
}


def find_runner(command: str) -> Callable[[str, Setting], None]:
    """Return the function that runs a command."""
    for part, runner in RUNNERS.items():
        if part in command:
            return runner
    raise ValueError(f"{command}: no entry of RUNNERS fits; add one, or write it inline")


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory, clips):
    """A LoRA run of one step."""
    output = tmp_path_factory.mktemp("lora")
    size = ["--width=64", "--height=48", "--max_train_steps=1", "--validation_steps=0"]
    command = [sys.executable, "train_svd_lora.py", *size, f"--base_folder={clips}"]
    subprocess.run([*command, f"--output_dir={output}"], cwd=ROOT, check=True)
    return output


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
    """A latent cache of the roaming clips."""
    folder = tmp_path_factory.mktemp("cache")
    flags = [f"--base_folder={boxed_clips}", f"--latent_cache={folder}"]
    command = [sys.executable, "cache_latents.py", *flags, "--width=64", "--height=48"]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory):
    """A folder with a video file."""
    file = tmp_path_factory.mktemp("videos") / "video.mp4"
    sample_videos.write_video(file, frames=30)
    return file.parent


@pytest.fixture
def real_paths(clips, boxed_clips, lora_folder, box_folder):
    """Return a real path for each one in the documentation that stands for the user's own."""
    video = boxed_clips / "roam0000"
    return {
        "/path/to/weight": TINY_SVD,
        "/path/to/frames": boxed_clips,
        "/path/to/more": clips,
        "/path/to/annotations": boxed_clips,
        "photo.jpg": clips / "fall0000" / "000.png",
        "path.json": video / "tracklets.json",
        "gt/gt.txt": video / "tracklets.json",
        "img1": video,
        "outputs/lora": lora_folder,
        "outputs/tracklet/stage1": box_folder,
        "outputs/tracklet/stage3": box_folder,
        '--mixed_precision="fp16"': "",  # needs a GPU
    }


def without_launcher(command: str) -> str:
    """Replace `accelerate launch ...`, `sbatch ...` and `python` by this Python.

    test_distributed.py tests the launchers. Here their configurations only have to exist.
    """
    for file in re.findall(r"configs/\S+", command):
        assert (ROOT / file).exists(), file
    return re.sub(
        r"^(accelerate launch( --\w+ \S+)*|sbatch \S+|python) ", f"{sys.executable} ", command
    )


@pytest.mark.parametrize(
    "command", documented_commands(), ids=lambda command: re.sub(r"\W+", "_", command)[:50]
)
def test_every_documented_command_runs(
    command, tmp_path, farm, real_paths, video_folder, lora_folder, latent_cache, boxed_clips
):
    runner = find_runner(command)
    command = without_launcher(command)
    for placeholder, path in real_paths.items():
        command = command.replace(placeholder, str(path))
    runner(command, Setting(tmp_path, farm, video_folder, lora_folder, latent_cache, boxed_clips))
