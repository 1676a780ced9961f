"""Whole runs: every tracker has the same curves and videos, run.json the command, and a card."""

import json
import re
import shlex
import shutil
import struct
import subprocess
import sys
import types
from io import BytesIO
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image

import train_svd
import train_svd_lora
from svd_xtend.data.images import clip_name, read_video
from svd_xtend.demo.synthetic_clips import write_clips
from svd_xtend.demo.tiny_svd import TINY_BOXES
from svd_xtend.evaluation import model_card, report
from svd_xtend.models.lora import LORA_FILE
from svd_xtend.training import run_record

ROOT = Path(__file__).parents[2]
TOKENS = {"HF_TOKEN": "hf_verysecret", "WANDB_API_KEY": "0123456789abcdef" * 2 + "verykept"}
FRAMES = 4


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Three clips that nothing trains on."""
    folder = tmp_path_factory.mktemp("held")
    write_clips(folder, "fall", 3, seed=7)
    return folder


@pytest.fixture(scope="module")
def train(clips, held, tmp_path_factory):
    """Return a function that trains a LoRA for two steps, with validation after each, from flags.

    train("--report_to=wandb") returns the output folder. Tokens are set in the environment.
    """
    from accelerate.state import AcceleratorState

    def train_two_steps(*flags, output_dir=None):
        output_dir = output_dir or tmp_path_factory.mktemp("run") / "out"
        validation_images = [str(held / f"fall000{i}" / "000.png") for i in (1, 2)]
        flags = [
            "--width=64", "--height=48", f"--num_frames={FRAMES}", f"--base_folder={clips}",
            "--num_workers=0", "--vae_encode_chunk=8", "--max_train_steps=2", "--rank=4",
            "--validation_steps=1", "--num_inference_steps=1", "--validation_clips=2",
            "--validation_folder", str(held), "--validation_image", *validation_images,
            f"--output_dir={output_dir}", *flags,
        ]  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(ROOT / "train_svd_lora.py"), *flags])
            for name, token in TOKENS.items():
                patch.setenv(name, token)
            args = train_svd.parse(train_svd_lora.script_parser())
            train_svd.train(args, train_svd_lora.RECIPE)
        return output_dir

    yield train_two_steps
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def hub():
    """Replace the Hub by that of a user with no repository; return the arguments of the upload."""
    from diffusers.utils import hub_utils

    class NoCardYet(huggingface_hub.errors.EntryNotFoundError):
        def __init__(self):
            pass

    def load(*_, **__):
        raise NoCardYet

    sent = {}
    with pytest.MonkeyPatch.context() as patch:
        repo = types.SimpleNamespace(repo_id="me/out")
        patch.setattr(huggingface_hub, "create_repo", lambda *_, **kwargs: repo)
        patch.setattr(huggingface_hub, "upload_folder", lambda **kwargs: sent.update(kwargs))
        patch.setattr(hub_utils.ModelCard, "load", load)
        yield sent


@pytest.fixture(scope="module")
def tensorboard_run(train, hub):
    """A run that reports to tensorboard and is pushed to the Hub."""
    return train("--report_to=tensorboard", "--push_to_hub", "--learning_rate=1e-3")


@pytest.fixture
def copied(tensorboard_run, tmp_path):
    """A copy of the same folder, without tensorboard's files, for tests that change it."""
    return Path(
        shutil.copytree(tensorboard_run, tmp_path / "out", ignore=shutil.ignore_patterns("logs"))
    )


@pytest.fixture(scope="module")
def wandb_run(train, tmp_path_factory):
    """A run that reports to wandb, offline: its output folder and wandb's folder."""
    import wandb

    kept = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(kept))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        wandb.teardown()  # forgets the environment of an earlier test
        out = train("--report_to=wandb", "--learning_rate=1e-3", "--seed=5")
        wandb.teardown()
    (folder,) = kept.glob("wandb/offline-run-*")
    return out, folder


# ----------------------------------------------------------------------------------------- trackers


def in_tensorboard(out):
    """Return {tag: {step: number}} and {tag: {step: gif}} as tensorboard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = out.glob("logs/svd_xtend/events*")
    events = EventAccumulator(str(file), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {
        tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]
    }
    images = {
        tag: {e.step: e.encoded_image_string for e in events.Images(tag)}
        for tag in events.Tags()["images"]
    }
    return scalars, images


def records(file):
    """Yield the records of a .wandb file: LevelDB's log, blocks of 32 KiB, a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield Record.FromString(whole)
            whole = b""


def in_wandb(folder):
    """Return {tag: {step: number}} and {tag: {step: mp4}} from wandb's file and beside it."""
    scalars, videos = {}, {}
    for record in records(next(folder.glob("*.wandb"))):
        row = {
            tuple(i.nested_key) or (i.key,): json.loads(i.value_json) for i in record.history.item
        }
        for (tag, *inside), value in row.items():
            if inside == ["path"]:
                videos.setdefault(tag, {})[row["_step",]] = (folder / "files" / value).read_bytes()
            elif not inside and not tag.startswith("_"):
                scalars.setdefault(tag, {})[row["_step",]] = value
    return scalars, videos


def in_files(out):
    """Return the same curves, {tag: {step: number}}, from the run's own files."""
    curves = {}
    for row in run_record.read_rows(out / "metrics.jsonl"):
        for name in ("loss", "lr", "grad_norm"):
            curves.setdefault(name, {})[row["step"]] = row[name]
    for row in run_record.read_rows(out / "motion.jsonl"):
        for name in ("motion", "motion_truth"):
            curves.setdefault(name, {})[row["step"]] = row[name]
    for row in run_record.read_rows(out / "held_out.jsonl"):
        raw = row["raw"]
        figures = {"loss": sum(raw["loss"]) / 5, "base": sum(raw["base"]) / 5}
        figures |= dict(zip(("difference", "low", "high"), raw["difference"]))
        for sigma, (difference, *_) in zip(raw["sigma"], raw["by_sigma"]):
            figures[f"difference_sigma_{sigma:.3g}"] = difference
        for name, value in figures.items():
            curves.setdefault(f"held_out/{name}", {})[row["step"]] = value
    return curves


def assert_curves(scalars, out, rel):
    curves = in_files(out)
    assert curves.keys() <= scalars.keys()
    assert sorted(curves["loss"]) == [1, 2]
    assert sorted(curves["held_out/loss"]) == [0, 1, 2]
    assert sorted(curves["motion"]) == [0, 1, 2]
    for tag, curve in curves.items():
        assert scalars[tag] == pytest.approx(curve, rel=rel, abs=1e-9), tag


def test_tensorboard_has_the_curves_of_the_runs_own_files(tensorboard_run):
    assert_curves(in_tensorboard(tensorboard_run)[0], tensorboard_run, 1e-6)  # it keeps float32


def test_wandb_has_the_curves_of_the_runs_own_files(wandb_run):
    assert_curves(in_wandb(wandb_run[1])[0], wandb_run[0], 1e-12)


def test_tensorboard_has_clips_that_move(tensorboard_run):
    """Its images may be gifs, which its page plays; a contact sheet would stand still."""
    for tag, by_step in in_tensorboard(tensorboard_run)[1].items():
        for step, gif in by_step.items():
            image = Image.open(BytesIO(gif))
            assert (image.format, image.n_frames) == ("GIF", FRAMES)
            if tag.startswith("validation/"):
                name = f"step{step:06d}_{tag.removeprefix('validation/')}.gif"
                assert gif == (tensorboard_run / "validation" / name).read_bytes()


def test_tensorboard_serves_them_as_gifs(tensorboard_run):
    from tensorboard.util import img_mime_type_detector

    for by_step in in_tensorboard(tensorboard_run)[1].values():
        assert {img_mime_type_detector.from_bytes(gif) for gif in by_step.values()} == {"image/gif"}


def test_wandb_has_the_videos(wandb_run):
    out, folder = wandb_run
    for tag, by_step in in_wandb(folder)[1].items():
        for step, video_file in by_step.items():
            if tag.startswith("validation/"):
                file = out / "validation" / f"step{step:06d}_{tag.removeprefix('validation/')}.mp4"
                assert video_file == file.read_bytes() and len(read_video(file)) == FRAMES


def test_both_trackers_get_the_same(tensorboard_run, wandb_run, held):
    scalars, images = in_tensorboard(tensorboard_run)
    wandb_scalars, videos = in_wandb(wandb_run[1])
    assert scalars.keys() == wandb_scalars.keys()
    assert images.keys() == videos.keys()
    for tag, by_step in images.items():
        assert set(by_step) == set(videos[tag])
    names = {clip_name(held / f"fall000{i}" / "000.png") for i in (1, 2)}
    for name in names:
        assert sorted(images[f"validation/{name}"]) == [0, 1, 2]


# ------------------------------------------------------------------------------------- run and card


def read_starts(out):
    return json.loads((out / "run.json").read_text())["starts"]


def files_with(text, folder):
    return [p for p in Path(folder).rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


def test_no_token_of_the_environment_is_in_a_file(tensorboard_run, wandb_run):
    """Neither in run.json nor in what the trackers keep."""
    assert files_with("train_svd_lora.py", tensorboard_run)  # the search finds what is there
    assert files_with("--report_to=wandb", wandb_run[1])
    for folder in (tensorboard_run, *wandb_run):
        for token in TOKENS.values():
            assert files_with(token, folder) == []


def test_the_command_in_run_json_repeats_the_run(tensorboard_run, wandb_run):
    for out in (tensorboard_run, wandb_run[0]):
        (start,) = read_starts(out)
        python, script, *flags = shlex.split(start["command"])
        assert python == "python" and Path(script).absolute() == ROOT / "train_svd_lora.py"
        again = train_svd.parse(train_svd_lora.script_parser(), flags)
        kept = json.loads((out / "args.json").read_text())
        resolved = {"validation": kept["validation"]}  # by train
        assert vars(again) | resolved == kept
        assert start["seed"] == again.seed == kept["seed"]
    assert json.loads((wandb_run[0] / "args.json").read_text())["seed"] == 5


def test_run_json_tells_code_and_machine(tensorboard_run):
    (start,) = read_starts(tensorboard_run)
    assert set(start) == {
        "command", "commit", "changed", "started", "environment", "device", "processes", "seed",
    }  # fmt: skip
    assert start["environment"]["torch"] == torch.__version__
    assert start["environment"]["python"] in sys.version
    assert start["processes"] == 1
    assert start["device"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", start["started"])
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode:
        pytest.skip("not a git checkout")
    assert re.fullmatch("[0-9a-f]{40}", start["commit"])
    assert start["changed"] in (True, False)


def test_a_resumed_run_keeps_the_earlier_start_and_drops_validations_past_its_checkpoint(
    train, copied
):
    for name in ("held_out.jsonl", "motion.jsonl"):  # as if it had gone on, and was killed
        run_record.write_row(copied / name, {**run_record.read_rows(copied / name)[-1], "step": 7})
    seed = read_starts(copied)[0]["seed"]
    train("--validation_steps=0", "--num_workers=1", output_dir=copied)
    first, last = read_starts(copied)
    assert "--num_workers=1" in last["command"] and "--num_workers=1" not in first["command"]
    assert last["seed"] == first["seed"] == seed
    for name in ("held_out.jsonl", "motion.jsonl"):
        assert [row["step"] for row in run_record.read_rows(copied / name)] == [0, 1, 2]
    assert "This is start 2 of the run" in model_card.render_model_card(copied)
    (copied / "run.json").write_text("{")  # what others wrote is no reason not to train
    assert run_record.read_starts(copied) == []


# --------------------------------------------------------------------------------------- model card


def test_the_card_shows_the_comparison_and_the_figures(tensorboard_run):
    card = (tensorboard_run / "README.md").read_text()
    assert (
        "![before and after training](comparison.gif)" in card
        and (tensorboard_run / "comparison.gif").exists()
    )
    held = run_record.read_rows(tensorboard_run / "held_out.jsonl")
    assert report.judge_run(held, {})[1] in card
    rows = re.findall(
        r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\S+) \((\S+) to (\S+)\) \|$", card, re.M
    )
    raw = held[-1]["raw"]
    true = [
        (s, b, t, *d) for s, b, t, d in zip(raw["sigma"], raw["base"], raw["loss"], raw["by_sigma"])
    ]
    assert len(rows) == 5 and [[float(cell) for cell in row] for row in rows] == [
        pytest.approx(row, rel=5e-3) for row in true
    ]
    moves = run_record.read_rows(tensorboard_run / "motion.jsonl")
    now, before, true = moves[-1]["motion"], moves[0]["motion"], moves[-1]["motion_truth"]
    assert (
        f"frame lengths per second: {now:.4g}, base model {before:.4g}, ground truth {true:.4g}."
        in card
    )
    (start,) = read_starts(tensorboard_run)
    assert f"```bash\n{start['command']}\n```" in card and (start["commit"] or "") in card
    assert (
        "base_model" not in card and "TODO: add an example" not in card and "`report.html`" in card
    )


def test_the_card_says_whether_it_learned(copied):
    for (low, high), verdict in {
        (-2.0, -1.0): "It learned",
        (-1.0, 1.0): "contains 0",
        (1.0, 2.0): "got worse",
    }.items():
        row = run_record.read_rows(copied / "held_out.jsonl")[-1]
        row["raw"]["difference"] = (low + high) / 2, low, high
        run_record.write_row(copied / "held_out.jsonl", row)
        assert verdict in model_card.render_model_card(copied)
    row["ema"] = {
        **row["raw"],
        "difference": (0.5, None, None),
    }  # what is exported; of one clip there is no interval
    run_record.write_row(copied / "held_out.jsonl", row)
    text = model_card.render_model_card(copied)
    assert "only one source video" in text
    assert not re.search("It learned|contains 0|got worse", text)


def test_the_card_tells_of_an_evaluation_and_of_which_step(copied):
    row = {"name": "psnr", "label": "PSNR, dB", "better": "higher", "still": 18.5, "base": 20.25, "tuned": 21.75,
           "truth": None, "difference": [1.5, 1.25, 1.75], "verdict": "better"}  # fmt: skip
    moves = {
        **row,
        "label": "motion",
        "better": "truth",
        "truth": 0.5,
        "difference": [0.1, None, None],
        "verdict": "",
    }
    file = copied / "evaluation" / "evaluation.json"
    file.parent.mkdir()
    file.write_text(
        json.dumps(
            {
                "clips": 4,
                "films": 2,
                "step": 7,
                "num_frames": 8,
                "size": [64, 48],
                "metrics": [row, moves],
            }
        )
    )
    (copied / "report.html").unlink()
    text = model_card.render_model_card(copied)
    assert (
        "| PSNR, dB | higher | 18.5 | 20.25 | 21.75 |  | +1.5 (+1.25 to +1.75) | better |" in text
    )
    assert "| motion | near ground truth | 18.5 | 20.25 | 21.75 | 0.5 | +0.1 |  |" in text
    assert "4 clips of 2 videos of the validation set, 8 frames of 64x48, step 7." in text
    assert "`report.html`" not in text


def test_a_card_of_a_run_without_validation_is_short(tmp_path):
    (tmp_path / "args.json").write_text(
        json.dumps({"pretrained_model_name_or_path": "stabilityai/svd"})
    )
    assert (
        model_card.render_model_card(tmp_path)
        == "Stable Video Diffusion (stabilityai/svd), fine-tuned with SVD Xtend."
    )


@pytest.mark.parametrize("kind", ["full", "lora", "boxes"])
def test_the_cards_code_renders(kind, pipe, tensorboard_run, boxed_clips, tmp_path, monkeypatch):
    """As printed, but with local files instead of the Hub, one sampling step, float32 and no GPU."""
    file = {"full": "model_index.json", "lora": LORA_FILE, "boxes": "tracklet_weights.safetensors"}[
        kind
    ]
    here = {"full": tmp_path / "pipe", "lora": tensorboard_run, "boxes": TINY_BOXES}[kind]
    if kind == "full":
        pipe.save_pretrained(here)
    args = json.loads((tensorboard_run / "args.json").read_text())
    (tmp_path / "args.json").write_text(
        json.dumps({**args, "fps": "native" if kind == "full" else 7})
    )
    (tmp_path / file).touch()
    (code,) = re.findall(
        r"```python\n(.*?)```", model_card.render_model_card(tmp_path, "me/out"), re.S
    )
    clip = boxed_clips / "roam0000"
    swap = {
        'from_pretrained("me/out"': f'from_pretrained("{here}"', '.to("cuda")': "", "float16": "float32",
        "photo.jpg": str(clip / "000.png"), "path.json": str(clip / "tracklets.json"), "video.mp4": f"{tmp_path}/a.mp4",
        "num_frames": "num_inference_steps=1, num_frames",
    }  # fmt: skip
    for old, new in swap.items():
        code = code.replace(old, new)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, name: {"me/out": str(here / name)}[repo]
    )
    monkeypatch.chdir(ROOT)
    exec(code, made := {})
    assert (
        len(made["frames"]) == FRAMES
        and made["frames"][0].size == (64, 48)
        and (tmp_path / "a.mp4").stat().st_size
    )
    assert bool(getattr(made["pipe"].unet, "peft_config", {})) == (kind == "lora") and (
        "adapter" in made
    ) == (kind == "boxes")


def pushed(out, **args):
    """Return the flags of a run, for another folder."""
    flags = json.loads((out / "args.json").read_text())
    return types.SimpleNamespace(**{**flags, "output_dir": str(out), **args})


def test_what_is_uploaded(tensorboard_run, hub):
    """Weights and results are; checkpoints, trackers' files and partial files of a kill are not."""
    from huggingface_hub.utils import filter_repo_objects

    files = [str(p.relative_to(tensorboard_run)) for p in tensorboard_run.rglob("*") if p.is_file()]
    files += [
        "report.html",
        "evaluation/evaluation.json",
        "metrics.jsonl.partial",
        "wandb/run/a.wandb",
    ]
    sent = set(filter_repo_objects(files, ignore_patterns=hub["ignore_patterns"]))
    assert hub["repo_id"] == "me/out"
    assert sent >= {
        "README.md", "pytorch_lora_weights.safetensors", "comparison.gif", "args.json", "run.json", "metrics.jsonl",
        "held_out.jsonl", "motion.jsonl", "report.html", "evaluation/evaluation.json",
    }  # fmt: skip
    assert not [f for f in sent if re.match("checkpoint|logs|wandb", f) or f.endswith(".partial")]
    assert {Path(f).suffix for f in sent if f.startswith("validation/")} == {".mp4"}


def test_a_second_push_brings_figures_up_to_date_and_keeps_what_people_wrote(
    copied, hub, monkeypatch
):
    from diffusers.utils import hub_utils

    card = hub_utils.ModelCard(
        (copied / "README.md").read_text().replace("[TODO: describe the data used", "Filmed by me")
    )
    monkeypatch.setattr(hub_utils.ModelCard, "load", lambda *_, **__: card)
    row = run_record.read_rows(copied / "motion.jsonl")[-1]
    run_record.write_row(copied / "motion.jsonl", {**row, "motion": 12.5})
    model_card.push_to_hub(pushed(copied))
    text = (copied / "README.md").read_text()
    assert (
        "frame lengths per second: 12.5" in text
        and text.count("## Did it learn?") == 1
        and "Filmed by me" in text
    )
    assert text.count("- image-to-video") == 1


def test_the_card_names_a_base_that_is_on_the_hub(copied, hub):
    model_card.push_to_hub(pushed(copied, pretrained_model_name_or_path="stabilityai/svd"))
    assert "base_model: stabilityai/svd" in (copied / "README.md").read_text()
