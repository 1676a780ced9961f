"""Split the clips of base folders into training clips and validation clips.

    indexes = select_training_clips(["data/a", "data/b"], validation_fraction=0.1)
    training_clips = ClipCollection(indexes, spec)
    validation_clips = ClipCollection(select_validation_clips(training_clips.indexes), spec)
    check_disjoint(validation_clips, training_clips)

The split is by source video, so that no video is in both parts. A video's part depends only on its
name and the seed, so that no training clip moves to the validation set when more videos are added.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from svd_xtend.data import sampler, video_decode
from svd_xtend.data.folder_index import FRAME_FOLDER, PICTURE, FolderIndex
from svd_xtend.data.sampler import ClipCollection

logger = logging.getLogger("svd_xtend")


def source_video(path: str | os.PathLike, has_clip_json: bool = True) -> str:
    """Return the name of the source video of a clip, which is the unit of splitting and of
    statistics.

    It is the "source" of the clip's clip.json, or else the clip's own name, without the suffix of a
    video file and without the "_scene012" that prepare_data.py appends. has_clip_json: False skips
    looking for a clip.json.
    """
    name = Path(path).name
    if has_clip_json:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            name = json.loads(Path(path, "clip.json").read_text())["source"] or name
    if video_decode.is_video(name):
        name = Path(name).stem
    else:
        name = Path(name).name
    return re.sub(r"_scene\d+$", "", name)


def clips_by_source_video(index: FolderIndex) -> dict[str, list[int]]:
    """Return {source video: rows of its clips in the index}, without pictures."""
    sources: dict[str, list[int]] = {}
    for row in np.flatnonzero(index.arrays["kinds"] != PICTURE).tolist():
        is_folder = index.arrays["kinds"][row] == FRAME_FOLDER
        has_clip_json = bool(is_folder and index.arrays["clip_json_times"][row])
        source = source_video(index.root / index.name(row), has_clip_json)
        sources.setdefault(source, []).append(row)
    return sources


def hash_to_unit(seed: int, name: str) -> float:
    """Return a number in [0, 1) that depends only on the seed and the name."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def choose_validation_sources(
    sources: Collection[str],
    fraction: float,
    seed: int = 0,
    groups: Sequence[Collection[str]] | None = None,
) -> set[str]:
    """Choose about this fraction of the source videos for validation, at least one if possible.

    groups: the source videos of each base folder; at least one of each group stays in training.
    Without groups, at least one of all stays.

    Each source is chosen by a hash of its name and the seed alone. When sources are added later,
    none of the earlier training sources becomes a validation source.
    """

    def key(name: str) -> float:
        return hash_to_unit(seed, name)

    always_trained = {max(group, key=key) for group in groups or [sources]}
    candidates = set(sources) - always_trained
    chosen = {name for name in candidates if key(name) < fraction}
    if not chosen and candidates:
        chosen = {min(candidates, key=key)}
    return chosen


def select_training_clips(
    base_folders: Sequence[str | os.PathLike], validation_fraction: float
) -> list[FolderIndex]:
    """Return the indexes of the base folders, with the validation clips marked as not used.

    Raises ValueError if the folders do not hold enough source videos for two parts.
    """
    indexes = [FolderIndex(folder) for folder in base_folders]
    sources_by_folder = [clips_by_source_video(index) for index in indexes]
    all_sources: set[str] = set().union(*sources_by_folder)
    chosen: set[str] = set()
    if all(sources_by_folder):
        chosen = choose_validation_sources(
            all_sources, validation_fraction, groups=sources_by_folder
        )
    if not chosen:
        folders = " ".join(map(str, base_folders))
        raise ValueError(
            f"--validation_ratio: {folders} holds {len(all_sources)} source video(s). The split is "
            "by source video, and each folder keeps at least one for training: add videos, or pass "
            "--validation_folder."
        )
    num_clips = 0
    num_validation_clips = 0
    for index, sources in zip(indexes, sources_by_folder):
        validation_rows = [row for name in chosen for row in sources.get(name, [])]
        used = np.ones(len(index.arrays["kinds"]), bool)
        used[validation_rows] = False
        index.used = used
        num_clips += sum(len(rows) for rows in sources.values())
        num_validation_clips += len(validation_rows)
    logger.info("%d of %d clips form the validation set", num_validation_clips, num_clips)
    return indexes


def select_validation_clips(training_indexes: Sequence[FolderIndex]) -> list[FolderIndex]:
    """Return the indexes of the clips that `select_training_clips` left out, folder by folder.

    They share what was measured of the clips. Folders without validation clips are left out.
    """
    validation_indexes = []
    for training_index in training_indexes:
        is_validation = ~np.asarray(training_index.used)
        if is_validation.any():
            index = copy.copy(training_index)
            index.used = is_validation
            validation_indexes.append(index)
    return validation_indexes


def check_disjoint(validation_clips: ClipCollection, training_clips: ClipCollection) -> None:
    """Raise ValueError if a validation clip, or the file that it links to, is a training clip.

    Of very many validation clips only a sample is checked.
    """
    paths = {}
    for clip_index in sampler.indices_to_check(validation_clips):
        path = validation_clips[int(clip_index)].path
        paths[path.resolve()] = path
    for index, rows in zip(training_clips.indexes, training_clips.video_rows):
        root = index.root.resolve()
        in_this_folder = {path.name: shown for path, shown in paths.items() if path.parent == root}
        if not in_this_folder:
            continue
        training_names = {index.name(row) for row in rows.tolist()}
        shared_names = in_this_folder.keys() & training_names
        if shared_names:
            raise ValueError(
                f"--validation_folder: {in_this_folder[min(shared_names)]} is among the training "
                "clips. Pass a folder of other clips."
            )


@contextlib.contextmanager
def errors_name_flag(flag: str) -> Iterator[None]:
    """Replace --base_folder by this flag in the errors of FolderIndex and ClipCollection."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("--base_folder", flag, 1)) from error
