"""Reading frames and pictures, writing clips: mp4, gif, contact sheet. A clip is a list of PIL images of one size."""

import errno
import io
import logging
import os
import re
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

logger = logging.getLogger("svd_xtend")

FRAME_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif"}
RETRY_DELAYS = (0.5, 1, 2, 4, 8, 16)  # seconds between attempts to read
TRANSIENT_ERRORS = ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH",
           "ENOTCONN", "EREMOTEIO")  # fmt: skip
SHEET_GAP = 4  # pixels between the pictures of a sheet


def natural_key(path):
    """Sorts frame_2 before frame_10."""
    parts = re.split(r"(\d+)", os.path.basename(path))
    return [int(part) if part.isdigit() else part.lower() for part in parts]


def select_frame_names(names):
    """Those of names in a folder that are frames', in natural order."""
    frames = (name for name in names if os.path.splitext(name)[1].lower() in FRAME_SUFFIXES)
    return sorted((name for name in frames if name[0] != "."), key=natural_key)


def list_frames(folder):
    """The frames of a video folder in natural order."""
    return [Path(folder, name) for name in select_frame_names(retry_io(os.listdir, folder))]


def retry_io(function, path):
    """function(path), again after a while where a network file system fails for the moment. Where it still does, Unreachable,
    which nobody takes for a damaged file; but EIO stays an OSError, as a bad sector gives it, too."""
    for wait in (*RETRY_DELAYS, None):
        try:
            return function(path)
        except OSError as error:
            if not is_transient(error):
                raise
            if wait is None and error.errno == errno.EIO:
                raise  # as a disk answers for a bad sector, too
            if wait is None:
                raise UnreachableError(
                    f"{path}: {error.strerror}, for {sum(RETRY_DELAYS)} s. When it can be reached, the same command goes on"
                ) from error
            logger.warning("%s: %s; trying again in %g s", path, error.strerror, wait)
            time.sleep(wait)


def is_transient(error):
    """Whether it is one of a network file system, which may pass, or of a disk, which may not."""
    return errno.errorcode.get(error.errno) in TRANSIENT_ERRORS


class UnreachableError(Exception):
    """A file system does not answer."""


def read_bytes(path):
    """A file's content."""
    return retry_io(lambda p: Path(p).read_bytes(), path)


def load_image(path, width=None, height=None, resize_mode="crop"):
    """Any picture that Pillow reads -> RGB, upright by its EXIF tag, resized to (width, height) where they are given.

    resize_mode: `crop` covers the target and crops the centre; `stretch` ignores the aspect ratio. Raises ValueError
    with the path in front.
    """
    return Image.fromarray(load_frame(path, width, height, resize_mode))


def load_frame(path, width=None, height=None, resize_mode="crop"):
    """load_image as an array (h, w, 3) uint8."""
    try:
        with Image.open(io.BytesIO(read_bytes(path))) as image:
            if width:
                turned = image.getexif().get(0x0112, 1) >= 5  # orientations that swap the sides
                image.draft(
                    "RGB", (height, width) if turned else (width, height)
                )  # JPEG: decode at a fitting 1/2^n
            ImageOps.exif_transpose(image, in_place=True)
            pixels = np.array(image if image.mode == "RGB" else to_rgb(image))
    # Pillow raises all of them on damaged files
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: cannot be read as a picture ({pillow_message(error)})"
        ) from error
    return resize(pixels, width, height, resize_mode) if width else pixels


def pillow_message(error):
    """What Pillow says, without the object that it read from."""
    return re.sub(" <_io.*>", "", str(error))


def resize(pixels, width, height, resize_mode="crop"):
    """Pixels (h, w, 3) uint8 at another size, as load_image does it: torch's bicubic, several times faster than Pillow's."""
    import torch

    h, w = pixels.shape[:2]
    if (w, h) == (width, height):
        return pixels
    if resize_mode == "crop":
        scale = min(w / width, h / height)
        kept_w, kept_h = max(round(width * scale), 1), max(round(height * scale), 1)
        left, top = (w - kept_w) // 2, (h - kept_h) // 2
        pixels = pixels[top : top + kept_h, left : left + kept_w]
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        planes, (height, width), mode="bicubic", antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


def picture_size(paths):
    """(width, height) of the first picture that can be read, upright by its EXIF tag, from its header alone."""
    for path in paths:
        try:
            with retry_io(Image.open, path) as image:
                width, height = image.size
                return (height, width) if image.getexif().get(0x0112, 1) >= 5 else (width, height)
        except (OSError, ValueError, SyntaxError):
            continue
    raise ValueError(
        f"{paths[0]}: cannot be read as a picture, nor can {len(paths) - 1} others beside it"
    )


def check_picture(path):
    """(width, height) of a picture whose header, and of a PNG whose every checksum, is right; ValueError where it is not, or
    where a JPEG lacks its end. Nothing is decoded: what is damaged within may still show only when it is read."""
    try:
        content = read_bytes(path)
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
        with Image.open(io.BytesIO(content)) as image:
            (width, height), kind = image.size, image.format
            turned = image.getexif().get(0x0112, 1) >= 5
    # Pillow raises all of them on damaged files
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: cannot be read as a picture ({pillow_message(error)})"
        ) from error
    if kind == "JPEG" and b"\xff\xd9" not in content[-64:]:
        raise ValueError(f"{path}: cannot be read as a picture (it ends early)")
    return (height, width) if turned else (width, height)


def to_rgb(image):
    """8-bit RGB; 16-bit and float pictures are scaled where `convert` would clip them."""
    if image.mode.startswith("I") or image.mode == "F":
        wide = np.asarray(image, np.float64)
        image = Image.fromarray(
            (wide / (257 if wide.max() > 255 else 1)).round().clip(0, 255).astype(np.uint8)
        )
    return image.convert("RGB")


def clip_name(path):
    """photos/cat.jpg -> photos_cat, a name for what is rendered from it."""
    return "_".join(Path(path).absolute().with_suffix("").parts[-2:]).strip("/_")


def stack_images(images, vertical=False, gap=0):
    """Pictures side by side, or one below the other, on white."""
    x = [0] + list(np.cumsum([image.width + gap for image in images]))
    y = [0] + list(np.cumsum([image.height + gap for image in images]))
    wide, high = max(image.width for image in images), max(image.height for image in images)
    size = (wide, int(y[-1]) - gap) if vertical else (int(x[-1]) - gap, high)
    canvas = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        canvas.paste(image, (0, int(y[i])) if vertical else (int(x[i]), 0))
    return canvas


def contact_sheet(frames, columns=8):
    """All frames of a clip in one picture, row by row; pictures under 160 pixels wide are shown larger."""
    rows = [frames[i : i + columns] for i in range(0, len(frames), columns)]
    return stack_images(
        [stack_images([enlarge(f) for f in row], gap=SHEET_GAP) for row in rows],
        vertical=True,
        gap=SHEET_GAP,
    )


def enlarge(image, least=160):
    """Whole-number magnification to at least `least` pixels of width."""
    k = -(-least // image.width)
    return (
        image.resize((image.width * k, image.height * k), Image.Resampling.NEAREST)
        if k > 1
        else image
    )


def add_title(image, text):
    """The picture under a line of text."""
    canvas = Image.new("RGB", (image.width, image.height + 22), "white")
    canvas.paste(image, (0, 22))
    ImageDraw.Draw(canvas).text((4, 2), text, fill="black", font=ImageFont.load_default(15))
    return canvas


def read_video(path):
    """The frames of a video file as PIL images."""
    import av

    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]
