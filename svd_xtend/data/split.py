"""TODO data.split."""

import contextlib
import copy
import hashlib
import json
import logging
import re
from pathlib import Path

import numpy as np

from svd_xtend.data import folder_index, sampler, video_decode
from svd_xtend.data.sampler import ClipCollection

logger = logging.getLogger("svd_xtend")


# ---------------------------------------------------------------------------------------------------------- which clips


def source_video(path, ask=True):
    """What must not be on both sides of a split, and is one witness, not several: the video that the clip at this path was
    extracted from, else the clip. ask: its clip.json, if there is one."""
    name = Path(path).name
    if ask:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            name = json.loads(Path(path, "clip.json").read_text())["source"] or name
    return re.sub(
        r"_scene\d+$", "", Path(name).stem if video_decode.is_video(name) else Path(name).name
    )


def clips_by_source_video(listing):
    """{source: numbers of its clips}, pictures left out."""
    sources = {}
    for i in np.flatnonzero(listing.arrays["kinds"] != folder_index.PICTURE).tolist():
        ask = listing.arrays["kinds"][i] == folder_index.FRAME_FOLDER and bool(
            listing.arrays["jsons"][i]
        )
        sources.setdefault(source_video(listing.root / listing.name(i), ask), []).append(i)
    return sources


def choose_validation_sources(sources, fraction, seed=0, parts=None):
    """Those of {source: clips} that are held out: about this fraction, each by what seed and name alone decide, so that when more come
    none that was trained on is held out. At least one; of each of `parts`, lists of sources, one stays."""

    def key(name):
        return (
            int.from_bytes(
                hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "big"
            )
            / 2**64
        )

    may = sources.keys() - {max(part, key=key) for part in parts or [sources]}
    return {name for name in may if key(name) < fraction} or set(sorted(may, key=key)[:1])


def training_part(roots, fraction):
    """Listings of base folders' clips that train, the others held out."""
    listings, sources = [folder_index.FolderIndex(root) for root in roots], {}
    parts = [clips_by_source_video(listing) for listing in listings]
    for k, own in enumerate(parts):
        for name, clips in own.items():
            sources.setdefault(name, []).extend((k, i) for i in clips)
    chosen = choose_validation_sources(sources, fraction, parts=parts) if all(parts) else ()
    if not chosen:
        names = " ".join(map(str, roots))
        raise ValueError(
            f"--validation_ratio: {names} holds {len(sources)} video(s); it takes two, not of one film"
        )
    for listing in listings:
        listing.used = np.ones(len(listing.arrays["kinds"]), bool)
    places = [place for name in chosen for place in sources[name]]
    for k, i in places:
        listings[k].used[i] = False
    logger.info("%d of %d clips are held out", len(places), sum(map(len, sources.values())))
    return listings


def validation_part(listings):
    """What `part` has held out, of each folder that has some: the same Listings, not looked into again."""
    copies = [copy.copy(listing) for listing in listings]
    for listing in copies:
        listing.used = ~listing.used
    return [listing for listing in copies if listing.used.any()]


def check_disjoint(validation_clips: ClipCollection, training_clips: ClipCollection) -> None:
    """Raise ValueError if a validation clip, or the file that it links to, is a training clip.

    Of very many validation clips only a sample is looked at.
    """
    paths = {}
    for index in sampler.indices_to_check(validation_clips):
        path = validation_clips[int(index)].path
        paths[path.resolve()] = path
    for folder_index, kept in zip(training_clips.indexes, training_clips.kept):
        root = folder_index.root.resolve()
        in_this_folder = {path.name: shown for path, shown in paths.items() if path.parent == root}
        if not in_this_folder:
            continue
        training_names = {folder_index.name(i) for i in kept.tolist()}
        shared_names = in_this_folder.keys() & training_names
        if shared_names:
            raise ValueError(
                f"--validation_folder: {in_this_folder[min(shared_names)]} is among the training clips. "
                "Pass a folder of other clips."
            )


@contextlib.contextmanager
def errors_name_flag(flag):
    """What is wrong with clips held out is not said of --base_folder."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("--base_folder", flag, 1)) from error
