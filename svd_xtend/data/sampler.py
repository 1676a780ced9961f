"""Which clips of some base folders are used, at which rate, size and motion; and which of them a sample shows.

    clips = Clips(["/data/a", "/data/b"], length=14, fps=7)
    clip = clips[5]                          # clips.Clip: frames by number, clip.metadata: fps, motion_bucket_id, caption
    order = Order(clips.pools(weights=[3, 1]), seed=0)
    next(order.choices(123456))              # the clip of global sample index 123456

Next: svd_xtend/folders.py, what a folder holds; svd_xtend/clips.py, one clip.
"""

import collections
import hashlib
import itertools
import logging
from pathlib import Path

import numpy as np

from svd_xtend.data import motion
from svd_xtend.data.clip import DURATION_TOLERANCE
from svd_xtend.data.folder_index import (
    DEFAULT_SOURCE_FPS,
    FRAME_FOLDER,
    PICTURE,
    VIDEO_FILE,
    FolderIndex,
)

logger = logging.getLogger("svd_xtend")

MIN_CYCLE = 1000  # draws over which pools keep the ratio of their weights, or more
CLIPS_REPORTED = 50  # clips that are left out, by name
CLIPS_CHECKED = 1000  # videos
MAX_ASPECT_RATIO = 2.5  # of the longest bucket, width to height or height to width


def indices_to_check(clips):
    """Places in a sequence to look at before a run starts: all, or of more than LOOKED_AT as many, spread evenly."""
    return np.unique(np.linspace(0, len(clips) - 1, CLIPS_CHECKED).astype(int))


def bucket_sizes(width, height, step):
    """Sizes (width, height) of at most as many pixels, sides multiples of `step`, for every width up to the aspect ratio ASPECT
    or from its inverse."""
    found = {(width, height)}
    for w in range(step, int((width * height * MAX_ASPECT_RATIO) ** 0.5) + 1, step):
        h = width * height // w // step * step
        if h and 1 / MAX_ASPECT_RATIO <= w / h <= MAX_ASPECT_RATIO:
            found.add((w, h))
    return sorted(found, key=lambda size: size[0] / size[1])


class ClipCollection:
    """The videos of some base folders that are long enough for `length` frames, a sequence of clips.Clip: made when asked for,
    so that a million of them is a few arrays. With `stills` the pictures in the folders follow behind its end.

    fps: frames a second of a sample, "native": the clip's own, which is also taken where it is less. source_fps: those of
    frame folders that do not tell; default: fps. motion_bucket_id: of clips that do not tell, "auto": by motion.buckets. size:
    (width, height) of a sample; with `buckets`, pixels, one of at most as many, sides multiples of `buckets`, in the aspect ratio
    nearest to the clip's."""

    def __init__(
        self,
        base_folders,
        spec,
        *,
        motion_bucket_id=127,
        source_fps=None,
        bucket_step=0,
        with_pictures=False,
        quiet=False,
    ):
        roots = (
            [base_folders] if isinstance(base_folders, (str, Path, FolderIndex)) else base_folders
        )
        self.spec, self.fps, self.length = spec, spec.fps, spec.num_frames
        self.source_fps = source_fps or (DEFAULT_SOURCE_FPS if spec.fps == "native" else spec.fps)
        self.indexes = [
            root if isinstance(root, FolderIndex) else FolderIndex(root) for root in roots
        ]
        automatic = motion_bucket_id == "auto"
        for listing in self.indexes:
            listing.fill(sizes=bucket_step > 0, motions=automatic)
        self.kept, self.stills = [], []
        for listing in self.indexes:
            videos, pictures = self.choose(listing)
            self.kept.append(videos)
            self.stills.append(pictures if with_pictures else pictures[:0])
        for k in range(len(roots) * (not quiet)):
            self.report(k)
        self.sizes = [len(kept) for kept in self.kept]
        self.motion_buckets, untimed = (
            self.column("buckets", self.kept),
            np.isnan(self.column("rates", self.kept)),
        )
        self.motions = self.column("motions", self.kept) * np.where(
            untimed, self.source_fps / DEFAULT_SOURCE_FPS, 1
        )
        untold = np.isnan(self.motion_buckets)
        self.scores, self.ranked = (
            self.motions[untold],
            untold & automatic,
        )  # by which clips have buckets, and which do
        self.motion_buckets[untold] = (
            motion.motion_buckets(self.scores) if automatic else motion_bucket_id
        )
        size = (spec.width, spec.height) if spec.width else None
        self.shapes = bucket_sizes(*size, bucket_step) if bucket_step else [size]
        self.shape_of = self.nearest_shapes()

    def rates(self, listing):
        """Frames a second of each clip: (its own, those at which it is sampled)."""
        own = listing.arrays["rates"]
        own = np.where(np.isnan(own), self.source_fps, own)
        return own, own if self.fps == "native" else np.minimum(own, self.fps)

    def choose(self, listing):
        """(videos, pictures) of a listing that can be used: their numbers there."""
        a = listing.arrays
        own, used = self.rates(listing)
        good = (
            np.array(['"trouble"' not in note for note in listing.notes()], bool)
            if len(a["notes"])
            else True
        )
        good = good & listing.used
        long = (a["counts"] - 1 + DURATION_TOLERANCE) / own >= (self.length - 1) / used
        video = (a["kinds"] == FRAME_FOLDER) | (a["kinds"] == VIDEO_FILE)
        return np.flatnonzero(good & video & long & (a["counts"] > 0)), np.flatnonzero(
            good & (a["kinds"] == PICTURE)
        )

    def left_out(self, k):
        """[(name, why)] of the entries of the k-th base folder that are not used."""
        listing = self.indexes[k]
        unused = np.ones(len(listing.arrays["kinds"]), bool) & listing.used
        unused[self.kept[k]], unused[self.stills[k]] = False, False
        a, (own, used), told = listing.arrays, self.rates(listing), list(listing.stray)
        for i in np.flatnonzero(unused):
            n, need = a["counts"][i], (self.length - 1) / used[i]
            reason = f"too short, {n} frame(s) at {own[i]:.4g} a second; {self.length} at {used[i]:.4g} take {need:.3g} s"
            reason = "holds no pictures" if n == 0 else reason
            reason = "a picture; --image_ratio uses them" if a["kinds"][i] == PICTURE else reason
            told.append((listing.name(i), listing.note(i).get("trouble", reason)))
        return told

    def report(self, k):
        """Warn of all that is left out of the k-th base folder, and why; raise where that leaves nothing."""
        root, told = self.indexes[k].root, self.left_out(k)
        if told:
            shown = "".join(f"\n  {name}: {reason}" for name, reason in told[:CLIPS_REPORTED])
            more = f"\n  ... python prepare_data.py check {root} names all" * (
                len(told) > CLIPS_REPORTED
            )
            total = len(told) + len(self.kept[k]) + len(self.stills[k])
            logger.warning(
                "--base_folder %s: skipped %d of %d entries:%s%s",
                root,
                len(told),
                total,
                shown,
                more,
            )
        if not len(self.kept[k]) and not len(self.stills[k]):
            raise ValueError(
                f"--base_folder {root}: no video is {self.length} frames long at --fps {self.fps}. Expected "
                f"{root}/<video>/<frame>.jpg, or {root}/<video>.mp4; lower --num_frames, raise --fps, or extract more frames."
            )

    def column(self, name, chosen):
        """Of all listings' chosen clips, one after the other."""
        return np.concatenate([listing.arrays[name][i] for listing, i in zip(self.indexes, chosen)])

    def nearest_shapes(self):
        """Of each video and then of each picture the place in `shapes` of the nearest aspect ratio."""
        if len(self.shapes) == 1:
            return np.zeros(len(self) + sum(map(len, self.stills)), int)
        chosen = self.kept, self.stills
        aspect = np.concatenate(
            [self.column("widths", c) / np.maximum(self.column("heights", c), 1) for c in chosen]
        )
        ratios = np.array([w / h for w, h in self.shapes])
        return np.abs(np.log(np.maximum(aspect, 1e-3))[:, None] - np.log(ratios)).argmin(1)

    def pools(self, weights=None, image_ratio=0.0):
        """[(clips, weight)]: clips among which a draw chooses alike, and how often it chooses these. Of one size each; of one
        folder where folders have weights; pictures apart, with `image_ratio` of all weight."""
        if weights and min(weights) / sum(weights) < 1 / MIN_CYCLE:
            told = " ".join(map(str, weights))
            raise ValueError(
                f"--folder_weights {told}: one is less than 1/{MIN_CYCLE} of their sum"
            )
        if not len(self) or (image_ratio and len(self) == len(self.shape_of)):
            raise ValueError(
                "--image_ratio: --base_folder holds no "
                + ("pictures beside its videos" if len(self) else "videos")
            )
        ends = np.cumsum(self.sizes)
        folders = np.split(np.arange(len(self)), ends[:-1]) if weights else [np.arange(len(self))]
        groups = [(ids, w) for ids, w in zip(folders, weights or [1]) if len(ids)]
        groups = [(ids, w / sum(w for _, w in groups) * (1 - image_ratio)) for ids, w in groups]
        groups += [(np.arange(len(self), len(self.shape_of)), image_ratio)] * (image_ratio > 0)
        pools = []
        for ids, weight in groups:
            for shape in np.unique(self.shape_of[ids]):
                own = ids[self.shape_of[ids] == shape]
                pools.append((own, weight * len(own) / len(ids)))
        return pools

    def digest(self):
        """The same wherever the same videos of the same frames were found."""
        digest = hashlib.blake2b(repr(self.sizes).encode(), digest_size=16)
        for listing in self.indexes:
            for name in ("names", "name_ends", "counts", "frames", "kinds"):
                digest.update(np.ascontiguousarray(listing.arrays[name]))
        return digest.hexdigest()

    def twice(self):
        """The name of a video that two of the base folders have, or None."""
        names = (
            [name for listing in self.indexes for name in listing.names()]
            if len(self.indexes) > 1
            else []
        )
        return next((name for name, count in collections.Counter(names).items() if count > 1), None)

    def __len__(self):
        return sum(self.sizes)

    def __getitem__(self, clip):
        if not 0 <= clip < len(self):
            raise IndexError(clip)
        listing, i = self.place(clip, self.kept)
        own = listing.arrays["rates"][i]
        own = self.source_fps if np.isnan(own) else float(own)
        fps = own if self.fps == "native" else min(own, self.fps)
        bucket = float(self.motion_buckets[clip])
        return listing.clip(
            i, self.source_fps, self.shapes[self.shape_of[clip]], fps=fps, motion_bucket_id=bucket
        )

    def picture(self, clip):
        """The picture of that number, from len(self) on: a clip of one frame in which nothing moves."""
        listing, i = self.place(clip - len(self), self.stills)
        fps = DEFAULT_SOURCE_FPS if self.fps == "native" else self.fps
        return listing.clip(i, fps, self.shapes[self.shape_of[clip]], fps=fps, motion_bucket_id=0.0)

    def place(self, number, chosen):
        """(listing, place in it) of one of the chosen clips."""
        for listing, own in zip(self.indexes, chosen):
            if number < len(own):
                return listing, int(own[number])
            number -= len(own)
        raise IndexError(number)

    def rank_among(self, others):
        """Give buckets by rank among other clips: those held out, which may be few, as those that train."""
        self.motion_buckets[self.ranked] = [
            others.bucket_of(score) for score in self.motions[self.ranked]
        ]

    def bucket_of(self, score):
        """motion_bucket_id of a clip of that motion among these; where they all tell theirs, SVD's own 127."""
        if score is None or not len(self.scores):
            return 127.0
        return float(
            np.interp(score, np.sort(self.scores), np.sort(motion.motion_buckets(self.scores)))
        )


class ClipSampler:
    """Which clips a global sample index shows, of pools [(clips, weight)]. Each pass over a pool is a fresh permutation keyed by
    (seed, pass). Where there are several each has its share of every so many draws, in an order keyed by (seed, cycle). A
    draw is of `unit` samples, a batch of all processes where pools differ in size. Any index can be asked for, in any order."""

    def __init__(self, pools, seed, unit=1):
        self.seed, self.pools, self.kept = seed, [np.asarray(clips) for clips, _ in pools], {}
        self.unit = unit if len(pools) > 1 else 1
        self.cycle = max(MIN_CYCLE, -(-sum(map(len, self.pools)) // self.unit))
        self.shares = draws_per_pool([weight for _, weight in pools], self.cycle)

    def remembered(self, key, make):
        """make(), once in a row for a key: samples of a pass follow each other. Of each kind and pool one is kept."""
        if self.kept.get(key[:2], (None,))[0] != key:
            self.kept[key[:2]] = key, make()
        return self.kept[key[:2]][1]

    def place(self, index):
        """(pool, how many of its samples came before) of a sample index."""
        if len(self.pools) == 1:
            return 0, index
        draw, within = divmod(index, self.unit)
        cycle, i = divmod(draw, self.cycle)

        def turns():
            pools = np.repeat(np.arange(len(self.pools)), self.shares)
            pools = np.random.default_rng((self.seed, cycle, 2)).permutation(pools)
            before = np.empty(len(pools), int)  # draws of the same pool before each
            before[np.argsort(pools, kind="stable")] = np.concatenate(
                [np.arange(n) for n in self.shares]
            )
            return pools, before

        pools, before = self.remembered(("turns", 0, cycle), turns)
        pool = int(pools[i])
        return pool, int(cycle * self.shares[pool] + before[i]) * self.unit + within

    def choices(self, index):
        """The clip of a sample index, and then those that stand in, one after the other, where it cannot be read."""
        pool, before = self.place(index)
        clips = self.pools[pool]
        epoch, place = divmod(before, len(clips))
        key = (self.seed, epoch) if len(self.pools) == 1 else (self.seed, epoch, 3, pool)
        order = self.remembered(
            ("pass", pool, epoch), lambda: np.random.default_rng(key).permutation(len(clips))
        )
        for i in range(len(clips)):
            yield int(clips[order[(place + i) % len(clips)]])


def draws_per_pool(weights, cycle=MIN_CYCLE):
    """Draws of a cycle that each pool has: largest remainders, and at least one."""
    exact = np.array(weights, float) / sum(weights) * cycle
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: cycle - shares.sum()]] += 1
    shares[shares.argmax()] -= (shares == 0).sum()
    return np.maximum(shares, 1)


class BatchIndexSampler:
    """Batches of global sample indices of one process, from sample `start` on, without end.

    N processes with batch b see in a step what one process with batch N b would: ((micro-step N) + rank) b + i.
    """

    def __init__(self, start, batch_size, rank=0, world_size=1):
        self.start, self.batch_size, self.rank, self.world_size = (
            start,
            batch_size,
            rank,
            world_size,
        )

    def __iter__(self):
        for batch in itertools.count(self.rank, self.world_size):
            yield [self.start + batch * self.batch_size + i for i in range(self.batch_size)]
