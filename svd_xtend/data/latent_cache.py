"""Latent cache: the outputs of the frozen VAE encoder and CLIP for every frame, computed once.

    <cache>/cache.json              the models, precision, size and crop that it was made with
    <cache>/<video>.safetensors     of each frame: VAE posterior (mean, std), CLIP embedding

cache_latents.py writes it, and training reads it with --latent_cache. It is stored per frame, not
per clip, so that a window can begin with any frame. Training still encodes one frame per clip: the
first one, with noise added.

The metadata of a video's file holds a digest of its frames' names, sizes and times of change, by
which a changed video is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svd_xtend.data.clip import Clip
from svd_xtend.data.images import retry_io
from svd_xtend.data.sampler import ClipCollection, indices_to_check

if TYPE_CHECKING:
    from diffusers import StableVideoDiffusionPipeline
    from torch import Tensor

DESCRIPTION_FILE = "cache.json"


# ----------------------------------------------------------------- how the cache was made


def models_digest(pipe: StableVideoDiffusionPipeline) -> str:
    """Return a hash that changes when a weight of the VAE's encoder or of CLIP does.

    Weights are hashed in half precision, so that the fp16 and float32 files of SVD count as one
    model.
    """
    digest = hashlib.blake2b(digest_size=16)
    for module in (pipe.vae.encoder, pipe.vae.quant_conv, pipe.image_encoder):
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                digest.update(name.encode())
                digest.update(tensor.detach().half().cpu().contiguous().numpy())
    return digest.hexdigest()


def describe_cache(
    pipe: StableVideoDiffusionPipeline, precision: str, width: int, height: int, resize_mode: str
) -> dict[str, Any]:
    """Return the content of cache.json; caches with the same description are interchangeable.

    pipe: as loaded, in float32. precision: "no", "fp16" or "bf16", in which the encoders run.
    width, height: pixels.
    """
    return {
        "models": models_digest(pipe),
        "precision": precision,
        "width": width,
        "height": height,
        "resize_mode": resize_mode,
    }


def write_cache_description(folder: str | os.PathLike, description: dict[str, Any]) -> None:
    """Write cache.json, completely or not at all."""
    partial_file = Path(folder, f"{DESCRIPTION_FILE}.{os.getpid()}.partial")
    partial_file.write_text(json.dumps(description, indent=1))
    os.replace(partial_file, Path(folder, DESCRIPTION_FILE))


def check_cache(
    folder: str | os.PathLike | None,
    pipe: StableVideoDiffusionPipeline,
    precision: str,
    width: int,
    height: int,
    resize_mode: str,
) -> None:
    """Raise ValueError unless the cache was made with these models, precision, size and crop.

    folder: None if no cache is used. The other parameters are those of `describe_cache`.
    """
    if folder is None:
        return
    try:
        description = json.loads(Path(folder, DESCRIPTION_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--latent_cache {folder}: has no readable {DESCRIPTION_FILE}. "
            "Make the cache with cache_latents.py."
        ) from error
    expected = describe_cache(pipe, precision, width, height, resize_mode)
    for key, value in expected.items():
        if description.get(key) != value:
            raise ValueError(
                f"--latent_cache {folder}: was made with {key} {description.get(key)}, but this "
                f"run uses {value}. Run cache_latents.py with the flags of this run and another "
                "--latent_cache folder."
            )


def check_cache_names(folder: str | os.PathLike | None, clips: ClipCollection) -> None:
    """Raise ValueError if two base folders hold a video of the same name, which names its cache
    file."""
    name = clips.duplicate_name()
    if name is not None:
        raise ValueError(
            f"--latent_cache {folder}: two base folders hold a video named {name}. "
            "Rename one, or use two caches."
        )


def check_cached_videos(folder: str | os.PathLike, clips: ClipCollection) -> None:
    """Raise ValueError if a video has no up-to-date cache file.

    Of very many videos only a sample is checked here. Each is checked again when it is read.
    """
    check_cache_names(folder, clips)
    videos = [clips[int(index)] for index in indices_to_check(clips)]
    stale_names = [clip.path.name for clip in videos if not is_cache_fresh(folder, clip)]
    if stale_names:
        raise ValueError(
            f"--latent_cache {folder}: {len(stale_names)} of {len(videos)} videos have a missing, "
            f"damaged or outdated cache file, or one of another size, for example "
            f"{stale_names[0]}. Run cache_latents.py again; it encodes only these."
        )


# ------------------------------------------------------------------------ cache files of videos


def cache_file(folder: str | os.PathLike, clip: Clip) -> Path:
    """Return the path of a video's cache file."""
    return Path(folder, f"{clip.path.name}.safetensors")


def clip_digest(clip: Clip) -> str:
    """Return a string that changes when a file of the video does, or the size of its samples."""
    if clip.size is None:
        raise ValueError(f"{clip.path}: the size of its samples is not known")
    width, height = clip.size
    return f"{clip.digest()} {width}x{height}"


@contextlib.contextmanager
def open_cache_file(file: Path, framework: str) -> Iterator[Any]:
    """Open a safetensors file. framework: "np" or "pt", the kind of the tensors."""
    from safetensors import safe_open

    with retry_io(lambda path: safe_open(path, framework), file) as tensors:
        yield tensors


def is_cache_fresh(folder: str | os.PathLike, clip: Clip) -> bool:
    """Return True if a video's cache file is complete and was made from its present frames and
    size."""
    from safetensors import SafetensorError

    try:
        with open_cache_file(cache_file(folder, clip), "np") as tensors:
            return stored_digest(tensors) == clip_digest(clip)
    except (OSError, SafetensorError):
        return False


def stored_digest(tensors: Any) -> str | None:
    """Return the clip digest in the metadata of an open cache file."""
    metadata = tensors.metadata() or {}
    return metadata.get("frames")


def write_cached_clip(
    folder: str | os.PathLike, clip: Clip, digest: str, tensors: Mapping[str, Tensor]
) -> None:
    """Write a video's cache file, completely or not at all.

    digest: clip_digest(clip), taken before the frames were read. tensors: `mean` and `std` (n, 4,
    h/8, w/8) of the VAE's posterior and `image_embeds` (n, d) of all n frames; {} for a video that
    cannot be read.
    """
    from safetensors.torch import save_file

    file = cache_file(folder, clip)
    partial_file = file.with_suffix(f".{os.getpid()}.partial")
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, partial_file, {"frames": digest})
    os.replace(partial_file, file)


def read_cached_window(
    folder: str | os.PathLike, clip: Clip, frame_indices: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the cached outputs of a window of frames, float32.

    `moments` (2, f, 4, h/8, w/8): mean and std of the VAE's posterior, in this order.
    `image_embeds` (1, d): CLIP embedding of the first frame.

    Raises ValueError, starting with the file, if it is missing, damaged or outdated, or if the
    video could not be read when the cache was made.
    """
    from safetensors import SafetensorError

    file = cache_file(folder, clip)
    first = int(frame_indices[0])
    end = int(frame_indices[-1]) + 1
    try:
        with open_cache_file(file, "pt") as tensors:
            if stored_digest(tensors) != clip_digest(clip):
                raise ValueError(
                    f"{file}: the frames have changed since; run cache_latents.py again"
                )
            # A slice reads only its own bytes of the file, and the window is then taken from it.
            mean = tensors.get_slice("mean")[first:end][frame_indices - first].float()
            std = tensors.get_slice("std")[first:end][frame_indices - first].float()
            image_embeds = tensors.get_slice("image_embeds")[first : first + 1].float()
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file}: cannot be read from the latent cache ({error}); run cache_latents.py again"
        ) from error
    return {"moments": np.stack([mean.numpy(), std.numpy()]), "image_embeds": image_embeds.numpy()}
