"""Every frame of a video file is found exactly, and windows of frames are sampled by time."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import sample_videos

from svd_xtend.data import video_decode
from svd_xtend.data.clip import Clip


def record_decoded_frames(monkeypatch):
    """Return a list that grows by the index of each frame that is decoded by its timestamp."""
    decoded = []
    nearest_frame = video_decode.nearest_frame

    def recorded(times, wanted):
        index = nearest_frame(times, wanted)
        decoded.append(index)
        return index

    monkeypatch.setattr(video_decode, "nearest_frame", recorded)
    return decoded


@pytest.mark.parametrize("name", sample_videos.CODECS)
def test_frames_by_index_are_those_of_a_full_decode(tmp_path, name):
    codec, pix_fmt, options = sample_videos.CODECS[name]
    rate = 10 if name.endswith("gif") else 25
    path = sample_videos.write_video(tmp_path / name, codec, pix_fmt, options, rate=rate)
    video = video_decode.probe_video(path)
    all_frames, _ = sample_videos.decode_all(path)
    assert len(video.times) == 40
    assert (video.width, video.height) == (96, 64)
    for seed in range(12):
        frame_indices = np.sort(np.random.default_rng(seed).integers(0, 40, 5))
        frames = list(video_decode.read_frames(path, video.times, frame_indices))
        assert np.array_equal(np.stack(frames), all_frames[frame_indices])


def test_only_frames_from_the_keyframe_to_the_end_of_the_window_are_decoded(tmp_path, monkeypatch):
    path = sample_videos.write_video(
        tmp_path / "a.mp4", frames=200, gop=20, options={"bf": "0", "sc_threshold": "0"}
    )
    video = video_decode.probe_video(path)
    assert video.keyframes.tolist() == list(range(0, 200, 20))
    decoded = record_decoded_frames(monkeypatch)
    list(video_decode.read_frames(path, video.times, range(133, 141)))
    assert decoded == list(range(120, 141))


def test_frames_shown_before_their_keyframe_are_decoded_from_the_keyframe_before(
    tmp_path, monkeypatch
):
    """H.265 lets frames shown before a keyframe refer to it and to earlier frames.

    A seek to that keyframe does not give them. A second seek does; decoding from the start is not
    needed.
    """
    options = {"x265-params": "log-level=none:scenecut=0", "preset": "ultrafast"}
    path = sample_videos.write_video(
        tmp_path / "a.mp4", "libx265", frames=200, gop=20, options=options
    )
    video = video_decode.probe_video(path)
    all_frames, _ = sample_videos.decode_all(path)
    decoded = record_decoded_frames(monkeypatch)
    num_second_seeks = 0
    for start in range(120, 160):
        decoded.clear()
        frames = list(video_decode.read_frames(path, video.times, range(start, start + 5)))
        assert np.array_equal(np.stack(frames), all_frames[start : start + 5])
        assert decoded[-1] == start + 4
        assert len(decoded) < 40
        num_second_seeks += decoded[0] > start
    assert num_second_seeks > 0, "no frame of the test video is shown before its keyframe"


def test_a_variable_frame_rate_is_sampled_by_time(tmp_path):
    """Whatever the gaps between frames, a window shows what is on screen at evenly spaced times."""
    milliseconds = np.cumsum(np.random.default_rng(3).integers(10, 120, 60))
    for name in ("vfr.mkv", "vfr.mp4"):
        path = sample_videos.write_video(tmp_path / name, frames=60, times=milliseconds)
        video = video_decode.probe_video(path)
        all_frames, all_times = sample_videos.decode_all(path)
        assert not video.is_regular()
        assert np.allclose(video.times, all_times)
        clip = Clip(path, [], video.rate, video.times)
        frame_indices = clip.frame_indices(7, 12, 5)
        wanted_times = all_times[7] + np.arange(12) / 5
        expected = [int(np.abs(np.array(all_times) - time).argmin()) for time in wanted_times]
        assert frame_indices.tolist() == expected
        frames = list(video_decode.read_frames(path, video.times, frame_indices))
        assert np.array_equal(np.stack(frames), all_frames[frame_indices])


@pytest.mark.parametrize("rate", [24, 25, 30, 60, Fraction(30000, 1001)])
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_at_its_own_rate_a_window_shows_consecutive_frames(tmp_path, rate, container):
    """Although Matroska rounds times to milliseconds."""
    path = sample_videos.write_video(tmp_path / f"a.{container}", rate=rate)
    video = video_decode.probe_video(path)
    clip = Clip(path, [], video.rate, video.times)
    assert video.is_regular()
    assert video.rate == pytest.approx(float(rate), rel=1e-3)
    for start in range(21):
        frame_indices = clip.frame_indices(start, 20, video.rate)
        assert frame_indices.tolist() == list(range(start, start + 20))
    assert clip.num_starts(20, video.rate) == 21
    assert clip.num_starts(40, video.rate) == 1


def test_half_the_rate_shows_every_second_frame_and_a_window_ends_within_the_clip():
    clip = Clip(Path("a"), ["x"] * 40, 24.0)
    assert clip.frame_indices(1, 5, 12).tolist() == [1, 3, 5, 7, 9]
    assert clip.frame_indices(0, 5, 7).tolist() == [0, 3, 7, 10, 14]  # 24 / 7 = 3.43 frames apart
    assert clip.num_starts(5, 12) == 32
    assert clip.frame_indices(31, 5, 12)[-1] == 39
    with pytest.raises(ValueError, match="^a: 1.62 s are too short for 14 frames at 7 fps"):
        clip.num_starts(14, 7)


@pytest.mark.parametrize("degrees, quarter_turns", [(90, 1), (-90, -1), (180, 2)])
def test_a_rotated_video_is_upright(tmp_path, degrees, quarter_turns):
    """FFmpeg's display matrix turns counterclockwise; its own player turns -90 clockwise."""
    path = sample_videos.write_video(tmp_path / "a.mp4", rotation=degrees)
    video = video_decode.probe_video(path)
    all_frames, _ = sample_videos.decode_all(path)
    expected_size = (96, 64) if degrees == 180 else (64, 96)
    assert (video.width, video.height) == expected_size
    frame = next(video_decode.read_frames(path, video.times, [5]))
    assert np.array_equal(frame, np.rot90(all_frames[5], quarter_turns))


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    path = sample_videos.write_video(tmp_path / "a.mkv", "mpeg4", aspect=Fraction(4, 3))
    video = video_decode.probe_video(path)
    assert (video.width, video.height) == (128, 64)


def test_odd_sizes_are_read_exactly(tmp_path):
    path = sample_videos.write_video(tmp_path / "odd.mkv", "ffv1", "bgr0", size=(33, 17), frames=9)
    video = video_decode.probe_video(path)
    frames = list(video_decode.read_frames(path, video.times, range(9)))
    expected = [sample_videos.make_frame(i, (33, 17)) for i in range(9)]
    assert np.array_equal(np.stack(frames), np.stack(expected))


def test_sound_is_ignored(tmp_path):
    path = sample_videos.write_video(tmp_path / "loud.mp4", sound=True, frames=30)
    assert len(video_decode.probe_video(path).times) == 30


def test_damage_within_a_file_is_an_error_only_where_it_is_decoded(tmp_path):
    path = sample_videos.write_video(tmp_path / "a.mp4", frames=400, gop=20)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = np.random.default_rng(0).bytes(300)
    path.write_bytes(content)
    video = video_decode.probe_video(path)
    assert len(list(video_decode.read_frames(path, video.times, range(60)))) == 60
    with pytest.raises(ValueError, match=r"^\S+a.mp4: (frame \d+ is damaged|cannot be decoded)"):
        list(video_decode.read_frames(path, video.times, range(400)))
