"""Write video files for tests: videos whose every frame shows its own index, and 30 kinds of unusable files."""

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
MILLISECOND = Fraction(1, 1000)
SOUND_RATE = 16000  # samples per second


def make_frame(i, size=(96, 64)):
    """Return frame i, (h, w, 3) uint8: a square moves over a gradient whose brightness depends on i."""
    y, x = np.mgrid[: size[1], : size[0]]
    red = (x * 2 + 3 * i) % 256
    green = y * 3 % 256
    blue = np.full_like(x, 3 * i % 256)
    picture = np.stack([red, green, blue], -1).astype(np.uint8)
    left = 2 * i % max(size[0] - 16, 1)
    picture[20:36, left : left + 16] = 255
    return picture


def write_video(
    path,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    frames=40,
    size=(96, 64),
    rate=25,
    gop=10,
    times=None,
    draw=make_frame,
    aspect=None,
    rotation=None,
    sound=False,
):
    """Encode a video and return its path.

    gop: frames from one keyframe to the next. times: milliseconds of each frame, for a variable frame rate.
    draw(i, size): the frame i. aspect: width to height of a pixel. rotation: degrees of the display matrix.
    sound: add three seconds of silence.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.gop_size = gop
        if times is not None:
            stream.time_base = MILLISECOND
            stream.codec_context.time_base = MILLISECOND
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound_stream = container.add_stream("aac", rate=SOUND_RATE) if sound else None
        for i in range(frames):
            picture = av.VideoFrame.from_ndarray(draw(i, size), format="rgb24")
            if times is not None:
                picture.pts = int(times[i])
                picture.time_base = MILLISECOND
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if sound_stream:
            encode_silence(container, sound_stream, seconds=3)
    return Path(path)


def encode_silence(container, stream, seconds):
    """Write silence to a sound stream."""
    samples = np.zeros((1, SOUND_RATE * seconds), np.float32)
    silence = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    silence.sample_rate = SOUND_RATE
    container.mux(stream.encode(silence))
    container.mux(stream.encode())


def decode_all(path):
    """Return all frames (n, h, w, 3) uint8, decoded from first to last, and their times in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        times = [float(frame.pts * frame.time_base) for frame in frames]
    return pixels, times


def write_sound_only(path):
    """Write a file with a sound stream and no video stream."""
    with av.open(str(path), "w") as container:
        encode_silence(container, container.add_stream("aac", rate=SOUND_RATE), seconds=1)


def write_frame_folder(folder, count=8, size=(64, 48), suffix="png"):
    """Write the frames 0 .. count - 1 as pictures and return the folder."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(make_frame(i, size)).save(folder / f"{i:03d}.{suffix}")
    return folder


def write_bad_files(root):
    """Write 30 kinds of files and folders that cannot be used as videos; return their names."""
    root = Path(root)
    mp4 = write_video(root / "scratch.mp4", frames=60).read_bytes()
    matroska = write_video(root / "scratch.mkv", frames=60).read_bytes()
    for name in ("scratch.mp4", "scratch.mkv"):
        (root / name).unlink()
    damaged_within = bytearray(mp4)
    data_start = mp4.index(b"mdat")
    damaged_within[data_start + 200 : data_start + 2600] = os.urandom(2400)
    files = {
        "01 zero bytes.mp4": b"",
        "02 text.mp4": b"this is no video\n" * 50,
        "03 noise.mkv": np.random.default_rng(0).bytes(20000),
        "04 without an index.mp4": mp4[: len(mp4) // 2],
        "05 header alone.mp4": mp4[:32],
        "06 head of a matroska.mkv": matroska[:300],
        "07 page.webm": b"<!DOCTYPE html><html>Not found</html>",
        "08 noise within.mp4": bytes(damaged_within),
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
    Image.fromarray(make_frame(0)).save(root / "16 a picture.mp4", format="JPEG")
    write_sound_only(root / "17 sound alone.mp4")
    write_video(root / "18 three frames.mp4", frames=3)
    write_video(root / "19 1x1.mkv", "ffv1", "bgr0", size=(1, 1), frames=2)
    Image.new("RGB", (1, 1)).save(root / "20 a pixel.png")
    (root / "21 no picture.png").write_text("text")
    (root / "22 link to nothing.mp4").symlink_to("nowhere.mp4")
    (root / "23 circle").symlink_to("23 circle")
    (root / "24 up").symlink_to("..", target_is_directory=True)
    os.mkfifo(root / "25 pipe.mp4")
    (root / "26 folder.mp4").mkdir()
    cut_short = write_frame_folder(root / "27 cut picture") / "003.png"
    cut_short.write_bytes(cut_short.read_bytes()[:60])
    (write_frame_folder(root / "28 wörte und text") / "004.png").write_text("text")
    (write_frame_folder(root / "29 empty picture", suffix="jpg") / "002.jpg").write_bytes(b"")
    (write_frame_folder(root / "30 bad clip json") / "clip.json").write_text("{")
    return sorted(path.name for path in root.iterdir())
