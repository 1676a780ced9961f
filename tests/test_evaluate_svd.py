"""evaluate_svd.py: its losses are those of the run, an untrained LoRA makes no difference, and --parity finds faults."""

import inspect
import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import open_dataset

import evaluate_svd
import infer_svd
import train_svd
from svd_xtend.data.annotations import read_tracklets
from svd_xtend.demo import synthetic_clips
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.evaluation import metrics, parity
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
RUNS = {  # name: (flags, trainer)
    "full": (["--train_params", "conv_out"], {}),
    "lora": (["--validation_steps=2"], {"lora": True}),
    "boxes": (
        ["--validation_steps=2", "--learning_rate=0.03", "--lr_warmup_steps=0"],
        {"tracklet": True},
    ),
}


def resolve_args(*flags):
    parser = evaluate_svd.build_parser()
    return evaluate_svd.resolve_args(parser.parse_args([str(flag) for flag in flags]))


def evaluate(*flags):
    """Evaluate in this process; returns the content of evaluation.json."""
    AcceleratorState._reset_state(reset_partial_state=True)
    args = resolve_args(*flags)
    evaluate_svd.evaluate_models(args)
    AcceleratorState._reset_state(reset_partial_state=True)
    return json.loads(Path(args.output_dir, "evaluation.json").read_text())


def run_script(monkeypatch, *flags):
    """Run the script as its user does, but in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["evaluate_svd.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "evaluate_svd.py"), run_name="__main__")
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def validation_folder(tmp_path_factory):
    """Three validation clips, with boxes."""
    folder = tmp_path_factory.mktemp("validation")
    synthetic_clips.write_clips(folder, "roam", 3, seed=synthetic_clips.HELD_OUT_SEED)
    return folder


@pytest.fixture
def tuned(kept, run, validation_folder, tmp_path_factory):
    """tuned(kind): the output folder of a run of RUNS, made once. It renders no validation videos."""

    def make(kind):
        if kind not in kept:
            flags, trainer = RUNS[kind]
            out = tmp_path_factory.mktemp(kind) / "out"
            kept[kind] = run(
                *RUN,
                f"--validation_folder={validation_folder}",
                *flags,
                validate=lambda *_: [],
                output_dir=out,
                **trainer,
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
def check_parity(monkeypatch, capsys):
    """check_parity(): the name of the first tensor that differs, and what was printed."""
    monkeypatch.setattr(parity, "SIGMAS", (0.3,))

    def check():
        args = resolve_args("--parity", "--width=64", "--height=48", "--num_frames=2")
        first = evaluate_svd.run_parity_check(args)
        return first, capsys.readouterr().out

    return check


def test_parity_holds_for_every_tensor(check_parity):
    first, printed = check_parity()
    assert first is None
    assert printed.endswith("\nPASS\n")
    assert "FAIL" not in printed
    lines = printed.split("\n")
    for name in parity.TOLERANCES:
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert line.endswith("PASS")


FAULTS = [  # (function of train_svd.py, its code, a fault in its place, the tensor that shows it)
    ("encode_conditioning", "[fps - 1,", "[fps,", "added_time_ids"),
    (
        "encode_conditioning",
        ".latent_dist.mode() for",
        ".latent_dist.mode() * pipe.vae.config.scaling_factor for",
        "image_latents",
    ),
    (
        "encode_conditioning",
        "embed_image(pipe, first_frame)",
        "embed_image(pipe, noised)",
        "image_embeds",
    ),
    (
        "encode_conditioning",
        "motion_bucket_id, noise_aug_strength]",
        "noise_aug_strength, motion_bucket_id]",
        "image_latents",
    ),
    (
        "drop_conditioning",
        "conditioning.image_latents * ~drops_latents[:, None, None, None]",
        "conditioning.image_latents",
        "dropped image_latents",
    ),
    (
        "drop_conditioning",
        "conditioning.image_embeds * ~drops_embeds[:, None, None]",
        "conditioning.image_embeds",
        "dropped image_embeds",
    ),
    ("encode_video", " * vae.config.scaling_factor", "", "noisy_latents"),
    ("scalings", "c_noise = 0.25", "c_noise = 0.5", "c_noise"),
    ("scalings", "c_in = 1 / (sigma**2 + 1) ** 0.5", "c_in = 1 / (sigma**2 + 1)", "noisy_latents"),
    ("scalings", "c_skip = 1 / (sigma**2 + 1)", "c_skip = 1 / (sigma**2 + 2)", "denoised"),
    ("denoising_loss", "(eps - sigma * latents)", "(eps + sigma * latents)", "loss"),
]


@pytest.mark.parametrize(
    "function, code, fault, tensor",
    FAULTS,
    ids=[f"{function}: {fault or code}" for function, code, fault, _ in FAULTS],
)
def test_parity_fails_and_names_the_tensor_that_is_wrong(
    function, code, fault, tensor, check_parity, monkeypatch
):
    source = inspect.getsource(getattr(train_svd, function))
    assert source.count(code) == 1
    namespace = dict(vars(train_svd))
    exec("from __future__ import annotations\n" + source.replace(code, fault), namespace)
    monkeypatch.setattr(train_svd, function, namespace[function])
    first, printed = check_parity()
    assert first == tensor
    assert f"\nFAIL: {tensor} is the first tensor that differs" in printed


def test_parity_exits_with_1_if_a_tensor_differs(monkeypatch, capsys):
    encode_conditioning = train_svd.encode_conditioning

    def wrong_fps(*inputs):
        conditioning = encode_conditioning(*inputs)
        wrong_ids = conditioning.added_time_ids + torch.tensor([1.0, 0, 0])
        return replace(conditioning, added_time_ids=wrong_ids)

    monkeypatch.setattr(train_svd, "encode_conditioning", wrong_fps)
    assert run_script(monkeypatch, "--parity", "--width=32", "--height=32", "--num_frames=2") == 1
    assert "FAIL: added_time_ids" in capsys.readouterr().out


def test_parity_exits_with_0_as_its_user_runs_it():
    flags = ["--parity", "--width=32", "--height=32", "--num_frames=2"]
    command = [sys.executable, "evaluate_svd.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("PASS\n")


# ------------------------------------------------------------------------------------- agreement with run and infer_svd


@pytest.mark.parametrize("kind", ["lora", "boxes"])
def test_the_losses_are_those_that_the_run_measured(kind, tuned, monkeypatch):
    """Of the run's result, which is its EMA weights; of its last checkpoint; of that checkpoint's EMA weights."""
    measured = {}

    def keep_losses(args, validation, losses, *_):
        measured.update(losses, sigma=validation.sigmas)

    out = tuned(kind)
    monkeypatch.setattr(evaluate_svd, "render_clips", lambda *_: [])
    monkeypatch.setattr(evaluate_svd, "write_results", keep_losses)
    row = json.loads((out / "held_out.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 2
    assert row["raw"]["loss"] != row["ema"]["loss"]
    cases = [([out], "ema"), ([out / "checkpoint-2"], "raw")]
    if kind == "lora":
        cases.append(([out / "checkpoint-2", "--ema"], "ema"))
    for (folder, *flags), name in cases:
        AcceleratorState._reset_state(reset_partial_state=True)
        evaluate_svd.evaluate_models(resolve_args("--tuned", folder, *flags))
        expected = row[name]
        assert measured["sigma"] == expected["sigma"]
        assert len(measured["base"]) == expected["clips"] == 2
        assert measured["base"].mean(0) == pytest.approx(expected["base"], rel=1e-6)
        assert measured["tuned"].mean(0) == pytest.approx(expected["loss"], rel=1e-6)
        change = np.abs(np.subtract(expected["loss"], expected["base"])).max()
        assert change > 1e-5 * np.mean(expected["base"])
    AcceleratorState._reset_state(reset_partial_state=True)


def unet_output(model, boxes=None):
    """Output of a UNet on a fixed input, under `boxes` if it takes boxes."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn((1, 2, 8, 12, 16), generator=generator)
    embeds = torch.randn((1, 1, 64), generator=generator)
    if hasattr(model, "adapter"):
        model.adapter.set(boxes)
        model = model.unet
    with torch.no_grad():
        return model(sample, torch.tensor([0.3]), embeds, torch.tensor([[6.0, 127, 0.02]])).sample


def load_model(tuned, *flags):
    """The model that is measured; its base model if `tuned` is False."""
    args = resolve_args("--tuned", *flags)
    return evaluate_svd.load_model(args, tuned, torch.device("cpu"))[1]


@pytest.fixture(scope="module")
def annotation(validation_folder):
    """(annotation file, its boxes in two frames)."""
    file = validation_folder / "roam0000" / "tracklets.json"
    return file, next(iter(read_tracklets(file).values())).at(range(2)).pad(8)


KINDS = {  # name: (run, what --tuned names in its folder, flags of infer_svd.py for the same model)
    "full": ("full", "", "--pretrained_model_name_or_path={}"),
    "full, checkpoint": ("full", "checkpoint-2", "--checkpoint={}"),
    "full, EMA of a checkpoint": ("full", "checkpoint-2 --ema", "--checkpoint={} --ema"),
    "LoRA": ("lora", "", "--lora={}"),
    "LoRA file": ("lora", "pytorch_lora_weights.safetensors", "--lora={}"),
    "LoRA, checkpoint": ("lora", "checkpoint-2", "--checkpoint={}"),
    "LoRA, EMA of a checkpoint": ("lora", "checkpoint-2 --ema", "--checkpoint={} --ema"),
    "box control": ("boxes", "", "--tracklet_weights={} --tracklets={boxes}"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_measured_model_is_the_one_that_infer_svd_renders_with(kind, tuned, annotation):
    run_kind, named, infer_flags = KINDS[kind]
    name, *ema = named.split(" ")
    file, boxes = annotation
    weights = tuned(run_kind) / name
    flags = ["--image=a.png", *infer_flags.format(weights, boxes=file).split()]
    pipe, adapter = infer_svd.load_pipeline(infer_svd.build_parser().parse_args(flags))
    if adapter:
        adapter.set(boxes)
    expected = unet_output(pipe.unet)
    output = unet_output(load_model(True, weights, *ema), boxes)
    base = unet_output(load_model(False, weights, *ema))
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-6)
    assert (output - base).abs().max() > 1e-4 * base.abs().max()


def test_the_ema_weights_in_a_checkpoint_of_box_control_are_its_result(tuned, annotation):
    out = tuned("boxes")
    _, boxes = annotation
    result = unet_output(load_model(True, out), boxes)
    ema = unet_output(load_model(True, out / "checkpoint-2", "--ema"), boxes)
    raw = unet_output(load_model(True, out / "checkpoint-2"), boxes)
    assert torch.allclose(result, ema, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(result, raw, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- no difference


def test_a_lora_that_changes_nothing_makes_no_difference_at_all(
    untrained, validation_folder, capsys, monkeypatch
):
    """The output also names clips, boxes and missing networks, and the page of the run is written anew."""
    pages = []
    monkeypatch.setattr(evaluate_svd.report, "write_report", pages.append)
    (untrained / "report.html").touch()
    folder_flags = [f"--validation_folder={validation_folder}", "--tracklets", validation_folder]
    evaluation = evaluate("--tuned", untrained, *folder_flags, *SIZE, *QUICK, "--num_clips=2")
    losses = evaluation["held_out"]
    table = {row["name"]: row for row in evaluation["metrics"]}
    assert losses["difference"] == [0, 0, 0]
    assert losses["by_sigma"] == [[0, 0, 0]] * 5
    assert losses["loss"] == losses["base"]
    assert {"psnr", "ssim", "first_frame_psnr", "motion", "box_iou", "box_success"} <= table.keys()
    for row in table.values():
        assert row["difference"] == [0, 0, 0], row
        assert row["tuned"] == row["base"], row
    assert table["psnr"]["truth"] is None
    assert table["motion"]["still"] == 0 < table["motion"]["truth"]
    assert table["box_iou"]["truth"] > table["box_iou"]["still"]
    assert table["first_frame_psnr"]["still"] == 100
    assert len({clip["clip"] for clip in evaluation["by_clip"]}) == 2
    assert evaluation["clips"] == evaluation["films"] == 2

    printed = capsys.readouterr().out
    assert "tuned - base (95 %)" in printed
    assert "validation set: 2 clips, 2 frames of 64x48" in printed
    assert evaluation["left_out"].keys() == {"lpips", "fvd"}
    reasons = {"lpips": "download https://", "fvd": "needs 9 frames or more, these clips have 2"}
    for name, reason in reasons.items():
        message = evaluation["left_out"][name]
        assert reason in message
        assert printed.count(message) == 2  # before the hours of rendering, and at the end
    assert pages == [untrained]
    for name in ("figures.png", "comparison.png", "comparison.gif"):
        assert (untrained / "evaluation" / name).stat().st_size > 1000


def test_without_tuned_the_base_model_alone_is_measured(validation_folder, tmp_path, capsys):
    evaluation = evaluate(
        f"--validation_folder={validation_folder}",
        *SIZE,
        *QUICK,
        "--num_clips=1",
        f"--output_dir={tmp_path}",
    )
    assert evaluation["held_out"] is None
    assert len(evaluation["base_loss"]) == 5
    for row in evaluation["metrics"]:
        assert row["tuned"] is None
        assert row["difference"] is None
    assert "tuned" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_installed_networks_are_used(monkeypatch, untrained, validation_folder, tmp_path):
    """With the means of a clip in place of I3D's features, FVD of equal sets is 0 and of the static baseline not."""
    networks = {
        "fvd": lambda frames: frames.mean((1, 2, 3)).astype(float),
        "lpips": lambda generated, ground_truth: np.arange(2.0),
    }
    monkeypatch.setattr(evaluate_svd, "load_networks", lambda *_: (networks, {}))
    evaluation = evaluate(
        "--tuned",
        untrained,
        f"--validation_folder={validation_folder}",
        *SIZE,
        *QUICK,
        "--num_clips=2",
        f"--output_dir={tmp_path}",
    )
    table = {row["name"]: row for row in evaluation["metrics"]}
    assert table["fvd"]["base"] == table["fvd"]["tuned"] > 0
    assert table["fvd"]["still"] > 0
    assert table["lpips"]["base"] == 1  # of frame 1; frame 0 is given


# ----------------------------------------------------------------------------------------------------------- which clips


def test_windows_are_the_first_of_each_clip_or_all_that_do_not_overlap(tmp_path):
    synthetic_clips.write_clips(tmp_path, "roam", 2, num_frames=14, width=128, height=96)
    shutil.copytree(tmp_path / "roam0001", tmp_path / "short")
    for frame in sorted((tmp_path / "short").glob("*.png"))[5:]:
        frame.unlink()
    data = open_dataset(tmp_path, 64, 48, 6, 7, 127, "crop")

    def windows(count):
        return [
            (clip.path.name[-1], start) for clip, start in evaluate_svd.choose_windows(data, count)
        ]

    # the order of the validation loss
    first, second = (data.clips[next(data.sampler.choices(i))].path.name[-1] for i in range(2))
    assert windows(1) == [(first, 0)]
    assert windows(2) == [(first, 0), (second, 0)]
    assert windows(3) == [("0", 0), ("1", 0), ("1", 6)]
    assert windows(9) == [("0", 0), ("0", 6), ("1", 0), ("1", 6)]


def test_windows_of_one_source_video_are_counted_as_one(untrained, tmp_path):
    """Two windows of each of two clips: four windows of two source videos."""
    synthetic_clips.write_clips(tmp_path / "long", "roam", 2, num_frames=4)
    evaluation = evaluate(
        "--tuned",
        untrained,
        f"--validation_folder={tmp_path / 'long'}",
        *SIZE,
        *QUICK,
        "--num_clips=4",
        f"--output_dir={tmp_path}",
    )
    assert (evaluation["clips"], evaluation["films"]) == (4, 2)
    assert evaluation["held_out"]["clips"] == 2


def test_training_clips_may_be_shorter_than_the_measured_windows(tuned, tmp_path):
    """They rank the motion of the validation clips, as in the run."""
    synthetic_clips.write_clips(tmp_path, "roam", 2, num_frames=12, width=128, height=96)
    args = resolve_args(
        "--tuned", tuned("lora"), "--num_frames=10", f"--validation_folder={tmp_path}"
    )
    assert len(evaluate_svd.load_validation_set(args, PartialState(cpu=True))) == 2
    assert args.num_frames == 10


def test_a_clip_that_cannot_be_read_is_left_out(validation_folder, tmp_path, caplog):
    folder = shutil.copytree(validation_folder, tmp_path / "clips")
    (folder / "roam0001" / "001.png").write_bytes(b"nothing")
    evaluation = evaluate(
        f"--validation_folder={folder}",
        *SIZE,
        *QUICK,
        "--num_clips=3",
        f"--output_dir={tmp_path}",
    )
    assert evaluation["clips"] == len(evaluation["by_clip"]) == 2
    assert "001.png: cannot be read as a picture" in caplog.text


def test_clips_that_were_trained_on_are_refused(tuned, clips):
    args = resolve_args("--tuned", tuned("lora"), f"--validation_folder={clips}")
    with pytest.raises(
        ValueError, match=f"^--validation_folder: {clips}/.* is among the training clips"
    ):
        evaluate_svd.load_validation_set(args, PartialState(cpu=True))


def test_without_the_training_clips_the_validation_set_is_ranked_by_itself(tuned, tmp_path, caplog):
    out = shutil.copytree(tuned("lora"), tmp_path / "out")
    run_args = json.loads((out / "args.json").read_text())
    run_args["base_folder"] = [str(tmp_path / "deleted")]
    (out / "args.json").write_text(json.dumps(run_args))
    args = resolve_args("--tuned", out)
    assert "motion_bucket_id is the rank of a clip's motion in the validation set" in caplog.text
    assert len(evaluate_svd.load_validation_set(args, PartialState(cpu=True))) == 3


def test_a_validation_set_that_was_split_from_a_deleted_folder_is_an_error(tuned, tmp_path):
    out = shutil.copytree(tuned("lora"), tmp_path / "out")
    run_args = json.loads((out / "args.json").read_text())
    run_args |= {
        "base_folder": [str(tmp_path / "deleted")],
        "validation_folder": None,
        "validation_ratio": 0.2,
    }
    (out / "args.json").write_text(json.dumps(run_args))
    with pytest.raises(
        ValueError,
        match=f"^--validation_folder {tmp_path}/deleted: no such folder; "
        f"the validation set of --tuned {out} is a part of it",
    ):
        resolve_args("--tuned", out)


def test_an_evaluation_of_a_checkpoint_lies_beside_it_and_names_its_step(tuned):
    """Not in the checkpoint, which --checkpoints_total_limit deletes; nor where the page finds that of the run."""
    out = tuned("lora")
    checkpoint = out / "checkpoint-2"
    evaluation = out / "evaluation"
    assert resolve_args("--tuned", out).output_dir == str(evaluation)
    args = resolve_args("--tuned", checkpoint)
    assert args.output_dir == str(evaluation / "checkpoint-2")
    args = resolve_args("--tuned", checkpoint, "--ema")
    assert args.output_dir == str(evaluation / "checkpoint-2-ema")
    assert evaluate_svd.read_trained_step(checkpoint) == 2
    assert evaluate_svd.read_trained_step(out) == 2
    assert evaluate_svd.read_trained_step(None) is None


def test_for_a_run_that_did_not_finish_the_error_names_its_last_checkpoint(tuned, tmp_path):
    out = shutil.copytree(tuned("lora"), tmp_path / "out")
    (out / lora.LORA_FILE).unlink()
    with pytest.raises(
        ValueError, match=f"^--tuned {out}: no trained weights in it; pass {out}/checkpoint-2"
    ):
        load_model(True, out)


# -------------------------------------------------------------------------------------------------------------- protocol


def test_ctrl_v_is_200_clips_of_25_frames_of_512x320_after_30_steps_compared_at_410x256(
    tuned, validation_folder
):
    args = resolve_args(
        "--protocol=ctrl-v", f"--validation_folder={validation_folder}", "--tuned", tuned("lora")
    )
    assert (args.num_clips, args.num_frames, args.width, args.height) == (200, 25, 512, 320)
    assert args.num_inference_steps == 30
    assert evaluate_svd.PROTOCOLS["ctrl-v"].comparison_size == (410, 256)


def test_deviations_from_the_protocol_are_named(
    monkeypatch, untrained, validation_folder, tmp_path, capsys
):
    sizes = []
    frame_metrics = metrics.frame_metrics

    def keep_sizes(generated, ground_truth):
        sizes.append((generated.shape, ground_truth.shape))
        return frame_metrics(generated, ground_truth)

    monkeypatch.setattr(metrics, "frame_metrics", keep_sizes)
    evaluation = evaluate(
        "--protocol=ctrl-v",
        "--tuned",
        untrained,
        f"--validation_folder={validation_folder}",
        *SIZE,
        *QUICK,
        "--num_clips=1",
        f"--output_dir={tmp_path}",
    )
    assert evaluation["otherwise_than_protocol"] == {
        "num_clips": 1,
        "num_frames": 2,
        "width": 64,
        "height": 48,
        "num_inference_steps": 1,
    }
    assert set(sizes) == {((2, 256, 410, 3), (2, 256, 410, 3))}
    assert "protocol ctrl-v, but num_clips 1, num_frames 2" in capsys.readouterr().out
    base = evaluation["by_clip"][0]["base"]
    assert base["psnr"] == pytest.approx(np.mean(base["psnr_by_frame"]))  # frame 0 counts


# -------------------------------------------------------------------------------------------------------------- processes


def test_two_processes_measure_what_one_measures(farm, validation_folder, tmp_path):
    flags = [f"--validation_folder={validation_folder}", *SIZE, *QUICK, "--num_clips=2"]
    _, printed, _ = farm.run(
        "evaluate_svd.py", *flags, engine="ddp", world=2, output_dir=tmp_path / "two"
    )
    assert "2 process(es)" in printed
    one = evaluate(*flags, f"--output_dir={tmp_path / 'one'}")
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    del one["args"], two["args"]
    assert one == two


# -------------------------------------------------------------------------------------------------------------- bad input


BAD = {  # flags: the beginning of the last line
    "--tuned=/nowhere": "--tuned /nowhere: no such file or folder",
    "--tuned={lora} --validation_folder=/nowhere": "--validation_folder /nowhere: no such folder",
    "--tuned={lora} --width=60": "argument --width: expected a multiple of 8, for example 64; got 60",
    "--tuned={lora} --num_frames=1": "--num_frames 1: expected 2 or more",
    "--tuned={lora} --num_clips=0": "argument --num_clips: expected a whole number of at least 1; got 0",
    "--tuned={lora} --fps=0": "argument --fps: expected a number above 0, or native; got 0",
    "--tuned={lora} --ema": "--ema: only checkpoints have EMA weights; pass --tuned .../checkpoint-...",
    "--tuned={empty} --validation_folder={clips}": "--tuned {empty}: no trained weights in it",
    "--tuned={broken} --validation_folder={clips}": "--tuned {broken}: damaged or not safetensors",
    "--tuned={args}": "--tuned {args}: {args}/args.json is damaged",
    "--tuned={lora} --pretrained_model_name_or_path=/no/where": "--pretrained_model_name_or_path /no/where: not a",
    "--tuned={lora} --validation_folder={empty}": "--validation_folder {empty}: no video is 2 frames long",
    "--tuned={lora} --num_clips=1 --output_dir={broken}": "--output_dir {broken}: cannot be written",
    "--width=64": "--validation_folder: pass a folder of clips that were not trained on",
    "--parity --pretrained_model_name_or_path=/no/where": "--pretrained_model_name_or_path /no/where: not a",
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_ends_in_a_line_that_begins_with_the_flag(
    flags, tuned, validation_folder, tmp_path, monkeypatch, capsys
):
    paths = {
        "lora": tuned("lora"),
        "clips": validation_folder,
        "empty": tmp_path / "empty",
        "args": tmp_path / "args",
        "broken": tmp_path / "broken.safetensors",
    }
    paths["empty"].mkdir()
    paths["args"].mkdir()
    (paths["args"] / "args.json").write_text("{")
    paths["broken"].write_bytes(b"nothing at all")
    has_own_size = "--tuned" in flags and "{clips}" not in flags
    size = [] if has_own_size else [*SIZE, *QUICK]
    assert run_script(monkeypatch, *size, *flags.format(**paths).split()) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    line = last_line.removeprefix("evaluate_svd.py: error: ")
    assert line.startswith(BAD[flags].format(**paths))


def test_the_precision_is_that_of_the_run_if_this_machine_has_it(monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda: False)
    assert evaluate_svd.choose_precision(None, "no") == "no"
    assert evaluate_svd.choose_precision(None, "bf16") == "no"
    with pytest.raises(ValueError, match="^--mixed_precision bf16"):
        evaluate_svd.choose_precision("bf16", "no")
