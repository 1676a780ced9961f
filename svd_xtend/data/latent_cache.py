"""Latent cache: what the frozen VAE and CLIP say of every frame, computed once by cache_latents.py.

    <cache>/cache.json              which models, size and crop it was made with
    <cache>/<video>.safetensors     of each frame: mean and std of the VAE's posterior, CLIP embedding; in the metadata a
                                    digest of the files' names, sizes and times, and the size of a frame

Per frame, not per clip: any window start is free. Every step still encodes one frame, the noised condition.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from svd_xtend.data.images import retry_io
from svd_xtend.data.sampler import indices_to_check

DESCRIPTION_FILE = "cache.json"


def models_digest(pipe):
    """Changes when a weight of the VAE's encoder or of CLIP does. Of the weights in half precision: the files of SVD's fp16
    variant and plain ones are one model."""
    digest = hashlib.blake2b(digest_size=16)
    for module in (pipe.vae.encoder, pipe.vae.quant_conv, pipe.image_encoder):
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                digest.update(name.encode())
                digest.update(tensor.detach().half().cpu().contiguous().numpy())
    return digest.hexdigest()


def describe_cache(pipe, precision, width, height, resize_mode):
    """What cache.json says; two caches of one description hold the same. pipe: as loaded, in float32; precision: the one
    that the encoders run in."""
    told = {"precision": precision, "width": width, "height": height, "resize_mode": resize_mode}
    return {"models": models_digest(pipe), **told}


def write_cache_description(folder, description):
    """Write cache.json, whole."""
    partial = Path(folder, f"{DESCRIPTION_FILE}.{os.getpid()}.partial")
    partial.write_text(json.dumps(description, indent=1))
    os.replace(partial, Path(folder, DESCRIPTION_FILE))


def check_cache(folder, *how):
    """Raise unless the cache in `folder` (None: there is none) is what `describe(*how)` says."""
    if folder is None:
        return
    file = Path(folder, DESCRIPTION_FILE)
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--latent_cache {folder}: no readable {DESCRIPTION_FILE} in it; make it with cache_latents.py"
        ) from error
    for key, wanted in describe_cache(*how).items():
        if found.get(key) != wanted:
            raise ValueError(
                f"--latent_cache {folder}: was made with {key} {found.get(key)}, this run has {wanted}; run "
                "cache_latents.py with this run's flags, into another folder"
            )


def cache_file(folder, clip):
    """Where the cache of a video is."""
    return Path(folder, f"{clip.path.name}.safetensors")


def is_cache_fresh(folder, clip):
    """Whether the video's cache is there, with a whole header, and of the frames as they are now, in this size."""
    from safetensors import SafetensorError, safe_open

    try:
        with retry_io(lambda file: safe_open(file, "np"), cache_file(folder, clip)) as f:
            return (f.metadata() or {}).get("frames") == clip_digest(clip)
    except (OSError, SafetensorError):
        return False


def clip_digest(clip):
    """Changes when a file of the clip does, or the size in which it is sampled."""
    return f"{clip.digest()} {clip.size[0]}x{clip.size[1]}"


def write_cached_clip(folder, clip, digest, tensors):
    """Write a video's cache whole or not at all. digest: digest_of, from before it was read; tensors: mean and std
    (f, 4, h, w), image_embeds (f, d), or none of a video that cannot be read."""
    from safetensors.torch import save_file

    file = cache_file(folder, clip)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial, {"frames": digest})
    os.replace(partial, file)


def read_cached_window(folder, clip, frames):
    """{moments (2, f, 4, h, w), image_embeds (1, d)} of these frames of a clip, float32.

    Raises ValueError with the file in front where it is missing, damaged, or of a video that could not be read."""
    from safetensors import SafetensorError, safe_open

    file, start = cache_file(folder, clip), int(frames[0])
    try:
        with retry_io(lambda file: safe_open(file, "pt"), file) as f:
            if (f.metadata() or {}).get("frames") != clip_digest(clip):
                raise ValueError(
                    f"{file}: its frames have changed since; run cache_latents.py again"
                )
            cut = {
                name: f.get_slice(name)[start : frames[-1] + 1][frames - start].float()
                for name in ("mean", "std")
            }
            image_embeds = f.get_slice("image_embeds")[start : start + 1].float()
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file}: cannot be read from the latent cache ({error}); run cache_latents.py again"
        ) from error
    return {
        "moments": np.stack([cut["mean"].numpy(), cut["std"].numpy()]),
        "image_embeds": image_embeds.numpy(),
    }


def check_cache_names(folder, clips):
    """Raise where two base folders have a video of one name: there is one file for a name."""
    if name := clips.twice():
        raise ValueError(
            f"--latent_cache {folder}: two folders hold a video {name}; rename one, or use two caches"
        )


def check_cached_videos(folder, clips):
    """Raise where a video of `clips` has no fresh cache. Of very many some are looked at: all are when they are read."""
    check_cache_names(folder, clips)
    videos = [clips[int(i)] for i in indices_to_check(clips)]
    stale = [clip.path.name for clip in videos if not is_cache_fresh(folder, clip)]
    if stale:
        raise ValueError(
            f"--latent_cache {folder}: {len(stale)} of {len(videos)} videos are missing, damaged, of another size or have changed since, "
            f"{stale[0]} for one; run cache_latents.py again: it does only those"
        )
