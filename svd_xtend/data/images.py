"""Read pictures and the frames of a folder; compose pictures into contact sheets.

    paths = list_frames("data/mine/clip0")
    frames = [load_frame(path, 512, 320) for path in paths]     # (320, 512, 3) uint8 each

Reads are retried when a network file system fails for a moment. Every error names the file.
"""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

logger = logging.getLogger("svd_xtend")

PathLike = str | os.PathLike
PathT = TypeVar("PathT", bound=PathLike)
ResultT = TypeVar("ResultT")

FRAME_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif"}
RETRY_DELAYS = (0.5, 1, 2, 4, 8, 16)  # seconds between attempts to read
TRANSIENT_ERRORS = {
    "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN",
    "ENETUNREACH", "ENOTCONN", "EREMOTEIO",
}  # fmt: skip

# What Pillow raises when it reads a damaged file.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

EXIF_ORIENTATION = 0x0112  # tag; orientations from 5 on swap width and height
EXIF_FIRST_SWAPPED = 5
JPEG_END = b"\xff\xd9"
JPEG_TAIL = 64  # last bytes of a JPEG file, within which its end marker must stand

SHEET_GAP = 4  # pixels between the pictures of a contact sheet
MIN_SHEET_WIDTH = 160  # pixels; smaller frames are enlarged to be seen
TITLE_HEIGHT = 22  # pixels
TITLE_FONT_SIZE = 15


# ------------------------------------------------------------------------------------------- files


def natural_key(path: PathLike) -> list[int | str]:
    """Return a sort key that orders frame_2 before frame_10."""
    parts = re.split(r"(\d+)", os.path.basename(path))
    return [int(part) if part.isdecimal() else part.lower() for part in parts]


def select_frame_names(names: Iterable[str]) -> list[str]:
    """Return the file names that are pictures and not hidden, in natural order."""
    frame_names = []
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        if suffix in FRAME_SUFFIXES and not name.startswith("."):
            frame_names.append(name)
    return sorted(frame_names, key=natural_key)


def list_frames(folder: PathLike) -> list[Path]:
    """Return the paths of the frames in a folder, in natural order."""
    return [Path(folder, name) for name in select_frame_names(retry_io(os.listdir, folder))]


class UnreachableError(Exception):
    """Raised when a network file system does not answer for longer than all retries take."""


def retry_io(function: Callable[[PathT], ResultT], path: PathT) -> ResultT:
    """Return function(path), and retry it while a network file system fails with a transient error.

    Raises UnreachableError when all retries have failed, so that no caller takes a file system that
    is away for a damaged file. EIO stays an OSError, because a disk reports it for a bad sector,
    too.
    """
    for delay in RETRY_DELAYS:
        try:
            return function(path)
        except OSError as error:
            if not is_transient(error.errno):
                raise
            logger.warning("%s: %s; trying again in %g s", path, error.strerror, delay)
            time.sleep(delay)
    try:
        return function(path)
    except OSError as error:
        if not is_transient(error.errno) or error.errno == errno.EIO:
            raise
        raise UnreachableError(
            f"{path}: {error.strerror}, for {sum(RETRY_DELAYS)} s. Run the same command again when "
            "the file system answers; it continues where it stopped."
        ) from error


def is_transient(error_number: int | None) -> bool:
    """Return True if a network file system may recover from the error with this errno."""
    return errno.errorcode.get(error_number or 0) in TRANSIENT_ERRORS


def read_bytes(path: PathLike) -> bytes:
    """Return the content of a file; see `retry_io`."""
    return retry_io(lambda p: Path(p).read_bytes(), path)


# ---------------------------------------------------------------------------------------- pictures


def load_image(
    path: PathLike, width: int | None = None, height: int | None = None, resize_mode: str = "crop"
) -> Image.Image:
    """Read a picture as a PIL image; see `load_frame`."""
    return Image.fromarray(load_frame(path, width, height, resize_mode))


def load_frame(
    path: PathLike, width: int | None = None, height: int | None = None, resize_mode: str = "crop"
) -> np.ndarray:
    """Read a picture as RGB (h, w, 3) uint8, rotated upright by its EXIF tag.

    width, height: pixels to resize to; None keeps the size. resize_mode: see `resize_frame`.
    Raises ValueError, starting with the path, if the picture cannot be read.
    """
    try:
        with Image.open(io.BytesIO(read_bytes(path))) as image:
            if width and height:
                # A JPEG is decoded at the smallest of 1/1, 1/2, 1/4, 1/8 that covers the size.
                draft_size = (height, width) if swaps_sides(image) else (width, height)
                image.draft("RGB", draft_size)
            ImageOps.exif_transpose(image, in_place=True)
            pixels = np.array(convert_to_rgb(image))
    except PILLOW_ERRORS as error:
        raise ValueError(
            f"{path}: cannot be read as a picture ({pillow_message(error)})"
        ) from error
    if width and height:
        return resize_frame(pixels, width, height, resize_mode)
    return pixels


def swaps_sides(image: Image.Image) -> bool:
    """Return True if rotating the picture by its EXIF tag swaps width and height."""
    return image.getexif().get(EXIF_ORIENTATION, 1) >= EXIF_FIRST_SWAPPED


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of an opened picture, after rotation by its EXIF tag."""
    width, height = image.size
    if swaps_sides(image):
        return height, width
    return width, height


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB; 16-bit and float pictures are scaled instead of clipped."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        if values.max() > 255:
            values = values / 257  # 65535 -> 255
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def pillow_message(error: BaseException) -> str:
    """Return the error's message without the file object that Pillow names in it."""
    return re.sub(" <_io.*>", "", str(error))


def resize_frame(
    pixels: np.ndarray, width: int, height: int, resize_mode: str = "crop"
) -> np.ndarray:
    """Resize a frame (h, w, 3) uint8 to (height, width, 3).

    resize_mode: "crop" covers the size and crops the centre; "stretch" ignores the aspect ratio.
    Uses torch's antialiased bicubic filter, which is several times faster than Pillow's.
    """
    import torch

    source_height, source_width = pixels.shape[:2]
    if (source_width, source_height) == (width, height):
        return pixels
    if resize_mode == "crop":
        scale = min(source_width / width, source_height / height)
        crop_width = max(round(width * scale), 1)
        crop_height = max(round(height * scale), 1)
        left = (source_width - crop_width) // 2
        top = (source_height - crop_height) // 2
        pixels = pixels[top : top + crop_height, left : left + crop_width]
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        planes, (height, width), mode="bicubic", antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


def picture_size(paths: Sequence[PathLike]) -> tuple[int, int]:
    """Return (width, height) of the first readable picture, upright, from its header alone.

    Raises ValueError if none of them can be read.
    """
    for path in paths:
        try:
            with retry_io(Image.open, path) as image:
                return upright_size(image)
        except (OSError, ValueError, SyntaxError):
            continue
    message = f"{paths[0]}: cannot be read as a picture"
    if len(paths) > 1:
        message += f"; {len(paths) - 1} others beside it cannot be read either"
    raise ValueError(message)


def check_picture(path: PathLike) -> tuple[int, int]:
    """Check a picture without decoding it; return (width, height), upright.

    Checks the header, every checksum of a PNG, and the end marker of a JPEG. Other damage shows
    only when the picture is read. Raises ValueError, starting with the path.
    """
    try:
        content = read_bytes(path)
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
        with Image.open(io.BytesIO(content)) as image:  # `verify` leaves the first one unusable
            file_format = image.format
            size = upright_size(image)
    except PILLOW_ERRORS as error:
        raise ValueError(
            f"{path}: cannot be read as a picture ({pillow_message(error)})"
        ) from error
    if file_format == "JPEG" and JPEG_END not in content[-JPEG_TAIL:]:
        raise ValueError(f"{path}: cannot be read as a picture (it ends early)")
    return size


def read_video(path: PathLike) -> list[Image.Image]:
    """Return all frames of a video file as PIL images."""
    import av

    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


# --------------------------------------------------------------------------------------- composing


def clip_name(path: PathLike) -> str:
    """Return a name for what is rendered from a picture: photos/cat.jpg -> photos_cat."""
    return "_".join(Path(path).absolute().with_suffix("").parts[-2:]).strip("/_")


def stack_images(
    images: Sequence[Image.Image], vertical: bool = False, gap: int = 0
) -> Image.Image:
    """Paste pictures side by side, or one below the other, on white, `gap` pixels apart."""
    gaps = gap * (len(images) - 1)
    if vertical:
        width = max(image.width for image in images)
        height = sum(image.height for image in images) + gaps
    else:
        width = sum(image.width for image in images) + gaps
        height = max(image.height for image in images)
    canvas = Image.new("RGB", (width, height), "white")
    x = 0
    y = 0
    for image in images:
        canvas.paste(image, (x, y))
        if vertical:
            y += image.height + gap
        else:
            x += image.width + gap
    return canvas


def contact_sheet(frames: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """Return one picture of all frames, row by row; small frames are enlarged."""
    rows = []
    for start in range(0, len(frames), columns):
        row = [enlarge(frame) for frame in frames[start : start + columns]]
        rows.append(stack_images(row, gap=SHEET_GAP))
    return stack_images(rows, vertical=True, gap=SHEET_GAP)


def enlarge(image: Image.Image, min_width: int = MIN_SHEET_WIDTH) -> Image.Image:
    """Magnify a picture by the smallest whole number that makes it `min_width` pixels wide."""
    factor = math.ceil(min_width / image.width)
    if factor <= 1:
        return image
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)


def add_title(image: Image.Image, text: str) -> Image.Image:
    """Return the picture below a line of text."""
    canvas = Image.new("RGB", (image.width, image.height + TITLE_HEIGHT), "white")
    canvas.paste(image, (0, TITLE_HEIGHT))
    font = ImageFont.load_default(TITLE_FONT_SIZE)
    ImageDraw.Draw(canvas).text((4, 2), text, fill="black", font=font)
    return canvas
