"""Video files as clips: every frame exact, sampled by time; what cannot be used is named and left out."""

import json
import logging
import os
import shutil
from fractions import Fraction
from pathlib import Path

import sample_videos
import numpy as np
import pytest
import torch
from PIL import Image

import train_svd
from svd_xtend.data import motion, sampler, video_decode
from svd_xtend.data.clip import Clip
from train_svd import DummyDataset

DATA = Path(__file__).parents[3] / "shared" / "data"


def dataset(folder, *rest, f=8, fps=25, motion_bucket_id=127, **own):
    return DummyDataset(folder, 64, 48, f, fps, motion_bucket_id, "crop", 1, *rest, **own)


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    """A folder with a video of 40 frames of each codec."""
    root = tmp_path_factory.mktemp("codecs")
    for name, (codec, pix_fmt, options) in sample_videos.CODECS.items():
        sample_videos.write_video(root / name, codec, pix_fmt, options, rate=10 if name.endswith("gif") else 25)
    return root


# --------------------------------------------------------------------------------------------------------------- decode


@pytest.mark.parametrize("name", sample_videos.CODECS)
def test_frames_by_number_are_those_of_a_full_decode(codecs, name):
    film, (whole, _) = video_decode.probe_video(codecs / name), sample_videos.decode_all(codecs / name)
    assert len(film.times) == 40 and (film.width, film.height) == (96, 64)
    for seed in range(12):
        numbers = np.sort(np.random.default_rng(seed).integers(0, 40, 5))
        got = list(video_decode.read_frames(codecs / name, film.times, numbers))
        assert all(np.array_equal(a, whole[n]) for a, n in zip(got, numbers, strict=True))


def test_only_the_window_and_its_way_from_the_keyframe_is_decoded(tmp_path, monkeypatch):
    path = sample_videos.write_video(
        tmp_path / "a.mp4", frames=200, gop=20, options={"bf": "0", "sc_threshold": "0"}
    )
    film, seen, nearest = video_decode.probe_video(path), [], video_decode.nearest_frame
    assert film.keyframes.tolist() == list(range(0, 200, 20))
    monkeypatch.setattr(
        video_decode, "nearest_frame", lambda *how: seen.append(nearest(*how)) or seen[-1]
    )
    list(video_decode.read_frames(path, film.times, range(133, 141)))
    assert seen == list(range(120, 141))


def test_frames_that_lead_a_keyframe_are_decoded_from_the_one_before_not_from_the_start(
    tmp_path, monkeypatch
):
    """H.265's encoders let frames before a keyframe refer to it and to what is before: a seek to it does not give them."""
    quiet = {"x265-params": "log-level=none:scenecut=0", "preset": "ultrafast"}
    path = sample_videos.write_video(tmp_path / "a.mp4", "libx265", frames=200, gop=20, options=quiet)
    film, (whole, _) = video_decode.probe_video(path), sample_videos.decode_all(path)
    seen, nearest, led = [], video_decode.nearest_frame, 0
    monkeypatch.setattr(
        video_decode, "nearest_frame", lambda *how: seen.append(nearest(*how)) or seen[-1]
    )
    for start in range(120, 160):
        seen.clear()
        got = list(video_decode.read_frames(path, film.times, range(start, start + 5)))
        assert np.array_equal(np.stack(got), whole[start : start + 5])
        assert seen[-1] == start + 4 and len(seen) < 40  # by their times, in two tries at the most
        led += seen[0] > start
    assert led  # there are such frames


def test_a_variable_frame_rate_is_sampled_by_time(tmp_path):
    """Whatever the gaps, a window shows what is on screen at its own even times."""
    times = np.cumsum(np.random.default_rng(3).integers(10, 120, 60))
    for name in ("vfr.mkv", "vfr.mp4"):
        path = sample_videos.write_video(tmp_path / name, frames=60, times=times)
        film, (whole, shown) = video_decode.probe_video(path), sample_videos.decode_all(path)
        assert not film.is_regular() and np.allclose(film.times, shown)
        clip = Clip(path, [], film.rate, film.times)
        numbers = clip.frame_indices(7, 12, 5)
        wanted = shown[7] + np.arange(12) / 5
        assert numbers.tolist() == [int(np.abs(np.array(shown) - t).argmin()) for t in wanted]
        assert all(
            np.array_equal(a, whole[n])
            for a, n in zip(video_decode.read_frames(path, film.times, numbers), numbers)
        )


@pytest.mark.parametrize("rate", [24, 25, 30, 60, Fraction(30000, 1001)])
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_at_its_own_rate_every_frame_follows_the_one_before(tmp_path, rate, container):
    """Though Matroska rounds times to milliseconds."""
    film = video_decode.probe_video(sample_videos.write_video(tmp_path / f"a.{container}", rate=rate))
    clip = Clip(tmp_path / f"a.{container}", [], film.rate, film.times)
    assert film.is_regular() and film.rate == pytest.approx(float(rate), rel=1e-3)
    assert all(
        clip.frame_indices(start, 20, film.rate).tolist() == list(range(start, start + 20))
        for start in range(21)
    )
    assert clip.num_starts(20, film.rate) == 21 and clip.num_starts(40, film.rate) == 1


def test_half_the_rate_is_every_second_frame_and_windows_end_in_time():
    clip = Clip(Path("a"), ["x"] * 40, 24.0)
    assert clip.frame_indices(1, 5, 12).tolist() == [1, 3, 5, 7, 9]
    assert clip.frame_indices(0, 5, 7).tolist() == [0, 3, 7, 10, 14]  # 24 / 7 = 3.43 frames apart
    assert clip.num_starts(5, 12) == 32 and clip.frame_indices(31, 5, 12)[-1] == 39
    with pytest.raises(ValueError, match="^a: 1.62 s are too short for 14 frames at 7 fps"):
        clip.num_starts(14, 7)


@pytest.mark.parametrize("degrees, turn", [(90, 1), (-90, -1), (180, 2)])
def test_a_rotated_video_is_upright(tmp_path, degrees, turn):
    """FFmpeg's display matrix turns counterclockwise; its own player turns -90 clockwise."""
    path = sample_videos.write_video(tmp_path / "a.mp4", rotation=degrees)
    film, (whole, _) = video_decode.probe_video(path), sample_videos.decode_all(path)
    assert (film.width, film.height) == ((64, 96) if turn in (1, -1) else (96, 64))
    assert np.array_equal(
        next(video_decode.read_frames(path, film.times, [5])), np.rot90(whole[5], turn)
    )


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = sample_videos.write_video(tmp_path / "a.mkv", "mpeg4", aspect=Fraction(4, 3))
    assert (video_decode.probe_video(path).width, video_decode.probe_video(path).height) == (
        128,
        64,
    )


def test_odd_sizes_and_sound_make_no_difference(tmp_path):
    odd = sample_videos.write_video(tmp_path / "odd.mkv", "ffv1", "bgr0", size=(33, 17), frames=9)
    film = video_decode.probe_video(odd)
    got = list(video_decode.read_frames(odd, film.times, range(9)))
    assert all(np.array_equal(picture, sample_videos.make_frame(i, (33, 17))) for i, picture in enumerate(got))
    loud = sample_videos.write_video(tmp_path / "loud.mp4", sound=True, frames=30)
    assert len(video_decode.probe_video(loud).times) == 30


def test_noise_within_a_file_is_an_error_where_it_is_met_and_nowhere_else(tmp_path):
    path = sample_videos.write_video(tmp_path / "a.mp4", frames=400, gop=20)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = np.random.default_rng(0).bytes(300)
    path.write_bytes(data)
    film = video_decode.probe_video(path)
    assert len(list(video_decode.read_frames(path, film.times, range(60)))) == 60
    with pytest.raises(ValueError, match=r"^\S+a.mp4: (frame \d+ is damaged|cannot be decoded)"):
        list(video_decode.read_frames(path, film.times, range(400)))


# -------------------------------------------------------------------------------------------------------------- dataset


def test_files_and_folders_are_mixed_and_say_their_own_rate(codecs, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(codecs, root)
    sample_videos.write_frame_folder(root / "frames", 20)
    (root / "frames" / "clip.json").write_text('{"fps": 12}')
    data = dataset(root, fps="native")
    rates = {clip.path.name: round(clip.metadata["fps"], 2) for clip in data.clips}
    assert rates == {**dict.fromkeys(sample_videos.CODECS, 25), "anim.gif": 10, "frames": 12}
    assert {round(float(data[i]["fps"]), 2) for i in range(12)} == {25, 10, 12}
    sampled = {
        clip.path.name: round(clip.metadata["fps"], 2) for clip in dataset(root, fps=11, f=4).clips
    }
    assert sampled == {**dict.fromkeys(sample_videos.CODECS, 11), "anim.gif": 10, "frames": 11}


def test_folders_that_do_not_tell_their_rate_are_told_by_flag(tmp_path):
    sample_videos.write_frame_folder(tmp_path / "frames", 20)
    assert dataset(tmp_path, fps=7).clips[0].metadata["fps"] == 7
    clip = dataset(tmp_path, fps=10, source_fps=20).clips[0]
    assert clip.metadata["fps"] == 10 and clip.frame_indices(0, 8, 10).tolist() == list(range(0, 16, 2))
    assert dataset(tmp_path, fps="native", source_fps=24).clips[0].metadata["fps"] == 24


def test_a_video_file_trains_as_its_frames_do(tmp_path):
    """Lossless, so that both are the same pictures."""
    sample_videos.write_video(tmp_path / "file" / "a.mkv", "ffv1", "bgr0", frames=30)
    sample_videos.write_frame_folder(tmp_path / "folder" / "a", 30, (96, 64))
    one, other = (
        dataset(tmp_path / "file", fps=12.5),
        dataset(tmp_path / "folder", fps=12.5, source_fps=25),
    )
    for index in range(6):
        a, b = one[index], other[index]
        assert np.array_equal(a["pixel_values"], b["pixel_values"]) and a["fps"] == pytest.approx(
            b["fps"]
        )


def test_files_are_looked_into_once(codecs, monkeypatch):
    for file in codecs.iterdir():
        os.utime(file, (1e9, 1e9))
    first = dataset(codecs, f=4).clips
    monkeypatch.setattr(
        video_decode, "probe_video", lambda path: pytest.fail(f"{path} was looked into again")
    )
    again = dataset(codecs, f=4).clips
    assert [c.path for c in first] == [c.path for c in again] and first.digest() == again.digest()
    assert all(np.array_equal(a.times, b.times) for a, b in zip(first, again))


def test_a_run_that_was_killed_while_looking_goes_on(codecs, tmp_path, monkeypatch):
    root, probe, seen = tmp_path / "root", video_decode.probe_video, []
    shutil.copytree(codecs, root)
    for file in root.iterdir():
        os.utime(file, (1e9, 1e9))

    def killed(path):
        seen.append(path.name)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return probe(path)

    monkeypatch.setattr("svd_xtend.data.folder_index.SAVED_EVERY", -1)
    monkeypatch.setattr(video_decode, "probe_video", killed)
    with pytest.raises(KeyboardInterrupt):
        dataset(root, f=4)
    seen[:] = [None] * 9
    assert len(dataset(root, f=4)) == len(sample_videos.CODECS)
    assert len(seen) - 9 < len(sample_videos.CODECS)


def test_thirty_kinds_of_bad_file_beside_one_good_clip(tmp_path, caplog):
    bad = sample_videos.write_bad_files(tmp_path)
    sample_videos.write_video(tmp_path / "a good clip ü.mp4")
    with caplog.at_level(logging.WARNING):
        data = DummyDataset(tmp_path, 64, 48, 8, 7, "auto", "crop", 1)
    assert len(bad) == 30 and [clip.path.name for clip in data.clips] == ["a good clip ü.mp4"]
    told = caplog.text.splitlines()
    for name in bad:
        (line,) = (line for line in told if line.startswith(f"  {name}: "))
        assert len(line) > len(name) + 8 and "object at" not in line, line
    assert not any(data[i]["failed"] for i in range(1000))


def test_what_may_not_be_read_is_named_and_left_out(tmp_path, monkeypatch, caplog):
    """Root may read everything, so that the system's answer is made up."""
    sample_videos.write_video(tmp_path / "good.mp4")
    sample_videos.write_video(tmp_path / "secret.mp4")
    sample_videos.write_frame_folder(tmp_path / "secret folder")
    listdir, opened = os.listdir, video_decode.open_video

    def refuse(path):
        if "secret" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return (listdir if Path(path).is_dir() else opened)(path)

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(video_decode, "open_video", refuse)
    with caplog.at_level(logging.WARNING):
        data = dataset(tmp_path)
    assert len(data) == 1
    for name in ("secret.mp4", "secret folder"):
        assert f"  {name}: Permission denied" in caplog.text


def test_a_file_that_breaks_in_mid_run_is_named_and_another_stands_in(tmp_path, caplog):
    for name in ("a.mp4", "b.mp4"):
        sample_videos.write_video(tmp_path / name)
    data = dataset(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"")
    items = [data[i] for i in range(4)]
    assert (
        sum(item["failed"] for item in items) == 2
        and "a.mp4: cannot be opened as a video" in caplog.text
    )


def test_captions_are_handed_on(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        sample_videos.write_video(tmp_path / name)
    sample_videos.write_frame_folder(tmp_path / "d", 30)
    sample_videos.write_frame_folder(tmp_path / "e", 30)
    (tmp_path / "a.txt").write_text("a dog\n")
    (tmp_path / "d" / "clip.json").write_text('{"caption": "a horse", "fps": 25}')
    rows = [
        {"file_name": "b.mp4", "text": "a cat", "motion_bucket_id": 200},
        {"file_name": "e", "caption": "a cow", "fps": 5},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = {clip.path.name: clip.metadata for clip in dataset(tmp_path, f=3).clips}
    assert {name: t["caption"] for name, t in told.items()} == {
        "a.mp4": "a dog", "b.mp4": "a cat", "c.mp4": "", "d": "a horse", "e": "a cow"
    }  # fmt: skip
    assert told["b.mp4"]["motion_bucket_id"] == 200 and told["e"]["fps"] == 5
    items = torch.utils.data.default_collate([dataset(tmp_path, f=3)[i] for i in range(5)])
    assert sorted(items["caption"]) == ["", "a cat", "a cow", "a dog", "a horse"]
    (tmp_path / "metadata.jsonl").write_text('{"caption": "whose?"}')
    with pytest.raises(ValueError, match=r"metadata.jsonl: line 1: expected .*file_name"):
        dataset(tmp_path)


@pytest.mark.skipif(not DATA.exists(), reason="needs the real clips")
def test_the_real_clips_train_as_they_are(tmp_path, run):
    shutil.copy(DATA / "bigbuckbunny.mp4", tmp_path)
    shutil.copytree(DATA / "mammoth_rhino" / "img1", tmp_path / "rhino")
    data = dataset(tmp_path, fps=7)
    assert {clip.path.name: len(clip) for clip in data.clips} == {
        "bigbuckbunny.mp4": 132,
        "rhino": 49,
    }
    out = run(
        f"--base_folder={tmp_path}",
        "--max_train_steps=2",
        "--train_params=conv_out",
        "--motion_bucket_id=auto",
    )
    assert (out / "motion.png").stat().st_size > 5000


def test_every_codec_trains(codecs, run):
    out = run(f"--base_folder={codecs}", "--max_train_steps=2", "--per_gpu_batch_size=6", "--fps=native", "--train_params=conv_out")  # fmt: skip
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------------------------------------------- sizes and pictures


def test_bucket_sizes_have_about_as_many_pixels_and_reach_every_aspect():
    for width, height, step in ((1024, 576, 64), (512, 320, 64), (64, 48, 8)):
        found = sampler.bucket_sizes(width, height, step)
        assert (width, height) in found and all(
            w % step == h % step == 0 and w * h <= width * height for w, h in found
        )
        aspects = [w / h for w, h in found]
        assert aspects == sorted(aspects) and aspects[0] < 0.7 and aspects[-1] > 1.5
    assert len(sampler.bucket_sizes(1024, 576, 64)) > 10


@pytest.fixture
def shaped(tmp_path):
    """Wide, tall and square clips."""
    for i in range(3):
        sample_videos.write_video(tmp_path / f"wide{i}.mp4", size=(128, 64), frames=16)
        sample_videos.write_video(tmp_path / f"tall{i}.mp4", size=(64, 128), frames=16)
    sample_videos.write_video(tmp_path / "square.mp4", size=(96, 96), frames=16)
    return tmp_path


def test_buckets_keep_the_aspect_ratio_and_a_batch_is_of_one_size(shaped):
    data = dataset(shaped, buckets=8, batch=4)
    sizes = {clip.stem: clip.size for clip in data.clips}
    assert (
        sizes["wide0"][0] / sizes["wide0"][1] > 1.5 and sizes["tall0"][0] / sizes["tall0"][1] < 0.7
    )
    assert 0.8 < sizes["square"][0] / sizes["square"][1] < 1.25
    seen = []
    for batch in range(40):
        items = [data[4 * batch + i] for i in range(4)]
        assert len({item["pixel_values"].shape for item in items}) == 1
        seen += [item["pixel_values"].shape[2:] for item in items]
    counts = [seen.count(size[::-1]) for size in (sizes["wide0"], sizes["tall0"], sizes["square"])]
    assert sum(counts) == 160 and abs(counts[0] - 160 * 3 / 7) < 40 and counts[2] > 0


def test_two_processes_see_the_buckets_that_one_would(shaped):
    """Batch 4, or two of 2: the same clips in every step."""
    data = dataset(shaped, buckets=8, batch=4)
    alone = [data.order.place(i) for i in range(200)]
    assert alone == [dataset(shaped, buckets=8, batch=4).order.place(i) for i in range(200)]
    pools = [data.order.place(i)[0] for i in range(200)]
    assert all(len(set(pools[i : i + 4])) == 1 for i in range(0, 200, 4)) and len(set(pools)) == 3


def test_a_run_over_buckets_and_pictures_trains(shaped, run):
    for i in range(4):
        Image.fromarray(sample_videos.make_frame(i, (90, 60))).save(shaped / f"photo{i}.png")
    shapes = []

    def loss(model, pipe, batch, args):
        shapes.append(tuple(batch["pixel_values"].shape))
        return train_svd.svd_loss(model, pipe, batch, args)

    flags = [
        "--max_train_steps=8",
        "--per_gpu_batch_size=2",
        "--image_ratio=0.5",
        "--buckets",
        "--fps=25",
    ]
    run(f"--base_folder={shaped}", *flags, "--train_params=conv_out", loss=loss)
    assert {s[1] for s in shapes} == {1, 8} and len({s[2:] for s in shapes}) > 2


def test_pictures_have_their_share_and_are_still(tmp_path):
    sample_videos.write_video(tmp_path / "a.mp4")
    for i in range(3):
        Image.fromarray(sample_videos.make_frame(i)).save(tmp_path / f"photo{i}.jpg")
    data = dataset(tmp_path, image_ratio=0.25)
    items = [data[i] for i in range(sampler.MIN_CYCLE // 5)]
    stills = [item for item in items if len(item["pixel_values"]) == 1]
    assert abs(len(stills) - 50) < 20 and {item["motion_bucket_id"] for item in stills} == {0}
    whole = [data.order.place(i)[0] for i in range(sampler.MIN_CYCLE)]
    assert whole.count(1) == sampler.MIN_CYCLE // 4
    with pytest.raises(ValueError, match="^--image_ratio: --base_folder holds no pictures"):
        (tmp_path / "none").mkdir()
        shutil.copy(tmp_path / "a.mp4", tmp_path / "none")
        dataset(tmp_path / "none", image_ratio=0.25)


def test_of_a_picture_the_spatial_half_of_the_unet_decides(pipe):
    """As SVD's image_only_indicator has it: a clip of one frame gives what the blocks give with all temporal weights at
    random, and these have no gradient; of two frames they have one."""
    from svd_xtend.models import unet_optimizations

    unet = unet_optimizations.speed_up(pipe.unet)
    g = torch.Generator().manual_seed(0)

    def answer(frames):
        x = torch.randn(1, frames, 8, 12, 16, generator=torch.Generator().manual_seed(1))
        context = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(2))
        return unet(x, torch.zeros(1), context, torch.tensor([[6.0, 127, 0.02]])).sample

    before = answer(1), answer(2)
    temporal = [p for n, p in unet.named_parameters() if "temporal" in n]
    answer(1).sum().backward()
    assert temporal and all(p.grad is None or not p.grad.any() for p in temporal)
    with torch.no_grad():
        for p in temporal:
            p.add_(torch.randn(p.shape, generator=g))
    assert torch.equal(answer(1), before[0]) and not torch.allclose(answer(2), before[1])


# --------------------------------------------------------------------------------------------------------------- motion


def test_motion_orders_clips_of_three_speeds_without_error():
    """Whatever the size, number and place of the objects, and the brightness behind them."""
    from svd_xtend.demo.synthetic_clips import BUCKETS, FPS, make_clip

    clips = [make_clip((11, i), "pointed") for i in range(120)]
    scores = np.array([motion.motion_score(clip.frames, 1 / FPS) for clip in clips])
    speeds = np.array([clip.motion_bucket_id for clip in clips])
    slow, middle, fast = (scores[speeds == bucket] for bucket in BUCKETS)
    assert min(len(slow), len(middle), len(fast)) > 20
    assert slow.max() < middle.min() and middle.max() < fast.min()


def test_motion_is_per_second_and_per_picture_whatever_the_rate_and_size(tmp_path):
    def pan(i, size):
        y, x = np.mgrid[: size[1], : size[0]]
        scene = (
            127
            + 60 * np.sin((x + 3 * i * size[0] / 192) * 0.21 * 192 / size[0])
            + 60 * np.sin(y * 0.3 * 192 / size[0])
        )
        return np.repeat(scene[..., None], 3, 2).astype(np.uint8)

    paths = [
        sample_videos.write_video(tmp_path / "a.mkv", "ffv1", "bgr0", draw=pan, size=(192, 96), frames=60),
        sample_videos.write_video(tmp_path / "large.mkv", "ffv1", "bgr0", draw=pan, size=(384, 192), frames=60),
        sample_videos.write_video(tmp_path / "half.mkv", "ffv1", "bgr0", draw=lambda i, s: pan(2 * i, s), size=(192, 96), frames=30, rate=Fraction(25, 2)),
    ]  # fmt: skip
    scores = [
        Clip(p, [], film.rate, film.times).measure_motion(film.keyframes)["motions"]
        for p in paths
        for film in [video_decode.probe_video(p)]
    ]
    assert scores == pytest.approx([3 / 192 * 25] * 3, rel=0.15)  # 3 of 192 pixels a frame


def test_what_stands_still_scores_nothing_and_buckets_go_by_rank():
    still = np.repeat(sample_videos.make_frame(0)[None], 4, 0)
    assert motion.motion_score(still, 0.1) < 1e-3
    assert motion.motion_buckets([0.5, 0.1, 0.9]).tolist() == [128, 1 + 254 / 6, 255 - 254 / 6]
    assert motion.motion_buckets([3, 3, 3, 3]).tolist() == [128] * 4
    many = motion.motion_buckets(np.random.default_rng(0).lognormal(size=500))
    assert many.min() >= 1 and many.max() <= 255 and abs(np.median(many) - 128) < 1


def test_clips_have_the_bucket_of_their_rank_but_what_they_tell_wins(tmp_path):
    for i, step in enumerate((0, 1, 2, 4)):
        sample_videos.write_video(tmp_path / f"{i}.mkv", "ffv1", "bgr0", draw=lambda f, s, step=step: sample_videos.make_frame(0, s) if step == 0 else np.roll(sample_videos.make_frame(0, s), step * f, 1))  # fmt: skip
    clips = dataset(tmp_path, motion_bucket_id="auto").clips
    assert [clip.metadata["motion_bucket_id"] for clip in clips] == pytest.approx(
        [1 + 254 * r for r in (0.125, 0.375, 0.625, 0.875)]
    )
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "3.mkv", "motion_bucket_id": 99}')
    clips = dataset(tmp_path, motion_bucket_id="auto").clips
    assert [round(clip.metadata["motion_bucket_id"]) for clip in clips] == [43, 128, 213, 99]
    assert {clip.metadata["motion_bucket_id"] for clip in dataset(tmp_path).clips} == {127, 99}


def test_long_clips_are_looked_at_in_some_places_from_keyframes_on():
    runs = motion.select_frame_runs(5000, 25, keyframes=range(0, 5000, 250))
    assert len(runs) == motion.MAX_PLACES and all(run[0] % 250 == 0 and len(run) == 3 for run in runs)
    assert [run.tolist() for run in motion.select_frame_runs(9, 7)] == [list(range(9))]
    assert motion.select_frame_runs(1, 25)[0].tolist() == [0]


def test_validation_measures_motion_and_warns_where_it_collapses(
    run, tmp_path, clips, caplog, monkeypatch
):
    """Beside the true continuation of the picture. A model that renders the picture again and again has collapsed."""
    flags = [
        "--validation_steps=2",
        "--num_inference_steps=2",
        "--max_train_steps=2",
        "--train_params=conv_out",
    ]
    out = run(*flags, output_dir=tmp_path / "alive")
    rows = [json.loads(line) for line in (out / "motion.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2] and all(
        row["motion_truth"] > 0.05 for row in rows
    )
    frames = [np.asarray(Image.open(f)) for f in sorted((clips / "fall0000").glob("*.png"))]
    assert rows[0]["motion_truth"] == pytest.approx(motion.motion_score(frames, 1 / 7), rel=1e-3)
    assert "collapses" not in caplog.text
    render = train_svd.validate

    def frozen(*how):
        return [(name, image, [image] * 8) for name, image, _ in render(*how)]

    run(*flags, output_dir=tmp_path / "dead", validate=frozen)
    assert "motion collapses: the rendered clips move" in caplog.text


def test_a_video_file_can_be_the_validation_image(run, tmp_path):
    sample_videos.write_video(tmp_path / "clips" / "a.mp4", frames=60)
    flags = [
        f"--base_folder={tmp_path / 'clips'}",
        "--validation_steps=2",
        "--num_inference_steps=1",
        "--max_train_steps=2",
    ]
    out = run(*flags, "--train_params=conv_out", "--fps=native")
    told = json.loads((out / "args.json").read_text())
    assert (
        told["validation_image"] == [str(tmp_path / "clips" / "a.mp4")]
        and told["validation"][0]["fps"] == 25
    )
    assert told["validation"][0]["frames"] == list(range(8)) and (out / "comparison.gif").exists()


def test_flags_are_checked(capsys):
    for flags, said in (
        (["--fps=0"], "--fps 0.0: must be above 0"),
        (["--fps=fast"], "argument --fps: invalid number or native value: 'fast'"),
        (
            ["--motion_bucket_id=much"],
            "argument --motion_bucket_id: invalid number or auto value: 'much'",
        ),
        (["--source_fps=-1"], "--source_fps -1.0: must be above 0"),
        (["--image_ratio=1"], "--image_ratio 1.0: from 0 to less than 1"),
        (["--image_ratio=0.1", "--latent_cache=x"], "--image_ratio: not with --latent_cache"),
    ):
        with pytest.raises(SystemExit):
            train_svd.parse(train_svd.build_parser(), flags)
        assert said in capsys.readouterr().err
