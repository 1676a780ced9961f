"""The motion score orders clips by speed, buckets follow from its ranks, and collapsed motion is
reported."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import sample_videos
from datasets import open_dataset
from PIL import Image

import train_svd
from svd_xtend.data import motion, video_decode
from svd_xtend.data.clip import Clip


def open_clips(folder, motion_bucket_id):
    return open_dataset(folder, 64, 48, 8, 25, motion_bucket_id, "crop", 1).clips


def bucket_ids(clips):
    return [clip.metadata["motion_bucket_id"] for clip in clips]


def test_the_score_orders_clips_of_three_speeds_without_error():
    """Whatever the size, number and place of the objects, and the brightness behind them."""
    from svd_xtend.demo.synthetic_clips import BUCKETS, FPS, make_clip

    clips = [make_clip((11, i), "pointed") for i in range(120)]
    scores = np.array([motion.motion_score(clip.frames, 1 / FPS) for clip in clips])
    speeds = np.array([clip.motion_bucket_id for clip in clips])
    slow, middle, fast = (scores[speeds == bucket] for bucket in BUCKETS)
    assert min(len(slow), len(middle), len(fast)) > 20
    assert slow.max() < middle.min()
    assert middle.max() < fast.min()


def test_the_score_depends_on_neither_the_frame_rate_nor_the_size(tmp_path):
    """It is in frame lengths per second; the scene pans by 3 of 192 pixels per frame, at 25 fps."""

    def pan(i, size):
        scale = 192 / size[0]
        y, x = np.mgrid[: size[1], : size[0]]
        across = 60 * np.sin((x + 3 * i / scale) * 0.21 * scale)
        down = 60 * np.sin(y * 0.3 * scale)
        scene = 127 + across + down
        return np.repeat(scene[..., None], 3, 2).astype(np.uint8)

    def pan_twice_as_far(i, size):
        return pan(2 * i, size)

    def score(name, **options):
        path = sample_videos.write_video(tmp_path / name, "ffv1", "bgr0", **options)
        video = video_decode.probe_video(path)
        clip = Clip(path, [], video.rate, video.times)
        return clip.measure_motion(video.keyframes)["motions"]

    scores = [
        score("a.mkv", draw=pan, size=(192, 96), frames=60),
        score("large.mkv", draw=pan, size=(384, 192), frames=60),
        score(
            "half.mkv",
            draw=pan_twice_as_far,
            size=(192, 96),
            frames=30,
            rate=Fraction(25, 2),
        ),
    ]
    assert scores == pytest.approx([3 / 192 * 25] * 3, rel=0.15)


def test_a_repeated_frame_has_no_motion():
    repeated = np.repeat(sample_videos.make_frame(0)[None], 4, 0)
    assert motion.motion_score(repeated, 0.1) < 1e-3


def test_buckets_follow_ranks():
    assert motion.motion_buckets([0.5, 0.1, 0.9]).tolist() == [128, 1 + 254 / 6, 255 - 254 / 6]
    assert motion.motion_buckets([3, 3, 3, 3]).tolist() == [128] * 4
    buckets = motion.motion_buckets(np.random.default_rng(0).lognormal(size=500))
    assert buckets.min() >= 1
    assert buckets.max() <= 255
    assert abs(np.median(buckets) - 128) < 1


def test_clips_get_the_bucket_of_their_rank_unless_metadata_has_one(tmp_path):
    for i, step in enumerate((0, 1, 2, 4)):

        def roll(f, size, step=step):
            return np.roll(sample_videos.make_frame(0, size), step * f, axis=1)

        sample_videos.write_video(tmp_path / f"{i}.mkv", "ffv1", "bgr0", draw=roll)
    ranks = (0.125, 0.375, 0.625, 0.875)
    expected = [1 + 254 * rank for rank in ranks]
    assert bucket_ids(open_clips(tmp_path, "auto")) == pytest.approx(expected)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "3.mkv", "motion_bucket_id": 99}')
    rounded = [round(bucket) for bucket in bucket_ids(open_clips(tmp_path, "auto"))]
    assert rounded == [43, 128, 213, 99]
    assert set(bucket_ids(open_clips(tmp_path, 127))) == {127, 99}


def test_a_long_clip_is_measured_in_a_few_places_from_keyframes_on():
    runs = motion.select_frame_runs(5000, 25, keyframes=range(0, 5000, 250))
    assert len(runs) == motion.MAX_PLACES
    for run in runs:
        assert run[0] % 250 == 0
        assert len(run) == 3


def test_a_short_clip_is_measured_whole():
    (run,) = motion.select_frame_runs(9, 7)
    assert run.tolist() == list(range(9))
    assert motion.select_frame_runs(1, 25)[0].tolist() == [0]


def test_validation_measures_motion_and_warns_if_it_collapses(run, tmp_path, clips, caplog):
    """Rendered motion is compared with the true continuation of the validation image.

    A model that renders only the image again and again has collapsed.
    """
    flags = [
        "--validation_steps=2",
        "--num_inference_steps=2",
        "--max_train_steps=2",
        "--train_params=conv_out",
    ]
    out = run(*flags, output_dir=tmp_path / "alive")
    rows = [json.loads(line) for line in (out / "motion.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2]
    assert all(row["motion_truth"] > 0.05 for row in rows)
    paths = sorted((clips / "fall0000").glob("*.png"))
    frames = [np.asarray(Image.open(path)) for path in paths]
    assert rows[0]["motion_truth"] == pytest.approx(motion.motion_score(frames, 1 / 7), rel=1e-3)
    assert "collapses" not in caplog.text

    def render_frozen(*arguments):
        rendered = train_svd.render_validation(*arguments)
        return [replace(clip, frames=[clip.first_frame] * 8) for clip in rendered]

    run(*flags, output_dir=tmp_path / "dead", validate=render_frozen)
    assert "motion collapses: the rendered clips move" in caplog.text
