"""DummyDataset: every kind of folder that users have."""

import logging

import numpy as np
import pytest
from datasets import open_dataset
from PIL import Image

import train_svd
from svd_xtend.data import images
from svd_xtend.data.sampler import BatchIndexSampler


def picture(path, value, mode="RGB", size=(20, 12), **save):
    """A flat grey picture of that mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        image = Image.fromarray(np.full(size[::-1], value * 257, np.uint16))
    else:
        image = Image.new("RGB", size, (value,) * 3)
        image = image.quantize() if mode == "P" else image.convert(mode)
    image.save(path, **save)


def dataset(folder, f=3, **kwargs):
    own = {
        "width": 16,
        "height": 8,
        "num_frames": f,
        "fps": 7,
        "motion_bucket_id": 127,
        "resize_mode": "crop",
    }
    return open_dataset(folder, **(own | kwargs))


def test_frames_are_in_natural_order(tmp_path):
    for i in range(1, 12):
        picture(tmp_path / "v" / f"frame_{i}.png", i * 10)
    item = dataset(tmp_path, f=11)[0]
    assert item["pixel_values"][:, 0, 0, 0].tolist() == [i * 10 for i in range(1, 12)]
    assert item["pixel_values"].shape == (11, 3, 8, 16) and item["pixel_values"].dtype == np.uint8


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_every_pillow_mode_becomes_rgb(tmp_path, mode):
    suffix, value = ("tif" if mode == "CMYK" else "png"), 255 if mode == "1" else 128
    for i in range(3):
        picture(tmp_path / "v" / f"{i}.{suffix}", value, mode)
    pixels = dataset(tmp_path)[0]["pixel_values"]
    assert abs(pixels.astype(int) - value).max() <= 3


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (12, 20), "black")
    image.paste("white", (0, 0, 12, 10))  # the upper half of an upright picture, stored lying
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = np.asarray(images.load_image(tmp_path / "a.jpg", 12, 20)).astype(int)
    assert upright.shape == (20, 12, 3) and upright[:8].min() > 200 and upright[12:].max() < 50


def test_crop_keeps_the_aspect_ratio_and_stretch_does_not(tmp_path):
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (16, 0, 48, 32))  # the centre square is white
    image.save(tmp_path / "a.png")
    assert np.asarray(images.load_image(tmp_path / "a.png", 16, 16)).min() > 200
    assert np.asarray(images.load_image(tmp_path / "a.png", 16, 16, "stretch")).min() < 50


def test_jpeg_draft_is_close_to_the_full_decode(tmp_path):
    y, x = np.mgrid[:480, :640]
    photo = np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)
    Image.fromarray(photo).resize((1280, 960), Image.Resampling.BICUBIC).save(
        tmp_path / "a.jpg", quality=95
    )
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    draft, full = (
        np.asarray(images.load_image(tmp_path / f"a.{s}", 320, 240)).astype(float)
        for s in ("jpg", "png")
    )
    assert 10 * np.log10(255**2 / ((draft - full) ** 2).mean()) > 30


def test_stray_files_and_short_clips_are_named_and_skipped(tmp_path, caplog):
    for i in range(3):
        picture(tmp_path / "good" / f"{i}.png", 9)
    picture(tmp_path / "short" / "0.png", 9)
    (tmp_path / "notes.xyz").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "good" / "Thumbs.db").write_text("x")
    with caplog.at_level(logging.WARNING):
        data = dataset(tmp_path)
    assert len(data) == 1
    assert (
        "notes.xyz: is no picture, video or folder" in caplog.text and "DS_Store" not in caplog.text
    )
    assert "short: too short, 1 frame(s) at 7 per second; 3 at 7 take 0.286 s" in caplog.text
    assert data[0]["pixel_values"].max() == 9


@pytest.mark.parametrize("make", ["missing", "empty", "file", "only_short"])
def test_a_folder_without_a_usable_clip_is_one_clear_error(tmp_path, make):
    root = tmp_path / "root"
    if make == "file":
        root.write_text("x")
    elif make != "missing":
        root.mkdir()
    if make == "only_short":
        picture(root / "v" / "0.png", 9)
    with pytest.raises(
        ValueError, match=r"^--base_folder .*root.*Expected .*/<video>/<frame>.jpg,? or"
    ):
        dataset(root)


def test_a_damaged_frame_is_reported_and_another_clip_stands_in(tmp_path, caplog):
    for v in range(4):
        for i in range(3):
            picture(tmp_path / f"v{v}" / f"{i}.png", 50 + v)
    bad = tmp_path / "v2" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    data = dataset(tmp_path)
    with caplog.at_level(logging.WARNING):
        items = [data[i] for i in range(8)]
    assert sum(item["failed"] for item in items) == 2 and str(bad) in caplog.text
    assert not any((item["pixel_values"] == 52).any() for item in items)


def test_more_than_one_percent_damaged_stops_the_run(tmp_path, run):
    for v in range(2):
        for i in range(8):
            picture(tmp_path / "bad" / f"v{v}" / f"{i}.png", 50)
    (tmp_path / "bad" / "v0" / "4.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="^--base_folder.*more than 1 %"):
        run("--max_train_steps=20", f"--base_folder={tmp_path / 'bad'}", "--motion_bucket_id=127")


def test_clip_json_tells_fps_and_motion_bucket(tmp_path, caplog):
    for i in range(3):
        picture(tmp_path / "a" / f"{i}.png", 9)
    (tmp_path / "a" / "clip.json").write_text('{"fps": 24}')
    item = dataset(tmp_path, motion_bucket_id=99, fps="native")[0]
    assert (item["fps"], item["motion_bucket_id"]) == (24, 99)
    with pytest.raises(ValueError, match=r"no video is 3 frames long at --fps 7.*raise --fps"):
        dataset(tmp_path)
    (tmp_path / "a" / "clip.json").write_text("[1]")
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="no video"):
        dataset(tmp_path)
    assert "a: clip.json: expected {" in caplog.text


def test_each_pass_shows_every_clip_once_in_a_new_order(tmp_path):
    for v in range(6):
        for i in range(3):
            picture(tmp_path / f"v{v}" / f"{i}.png", 10 * v)
    data = dataset(tmp_path, seed=4)
    passes = [[int(data[e * 6 + i]["pixel_values"].max()) for i in range(6)] for e in range(3)]
    assert (
        all(sorted(p) == [0, 10, 20, 30, 40, 50] for p in passes)
        and len({tuple(p) for p in passes}) > 1
    )


def test_processes_share_the_samples_that_one_process_would_see():
    def first(n, *args):
        return [batch for batch, _ in zip(BatchIndexSampler(*args), range(n))]

    alone = sum(first(6, 10, 4), [])
    two = [first(6, 10, 2, rank, 2) for rank in range(2)]
    assert sum((a + b for a, b in zip(*two)), []) == alone == list(range(10, 34))


def test_workers_change_nothing(clips):
    from torch.utils.data import DataLoader

    data = open_dataset(clips, 64, 48, 8, 7, 127, "crop")
    read = [
        next(iter(DataLoader(data, batch_sampler=BatchIndexSampler(3, 4), num_workers=n)))[
            "pixel_values"
        ]
        for n in (0, 2)
    ]
    assert (read[0] == read[1]).all()


def test_flags_are_checked_before_anything_is_loaded(capsys):
    for flags, said in (
        (["--width=500"], "argument --width: expected a multiple of 8, for example 496; got 500"),
        (["--conditioning_dropout_prob", "0.5"], "--conditioning_dropout_prob"),
        (["--validation_image", "nowhere.png"], "--validation_image nowhere.png: no such file"),
        (["--per_gpu_batch_size=0"], "argument --per_gpu_batch_size: expected"),
    ):
        with pytest.raises(SystemExit):
            train_svd.parse(train_svd.build_parser(), flags)
        assert said in capsys.readouterr().err
