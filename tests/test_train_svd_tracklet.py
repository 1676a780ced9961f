"""Training box control: what an item holds, what each stage does, what is saved, what inference makes of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sample_videos
import torch
from datasets import open_dataset
from PIL import Image
from safetensors.torch import load_file

import train_svd_tracklet as script
from svd_xtend.data import annotations, tracklets
from svd_xtend.demo.synthetic_clips import make_clip
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.models import box_control
from svd_xtend.models.loading import load_svd
from svd_xtend.models.lora import inject_lora, save_lora
from svd_xtend.training.optimizers import GATE_RATE
from train_svd import LossOptions, training_loss

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / "shared" / "data"


def dataset(folder, *flags):
    args = script.script_parse([f"--base_folder={folder}", "--width=64", "--height=48", *flags])
    make_dataset = script.make_recipe(args).make_dataset
    return open_dataset(folder, 64, 48, 8, 7, 127, "crop", 5, make_dataset=make_dataset)


def index_of(data, name):
    """A sample index at which the clip of this name is drawn."""
    plain = [
        np.random.default_rng((data.seed, 0)).permutation(len(data))[i] for i in range(len(data))
    ]
    return plain.index([clip.stem for clip in data.clips].index(name))


# --------------------------------------------------------------------------------------------------------------- items


def test_an_item_is_the_dummy_datasets_and_the_boxes_of_its_window(boxed_clips):
    data = dataset(boxed_clips, "--draw_boxes=no", "--soft_boxes=0", "--box_dropout=0")
    plain = open_dataset(boxed_clips, 64, 48, 8, 7, 127, "crop", 5)
    item, index = data[index_of(data, "roam0002")], index_of(data, "roam0002")
    assert (item["pixel_values"] == plain[index]["pixel_values"]).all()
    clip = make_clip((0, 2), "roam")
    n = len(clip.kinds)
    np.testing.assert_allclose(item["control"]["boxes"][:, :n], clip.boxes, atol=1e-4)
    assert item["control"]["valid"][:, :n].all() and not item["control"]["valid"][:, n:].any()
    assert {k: v.shape for k, v in item["control"].items()} == {
        "boxes": (8, 8, 4), "valid": (8, 8), "hard": (8, 8), "colors": (8, 3)
    }  # fmt: skip


def test_boxes_follow_a_video_file_and_the_rate_at_which_it_is_sampled(tmp_path):
    """A square that moves 2 pixels a frame, every second frame of it; the caption beside the file is no annotation."""
    sample_videos.write_video(tmp_path / "a.mkv", "ffv1", "bgr0", frames=30)
    boxes = {str(i): [2 * i, 20, 2 * i + 16, 36] for i in range(30)}
    told = {"size": [96, 64], "tracklets": [{"id": "square", "boxes": boxes}]}
    (tmp_path / "a.json").write_text(json.dumps(told))
    (tmp_path / "a.txt").write_text("a white square")
    args = script.script_parse(
        [f"--base_folder={tmp_path}", "--draw_boxes=no", "--soft_boxes=0", "--box_dropout=0"]
    )
    make_dataset = script.make_recipe(args).make_dataset
    data = open_dataset(tmp_path, 96, 64, 8, 12.5, 127, "crop", 5, make_dataset=make_dataset)
    item = data[0]
    for picture, box in zip(item["pixel_values"], item["control"]["boxes"][:, 0]):
        y, x = np.nonzero((picture == 255).all(0))
        square = np.array([x.min() / 96, y.min() / 64, (x.max() + 1) / 96, (y.max() + 1) / 64])
        np.testing.assert_allclose(box, square, atol=0.02)
    steps = np.diff(item["control"]["boxes"][:, 0, 0]) * 96
    np.testing.assert_allclose(steps, 4, atol=1e-3)
    assert item["caption"] == "a white square"


def test_stage_1_draws_exact_boxes_2_hides_them_in_soft_ones_3_draws_nothing(boxed_clips):
    plain = open_dataset(boxed_clips, 64, 48, 8, 7, 127, "crop", 5)
    items = {
        stage: dataset(boxed_clips, f"--stage={stage}", "--box_dropout=0")[3] for stage in (1, 2, 3)
    }
    clean = plain[3]["pixel_values"]
    for stage, item in items.items():
        assert (item["pixel_values"][0] == clean[0]).all()  # the condition
        assert (item["pixel_values"][1:] != clean[1:]).any() == (stage != 3)
    assert (
        items[1]["pixel_values"] == items[2]["pixel_values"]
    ).all()  # the true boxes are drawn, not the soft ones
    valid = items[1]["control"]["valid"] > 0
    assert (items[1]["control"]["hard"][valid] == 1).all() and items[2]["control"]["hard"][
        valid
    ].mean() < 0.6
    true, shown = items[1]["control"]["boxes"][valid], items[2]["control"]["boxes"][valid]
    assert (
        (shown[:, :2] <= true[:, :2]).all()
        and (shown[:, 2:] >= true[:, 2:]).all()
        and (shown != true).any()
    )
    defaults = [script.script_parse([f"--stage={s}"]) for s in (1, 2, 3)]
    assert [(a.learning_rate, a.max_train_steps) for a in defaults] == [
        (2e-4, 50000),
        (3e-5, 50000),
        (3e-5, 10000),
    ]


def test_a_quarter_of_the_clips_has_no_boxes_and_none_is_drawn_there(boxed_clips):
    data, plain = dataset(boxed_clips), open_dataset(boxed_clips, 64, 48, 8, 7, 127, "crop", 5)
    items = [data[i] for i in range(120)]
    empty = [i for i, item in enumerate(items) if not item["control"]["valid"].any()]
    assert len(empty) / 120 == pytest.approx(0.25, abs=0.1)
    assert all((items[i]["pixel_values"] == plain[i]["pixel_values"]).all() for i in empty)


def test_colours_change_from_sample_to_sample_and_items_repeat(boxed_clips):
    data = dataset(boxed_clips)
    assert len({data[i]["control"]["colors"].tobytes() for i in range(6)}) > 3
    for key, value in dataset(boxed_clips)[4]["control"].items():
        assert (value == data[4]["control"][key]).all()


def test_videos_without_boxes_are_named_and_none_with_boxes_is_an_error(
    boxed_clips, clips, tmp_path, caplog
):
    shutil.copytree(boxed_clips, tmp_path / "some")
    (tmp_path / "some" / "roam0001" / "tracklets.json").unlink()
    data = dataset(tmp_path / "some", "--box_dropout=0")
    assert "1 videos train without boxes: roam0001" in caplog.text
    assert not data[index_of(data, "roam0001")]["control"]["valid"].any()
    for file in (tmp_path / "some").glob("*/tracklets.json"):
        file.unlink()
    with pytest.raises(
        ValueError,
        match="^--tracklets .*: no boxes for any video. Expected a file that names roam0000",
    ):
        dataset(tmp_path / "some")
    with pytest.raises(ValueError, match=r"tracklets.json: the file: expected JSON"):
        (tmp_path / "some" / "roam0001" / "tracklets.json").write_text("{")
        dataset(tmp_path / "some")


@pytest.mark.parametrize(
    "flags, told",
    [
        (
            ["--box_dropout=1.5"],
            "error: argument --box_dropout: expected a fraction from 0 to 1; got 1.5",
        ),
        (
            ["--validation_tracklets", "a.json"],
            "error: --validation_tracklets: expected",
        ),
        (["--stage=4"], "error: argument --stage: invalid choice: 4"),
        (["--stage=1", "--latent_cache=c"], "error: --latent_cache: holds clean frames"),
    ],
)
def test_bad_flags_are_one_error(flags, told, capsys):
    with pytest.raises(SystemExit):
        script.script_parse(flags)
    assert told in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- loss


def test_foreground_weight_moves_the_loss_to_the_boxes(pipe, boxed_clips):
    """At weight 1 it is the plain loss; the weighted loss is the mean of the squared error under a weight of mean 1."""
    args = script.script_parse(["--seed=3", "--width=64", "--height=48", "--P_mean=0.7", "--P_std=1.6", "--conditioning_dropout_prob=0"])  # fmt: skip
    data = dataset(boxed_clips, "--box_dropout=0")
    items = torch.utils.data.default_collate([data[0], data[1]])
    batch = {**items, "pixel_values": items["pixel_values"].float() / 127.5 - 1}
    model = box_control.ControlledUNet(pipe.unet, box_control.new_box_control(pipe.unet))
    with torch.no_grad():
        options = LossOptions.from_args(args)
        plain = training_loss(model, pipe, batch, options)
        assert script.add_pixel_weight(batch, pipe, 1.0) is batch
        heavy = training_loss(model, pipe, script.add_pixel_weight(batch, pipe, 2.0), options)
        batch["foreground"] = torch.tensor([0.0, 0, 1, 1]).expand(batch["foreground"].shape)
        everywhere = training_loss(model, pipe, script.add_pixel_weight(batch, pipe, 2.0), options)
    assert not torch.allclose(heavy, plain, rtol=1e-3)
    torch.testing.assert_close(everywhere, plain)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Box control with open gates, as after some training, in a folder."""
    pipe, folder = load_svd(str(TINY_SVD), torch.float32), tmp_path_factory.mktemp("boxes")
    adapter = box_control.new_box_control(pipe.unet)
    for name, p in adapter.named_parameters():
        if "alpha" in name:
            p.data += 0.5
    box_control.save_box_control(adapter, folder)
    return folder


def test_a_run_renders_saves_only_the_adapter_and_ends_in_loadable_weights(run, boxed_clips):
    image = boxed_clips / "roam0001" / "000.png"
    out = run("--max_train_steps=2", "--validation_steps=2", "--num_inference_steps=1", f"--validation_image={image}", "--checkpointing_steps=1", tracklet=True)  # fmt: skip
    saved = load_file(out / "checkpoint-2" / "trained.safetensors")
    assert all(name.startswith("adapter.") for name in saved)
    assert (out / "comparison.gif").exists()
    shown = Image.open(next((out / "validation").glob("step000002_*.png")))
    assert shown.width > 8 * 2 * 256  # clean and boxed, side by side, eight frames a row
    unet = load_svd(str(TINY_SVD), torch.float32).unet
    adapter = box_control.load_box_control(unet, out)
    for name, p in adapter.state_dict().items():
        assert torch.equal(p, saved[f"adapter.{name}"])


def test_resumed_run_equals_uninterrupted_run(run, tmp_path):
    flags = ["--checkpointing_steps=2", "--lr_warmup_steps=1", "--use_ema"]
    run("--max_train_steps=4", *flags, tracklet=True, output_dir=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
    run("--max_train_steps=4", *flags, tracklet=True, output_dir=tmp_path / "killed")
    for name in ("trained.safetensors", "ema.safetensors"):
        files = [tmp_path / folder / "checkpoint-4" / name for folder in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_gates_learn_faster_and_never_decay_by_the_schedule_that_all_follow(run, optimizers):
    run(
        "--max_train_steps=2",
        "--learning_rate=1e-3",
        "--lr_warmup_steps=4",
        "--lr_scheduler=constant",
        tracklet=True,
    )
    common, gates = optimizers[-1].param_groups
    assert common["lr"] == pytest.approx(0.5e-3) and gates["lr"] == pytest.approx(
        GATE_RATE * 0.5e-3
    )
    assert common["weight_decay"] == 1e-2 and gates["weight_decay"] == 0
    assert len(gates["params"]) == 2 * 4 + 3 * 2  # of 4 layers, 2 of them with an enhancer


def test_a_stage_starts_where_the_last_one_ended(run, tmp_path, weights):
    out = run(
        "--stage=2",
        f"--tracklet_weights={weights}",
        "--max_train_steps=1",
        "--learning_rate=0",
        tracklet=True,
    )
    assert_equal_files(out / box_control.BOX_CONTROL_FILE, weights / box_control.BOX_CONTROL_FILE)
    with pytest.raises(
        ValueError,
        match=r"--tracklet_weights .*: these weights need --max_objects 8 --enhancer carry",
    ):
        run(
            f"--tracklet_weights={weights}",
            "--max_objects=4",
            tracklet=True,
            output_dir=tmp_path / "other",
        )


def assert_equal_files(a, other):
    a, other = load_file(a), load_file(other)
    assert a.keys() == other.keys() and all(torch.equal(a[k], other[k]) for k in a)


def test_parts_of_the_unet_train_along_are_saved_and_go_on_in_the_next_stage(
    run, tmp_path, weights
):
    first = run(
        f"--tracklet_weights={weights}",
        "--train_params",
        "time_mixer",
        "conv_in",
        "--max_train_steps=2",
        tracklet=True,
    )
    saved = {
        name for name in load_file(first / box_control.BOX_CONTROL_FILE) if name.startswith("unet.")
    }
    assert "unet.conv_in.weight" in saved and any("time_mixer" in name for name in saved)
    base, tuned = (load_svd(str(TINY_SVD), torch.float32).unet for _ in range(2))
    box_control.load_box_control(tuned, first)
    assert not torch.equal(base.conv_in.weight, tuned.conv_in.weight)
    assert torch.equal(base.conv_out.weight, tuned.conv_out.weight)
    second = run(
        f"--tracklet_weights={first}",
        "--max_train_steps=1",
        tracklet=True,
        output_dir=tmp_path / "second",
    )
    assert saved <= load_file(second / box_control.BOX_CONTROL_FILE).keys()


def test_a_lora_lies_under_the_boxes_and_stays_as_it_is(run, pipe, tmp_path):
    inject_lora(pipe.unet, 2, 2, ["attention"])
    save_lora(pipe.unet, tmp_path / "lora")
    out = run(
        f"--lora={tmp_path / 'lora'}",
        "--train_params",
        "lora_A",
        "--max_train_steps=1",
        tracklet=True,
    )
    assert not any(
        "lora" in name for name in load_file(out / "checkpoint-1" / "trained.safetensors")
    )


def test_half_precision_trains_and_renders(run, boxed_clips):
    from svd_xtend.models.precision import fast_bf16

    if not fast_bf16():
        pytest.skip("no bfloat16 here")
    image = boxed_clips / "roam0001" / "000.png"
    out = run("--mixed_precision=bf16", "--train_params", "conv_in", "--max_train_steps=1", "--validation_steps=1",
              "--num_inference_steps=1", f"--validation_image={image}", tracklet=True)  # fmt: skip
    assert all(
        v.dtype == torch.float32
        for v in load_file(out / "checkpoint-1" / "trained.safetensors").values()
    )


# ----------------------------------------------------------------------------------------------------------- inference


def infer(tmp_path, *flags):
    """infer_svd.py in this process; returns its folder."""
    import infer_svd

    args = infer_svd.build_parser().parse_args(
        ["--num_inference_steps=2", f"--output_dir={tmp_path}", *map(str, flags)]
    )
    infer_svd.main(args)
    return tmp_path


def test_inference_heeds_the_boxes_and_shows_them_beside_the_clean_clip(
    tmp_path, boxed_clips, weights
):
    image = boxed_clips / "roam0001" / "000.png"
    path = {
        "frames": 8,
        "tracklets": [
            {"id": "it", "boxes": {"0": [0.1, 0.1, 0.4, 0.5], "7": [0.6, 0.5, 0.9, 0.9]}}
        ],
    }
    (tmp_path / "path.json").write_text(json.dumps(path))
    given = ["--tracklets", tmp_path / "path.json", "--tracklet_weights", weights, "--image", image]
    name = "roam0001_000.png"
    out = infer(tmp_path / "with", *given)
    stock = infer(tmp_path / "stock", "--image", image)
    late = infer(tmp_path / "late", *given, "--box_tau=0")
    far = infer(tmp_path / "far", *given, "--box_guidance_scale=2")
    pictures = {p.name: (p / name).read_bytes() for p in (out, stock, late, far)}
    assert pictures["stock"] == pictures["late"] != pictures["with"] != pictures["far"]
    assert (out / "roam0001_000_boxes.mp4").exists() and not (
        stock / "roam0001_000_boxes.mp4"
    ).exists()


def test_soft_boxes_are_shown_relaxed_to_the_model(tmp_path, boxed_clips, weights):
    """Two keyframes, and the same path given in every frame, are not the same request."""
    image = boxed_clips / "roam0001" / "000.png"
    start, end = np.array([0.1, 0.1, 0.4, 0.5]), np.array([0.6, 0.5, 0.9, 0.9])
    dense = {str(f): ((7 - f) / 7 * start + f / 7 * end).tolist() for f in range(8)}
    for name, boxes in (("keys", {"0": start.tolist(), "7": end.tolist()}), ("dense", dense)):
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"frames": 8, "tracklets": [{"boxes": boxes}]})
        )
    clips = [infer(tmp_path / n, "--tracklets", tmp_path / f"{n}.json", "--tracklet_weights", weights, "--image", image) for n in ("keys", "dense")]  # fmt: skip
    assert len({(clip / "roam0001_000.png").read_bytes() for clip in clips}) == 2


def test_boxes_of_nothing_are_an_error_that_names_the_file(tmp_path, weights):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="none.json: cannot be read as an annotation file"):
        infer(tmp_path, "--image", tmp_path / "a.png", "--tracklets", tmp_path / "none.json", "--tracklet_weights", weights)  # fmt: skip


@pytest.mark.skipif(not DATA.is_dir(), reason="the real clip is not part of the repo")
def test_a_real_clip_trains_with_its_motchallenge_boxes(run, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "mammoth_rhino").symlink_to(DATA / "mammoth_rhino" / "img1")
    out = run(f"--base_folder={tmp_path / 'videos'}", f"--tracklets={DATA / 'mammoth_rhino' / 'gt' / 'gt.txt'}",
              "--max_train_steps=1", "--validation_steps=1", "--num_inference_steps=1", tracklet=True)  # fmt: skip
    assert (out / box_control.BOX_CONTROL_FILE).exists() and (out / "comparison.png").exists()
    (own,) = annotations.read_tracklets(DATA / "mammoth_rhino" / "gt" / "gt.txt").values()
    seen = tracklets.fit_to_picture(own, (854, 480), 64, 48, "crop", range(8), 8)
    assert seen.valid[:, :2].all() and not seen.valid[:, 2:].any()
