"""evaluate_svd.py: what it says of a model is what the run said, what is no different it calls so, and --parity finds faults."""

import inspect
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

import evaluate_svd
import infer_svd
import train_svd
from svd_xtend.data.annotations import read_tracklets
from svd_xtend.demo import synthetic_clips
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.evaluation import metrics
from svd_xtend.models import lora, precision
from svd_xtend.models.loading import load_svd

ROOT = Path(__file__).parents[1]
SIZE = ["--width=64", "--height=48", "--num_frames=2"]
QUICK = ["--num_inference_steps=1", "--mixed_precision=no"]
RUN = [
    *SIZE,
    *QUICK,
    "--max_train_steps=2",
    "--checkpointing_steps=2",
    "--use_ema",
    "--validation_clips=2",
]
RUNS = {  # flags; the trainer
    "full": (["--train_params", "conv_out"], {}),
    "lora": (["--validation_steps=2"], {"lora": True}),
    "boxes": (
        ["--validation_steps=2", "--learning_rate=0.03", "--lr_warmup_steps=0"],
        {"tracklet": True},
    ),
}


def settle(*flags):
    return evaluate_svd.settle(
        evaluate_svd.build_parser().parse_args([str(flag) for flag in flags])
    )


def evaluate(*flags):
    """What evaluation.json says."""
    AcceleratorState._reset_state(reset_partial_state=True)
    args = settle(*flags)
    evaluate_svd.compare(args)
    AcceleratorState._reset_state(reset_partial_state=True)
    return json.loads(Path(args.output_dir, "evaluation.json").read_text())


def main(monkeypatch, *flags):
    """The exit status of the script, as the user runs it."""
    monkeypatch.setattr(sys, "argv", ["evaluate_svd.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "evaluate_svd.py"), run_name="__main__")
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Three held-out clips, with boxes."""
    folder = tmp_path_factory.mktemp("apart")
    synthetic_clips.write_clips(folder, "roam", 3, seed=synthetic_clips.HELD_OUT_SEED)
    return folder


@pytest.fixture
def tuned(kept, run, apart, tmp_path_factory):
    """tuned(kind): folder of a run of RUNS, made once; where it validates it told its held-out loss."""

    def make(kind):
        if kind not in kept:
            flags, how = RUNS[kind]
            out = tmp_path_factory.mktemp(kind) / "out"
            kept[kind] = run(
                *RUN,
                f"--validation_folder={apart}",
                *flags,
                validate=lambda *_: [],
                output_dir=out,
                **how,
            )
        return kept[kind]

    return make


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A LoRA that changes nothing."""
    folder = tmp_path_factory.mktemp("untrained")
    unet = load_svd(str(TINY_SVD), torch.float32).unet
    lora.save_lora(lora.inject_lora(unet, 4, 4, ["attention"]), folder)
    return folder


# -------------------------------------------------------------------------------------------------------------- parity


@pytest.fixture
def parity(monkeypatch, capsys):
    """Name of the first tensor that differs, and what was printed."""
    monkeypatch.setattr(evaluate_svd, "SIGMAS", (0.3,))

    def go():
        first = evaluate_svd.parity(
            settle("--parity", "--width=64", "--height=48", "--num_frames=2")
        )
        return first, capsys.readouterr().out

    return go


def test_parity_holds_for_every_tensor(parity):
    first, printed = parity()
    assert first is None and printed.endswith("\nPASS\n") and "FAIL" not in printed
    for name in evaluate_svd.ALLOWED:
        assert any(
            line.startswith(f"{name} ") and line.endswith("PASS") for line in printed.split("\n")
        ), name


FAULTS = [  # function of train_svd.py; what stands in it; what would be wrong there; the tensor that shows it
    ("condition", "fps.float() - 1", "fps.float()", "added_time_ids"),
    ("condition", ".latent_dist.mode() for", ".latent_dist.mode() * pipe.vae.config.scaling_factor for", "image_latents"),
    ("condition", "embed_image(pipe, first_frame) if", "embed_image(pipe, noised) if", "image_embeds"),
    ("condition", "motion_bucket_id.float(), noise_aug_strength", "noise_aug_strength, motion_bucket_id.float()", "image_latents"),
    ("drop_conditioning", "image_latents * ~latents[:, None, None, None]", "image_latents", "dropped image_latents"),
    ("drop_conditioning", "image_embeds * ~clip[:, None, None]", "image_embeds", "dropped image_embeds"),
    ("encode_video", " * vae.config.scaling_factor", "", "noisy_latents"),
    ("scalings", "c_noise = 0.25", "c_noise = 0.5", "c_noise"),
    ("scalings", "c_in = 1 / (sigma**2 + 1) ** 0.5", "c_in = 1 / (sigma**2 + 1)", "noisy_latents"),
    ("scalings", "c_skip = 1 / (sigma**2 + 1)", "c_skip = 1 / (sigma**2 + 2)", "denoised"),
    ("svd_loss", "(eps - sigma * latents)", "(eps + sigma * latents)", "loss"),
]  # fmt: skip


@pytest.mark.parametrize(
    "function, right, wrong, tensor", FAULTS, ids=[f"{f}: {w or r}" for f, r, w, _ in FAULTS]
)
def test_parity_fails_and_names_the_tensor_that_is_wrong(
    function, right, wrong, tensor, parity, monkeypatch
):
    source = inspect.getsource(getattr(train_svd, function))
    assert source.count(right) == 1
    names = dict(vars(train_svd))
    exec(source.replace(right, wrong), names)
    monkeypatch.setattr(train_svd, function, names[function])
    first, printed = parity()
    assert first == tensor and f"\nFAIL: {tensor} is the first that differs" in printed


def test_parity_ends_with_one_where_something_differs(monkeypatch, capsys):
    told = train_svd.condition

    def wrong(*inputs):
        embeds, latents, ids = told(*inputs)
        return embeds, latents, ids + torch.tensor([1.0, 0, 0])

    monkeypatch.setattr(train_svd, "condition", wrong)
    assert main(monkeypatch, "--parity", "--width=32", "--height=32", "--num_frames=2") == 1
    assert "FAIL: added_time_ids" in capsys.readouterr().out


def test_parity_as_the_user_runs_it_ends_with_zero():
    command = [
        sys.executable,
        "evaluate_svd.py",
        "--parity",
        "--width=32",
        "--height=32",
        "--num_frames=2",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("PASS\n"), done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- as the run, as infer


@pytest.mark.parametrize("kind", ["lora", "boxes"])
def test_an_evaluation_says_of_the_held_out_loss_what_the_run_said(kind, tuned, monkeypatch):
    """Of a run's result, which is its averages; of its last checkpoint; and of that one's averages. Nothing is rendered here."""
    said, out = {}, tuned(kind)
    monkeypatch.setattr(evaluate_svd, "render", lambda *_: [])
    monkeypatch.setattr(
        evaluate_svd, "write", lambda args, held, losses, *_: said.update(losses, sigma=held.sigmas)
    )
    row = json.loads((out / "held_out.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 2 and row["raw"]["loss"] != row["ema"]["loss"]
    cases = [
        ([out], "ema"),
        ([out / "checkpoint-2"], "raw"),
        ([out / "checkpoint-2", "--ema"], "ema"),
    ]
    for (folder, *flags), name in cases[: 3 if kind == "lora" else 2]:
        AcceleratorState._reset_state(reset_partial_state=True)
        evaluate_svd.compare(settle("--tuned", folder, *flags))
        told = row[name]
        assert said["sigma"] == told["sigma"] and len(said["base"]) == told["clips"] == 2
        assert said["base"].mean(0) == pytest.approx(told["base"], rel=1e-6)
        assert said["tuned"].mean(0) == pytest.approx(told["loss"], rel=1e-6)
        assert np.abs(np.subtract(told["loss"], told["base"])).max() > 1e-5 * np.mean(
            told["base"]
        )  # it moved
    AcceleratorState._reset_state(reset_partial_state=True)


def outputs(model, boxes=None):
    """What a UNet makes of a fixed input, under boxes where it takes some."""
    g = torch.Generator().manual_seed(0)
    sample, embeds = (torch.randn(size, generator=g) for size in ((1, 2, 8, 12, 16), (1, 1, 64)))
    if hasattr(model, "adapter"):
        model.adapter.set(boxes)
        model = model.unet
    with torch.no_grad():
        return model(sample, torch.tensor([0.3]), embeds, torch.tensor([[6.0, 127, 0.02]])).sample


def loaded(tuned, *flags):
    """The model that is measured, or with tuned=False its base."""
    return evaluate_svd.load(settle("--tuned", *flags), tuned, torch.device("cpu"))[1]


@pytest.fixture(scope="module")
def drawn(apart):
    """(file of boxes, these of two frames)."""
    file = apart / "roam0000" / "tracklets.json"
    return file, next(iter(read_tracklets(file).values())).at(range(2)).pad(8)


KINDS = {  # of a run: what --tuned names in it, and what infer_svd.py is passed for the same
    "full": ("full", "", "--pretrained_model_name_or_path={}"),
    "full, a checkpoint": ("full", "checkpoint-2", "--checkpoint={}"),
    "full, a checkpoint's averages": ("full", "checkpoint-2 --ema", "--checkpoint={} --ema"),
    "LoRA": ("lora", "", "--lora={}"),
    "LoRA, its file": ("lora", "pytorch_lora_weights.safetensors", "--lora={}"),
    "LoRA, a checkpoint": ("lora", "checkpoint-2", "--checkpoint={}"),
    "LoRA, a checkpoint's averages": ("lora", "checkpoint-2 --ema", "--checkpoint={} --ema"),
    "box control": ("boxes", "", "--tracklet_weights={} --tracklets={boxes}"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_is_what_infer_renders_with(kind, tuned, drawn):
    run, named, flags = KINDS[kind]
    name, *ema = named.split(" ")
    (file, boxes), own = drawn, tuned(run) / name
    flags = ["--image=a.png", *flags.format(own, boxes=file).split()]
    pipe, adapter = infer_svd.load_pipeline(infer_svd.build_parser().parse_args(flags))
    if adapter:
        adapter.set(boxes)
    expected, made, base = (
        outputs(pipe.unet),
        outputs(loaded(True, own, *ema), boxes),
        outputs(loaded(False, own, *ema)),
    )
    assert torch.allclose(made, expected, rtol=1e-5, atol=1e-6)
    assert (made - base).abs().max() > 1e-4 * base.abs().max()


def test_the_averages_in_a_checkpoint_of_box_control_are_its_result(tuned, drawn):
    out, boxes = tuned("boxes"), drawn[1]
    result, averages = (
        outputs(loaded(True, out), boxes),
        outputs(loaded(True, out / "checkpoint-2", "--ema"), boxes),
    )
    assert torch.allclose(result, averages, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(
        result, outputs(loaded(True, out / "checkpoint-2"), boxes), rtol=1e-5, atol=1e-6
    )


# --------------------------------------------------------------------------------------------------------- no difference


def test_a_lora_that_changes_nothing_makes_no_difference_at_all(
    untrained, apart, capsys, monkeypatch
):
    """And clips, boxes, and networks that are not at hand have their say in what is printed and written, and on the run's page."""
    pages = []
    monkeypatch.setattr(evaluate_svd.report, "write_report", pages.append)
    (untrained / "report.html").touch()
    flags = [f"--validation_folder={apart}", "--tracklets", apart, *SIZE, *QUICK, "--num_clips=2"]
    told = evaluate("--tuned", untrained, *flags)
    row, table = told["held_out"], {line["name"]: line for line in told["metrics"]}
    assert (
        row["difference"] == [0, 0, 0]
        and row["by_sigma"] == [[0, 0, 0]] * 5
        and row["loss"] == row["base"]
    )
    assert {"psnr", "ssim", "first_frame_psnr", "motion", "box_iou", "box_success"} <= table.keys()
    for line in table.values():
        assert line["difference"] == [0, 0, 0] and line["tuned"] == line["base"], line
    assert (
        table["psnr"]["truth"] is None and table["motion"]["still"] == 0 < table["motion"]["truth"]
    )
    assert (
        table["box_iou"]["truth"] > table["box_iou"]["still"]
        and table["first_frame_psnr"]["still"] == 100
    )
    assert len({clip["clip"] for clip in told["by_clip"]}) == told["clips"] == told["films"] == 2
    printed = capsys.readouterr().out
    assert "tuned - base (95 %)" in printed and "2 clips held out, 2 frames of 64x48" in printed
    assert told["left_out"].keys() == {"lpips", "fvd"}
    for text, why in zip(
        told["left_out"].values(),
        ("download https://", "takes 9 frames or more, these clips have 2"),
    ):
        assert printed.count(text) == 2 and why in text  # before hours are spent, and at the end
    assert pages == [untrained]
    for name in ("figures.png", "comparison.png", "comparison.gif"):
        assert (untrained / "evaluation" / name).stat().st_size > 1000


def test_the_base_alone_has_no_tuned_beside_it(apart, tmp_path, capsys):
    told = evaluate(
        f"--validation_folder={apart}", *SIZE, *QUICK, "--num_clips=1", f"--output_dir={tmp_path}"
    )
    assert told["held_out"] is None and len(told["base_loss"]) == 5
    assert all(line["tuned"] is line["difference"] is None for line in told["metrics"])
    assert "tuned" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_networks_that_are_at_hand_are_asked(monkeypatch, untrained, apart, tmp_path):
    """A stand-in for I3D whose features are a clip's means: FVD of equal sets is 0, of the still it is not."""
    means = {
        "fvd": lambda frames: frames.mean((1, 2, 3)).astype(float),
        "lpips": lambda made, true: np.arange(2.0),
    }
    monkeypatch.setattr(evaluate_svd, "networks", lambda *_: (means, {}))
    args = (
        f"--validation_folder={apart}",
        *SIZE,
        *QUICK,
        "--num_clips=2",
        f"--output_dir={tmp_path}",
    )
    table = {line["name"]: line for line in evaluate("--tuned", untrained, *args)["metrics"]}
    assert table["fvd"]["base"] == table["fvd"]["tuned"] > 0 and table["fvd"]["still"] > 0
    assert table["lpips"]["base"] == 1  # of frame 1: frame 0 was given


# ------------------------------------------------------------------------------------------------------------ which clips


def test_windows_are_first_ones_or_where_clips_are_few_all_that_do_not_overlap(tmp_path):
    synthetic_clips.write_clips(tmp_path, "roam", 2, num_frames=14, width=128, height=96)
    shutil.copytree(tmp_path / "roam0001", tmp_path / "short")
    for frame in sorted((tmp_path / "short").glob("*.png"))[5:]:
        frame.unlink()
    data = train_svd.DummyDataset(tmp_path, 64, 48, 6, 7, 127, "crop")

    def found(count):
        return [(clip.path.name[-1], start) for clip, start in evaluate_svd.windows(data, count)]

    one, other = (
        data.clips[next(data.order.choices(i))].path.name[-1] for i in range(2)
    )  # as the held-out loss has them
    assert found(1) == [(one, 0)] and found(2) == [(one, 0), (other, 0)]
    assert found(3) == [("0", 0), ("1", 0), ("1", 6)] and found(9) == [
        ("0", 0),
        ("0", 6),
        ("1", 0),
        ("1", 6),
    ]


def test_windows_of_one_film_are_told_from_films(untrained, tmp_path):
    """Two of each of two clips: four windows, two witnesses."""
    synthetic_clips.write_clips(tmp_path / "long", "roam", 2, num_frames=4)
    flags = [
        f"--validation_folder={tmp_path / 'long'}",
        *SIZE,
        *QUICK,
        "--num_clips=4",
        f"--output_dir={tmp_path}",
    ]
    told = evaluate("--tuned", untrained, *flags)
    assert (told["clips"], told["films"], told["held_out"]["clips"]) == (4, 2, 2)


def test_clips_that_train_may_be_shorter_than_what_is_measured(tuned, tmp_path):
    """They rank the motion of those that are held out, as in the run."""
    synthetic_clips.write_clips(tmp_path, "roam", 2, num_frames=12, width=128, height=96)
    args = settle("--tuned", tuned("lora"), "--num_frames=10", f"--validation_folder={tmp_path}")
    assert len(evaluate_svd.clips_of(args, PartialState(cpu=True))) == 2 and args.num_frames == 10


def test_a_clip_that_cannot_be_read_is_left_out(apart, tmp_path, caplog):
    folder = shutil.copytree(apart, tmp_path / "clips")
    (folder / "roam0001" / "001.png").write_bytes(b"nothing")
    flags = (
        f"--validation_folder={folder}",
        *SIZE,
        *QUICK,
        "--num_clips=3",
        f"--output_dir={tmp_path}",
    )
    told = evaluate(*flags)
    assert (
        told["clips"] == len(told["by_clip"]) == 2
        and "001.png: cannot be read as a picture" in caplog.text
    )


def test_clips_that_it_was_trained_on_are_refused(tuned, clips):
    args = settle("--tuned", tuned("lora"), f"--validation_folder={clips}")
    with pytest.raises(
        ValueError, match=f"^--validation_folder: {clips}/.* is among the clips that train"
    ):
        evaluate_svd.clips_of(args, PartialState(cpu=True))


def test_where_the_clips_that_trained_have_gone_it_says_what_follows(
    tuned, apart, tmp_path, caplog
):
    out = shutil.copytree(tuned("lora"), tmp_path / "out")
    told = json.loads((out / "args.json").read_text())
    (out / "args.json").write_text(json.dumps({**told, "base_folder": [str(tmp_path / "gone")]}))
    args = settle("--tuned", out)
    assert "motion_bucket_id is by rank among the held-out clips" in caplog.text
    assert len(evaluate_svd.clips_of(args, PartialState(cpu=True))) == 3
    (out / "args.json").write_text(
        json.dumps(
            {
                **told,
                "base_folder": [str(tmp_path / "gone")],
                "validation_folder": None,
                "validation_ratio": 0.2,
            }
        )
    )
    with pytest.raises(
        ValueError,
        match=f"^--validation_folder {tmp_path}/gone: no such folder; --tuned {out} has held out",
    ):
        settle("--tuned", out)


def test_an_evaluation_of_a_checkpoint_lies_beside_it_and_tells_its_step(tuned):
    """Not in it: --checkpoints_total_limit deletes it; nor in the place of the final one's, which the page shows."""
    out = tuned("lora")
    for flags, name in (([], "checkpoint-2"), (["--ema"], "checkpoint-2-ema")):
        assert settle("--tuned", out / "checkpoint-2", *flags).output_dir == str(
            out / "evaluation" / name
        )
    assert settle("--tuned", out).output_dir == str(out / "evaluation")
    assert evaluate_svd.step_of(out / "checkpoint-2") == evaluate_svd.step_of(out) == 2
    assert evaluate_svd.step_of(None) is None


def test_a_run_without_an_end_names_its_checkpoint(tuned, apart, tmp_path):
    out = shutil.copytree(tuned("lora"), tmp_path / "out")
    (out / lora.LORA_FILE).unlink()
    with pytest.raises(
        ValueError, match=f"^--tuned {out}: holds nothing .* at its end; pass {out}/checkpoint-2"
    ):
        loaded(True, out)


# --------------------------------------------------------------------------------------------------------------- protocol


def test_ctrl_v_is_200_clips_of_25_frames_of_512x320_after_30_steps_compared_at_410x256(
    tuned, apart
):
    args = settle("--protocol=ctrl-v", f"--validation_folder={apart}", "--tuned", tuned("lora"))
    assert (args.num_clips, args.num_frames, args.width, args.height) == (200, 25, 512, 320)
    assert args.num_inference_steps == 30 and evaluate_svd.COMPARED_AT["ctrl-v"] == (410, 256)


def test_what_is_otherwise_than_the_protocol_is_said(
    monkeypatch, untrained, apart, tmp_path, capsys
):
    sizes, compared = [], metrics.frame_figures
    monkeypatch.setattr(
        metrics, "frame_figures", lambda a, b: sizes.append((a.shape, b.shape)) or compared(a, b)
    )
    flags = (
        f"--validation_folder={apart}",
        *SIZE,
        *QUICK,
        "--num_clips=1",
        f"--output_dir={tmp_path}",
    )
    told = evaluate("--protocol=ctrl-v", "--tuned", untrained, *flags)
    otherwise = {
        "num_clips": 1,
        "num_frames": 2,
        "width": 64,
        "height": 48,
        "num_inference_steps": 1,
    }
    assert told["otherwise_than_protocol"] == otherwise and set(sizes) == {((2, 256, 410, 3),) * 2}
    assert "protocol ctrl-v, but num_clips 1, num_frames 2" in capsys.readouterr().out
    first = told["by_clip"][0]["base"]  # frame 0 counts
    assert first["psnr"] == pytest.approx(np.mean(first["psnr_by_frame"]))


# --------------------------------------------------------------------------------------------------------------- processes


def test_two_processes_say_what_one_says(farm, apart, tmp_path):
    flags = [f"--validation_folder={apart}", *SIZE, *QUICK, "--num_clips=2"]
    _, printed, _ = farm.run(
        "evaluate_svd.py", *flags, engine="ddp", world=2, output_dir=tmp_path / "two"
    )
    assert "2 process(es)" in printed
    told = [evaluate(*flags, f"--output_dir={tmp_path / 'one'}")]
    told += [json.loads((tmp_path / "two" / "evaluation.json").read_text())]
    for one in told:
        del one["args"]
    assert told[0] == told[1]


# --------------------------------------------------------------------------------------------------------------- bad input


BAD = {  # how it is run; what its last line begins with
    "--tuned=/nowhere": "--tuned /nowhere: not there",
    "--tuned={lora} --validation_folder=/nowhere": "--validation_folder /nowhere: no such folder",
    "--tuned={lora} --width=60": "--width 60: must be a multiple of 8; try 64",
    "--tuned={lora} --num_frames=1": "--num_frames 1: must be at least 2",
    "--tuned={lora} --num_clips=0": "--num_clips 0: must be at least 1",
    "--tuned={lora} --fps=0": "--fps 0.0: must be above 0",
    "--tuned={lora} --ema": "--ema: averages are in checkpoints; pass --tuned .../checkpoint-...",
    "--tuned={empty} --validation_folder={apart}": "--tuned {empty}: holds nothing that a trainer writes",
    "--tuned={broken} --validation_folder={apart}": "--tuned {broken}: damaged or not safetensors",
    "--tuned={args}": "--tuned {args}: {args}/args.json is damaged",
    "--tuned={lora} --pretrained_model_name_or_path=/no/where": "--pretrained_model_name_or_path /no/where: not a",
    "--tuned={lora} --validation_folder={empty}": "--validation_folder {empty}: no video is 2 frames long",
    "--tuned={lora} --num_clips=1 --output_dir={broken}": "--output_dir {broken}: cannot be written",
    "--width=64": "--validation_folder: pass a folder of clips that nothing was trained on",
    "--parity --pretrained_model_name_or_path=/no/where": "--pretrained_model_name_or_path /no/where: not a",
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_ends_in_a_line_that_begins_with_the_flag(
    flags, tuned, apart, tmp_path, monkeypatch, capsys
):
    paths = {
        "lora": tuned("lora"),
        "apart": apart,
        "empty": tmp_path / "empty",
        "args": tmp_path / "args",
    }
    for name in ("empty", "args"):
        paths[name].mkdir()
    (paths["args"] / "args.json").write_text("{")
    paths["broken"] = tmp_path / "broken.safetensors"
    paths["broken"].write_bytes(b"nothing at all")
    size = [*SIZE, *QUICK] if "--tuned" not in flags or "{apart}" in flags else []
    assert main(monkeypatch, *flags.format(**paths).split(), *size) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith(BAD[flags].format(**paths))


def test_precision_is_the_runs_where_this_machine_has_it(monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda: False)
    assert evaluate_svd.precision(None, "no") == "no" == evaluate_svd.precision(None, "bf16")
    with pytest.raises(ValueError, match="^--mixed_precision bf16"):
        evaluate_svd.precision("bf16", "no")
