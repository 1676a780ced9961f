"""Test prepare_data.py: check a folder, extract frames, convert annotations, split a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sample_videos
from datasets import open_dataset
from PIL import Image

import prepare_data
from svd_xtend.data import annotations, folder_index, split
from svd_xtend.data.clip import ClipSpec
from svd_xtend.data.sampler import ClipCollection

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


def call(*argv):
    """Run a command in this process."""
    args = prepare_data.build_parser().parse_args(list(map(str, argv)))
    prepare_data.COMMANDS[args.command](args)


def two_scenes(i, size):
    """Draw frame i of a video whose second scene begins at frame 25."""
    return (
        sample_videos.make_frame(i, size)
        if i < 25
        else 255 - sample_videos.make_frame(i - 25, size)[::-1]
    )


@pytest.fixture
def mixed(tmp_path):
    """Make a folder of good and bad clips, one with a cut; return it and the bad names."""
    root = tmp_path / "mixed"
    root.mkdir()
    bad = sample_videos.write_bad_files(root)
    sample_videos.write_video(root / "good.mp4", frames=60, gop=60)
    sample_videos.write_video(root / "cut.mp4", frames=50, draw=two_scenes)
    sample_videos.write_frame_folder(root / "frames", 30)
    (root / "frames" / "clip.json").write_text('{"fps": 10, "caption": "a square"}')
    return root, bad


# ---------------------------------------------------------------------------- check


def test_check_reports_as_the_user_runs_it(mixed, tmp_path):
    root, bad = mixed
    command = [
        sys.executable,
        "prepare_data.py",
        "check",
        root,
        f"--output_dir={tmp_path / 'out'}",
        "--num_frames=8",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["name"]: row for row in report["clips"]}
    assert rows.keys() == {"good.mp4", "cut.mp4", "frames"}
    assert rows["cut.mp4"]["cuts"] == [25]
    assert rows["frames"]["caption"] == "a square"
    good = rows["good.mp4"]
    assert "cuts" not in good
    assert (good["width"], good["frames"], good["fps"]) == (96, 60, 25)
    assert set(report["skipped"]) == set(bad) - {"20 a pixel.png"}
    assert report["pictures"] == 1
    heading = f"{root}: 3 clips of at least 8 frames at --fps 7.0, 1 pictures, 29 skipped"
    assert heading in done.stdout
    assert "1 clips hold more than one scene: cut.mp4" in done.stdout
    assert "... 9 others" in done.stdout
    assert Image.open(tmp_path / "out" / "check.png").size[0] > 800


def test_training_leaves_out_what_check_finds_damaged(tmp_path, caplog):
    """The damage is where training's own look at a few frames does not find it."""
    root = tmp_path / "root"
    for name in ("a", "b"):
        sample_videos.write_frame_folder(root / name, 200)
    sample_videos.write_video(root / "film.mp4", frames=400, gop=20)
    (root / "b" / "101.png").write_bytes(b"damaged")
    data = bytearray((root / "film.mp4").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 1500] = os.urandom(1500)
    (root / "film.mp4").write_bytes(data)
    for path in (root / "a", root / "b", root / "film.mp4"):
        os.utime(path, (1e9, 1e9))
    before = open_dataset(root, 64, 48, 8, 7, "auto", "crop")
    call("check", root, f"--output_dir={tmp_path / 'out'}")
    after = open_dataset(root, 64, 48, 8, 7, "auto", "crop")
    assert len(before) == 3
    assert [clip.stem for clip in after.clips] == ["a"]
    assert "b: 101.png: cannot be read as a picture" in caplog.text
    assert "film.mp4: " in caplog.text


def test_check_decodes_once_and_scores_as_training_does(tmp_path, monkeypatch):
    sample_videos.write_video(tmp_path / "root" / "a.mp4", frames=300, gop=30)
    sample_videos.write_frame_folder(tmp_path / "root" / "b", 60)
    for path in (tmp_path / "root").iterdir():
        os.utime(path, (1e9, 1e9))
    ClipCollection(tmp_path / "root", ClipSpec(0, 0, 8, 7), motion_bucket_id="auto")
    sampled = folder_index.FolderIndex(tmp_path / "root").arrays["motions"].copy()
    call("check", tmp_path / "root", f"--output_dir={tmp_path}")
    complete = folder_index.FolderIndex(tmp_path / "root").arrays["motions"]
    np.testing.assert_allclose(sampled, complete, rtol=0.03)
    monkeypatch.setattr(prepare_data, "decode_fully", lambda *_: pytest.fail("decoded again"))
    call("check", tmp_path / "root", f"--output_dir={tmp_path}")


def test_check_of_a_folder_without_a_usable_clip_says_why(tmp_path, capsys):
    sample_videos.write_video(tmp_path / "root" / "short.mp4", frames=5)
    call("check", tmp_path / "root", f"--output_dir={tmp_path}")
    printed = capsys.readouterr().out
    assert "0 clips of at least 14" in printed
    assert "short.mp4: too short, 5 frame(s)" in printed
    with pytest.raises(ValueError, match="^--base_folder .*none: no such folder"):
        call("check", tmp_path / "none")


# ---------------------------------------------------------------------------- frames


def test_extracted_frames_are_those_of_the_video_and_have_its_rate(tmp_path):
    sample_videos.write_video(tmp_path / "in" / "a.mkv", "ffv1", "bgr0", frames=30)
    (tmp_path / "in" / "a.txt").write_text("a square")
    call("frames", tmp_path / "in", tmp_path / "out", "--format=png", "--fps=12.5")
    files = sorted((tmp_path / "out" / "a").glob("*.png"))
    assert len(files) == 15
    for k, file in enumerate(files):
        assert np.array_equal(np.asarray(Image.open(file)), sample_videos.make_frame(2 * k))
    metadata = json.loads((tmp_path / "out" / "a" / "clip.json").read_text())
    assert metadata == {"caption": "a square", "fps": 12.5, "source": "a.mkv"}
    assert len(open_dataset(tmp_path / "out", 64, 48, 8, "native", 127, "crop")) == 1


def test_each_scene_becomes_a_folder_without_frames_of_another(tmp_path):
    sample_videos.write_video(tmp_path / "cut.mp4", frames=50, draw=two_scenes)
    call("frames", tmp_path / "cut.mp4", tmp_path / "out", "--scenes", "--format=png")
    for k in (0, 1):
        files = sorted((tmp_path / "out" / f"cut_scene{k:03d}").glob("*.png"))
        assert len(files) == 25
        for i, file in enumerate(files):
            error = np.asarray(Image.open(file), int) - two_scenes(25 * k + i, (96, 64))
            assert np.abs(error).mean() < 12, (k, i)


def test_a_killed_extraction_continues_and_leaves_no_partial_folders(tmp_path, capsys):
    for name in "abc":
        sample_videos.write_video(tmp_path / "in" / f"{name}.mp4", frames=20)
    write = prepare_data.write_frames

    def killed(folder, *arguments):
        if folder.name == "c":
            raise KeyboardInterrupt
        write(folder, *arguments)

    prepare_data.write_frames = killed
    try:
        with pytest.raises(KeyboardInterrupt):
            call("frames", tmp_path / "in", tmp_path / "out")
    finally:
        prepare_data.write_frames = write
    out = tmp_path / "out"

    def change_times():
        return {name: (out / name).stat().st_mtime_ns for name in "ab" if (out / name).exists()}

    before = change_times()
    capsys.readouterr()
    call("frames", tmp_path / "in", out)
    printed = capsys.readouterr().out
    assert "wrote 1 folders of frames" in printed
    assert "Of 3 videos, 2 were already extracted" in printed
    assert change_times() == before
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == ["a", "b", "c"]
    call("frames", tmp_path / "in", out, "--fps=5", "--min_frames=2")  # other flags: all again
    assert all(len(list((out / name).glob("*.jpg"))) == 4 for name in "abc")


def test_videos_that_cannot_be_read_are_named_and_the_others_extracted(tmp_path, capsys, caplog):
    (tmp_path / "in").mkdir()
    sample_videos.write_bad_files(tmp_path / "in")
    sample_videos.write_video(tmp_path / "in" / "good.mp4", frames=20)
    for path in (tmp_path / "in" / "24 up", tmp_path / "in" / "25 pipe.mp4"):
        path.unlink()
    call("frames", tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "good" / "clip.json").exists()
    assert "02 text.mp4: cannot be opened" in caplog.text
    with pytest.raises(SystemExit, match="nowhere.mp4: no such file"):
        call("frames", tmp_path / "nowhere.mp4", tmp_path / "out")


# ---------------------------------------------------------------------------- tracklets, split


def test_public_annotations_become_the_projects_own(tmp_path):
    mot = "\n".join(f"{f},7,{10 * f},20,30,40,1,1,1" for f in range(1, 6))
    (tmp_path / "walk.txt").write_text(mot)
    (tmp_path / "out" / "walk").mkdir(parents=True)
    call("tracklets", tmp_path / "walk.txt", tmp_path / "out", "--size=200x100")
    found = annotations.read_tracklets(tmp_path / "out" / "walk" / "tracklets.json")["tracklets"]
    asked = annotations.read_tracklets(tmp_path / "walk.txt", (200, 100))["walk"]
    np.testing.assert_allclose(found.boxes, asked.boxes, atol=1e-4)
    assert found.ids == asked.ids == ("7",)
    with pytest.raises(ValueError, match="does not contain the size of the pictures"):
        call("tracklets", tmp_path / "walk.txt", tmp_path / "out")


@pytest.mark.skipif(not DATA.exists(), reason="needs the real annotations")
def test_real_annotations_of_each_format(tmp_path):
    call("tracklets", DATA / "bdd100k" / "b1c66a42-6f7d68ca.json", tmp_path, "--size=1280x720")
    call("tracklets", DATA / "kitti" / "label_02" / "0001.txt", tmp_path, "--size=1242x375")
    call("tracklets", DATA / "mammoth_rhino" / "gt" / "gt.txt", tmp_path)
    lengths = {
        p.stem: len(next(iter(annotations.read_tracklets(p).values())))
        for p in tmp_path.glob("*.json")
    }
    assert lengths == {"b1c66a42-6f7d68ca": 202, "0001": 447, "mammoth_rhino": 49}


def is_clip(name):
    return name.startswith(("source", "a.mp4"))


@pytest.mark.parametrize("how", ["link", "copy", "move"])
def test_split_keeps_source_videos_whole_and_takes_captions_along(tmp_path, how):
    root = tmp_path / "root"
    out = tmp_path / "out"
    for source in range(6):
        for scene in range(2):
            sample_videos.write_frame_folder(root / f"source{source}_scene{scene:03d}", 8)
    sample_videos.write_video(root / "a.mp4", frames=10)
    (root / "a.txt").write_text("a caption")
    (root / "metadata.jsonl").write_text(
        '{"file_name": "a.mp4", "fps": 5}\n{"file_name": "source0_scene000", "fps": 5}'
    )
    call("split", root, out, "--held_out=0.3", f"--how={how}")
    train = {path.name for path in (out / "train").iterdir()}
    held_out = {path.name for path in (out / "held_out").iterdir()}
    assert train & held_out <= {"metadata.jsonl"}
    assert sum(map(is_clip, train | held_out)) == 13
    assert 0 < sum(map(is_clip, held_out)) < 13
    train_sources = {name.split("_")[0] for name in train if name.startswith("source")}
    held_out_sources = {name.split("_")[0] for name in held_out if name.startswith("source")}
    assert not train_sources & held_out_sources
    (part,) = (part for part in ("train", "held_out") if (out / part / "a.mp4").exists())
    assert (out / part / "a.txt").read_text() == "a caption"
    assert folder_index.read_metadata(out / part)["a.mp4"]["fps"] == 5
    assert (root / "a.mp4").exists() == (how != "move")
    spec = ClipSpec(0, 0, 8, "native")
    assert len(ClipCollection([out / "train", out / "held_out"], spec)) == 13
    with pytest.raises(SystemExit, match="already exists|needs at least two"):
        call("split", root, out)


def test_adding_videos_never_moves_a_training_source_into_the_validation_set():
    few = {f"film{i}": ["x"] for i in range(40)}
    more = {**few, **{f"new{i}": ["x"] for i in range(40)}}
    for seed in range(20):
        before = split.choose_validation_sources(few, 0.2, seed)
        after = split.choose_validation_sources(more, 0.2, seed)
        assert before == after & few.keys()
        assert 0 < len(before) < 20


def test_the_seed_changes_the_split():
    sources = [f"film{i}" for i in range(40)]
    first = split.choose_validation_sources(sources, 0.2, seed=0)
    second = split.choose_validation_sources(sources, 0.2, seed=1)
    assert first != second


def test_a_single_source_video_cannot_be_split(tmp_path):
    sample_videos.write_frame_folder(tmp_path / "root" / "a_scene000", 8)
    sample_videos.write_frame_folder(tmp_path / "root" / "a_scene001", 8)
    with pytest.raises(SystemExit, match="split is by source video and needs at least two"):
        call("split", tmp_path / "root", tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()
