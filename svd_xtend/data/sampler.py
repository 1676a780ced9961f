"""Choose the clips of some base folders that can be used, and the order in which samples show them.

    spec = ClipSpec(width=512, height=320, num_frames=14, fps=7)
    clips = ClipCollection(["/data/a", "/data/b"], spec)
    clip = clips[5]                        # a clip.Clip, with fps, motion_bucket_id and caption
    clip_sampler = ClipSampler(clips.pools(weights=[3, 1]), seed=0)
    next(clip_sampler.choices(123456))     # the clip that global sample index 123456 shows

A sample index is global and has no end. Which clip it shows depends on the seed alone, so that
resumed runs and runs of any number of processes see the same samples.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import logging
import math
import os
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path

import numpy as np

from svd_xtend.data import motion
from svd_xtend.data.clip import DURATION_TOLERANCE, Clip, ClipSpec
from svd_xtend.data.folder_index import (
    DEFAULT_SOURCE_FPS,
    FRAME_FOLDER,
    PICTURE,
    VIDEO_FILE,
    FolderIndex,
)

logger = logging.getLogger("svd_xtend")

MIN_CYCLE = 1000  # draws, at least, within which each pool has exactly its share
MAX_CLIPS_NAMED = 50  # skipped entries of a folder that a warning names
MAX_CLIPS_CHECKED = 1000  # clips that are examined before a run starts
MAX_ASPECT_RATIO = 2.5  # of the longest size bucket, width to height or height to width
DEFAULT_MOTION_BUCKET = 127.0  # SVD's own default
MIN_ASPECT_RATIO_OF_CLIP = 1e-3  # keeps the logarithm finite where a size is unknown

# What else keys the random generators of a ClipSampler, beside the seed and a count
CYCLE_KEY = 2
POOL_PASS_KEY = 3


def indices_to_check(clips: Sized) -> np.ndarray:
    """Return the indices of clips to check: at most MAX_CLIPS_CHECKED, evenly spread."""
    return np.unique(np.linspace(0, len(clips) - 1, MAX_CLIPS_CHECKED).astype(int))


def bucket_sizes(width: int, height: int, step: int) -> list[tuple[int, int]]:
    """Return the sizes (width, height) of the aspect-ratio buckets, from the tallest to the widest.

    Each has at most width * height pixels and sides that are multiples of `step`. Every such width
    whose aspect ratio is between 1 / MAX_ASPECT_RATIO and MAX_ASPECT_RATIO has one; (width, height)
    itself is always among them.
    """
    sizes = {(width, height)}
    max_width = int((width * height * MAX_ASPECT_RATIO) ** 0.5)
    for bucket_width in range(step, max_width + 1, step):
        bucket_height = width * height // bucket_width // step * step
        if bucket_height == 0:
            continue
        if 1 / MAX_ASPECT_RATIO <= bucket_width / bucket_height <= MAX_ASPECT_RATIO:
            sizes.add((bucket_width, bucket_height))
    return sorted(sizes, key=lambda size: size[0] / size[1])


class ClipCollection:
    """The videos of some base folders that are long enough for a sample: a sequence of clip.Clip.

    A clip is made when it is asked for, so that a million clips are a few arrays. With
    `with_pictures`, the pictures of the folders are numbered behind the videos, from len(self) on;
    see `picture`.

    spec: a clip whose own frame rate is below spec.fps keeps its own. spec.width and spec.height
    may be 0 if nobody asks for the size of a sample.
    motion_bucket_id: of clips whose metadata has none; "auto": by the rank of their motion, see
    motion.motion_buckets.
    source_fps: frame rate of folders without frame-rate metadata; default: spec.fps, or 7 where
    that is "native".
    bucket_step: if not 0, a sample has the size of the aspect-ratio bucket nearest to the clip, see
    bucket_sizes.
    quiet: do not warn about skipped entries, and accept folders without usable clips.

    indexes: a FolderIndex per base folder. video_rows, picture_rows: for each of them the rows that
    are used.
    motions: picture lengths per second of each video, NaN if not measured. motion_buckets:
    motion_bucket_id of each video.

    Raises ValueError if a folder has neither a video that is long enough nor a picture to use.
    """

    def __init__(
        self,
        base_folders: str | Path | FolderIndex | Sequence[str | Path | FolderIndex],
        spec: ClipSpec,
        *,
        motion_bucket_id: float | str = 127,
        source_fps: float | None = None,
        bucket_step: int = 0,
        with_pictures: bool = False,
        quiet: bool = False,
    ) -> None:
        if isinstance(base_folders, (str, os.PathLike, FolderIndex)):
            base_folders = [base_folders]
        self.spec = spec
        self.default_fps: float = DEFAULT_SOURCE_FPS
        self.max_fps: float = math.inf  # of a sample
        if not isinstance(spec.fps, str):  # "native"
            self.default_fps = spec.fps
            self.max_fps = spec.fps
        self.source_fps = source_fps or self.default_fps
        self.indexes = [
            folder if isinstance(folder, FolderIndex) else FolderIndex(folder)
            for folder in base_folders
        ]
        is_automatic = motion_bucket_id == "auto"
        for index in self.indexes:
            index.inspect(sizes=bucket_step > 0, motions=is_automatic)

        self.video_rows: list[np.ndarray] = []
        self.picture_rows: list[np.ndarray] = []
        for index in self.indexes:
            videos, pictures = self.usable_rows(index)
            self.video_rows.append(videos)
            self.picture_rows.append(pictures if with_pictures else pictures[:0])
        self.num_videos_of_folder = [len(rows) for rows in self.video_rows]
        if not quiet:
            for folder_number in range(len(self.indexes)):
                self.warn_about_skipped(folder_number)

        # Motion was measured as if a folder without frame-rate metadata had DEFAULT_SOURCE_FPS
        has_no_rate = np.isnan(self.column("rates", self.video_rows))
        correction = np.where(has_no_rate, self.source_fps / DEFAULT_SOURCE_FPS, 1)
        self.motions = self.column("motions", self.video_rows) * correction
        self.motion_buckets = self.column("motion_buckets", self.video_rows)
        has_no_bucket = np.isnan(self.motion_buckets)
        self.scores = self.motions[has_no_bucket]  # the motions that are ranked
        self.is_ranked = has_no_bucket & is_automatic
        if is_automatic:
            self.motion_buckets[has_no_bucket] = motion.motion_buckets(self.scores)
        else:
            self.motion_buckets[has_no_bucket] = motion_bucket_id

        self.sample_sizes = [(spec.width, spec.height)]
        if bucket_step:
            self.sample_sizes = bucket_sizes(spec.width, spec.height, bucket_step)
        self.size_numbers = self.nearest_sizes()

    # ---------------------------------------------------------------------- which clips can be used

    def frame_rates(self, index: FolderIndex) -> tuple[np.ndarray, np.ndarray]:
        """Return (own frame rate, that of a sample) of each clip of a folder, frames per second."""
        own_rates = index.arrays["rates"]
        own_rates = np.where(np.isnan(own_rates), self.source_fps, own_rates)
        return own_rates, np.minimum(own_rates, self.max_fps)

    def usable_rows(self, index: FolderIndex) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a folder's index that can be used: (videos, pictures)."""
        kinds = index.arrays["kinds"]
        counts = index.arrays["counts"]
        own_rates, sample_rates = self.frame_rates(index)
        is_usable = ~index.arrays["unusable"] & index.used
        is_video = (kinds == FRAME_FOLDER) | (kinds == VIDEO_FILE)
        duration = (counts - 1 + DURATION_TOLERANCE) / own_rates
        needed_duration = (self.spec.num_frames - 1) / sample_rates
        is_long_enough = (duration >= needed_duration) & (counts > 0)
        videos = np.flatnonzero(is_usable & is_video & is_long_enough)
        pictures = np.flatnonzero(is_usable & (kinds == PICTURE))
        return videos, pictures

    def skipped_entries(self, folder_number: int) -> list[tuple[str, str]]:
        """Return [(name, reason)] of the entries of a base folder that are not used."""
        index = self.indexes[folder_number]
        is_skipped = np.ones(len(index.arrays["kinds"]), bool) & index.used
        is_skipped[self.video_rows[folder_number]] = False
        is_skipped[self.picture_rows[folder_number]] = False
        own_rates, sample_rates = self.frame_rates(index)
        skipped = list(index.stray)
        for row in np.flatnonzero(is_skipped).tolist():
            count = index.arrays["counts"][row]
            trouble = index.note(row).get("trouble")
            if trouble is not None:
                reason = trouble
            elif index.arrays["kinds"][row] == PICTURE:
                reason = "a picture; --image_ratio uses them"
            elif count == 0:
                reason = "holds no pictures"
            else:
                needed_duration = (self.spec.num_frames - 1) / sample_rates[row]
                reason = (
                    f"too short, {count} frame(s) at {own_rates[row]:.4g} per second; "
                    f"{self.spec.num_frames} at {sample_rates[row]:.4g} "
                    f"take {needed_duration:.3g} s"
                )
            skipped.append((index.name(row), reason))
        return skipped

    def warn_about_skipped(self, folder_number: int) -> None:
        """Warn about the entries of a base folder that are not used.

        Raises ValueError if none is left.
        """
        root = self.indexes[folder_number].root
        num_used = len(self.video_rows[folder_number]) + len(self.picture_rows[folder_number])
        skipped = self.skipped_entries(folder_number)
        if skipped:
            lines = [f"\n  {name}: {reason}" for name, reason in skipped[:MAX_CLIPS_NAMED]]
            if len(skipped) > MAX_CLIPS_NAMED:
                lines.append(f"\n  ... python prepare_data.py check {root} lists all of them")
            logger.warning(
                "--base_folder %s: skipped %d of %d entries:%s",
                root,
                len(skipped),
                len(skipped) + num_used,
                "".join(lines),
            )
        if num_used == 0:
            raise ValueError(
                f"--base_folder {root}: no video is {self.spec.num_frames} frames long "
                f"at --fps {self.spec.fps}. "
                f"Expected {root}/<video>/<frame>.jpg, or {root}/<video>.mp4. "
                "Lower --num_frames, raise --fps, or extract more frames."
            )

    def duplicate_name(self) -> str | None:
        """Return the name of a clip that two of the base folders have, or None."""
        if len(self.indexes) == 1:
            return None
        counts = collections.Counter(name for index in self.indexes for name in index.names())
        return next((name for name, count in counts.items() if count > 1), None)

    def digest(self) -> str:
        """Return a digest that is the same wherever the same videos and frames are found."""
        digest = hashlib.blake2b(repr(self.num_videos_of_folder).encode(), digest_size=16)
        for index in self.indexes:
            digest.update(index.content())
        return digest.hexdigest()

    # --------------------------------------------------------------------------------- single clips

    def __len__(self) -> int:
        return sum(self.num_videos_of_folder)

    def __getitem__(self, clip_index: int) -> Clip:
        if not 0 <= clip_index < len(self):
            raise IndexError(clip_index)
        index, row = locate_row(clip_index, self.indexes, self.video_rows)
        own_rate = float(index.arrays["rates"][row])
        if np.isnan(own_rate):
            own_rate = self.source_fps
        return index.clip(
            row,
            self.source_fps,
            self.sample_size(clip_index),
            fps=min(own_rate, self.max_fps),
            motion_bucket_id=float(self.motion_buckets[clip_index]),
        )

    def picture(self, clip_index: int) -> Clip:
        """Return a picture as a clip of one frame without motion.

        clip_index: len(self) for the first picture.
        """
        index, row = locate_row(clip_index - len(self), self.indexes, self.picture_rows)
        fps = self.default_fps
        return index.clip(row, fps, self.sample_size(clip_index), fps=fps, motion_bucket_id=0.0)

    def sample_size(self, clip_index: int) -> tuple[int, int] | None:
        """Return (width, height) of a sample of that clip; None if the spec has no size."""
        return self.sample_sizes[self.size_numbers[clip_index]] if self.spec.width else None

    def column(self, name: str, rows: list[np.ndarray]) -> np.ndarray:
        """Return a column of the indexes at these rows of each, one folder after the other."""
        return np.concatenate(
            [index.arrays[name][chosen] for index, chosen in zip(self.indexes, rows)]
        )

    def nearest_sizes(self) -> np.ndarray:
        """Return the number of the sample size for each video, and then for each picture.

        It is the one of `sample_sizes` that is nearest to the clip's aspect ratio.
        """
        num_pictures = sum(len(rows) for rows in self.picture_rows)
        if len(self.sample_sizes) == 1:
            return np.zeros(len(self) + num_pictures, int)
        ratios_of_clips = np.concatenate(
            [
                self.column("widths", rows) / np.maximum(self.column("heights", rows), 1)
                for rows in (self.video_rows, self.picture_rows)
            ]
        )
        log_ratios = np.log(np.maximum(ratios_of_clips, MIN_ASPECT_RATIO_OF_CLIP))
        log_bucket_ratios = np.log(
            np.array([width / height for width, height in self.sample_sizes])
        )
        return np.abs(log_ratios[:, None] - log_bucket_ratios).argmin(1)

    # ------------------------------------------------------------------------------- motion buckets

    def rank_among(self, others: ClipCollection) -> None:
        """Set the motion buckets that "auto" chose by the rank among other clips.

        A validation set may be too small to be ranked among itself; its clips get the buckets that
        they would have in training.
        """
        scores = self.motions[self.is_ranked]
        self.motion_buckets[self.is_ranked] = [others.motion_bucket_of(score) for score in scores]

    def motion_bucket_of(self, score: float | None) -> float:
        """Return the motion_bucket_id of a clip of that motion, by its rank among these clips.

        SVD's default where the score is unknown, or the metadata of all clips here has a
        motion_bucket_id.
        """
        if score is None or not len(self.scores):
            return DEFAULT_MOTION_BUCKET
        buckets = np.sort(motion.motion_buckets(self.scores))
        return float(np.interp(score, np.sort(self.scores), buckets))

    # ---------------------------------------------------------------------------------------- pools

    def pools(
        self, weights: Sequence[float] | None = None, image_ratio: float = 0.0
    ) -> list[tuple[np.ndarray, float]]:
        """Return pools for a ClipSampler: [(clip indices, share of all draws)].

        The clips of a pool have one size and are drawn equally often. weights: one per base folder,
        if each folder is to have its share of the draws; otherwise all folders are one.
        image_ratio: share of the draws that are pictures.

        Raises ValueError if a weight is too small to be kept, or if there are no videos, or no
        pictures for image_ratio.
        """
        if weights and min(weights) / sum(weights) < 1 / MIN_CYCLE:
            shown = " ".join(map(str, weights))
            raise ValueError(
                f"--folder_weights {shown}: one is less than 1/{MIN_CYCLE} of their sum"
            )
        num_videos = len(self)
        num_clips = len(self.size_numbers)
        if num_videos == 0:
            raise ValueError("--image_ratio: --base_folder holds no videos")
        if image_ratio and num_videos == num_clips:
            raise ValueError("--image_ratio: --base_folder holds no pictures beside its videos")

        groups = [(np.arange(num_videos), 1.0)]
        if weights:
            folder_ends = np.cumsum(self.num_videos_of_folder)
            clips_of_folder = np.split(np.arange(num_videos), folder_ends[:-1])
            groups = [
                (clips, weight) for clips, weight in zip(clips_of_folder, weights) if len(clips)
            ]
        total_weight = sum(weight for _, weight in groups)
        groups = [(clips, weight / total_weight * (1 - image_ratio)) for clips, weight in groups]
        if image_ratio > 0:
            groups.append((np.arange(num_videos, num_clips), image_ratio))

        pools = []
        for clips, weight in groups:
            size_numbers = self.size_numbers[clips]
            for size_number in np.unique(size_numbers):
                clips_of_size = clips[size_numbers == size_number]
                pools.append((clips_of_size, weight * len(clips_of_size) / len(clips)))
        return pools


def locate_row(
    number: int, indexes: list[FolderIndex], rows: list[np.ndarray]
) -> tuple[FolderIndex, int]:
    """Return (index, row) of clip `number`, counted over the chosen rows of all indexes."""
    for index, chosen in zip(indexes, rows):
        if number < len(chosen):
            return index, int(chosen[number])
        number -= len(chosen)
    raise IndexError(number)


class ClipSampler:
    """Say which clip each global sample index shows. Any index can be asked for, in any order.

    pools: [(clip indices, weight)]. Each pass over a pool is a fresh permutation of it, keyed by
    (seed, pass). Several pools take turns in cycles: within a cycle each has exactly its share of
    the draws, in an order keyed by (seed, cycle).
    unit: consecutive samples of one draw, all from one pool. If the pools differ in frame size, it
    has to be the batch of all processes.
    """

    def __init__(
        self, pools: Sequence[tuple[Sequence[int] | np.ndarray, float]], seed: int, unit: int = 1
    ) -> None:
        self.seed = seed
        self.pools = [np.asarray(clips) for clips, _ in pools]
        self.unit = unit if len(pools) > 1 else 1
        num_clips = sum(len(clips) for clips in self.pools)
        draws_for_all_clips = -(-num_clips // self.unit)  # rounded up
        self.cycle = max(MIN_CYCLE, draws_for_all_clips)  # draws
        self.shares = draws_per_pool([weight for _, weight in pools], self.cycle)
        # Samples that follow each other belong to the same cycle and passes, so the last ones are
        # kept
        self.last_cycle: tuple[int, np.ndarray, np.ndarray] | None = None
        self.last_passes: dict[int, tuple[int, np.ndarray]] = {}  # by pool

    def choices(self, index: int) -> Iterator[int]:
        """Yield the clip that a sample index shows, then replacements if it is unreadable.

        The replacements are all other clips of its pool.
        """
        pool, num_earlier = self.locate(index)
        clips = self.pools[pool]
        pass_number, position = divmod(num_earlier, len(clips))
        order = self.order_of_pass(pool, pass_number)
        for offset in range(len(clips)):
            yield int(clips[order[(position + offset) % len(clips)]])

    def locate(self, index: int) -> tuple[int, int]:
        """Return the pool that a sample is drawn from, and how many earlier samples are from it."""
        if len(self.pools) == 1:
            return 0, index
        draw, sample_of_draw = divmod(index, self.unit)
        cycle, draw_of_cycle = divmod(draw, self.cycle)
        pool_of_draw, earlier_draws = self.turns_of_cycle(cycle)
        pool = int(pool_of_draw[draw_of_cycle])
        num_draws = int(cycle * self.shares[pool] + earlier_draws[draw_of_cycle])
        return pool, num_draws * self.unit + sample_of_draw

    def turns_of_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Return for each draw of a cycle its pool, and how many earlier draws have it too."""
        if self.last_cycle is not None and self.last_cycle[0] == cycle:
            return self.last_cycle[1:]
        generator = np.random.default_rng((self.seed, cycle, CYCLE_KEY))
        pool_of_draw = np.repeat(np.arange(len(self.pools)), self.shares)
        pool_of_draw = generator.permutation(pool_of_draw)
        earlier_draws = np.empty(len(pool_of_draw), int)
        for pool, share in enumerate(self.shares):
            earlier_draws[pool_of_draw == pool] = np.arange(share)
        self.last_cycle = (cycle, pool_of_draw, earlier_draws)
        return pool_of_draw, earlier_draws

    def order_of_pass(self, pool: int, pass_number: int) -> np.ndarray:
        """Return the permutation of a pool in one pass over it."""
        last_pass = self.last_passes.get(pool)
        if last_pass is not None and last_pass[0] == pass_number:
            return last_pass[1]
        key: tuple[int, ...] = (self.seed, pass_number)
        if len(self.pools) > 1:
            key = (self.seed, pass_number, POOL_PASS_KEY, pool)
        order = np.random.default_rng(key).permutation(len(self.pools[pool]))
        self.last_passes[pool] = (pass_number, order)
        return order


def draws_per_pool(weights: Sequence[float], cycle: int = MIN_CYCLE) -> np.ndarray:
    """Return the number of draws that each pool has in a cycle.

    Draws are shared out by the largest-remainder method, and each pool has at least one. Those that
    lift a pool to one are taken from the largest share.
    """
    exact = np.array(weights, float) / sum(weights) * cycle
    shares = np.floor(exact).astype(int)
    num_left = cycle - shares.sum()
    by_remainder = np.argsort(shares - exact, kind="stable")  # largest remainder first
    shares[by_remainder[:num_left]] += 1
    shares[shares.argmax()] -= (shares == 0).sum()
    return np.maximum(shares, 1)


class BatchIndexSampler:
    """Yield batches of global sample indices for one process, from `start` on, without end.

    N processes with batches of b see in a step what one process with batches of N * b would: batch
    number n of process r holds the b samples from (n * N + r) * b on.
    """

    def __init__(self, start: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.start = start
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        for batch_number in itertools.count(self.rank, self.world_size):
            first = self.start + batch_number * self.batch_size
            yield list(range(first, first + self.batch_size))
