"""Written videos have the right rate, length, size and pictures."""

import av
import numpy as np
from PIL import Image

from svd_xtend.data import images
from svd_xtend.inference import video_writer


def probe(path):
    """Return (frames per second, number of frames, (width, height))."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        num_frames = len(list(container.decode(stream)))
        return float(stream.average_rate), num_frames, (stream.width, stream.height)


def test_a_written_clip_has_the_right_rate_length_and_size(tmp_path):
    frames = [Image.new("RGB", (63, 47), (i * 20, 80, 90)) for i in range(8)]
    video_writer.write_clip(tmp_path / "deep" / "clip", frames, 7)
    rate, count, size = probe(tmp_path / "deep" / "clip.mp4")
    assert (rate, count) == (7, 8)
    assert size == (190, 142)  # enlarged 3 times, padded to even sides
    gif = Image.open(tmp_path / "deep" / "clip.gif")
    assert gif.n_frames == 8 and gif.info["duration"] == 140 and gif.info["loop"] == 0
    assert Image.open(tmp_path / "deep" / "clip.png").width > 8 * 160


def test_mp4_keeps_the_pictures(tmp_path):
    y, x = np.mgrid[:96, :128]
    frames = [Image.fromarray(np.stack([x + i, y + i, x], -1).astype(np.uint8)) for i in range(5)]
    video_writer.write_mp4(tmp_path / "a.mp4", frames, 25)
    read = images.read_video(tmp_path / "a.mp4")
    assert len(read) == 5
    assert np.abs(np.asarray(read[3], float) - np.asarray(frames[3], float)).mean() < 4
