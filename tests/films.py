"""Video files for tests, encoded here: every frame tells its own number, and 30 kinds of file that nothing can be made of."""

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

CODECS = {  # file name: (codec, pixel format, options)
    "h264.mp4": ("libx264", "yuv420p", {}),
    "h264.mkv": ("libx264", "yuv420p", {}),
    "h264.avi": ("libx264", "yuv420p", {}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none"}),
    "hevc10.mov": ("libx265", "yuv420p10le", {"x265-params": "log-level=none"}),
    "av1.mkv": ("libsvtav1", "yuv420p", {"svtav1-params": "lp=1"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"deadline": "realtime"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {}),
    "anim.gif": ("gif", "rgb8", {}),
    "mjpeg.mov": ("mjpeg", "yuvj420p", {}),
    "ts.ts": ("libx264", "yuv420p", {}),
}


def frame(i, size=(96, 64)):
    """(h, w, 3) uint8: a square moves over a gradient, whose brightness is the number's."""
    y, x = np.mgrid[: size[1], : size[0]]
    picture = np.stack(
        [(x * 2 + 3 * i) % 256, y * 3 % 256, np.full_like(x, 3 * i % 256)], -1
    ).astype(np.uint8)
    left = 2 * i % max(size[0] - 16, 1)
    picture[20:36, left : left + 16] = 255
    return picture


def write(
    path,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    frames=40,
    size=(96, 64),
    rate=25,
    gop=10,
    times=None,
    **own,
):
    """Encode; times: milliseconds of each frame. own: what else the stream is told (rotation, aspect, sound)."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, pix_fmt, gop
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if "aspect" in own:
            stream.codec_context.sample_aspect_ratio = own["aspect"]
        if "rotation" in own:
            stream.set_display_rotation(own["rotation"])
        sound = container.add_stream("aac", rate=16000) if own.get("sound") else None
        for i in range(frames):
            picture = av.VideoFrame.from_ndarray(own.get("draw", frame)(i, size), format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = int(times[i]), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if sound:
            quiet = av.AudioFrame.from_ndarray(
                np.zeros((1, 16000 * 3), np.float32), format="fltp", layout="mono"
            )
            quiet.sample_rate = 16000
            container.mux(sound.encode(quiet))
            container.mux(sound.encode())
    return Path(path)


def decode_all(path):
    """All frames (n, h, w, 3) uint8, from the first to the last; times in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return np.stack([f.to_ndarray(format="rgb24") for f in frames]), [
            float(f.pts * f.time_base) for f in frames
        ]


def sound_alone(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        quiet = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        quiet.sample_rate = 16000
        container.mux(stream.encode(quiet))
        container.mux(stream.encode())


def pictures(folder, count=8, size=(64, 48), suffix="png"):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(frame(i, size)).save(folder / f"{i:03d}.{suffix}")
    return folder


def write_bad(root):
    """30 kinds; returns their names."""
    root = Path(root)
    good = write(root / "scratch.mp4", frames=60).read_bytes()
    matroska = write(root / "scratch.mkv", frames=60).read_bytes()
    for name in ("scratch.mp4", "scratch.mkv"):
        (root / name).unlink()
    middle = bytearray(good)
    moov = good.index(b"mdat")
    middle[moov + 200 : moov + 2600] = os.urandom(2400)
    files = {
        "01 zero bytes.mp4": b"",
        "02 text.mp4": b"this is no video\n" * 50,
        "03 noise.mkv": np.random.default_rng(0).bytes(20000),
        "04 without an index.mp4": good[: len(good) // 2],
        "05 header alone.mp4": good[:32],
        "06 head of a matroska.mkv": matroska[:300],
        "07 page.webm": b"<!DOCTYPE html><html>Not found</html>",
        "08 noise within.mp4": bytes(middle),
        "09 zeros.avi": bytes(5000),
        "10 notes.doc": b"x",
        "11 archive.zip": b"PK\3\4",
        "12 playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\nhttp://localhost:1/a.ts\n",
        "13 svg.mov": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "14 one byte.gif": b"G",
        "15 gif head.gif": b"GIF89a" + struct.pack("<HH", 60000, 60000) + bytes(10),
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
    Image.fromarray(frame(0)).save(root / "16 a picture.mp4", format="JPEG")
    sound_alone(root / "17 sound alone.mp4")
    write(root / "18 three frames.mp4", frames=3)
    write(root / "19 1x1.mkv", "ffv1", "bgr0", size=(1, 1), frames=2)
    Image.new("RGB", (1, 1)).save(root / "20 a pixel.png")
    (root / "21 no picture.png").write_text("text")
    (root / "22 link to nothing.mp4").symlink_to("nowhere.mp4")
    (root / "23 circle").symlink_to("23 circle")
    (root / "24 up").symlink_to("..", target_is_directory=True)
    os.mkfifo(root / "25 pipe.mp4")
    (root / "26 folder.mp4").mkdir()
    broken = pictures(root / "27 cut picture")
    (broken / "003.png").write_bytes((broken / "003.png").read_bytes()[:60])
    (pictures(root / "28 wörte und text") / "004.png").write_text("text")
    (pictures(root / "29 empty picture", suffix="jpg") / "002.jpg").write_bytes(b"")
    (pictures(root / "30 bad clip json") / "clip.json").write_text("{")
    return sorted(path.name for path in root.iterdir())
