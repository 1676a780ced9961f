"""TODO inference.video_writer."""

import logging
from pathlib import Path

from PIL import Image, ImageOps

from svd_xtend.data.images import SHEET_GAP, add_title, contact_sheet, enlarge, stack_images

logger = logging.getLogger("svd_xtend")


# ---------------------------------------------------------------------------------------------------------------- write


def write_mp4(path, frames, fps):
    """H.264, playable everywhere: 4:2:0, sides padded to even numbers."""
    import av

    width, height = (side + side % 2 for side in frames[0].size)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps), options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            frame = ImageOps.pad(frame, (width, height)) if frame.size != (width, height) else frame
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def write_gif(path, frames, fps):
    """One palette for the whole clip: colours do not flicker. GIF counts hundredths of a second: 7 fps plays at 7.14."""
    palette = stack_images(frames[:: max(1, len(frames) // 8)], vertical=True).quantize(
        255, dither=Image.Dither.NONE
    )
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=round(100 / fps) * 10, loop=0
    )


def write_clip(stem, frames, fps):
    """`stem`.mp4, `stem`.gif and `stem`.png, the contact sheet."""
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    shown = [enlarge(frame) for frame in frames]
    write_mp4(f"{stem}.mp4", shown, fps)
    write_gif(f"{stem}.gif", shown, fps)
    contact_sheet(frames).save(f"{stem}.png")


def write_comparison(stem, rows, fps):
    """`stem`.gif, the videos of each row side by side, and `stem`.png, every frame of them, one below the other.

    rows: [{title: frames, or a single image}], the same titles in each; a single image is in the gif only."""
    moving, still = [], []
    length = max(len(clip) for clip in rows[0].values() if isinstance(clip, list))
    for f in range(length):
        now = [
            {t: clip[f] if isinstance(clip, list) else clip for t, clip in row.items()}
            for row in rows
        ]
        now = [
            stack_images(
                [add_title(enlarge(image, 256), t) for t, image in row.items()], gap=SHEET_GAP
            )
            for row in now
        ]
        moving.append(stack_images(now, vertical=True, gap=SHEET_GAP))
    for row in rows:
        still += [
            add_title(contact_sheet(clip, length), t)
            for t, clip in row.items()
            if isinstance(clip, list)
        ]
    write_gif(f"{stem}.gif", moving, fps)
    stack_images(still, vertical=True, gap=SHEET_GAP).save(f"{stem}.png")
