"""Write clips to disk as mp4, gif and contact sheet, alone or side by side.

    write_clip("outputs/cat", frames, fps=7)      # outputs/cat.mp4, .gif and .png

A clip is a list of PIL images of one size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from svd_xtend.data.images import SHEET_GAP, add_title, contact_sheet, enlarge, stack_images

Frames = list[Image.Image]

MP4_QUALITY = "16"  # x264's constant rate factor: 0 is lossless, 18 about visually lossless
GIF_COLORS = 255  # colours of the palette, one below the maximum of the format
MAX_PALETTE_FRAMES = 8  # frames, about, from which the palette of a gif is made
COMPARED_WIDTH = 256  # pixels to which the frames of a comparison are enlarged, at least


def write_mp4(path: str | os.PathLike, frames: Sequence[Image.Image], fps: float) -> None:
    """Write H.264 video that plays everywhere: 4:2:0 colour, sides padded to even numbers of
    pixels.

    fps: frames per second, rounded to a whole number.
    """
    import av

    width, height = frames[0].size
    even_size = (width + width % 2, height + height % 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps), options={"crf": MP4_QUALITY})
        stream.width, stream.height = even_size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            if frame.size != even_size:
                frame = ImageOps.pad(frame, even_size)
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def write_gif(path: str | os.PathLike, frames: Sequence[Image.Image], fps: float) -> None:
    """Write an endless gif with one palette for all frames, so that colours do not flicker.

    A gif stores the duration of a frame in hundredths of a second: 7 fps plays at 7.14.
    """
    step = max(1, len(frames) // MAX_PALETTE_FRAMES)
    samples = stack_images(frames[::step], vertical=True)
    palette = samples.quantize(GIF_COLORS, dither=Image.Dither.NONE)
    quantized = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    milliseconds = round(100 / fps) * 10
    quantized[0].save(
        path, save_all=True, append_images=quantized[1:], duration=milliseconds, loop=0
    )


def write_clip(stem: str | os.PathLike, frames: Frames, fps: float) -> None:
    """Write <stem>.mp4, <stem>.gif, and <stem>.png, a contact sheet. Small frames are enlarged.

    fps: frames per second.
    """
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    enlarged = [enlarge(frame) for frame in frames]
    write_mp4(f"{stem}.mp4", enlarged, fps)
    write_gif(f"{stem}.gif", enlarged, fps)
    contact_sheet(frames).save(f"{stem}.png")


def write_comparison(
    stem: str | os.PathLike, rows: Sequence[Mapping[str, Frames | Image.Image]], fps: float
) -> None:
    """Write clips side by side: <stem>.gif plays them, <stem>.png shows each of their frames.

    rows: {title: clip, or a single picture} of each row, with the same titles in all rows. A single
    picture appears in the gif alone. fps: frames per second of the gif.
    """
    num_frames = max(len(clip) for clip in rows[0].values() if isinstance(clip, list))
    gif_frames = []
    for i in range(num_frames):
        strips = []
        for row in rows:
            titled = []
            for title, clip in row.items():
                picture = clip[i] if isinstance(clip, list) else clip
                titled.append(add_title(enlarge(picture, COMPARED_WIDTH), title))
            strips.append(stack_images(titled, gap=SHEET_GAP))
        gif_frames.append(stack_images(strips, vertical=True, gap=SHEET_GAP))
    write_gif(f"{stem}.gif", gif_frames, fps)

    sheets = []
    for row in rows:
        for title, clip in row.items():
            if isinstance(clip, list):
                sheets.append(add_title(contact_sheet(clip, num_frames), title))
    stack_images(sheets, vertical=True, gap=SHEET_GAP).save(f"{stem}.png")
