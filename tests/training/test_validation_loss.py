"""The validation loss: the trainer's own loss, on fixed noise, on clips that do not train."""

import json
import os
import re
import shutil
from itertools import product

import numpy as np
import pytest
import sample_videos
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from scipy import stats
from torch.utils.data import default_collate

import train_svd
import train_svd_tracklet
from svd_xtend.data import folder_index, split
from svd_xtend.demo.synthetic_clips import HELD_OUT_SEED, write_clips
from svd_xtend.training import distributed, run_record, validation, validation_loss

SIZE = ["--width=64", "--height=48", "--num_frames=2", "--vae_encode_chunk=8"]
TUNED = [*SIZE, "--use_ema", "--max_train_steps=4", "--checkpointing_steps=2"]
LOOKED = ["--validation_steps=2", "--report_to=tensorboard"]


def rows_in(out):
    return [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]


def load(*flags):
    """Return (args, training set, validation set), as a run would have them."""
    args = train_svd.parse(train_svd.build_parser(), [*SIZE, "--seed=1", *map(str, flags)])
    return args, *train_svd.load_data(args, train_svd.Recipe(), PartialState(cpu=True))


def validation_loss_of(dataset, args, pipe, add_encodings=train_svd.add_encodings):
    return validation_loss.ValidationLoss(
        dataset,
        args,
        pipe,
        PartialState(cpu=True),
        loss_at_sigma=train_svd.loss_at_sigma,
        add_encodings=add_encodings,
    )


def names(data):
    return [clip.path.name for clip in data.clips]


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Three held-out clips."""
    folder = tmp_path_factory.mktemp("apart")
    write_clips(folder, "fall", 3, seed=HELD_OUT_SEED)
    return folder


@pytest.fixture
def tuned(kept, run, apart, tmp_path_factory):
    """Folder of a LoRA run of four steps, made once; it is looked at after none, two and four."""
    if not kept:
        how = dict(
            lora=True, validate=lambda *_: [], output_dir=tmp_path_factory.mktemp("tuned") / "out"
        )
        kept["tuned"] = run(*TUNED, *LOOKED, f"--validation_folder={apart}", **how)
    return kept["tuned"]


# ----------------------------------------------------------------------------------------------------------------- loss


def test_a_held_out_loss_is_the_trainers_own_of_that_clip_at_that_sigma(clips, apart, pipe):
    """By hand: from pixels, log sigma itself as P_mean, one clip at a time, though the flags ask for pairs and for dropout."""
    args, _, data = load(
        f"--base_folder={clips}", f"--validation_folder={apart}", "--validation_seed=5", "--conditioning_dropout_prob=0.3",
        "--per_gpu_batch_size=2",
    )  # fmt: skip
    held = validation_loss_of(data, args, pipe)
    table = held.losses(pipe.unet)
    assert table.shape == (3, 5) and len(np.unique(table)) == 15
    for i, (j, sigma) in product(range(3), enumerate(held.sigmas)):
        alone = train_svd.LossOptions(seed=5, P_mean=float(np.log(sigma)), P_std=0.0)
        batch = {
            **distributed.batch_to_device(default_collate([data[i]]), "cpu"),
            "index": torch.tensor([5 * i + j]),
        }
        with torch.no_grad():
            expected = train_svd.training_loss(pipe.unet, pipe, batch, alone).item()
        assert table[i, j] == pytest.approx(expected, rel=1e-5), (i, j)


def test_noise_levels_are_the_middles_of_equally_likely_parts():
    """One in each fifth of what training draws; the mean of log sigma is P_mean."""
    for P_mean, P_std in ((0.7, 1.6), (-1.2, 0.3)):
        logs = np.log(validation_loss.noise_levels(P_mean, P_std))
        assert stats.norm(P_mean, P_std).cdf(logs) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
        assert logs.mean() == pytest.approx(P_mean)


@pytest.mark.parametrize(
    "trainer, ema", [("full", False), ("full", True), ("lora", False), ("tracklet", False)]
)
def test_nothing_learned_is_no_difference(run, apart, tmp_path, trainer, ema):
    """At a learning rate of 0, to the last bit: model and averages, each trainer's own loss."""
    folder = tmp_path / "boxed" if trainer == "tracklet" else apart
    write_clips(tmp_path / "boxed", "roam", 2, seed=HELD_OUT_SEED)
    flags = [
        *SIZE,
        "--learning_rate=0",
        "--max_train_steps=2",
        "--validation_steps=2",
        "--validation_clips=2",
    ]
    flags += ["--per_gpu_batch_size=2", f"--validation_folder={folder}", *["--use_ema"] * ema]
    hooks = dict(
        validate=lambda *_: [],
        export=lambda *_: None,
        **{trainer: True} if trainer != "full" else {},
    )
    row = rows_in(run(*flags, **hooks))[-1]
    assert row["step"] == 2 and ("ema" in row) == ema
    for one in (row["raw"], row.get("ema", row["raw"])):
        assert one["difference"] == [0.0, 0.0, 0.0] and one["by_sigma"] == [[0.0, 0.0, 0.0]] * 5
        assert one["loss"] == one["base"] and min(one["base"]) > 0


# ------------------------------------------------------------------------------------------------------------------ run


def test_looking_leaves_training_alone(run, tuned, tmp_path):
    """Losses, weights and averages are those of a run without, bit for bit."""
    plain = run(*TUNED, lora=True, output_dir=tmp_path / "plain")
    one, other = (
        [row["loss"] for row in run_record.read_rows(out / "metrics.jsonl")]
        for out in (plain, tuned)
    )
    assert len(one) == 4 and one == other
    files = [f"checkpoint-4/{name}.safetensors" for name in ("trained", "ema")]
    for file in ("pytorch_lora_weights.safetensors", *files):
        one, other = load_file(plain / file), load_file(tuned / file)
        assert one.keys() == other.keys() and all(
            torch.equal(one[name], other[name]) for name in one
        ), file


def test_model_and_averages_have_a_row_each_and_differ(tuned):
    """Averages lag behind; both began as the base."""
    first, *_, last = rows_in(tuned)
    assert [row["step"] for row in rows_in(tuned)] == [0, 2, 4]
    assert first["raw"] == first["ema"] and first["raw"]["difference"] == [0.0, 0.0, 0.0]
    assert last["raw"]["base"] == last["ema"]["base"] == first["raw"]["base"]
    for key in ("loss", "difference", "by_sigma"):
        assert last["raw"][key] != last["ema"][key]
        assert last["raw"][key] != first["raw"][key]


def test_a_resumed_run_says_again_what_the_earlier_start_said(run, tuned, apart, tmp_path):
    """The base is looked at before the checkpoint is loaded. Rows are sorted, each step has one, that of the last start."""
    again = tmp_path / "again"
    shutil.copytree(tuned, again)
    shutil.rmtree(
        again / "checkpoint-4"
    )  # as if killed in step 4, when a row of it was there already
    marked = "".join(json.dumps({**row, "mark": True}) + "\n" for row in rows_in(tuned))
    (again / "held_out.jsonl").write_text(marked + '{"step": 4, "raw"')  # and another half written
    how = dict(lora=True, validate=lambda *_: [], output_dir=again)
    run(*TUNED, "--validation_steps=2", f"--validation_folder={apart}", **how)
    rows = rows_in(again)
    assert [(row["step"], "mark" in row) for row in rows] == [(0, False), (2, True), (4, False)]
    for row, before in zip(rows, rows_in(tuned)):
        assert row["raw"] == before["raw"] and row["ema"] == before["ema"]


LORA = """
import train_svd, train_svd_lora
args = train_svd.parse(train_svd_lora.script_parser())
nothing = dict(export=lambda *_: None, validate=lambda *_: [])
train_svd.train(args, train_svd.Recipe(prepare_unet=train_svd_lora.add_lora, **nothing))
"""


def test_two_processes_find_what_one_does(farm, clips, apart, tmp_path):
    """Of three clips one has two, the other one, and under FSDP2 they would wait for each other in a forward pass. Before
    training, and after a step."""
    (tmp_path / "script.py").write_text(LORA)
    flags = [tmp_path / "script.py", *SIZE, "--num_workers=0", "--seed=1", "--mixed_precision=no"]
    flags += [
        f"--base_folder={clips}",
        f"--validation_folder={apart}",
        "--max_train_steps=1",
        "--validation_steps=1",
    ]
    flags += ["--learning_rate=1e-3"]
    farm.run(*flags, "--per_gpu_batch_size=2", output_dir=tmp_path / "one")
    for engine in ("ddp", "fsdp2"):
        farm.run(*flags, engine=engine, world=2, output_dir=tmp_path / engine)
        assert [row["step"] for row in rows_in(tmp_path / engine)] == [0, 1]
        for one, two in zip(rows_in(tmp_path / "one"), rows_in(tmp_path / engine)):
            for key in ("clips", "sigma", "base", "loss"):
                assert two["raw"][key] == pytest.approx(one["raw"][key], rel=1e-6), (engine, key)
            for key in ("difference", "by_sigma"):  # of numbers near to each other
                assert np.array(two["raw"][key]) == pytest.approx(
                    np.array(one["raw"][key]), abs=1e-6
                ), (engine, key)
        assert one["raw"]["difference"][0] != 0


# -------------------------------------------------------------------------------------------------------------- compare


def test_the_interval_is_students():
    """As SciPy has it."""
    for n in (2, 3, 40):
        differences = np.random.default_rng(n).normal(0.1, 1, n)
        mean, *ends = validation_loss.confidence_interval(differences)
        assert mean == pytest.approx(differences.mean())
        assert ends == pytest.approx(
            tuple(stats.ttest_1samp(differences, 0).confidence_interval(0.95))
        )
    assert validation_loss.confidence_interval([0.5]) == (0.5, None, None)
    assert validation_loss.confidence_interval(np.zeros(4)) == (0.0, 0.0, 0.0)


def test_pairing_takes_out_what_both_have():
    """Clips differ by 1, model and base by about 0.01: seen all the same, and the mean difference is that of the means."""
    rng = np.random.default_rng(0)
    base = rng.normal(2, 1, (8, 1)) + rng.normal(0, 0.1, (8, 5))
    row = validation_loss.compare_losses(
        [1, 2, 3, 4, 5], base, base - rng.normal(0.01, 0.002, (8, 5))
    )
    mean, low, high = row["difference"]
    assert -0.012 < low < mean < high < -0.008 and all(high < 0 for *_, high in row["by_sigma"])
    assert mean == pytest.approx(np.mean(row["loss"]) - np.mean(row["base"]))
    assert [one[0] for one in row["by_sigma"]] == pytest.approx(
        np.subtract(row["loss"], row["base"])
    )


def test_the_tracker_and_the_words_say_what_the_row_does(tuned):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tuned / "logs" / "svd_xtend")).Reload()
    shown = {
        tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]
    }
    for row, (name, kind) in product(
        rows_in(tuned), (("held_out", "raw"), ("held_out_ema", "ema"))
    ):
        one, mean = row[kind], row[kind]["difference"][0]
        expected = dict(zip(("difference", "low", "high"), one["difference"]))
        expected |= {"loss": np.mean(one["loss"]), "base": np.mean(one["base"])}
        expected |= {
            f"difference_sigma_{s:.3g}": d[0] for s, d in zip(one["sigma"], one["by_sigma"])
        }
        assert {k for k in shown if k.startswith(f"{name}/")} == {
            f"{name}/{key}" for key in expected
        }
        for key, value in expected.items():
            assert shown[f"{name}/{key}"][row["step"]] == pytest.approx(
                value, rel=1e-6, abs=1e-12
            ), key
        words = [
            float(word)
            for word in re.findall(
                r"[-+]?\d[\d.]*(?:e[-+]\d+)?", validation_loss.format_comparison(one)
            )
        ]
        ends = [expected["low"], expected["high"]]
        assert words == pytest.approx(
            [expected["loss"], expected["base"], mean, 95, *ends, 3], rel=6e-3
        )


def test_one_clip_has_no_ends_to_show():
    row = validation_loss.compare_losses([1.0], np.array([[0.4]]), np.array([[0.3]]))
    assert row["difference"] == (pytest.approx(-0.1), None, None)
    assert "95 %" not in validation_loss.format_comparison(
        row
    ) and validation_loss.format_comparison(row).endswith("-0.1 on 1 clip")
    assert validation_loss.tracker_curves(row, "x").keys() == {
        "x/loss",
        "x/base",
        "x/difference",
        "x/difference_sigma_1",
    }


# ---------------------------------------------------------------------------------------------------------- which clips


def film_of(name):
    return "long" if name in ("opening", "middle", "ending") else name.split("_")[0]


@pytest.fixture
def filmed(tmp_path):
    """A folder of 15 clips of 5 films: of four by their names, of one by what prepare_data.py wrote beside the frames."""
    root = tmp_path / "filmed"
    for film, scene in product(range(4), range(3)):
        sample_videos.write_frame_folder(root / f"film{film}_scene{scene:03d}", 4)
    for part in ("opening", "middle", "ending"):
        (sample_videos.write_frame_folder(root / part, 4) / "clip.json").write_text(
            '{"fps": 7, "source": "long.mp4"}'
        )
    return root


def test_a_ratio_keeps_films_apart(filmed):
    """Every clip is on one side, no film on both; at least one film is on each, and two runs hold out the same."""
    counts = []
    for ratio in (0.01, 0.2, 0.3, 0.99):
        _, data, held = load(
            f"--base_folder={filmed}", f"--validation_ratio={ratio}", f"--seed={int(100 * ratio)}"
        )
        assert sorted(names(data) + names(held)) == sorted(path.name for path in filmed.iterdir())
        assert not set(map(film_of, names(data))) & set(map(film_of, names(held)))
        assert len(held) == len(held.clips)
        counts.append(len(held))
        drawn = {data.clips[next(data.sampler.choices(i))].path.name for i in range(40)}
        assert drawn == set(names(data))
    assert counts[0] == 3 and counts == sorted(counts) and counts[-1] == 12
    again = load(f"--base_folder={filmed}", "--validation_ratio=0.99", "--validation_seed=7")
    assert names(again[2]) == names(held)


def test_a_film_told_by_its_clips_is_held_out_whole(filmed):
    """Whichever that is: here all others are of films of one clip."""
    held_out_once = False
    for path in filmed.glob("film*"):
        path.rename(path.with_name(path.name.replace("_scene", "-")))
    for ratio in (0.2, 0.4, 0.6, 0.8):
        _, data, held = load(f"--base_folder={filmed}", f"--validation_ratio={ratio}")
        sides = [{"opening", "middle", "ending"} & set(names(side)) for side in (data, held)]
        assert sorted(map(len, sides)) == [0, 3]
        held_out_once |= bool(sides[1])
    assert held_out_once


def test_a_folder_of_one_film_is_refused(tmp_path):
    for scene in range(2):
        sample_videos.write_frame_folder(tmp_path / "root" / f"film_scene{scene:03d}", 4)
    with pytest.raises(ValueError, match="^--validation_ratio: .*root holds 1 source video"):
        load(f"--base_folder={tmp_path / 'root'}", "--validation_ratio=0.5")


def test_a_ratio_holds_out_about_so_many_films_and_never_one_that_trained():
    """By name alone: when films come, or grow, the old ones stay where they are."""
    share = []
    for k in range(200):
        few = {f"film{k}-{i}": ["clip"] for i in range(30)}
        more = {**few, **{f"new{k}-{i}": ["clip"] for i in range(9)}, f"film{k}-0": ["clip"] * 50}
        before, after = (
            split.choose_validation_sources(few, 0.25),
            split.choose_validation_sources(more, 0.25),
        )
        assert before == after & few.keys()
        share.append(len(before) / 30)
    assert np.mean(share) == pytest.approx(0.25, abs=0.02)


def test_a_film_in_two_base_folders_is_on_one_side(tmp_path):
    """Of which one has other films, too."""
    a, b = tmp_path / "a", tmp_path / "b"
    for i in range(6):
        sample_videos.write_frame_folder(a / f"film{i}_scene000", 4)
        sample_videos.write_frame_folder(b / f"film{i}_scene001", 4)
        sample_videos.write_frame_folder(b / f"other{i}_scene000", 4)
    for ratio in (0.2, 0.4, 0.6):
        _, data, held = load("--base_folder", a, b, f"--validation_ratio={ratio}")
        assert not set(map(film_of, names(data))) & set(map(film_of, names(held)))
        assert len(data) + len(held) == 18 and len(held) > 0


def test_each_held_out_clip_counts_once_in_buckets_of_sizes_too(tmp_path, clips, pipe):
    """One that counts twice is no independent one: the interval would be too narrow."""
    write_clips(tmp_path / "apart", "fall", 3, seed=5)
    write_clips(tmp_path / "apart", "shapes", 3, seed=5, width=48, height=64)
    args, _, data = load(
        f"--base_folder={clips}", f"--validation_folder={tmp_path / 'apart'}", "--buckets"
    )
    held = validation_loss_of(data, args, pipe)
    first = [batch["pixel_values"] for batch in held.batches]
    assert {tuple(frame.shape[-2:]) for frame in first} == {(48, 64), (64, 48)}
    assert len(first) == len({frame.numpy().tobytes() for frame in first}) == 6


def test_a_folder_that_is_split_is_looked_into_once(filmed, monkeypatch):
    """Of a million videos that is hours. (What was written just now is always looked at again.)"""
    for path in filmed.rglob("*"):
        os.utime(path, (1e9, 1e9))
    looked, look = [], folder_index.FolderIndex.inspect_clip
    monkeypatch.setattr(
        folder_index.FolderIndex,
        "inspect_clip",
        lambda self, i, **how: looked.append(i) or look(self, i, **how),
    )
    load(f"--base_folder={filmed}", "--validation_ratio=0.3")
    assert sorted(looked) == list(range(15))


@pytest.mark.parametrize("told", ["[]", '{"source": null}', "{", "{}"])
def test_a_clip_json_without_a_source_splits_by_name(filmed, told):
    (filmed / "opening" / "clip.json").write_text(told)
    _, data, held = load(f"--base_folder={filmed}", "--validation_ratio=0.3")
    assert len(data) + len(held) == (
        15 if told in ("{}", '{"source": null}') else 14
    )  # else it is left out as before


def test_a_dot_in_a_folders_name_is_no_suffix(tmp_path):
    """Clips named by date are not all of one film."""
    for day in range(1, 6):
        sample_videos.write_frame_folder(tmp_path / "root" / f"2024.05.0{day}", 4)
    assert split.clips_by_source_video(folder_index.FolderIndex(tmp_path / "root")).keys() == {
        f"2024.05.0{day}" for day in range(1, 6)
    }


def test_held_out_clips_have_the_motion_bucket_that_they_would_have_in_training(tmp_path):
    """By rank among the clips that train: a copy of one has its bucket, 1 to 255 by how many are slower, and what stands still that
    of the slowest. Among themselves three would be ranked as if they spanned all. A bucket that is told stays."""
    root, apart = tmp_path / "root", tmp_path / "apart"
    write_clips(root, "fall", 7, seed=3)
    for told in root.glob("*/clip.json"):
        told.unlink()
    copies = ("fall0002", "fall0005")
    for name in copies:
        shutil.copytree(root / name, apart / name)
    shutil.copytree(root / "fall0000", apart / "still")
    for frame in (apart / "still").glob("*.png"):
        shutil.copy(root / "fall0000" / "000.png", frame)
    (sample_videos.write_frame_folder(apart / "told", 8) / "clip.json").write_text(
        '{"fps": 7, "motion_bucket_id": 33}'
    )
    _, data, held = load(f"--base_folder={root}", f"--validation_folder={apart}")
    own = {clip.path.name: clip.metadata["motion_bucket_id"] for clip in held.clips}
    trains = {clip.path.name: clip.metadata["motion_bucket_id"] for clip in data.clips}
    motions = dict(zip(names(data), data.clips.motions))
    for name in copies:
        slower = sum(motion < motions[name] for motion in motions.values())
        assert (
            own[name] == pytest.approx(trains[name]) == pytest.approx(1 + 254 * (slower + 0.5) / 7)
        )
    assert own["still"] == pytest.approx(min(trains.values())) and own["told"] == 33


def test_a_run_renders_what_it_holds_out(filmed):
    """Where no picture is named."""
    args, data, held = load(f"--base_folder={filmed}", "--validation_ratio=0.3")
    args = validation.choose_validation_inputs(args, data, held)
    assert args.validation_image == [str(filmed / names(held)[0] / "000.png")]
    assert args.validation_image[0].split("/")[-2] not in names(data)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "flags, told",
    [
        (
            ["--validation_ratio=1"],
            "argument --validation_ratio: expected a fraction from 0 to less than 1; got 1",
        ),
        (
            ["--validation_ratio=-0.1"],
            "argument --validation_ratio: expected a fraction from 0 to less than 1; got -0.1",
        ),
        (
            ["--validation_ratio=nan"],
            "argument --validation_ratio: expected a fraction from 0 to less than 1; got nan",
        ),
        (
            ["--validation_ratio=0.1", "--validation_folder", "a"],
            "--validation_ratio: cannot be used with --validation_folder",
        ),
        (
            ["--validation_clips=0"],
            "argument --validation_clips: expected a whole number of at least 1; got 0",
        ),
    ],
)
def test_bad_flags_are_one_error(flags, told, capsys):
    with pytest.raises(SystemExit):
        train_svd.parse(train_svd.build_parser(), flags)
    assert f"error: {told}" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_named(clips, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path / 'nowhere'}: no such folder"):
        load(f"--base_folder={clips}", f"--validation_folder={tmp_path / 'nowhere'}")


def test_boxes_of_the_one_video_that_trains_are_not_those_of_one_held_out(boxed_clips, tmp_path):
    """A file of one video need not name it, where just one trains; but one held out has other boxes."""
    for side, name in (("train", "roam0000"), ("apart", "roam0001")):
        shutil.copytree(boxed_clips / name, tmp_path / side / f"{side}_video")
    file = tmp_path / "boxes.json"
    shutil.copy(boxed_clips / "roam0000" / "tracklets.json", file)
    (tmp_path / "apart" / "apart_video" / "tracklets.json").unlink()
    flags = [
        f"--base_folder={tmp_path / 'train'}",
        f"--tracklets={file}",
        "--width=64",
        "--height=48",
        "--num_frames=8",
    ]
    args = train_svd_tracklet.script_parse([*flags, f"--validation_folder={tmp_path / 'apart'}"])
    args.seed = 0
    with pytest.raises(
        ValueError, match="no boxes for any video. Expected a file that names apart_video"
    ):
        train_svd.load_data(args, train_svd_tracklet.make_recipe(args), PartialState(cpu=True))
    args.validation_folder = None
    recipe = train_svd_tracklet.make_recipe(args)
    assert train_svd.load_data(args, recipe, PartialState(cpu=True))[0]


def test_clips_of_one_film_are_one_witness():
    """Else four windows of one film would pass for four films: with no true effect a third of the intervals would leave out 0."""
    rng = np.random.default_rng(0)
    missed = {"clips": 0, "films": 0}
    for _ in range(400):
        base = np.ones((16, 5))
        tuned = base + np.repeat(rng.normal(size=(4, 1)), 4, 0) + 0.1 * rng.normal(size=(16, 5))
        for name, of in (("clips", None), ("films", np.repeat(list("abcd"), 4))):
            row = validation_loss.compare_losses([1, 2, 3, 4, 5], base, tuned, of)
            _, low, high = row["difference"]
            missed[name] += not low <= 0 <= high
    assert (
        row["clips"] == 16
        and row["films"] == 4
        and "on 16 clips of 4 videos" in validation_loss.format_comparison(row)
    )
    assert missed["films"] < 0.08 * 400 < 0.2 * 400 < missed["clips"]


def test_scenes_of_a_film_are_told_apart_from_films(filmed, pipe, clips):
    args, _, data = load(
        f"--base_folder={clips}", f"--validation_folder={filmed}", "--validation_clips=15"
    )
    held = validation_loss_of(data, args, pipe, add_encodings=lambda pipe, batch, chunk: batch)
    assert sorted(held.sources) == sorted(["long"] * 3 + [f"film{i}" for i in range(4)] * 3)


@pytest.mark.parametrize("linked", [False, True])
def test_a_clip_that_trains_cannot_be_held_out(clips, tmp_path, linked):
    """By itself, or by a link as prepare_data.py split makes them."""
    write_clips(tmp_path / "apart", "fall", 1, seed=HELD_OUT_SEED)
    (tmp_path / "apart" / "again").symlink_to((clips / "fall0003").absolute())
    folder = tmp_path / "apart" if linked else clips
    with pytest.raises(
        ValueError, match="^--validation_folder: .*(fall|again).* is among the training clips"
    ):
        load(f"--base_folder={clips}", f"--validation_folder={folder}")
