"""Which videos a --base_folder holds, and which of them a sample shows: the same for ten videos and for a million.

    clips = Clips(["/data/a", "/data/b"], least=14, fps=7, motion_bucket_id=127)
    frames, told = clips[5]                  # frame files in natural order, {"fps": 7, "motion_bucket_id": 127}
    order = Order(clips.sizes, weights=[3, 1], seed=0)
    next(order.choices(123456))              # the clip of global sample index 123456

Folders are listed once. What was found is kept in one file of ~/.cache/svd_xtend for each, by which the next start asks
only for folders that have changed since, and which loader processes read from where it lies instead of copying it.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import logging
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from svd_xtend import video

logger = logging.getLogger("svd_xtend")

CYCLE = 1000  # samples over which several folders keep the ratio of their weights
SETTLED = 2e9  # nanoseconds; what is younger may change again without a later time of change
LOOKED_AT = 1000  # videos
THREADS = 8  # that wait for a network file system


def read_clip_json(folder, told):
    """`told`, fps and motion bucket, with what a video's clip.json says instead."""
    file = Path(folder, "clip.json")
    try:
        own = json.loads(video.read_bytes(file))
        return {key: float(own.get(key, value)) for key, value in told.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{file}: expected {{"fps": 7, "motion_bucket_id": 127}}, got: {error}') from error


class Listing:
    """The video folders of one base folder, in natural order, and their frames.

    arrays: `names` of the folders one after the other, each up to its place in `name_ends`; `frames` and `ends` likewise,
    of the frames of each, joined by "/", and their `counts`; `times` when each folder had last changed; `told` whether it
    has a clip.json."""

    def __init__(self, root):
        self.root, self.file = Path(root), index_file(root)
        if not self.root.is_dir():
            raise ValueError(f"--base_folder {root}: no such folder. Expected {root}/<video>/<frame>.jpg")
        folders, self.stray = {}, []
        with os.scandir(self.root) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders[entry.name] = entry.stat().st_mtime_ns
                else:
                    self.stray.append(entry.name)
        self.arrays = load(self.file)
        times = self.arrays["times"].tolist() if self.arrays else ()
        known = {n: i for i, (n, t) in enumerate(zip(self.names(), times)) if folders.get(n) == t}
        if self.arrays is None or not len(known) == len(folders) == len(times):
            self.arrays = self.list_changed(folders, known)
            save(self.arrays, self.file)
            self.arrays = load(self.file) or self.arrays

    def __getstate__(self):
        """For loader processes that are not forked: not the arrays, but where they lie."""
        stamp = self.arrays["stamp"].tobytes()
        kept = load(self.file)
        there = kept is not None and kept["stamp"].tobytes() == stamp
        return {
            **vars(self),
            "arrays": None if there else {k: np.array(v) for k, v in self.arrays.items()},
            "stamp": stamp,
        }

    def __setstate__(self, state):
        vars(self).update(state)
        self.arrays = self.arrays or load(self.file)
        if self.arrays is None or self.arrays["stamp"].tobytes() != self.stamp:
            raise ValueError(
                f"--base_folder {self.root}: was listed anew by another run while this one began; start again"
            )

    def names(self):
        """Of the video folders, in natural order."""
        if not self.arrays:
            return []
        joined, ends = bytes(self.arrays["names"]), [0, *self.arrays["name_ends"].tolist()]
        return [os.fsdecode(joined[start:end]) for start, end in itertools.pairwise(ends)]

    def name(self, i):
        """Of the i-th video folder."""
        return decode(self.arrays["names"], self.arrays["name_ends"], i)

    def frame_names(self, i):
        """Of the frames of the i-th video folder, in natural order."""
        joined = decode(self.arrays["frames"], self.arrays["ends"], i)
        return joined.split("/") if joined else []

    def list_changed(self, folders, known):
        """The arrays, of `folders` {name: time of change}, those that are not `known` {name: place here} listed anew."""
        from tqdm import tqdm

        changed, now, found = [name for name in folders if name not in known], time.time_ns(), {}
        # of a hundred each: a task for one folder would take longer to hand out than to do
        parts = [changed[i : i + 100] for i in range(0, len(changed), 100)]
        with (
            ThreadPoolExecutor(THREADS) as pool,
            tqdm(total=len(changed), desc=f"listing {self.root}", delay=2) as bar,
        ):
            for part, looked in zip(parts, pool.map(lambda part: list(map(self.look, part)), parts)):
                found.update(zip(part, looked))
                bar.update(len(part))
        names, parts, counts, told = sorted(folders, key=video.natural_key), [], [], []
        for name in names:
            i = known.get(name)
            frames, has = found[name] if i is None else (self.frame_names(i), self.arrays["told"][i])
            parts.append("/".join(frames))
            counts.append(len(frames))
            told.append(has)
        joined, name_ends = encode(names)
        frames, ends = encode(parts)
        return {
            "stamp": np.frombuffer(os.urandom(8), np.uint8),
            "times": np.array([t if now - t > SETTLED else -1 for t in map(folders.get, names)], np.int64),
            "counts": np.array(counts, np.int32), "told": np.array(told, bool),
            "name_ends": name_ends, "names": joined, "ends": ends, "frames": frames,
        }  # fmt: skip

    def look(self, name):
        """(frame names of a video folder, whether it has a clip.json, which then can be read)."""
        found = video.patiently(os.listdir, os.path.join(self.root, name))
        has = "clip.json" in found
        if has:
            read_clip_json(self.root / name, {"fps": 0, "motion_bucket_id": 0})
        return video.frame_names(found), has


def encode(names):
    """(names one after the other as bytes, where each ends), whatever a file system allows in them."""
    parts = [os.fsencode(name) for name in names]
    return np.frombuffer(b"".join(parts), np.uint8), np.cumsum([len(part) for part in parts], dtype=np.int64)


def decode(joined, ends, i):
    """The i-th name."""
    return os.fsdecode(bytes(joined[ends[i - 1] if i else 0 : ends[i]]))


def index_file(root):
    """Where what was found in a base folder is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "svd_xtend")
    return cache / f"{hashlib.blake2b(os.fsencode(os.path.abspath(root)), digest_size=12).hexdigest()}.index"


def load(file):
    """The arrays of an index, mapped; None where there is none that can be read. One array of bytes, whose head says where
    the others are in it."""
    try:
        whole = np.asarray(np.memmap(file, np.uint8, "r"))  # still mapped, and faster to cut
        size = int(whole[:8].view(np.int64)[0])
        head = json.loads(bytes(whole[8 : 8 + size]))
        arrays = {k: whole[start:end].view(kind) for k, (start, end, kind) in head.items()}
        return arrays if len(whole) == max(end for _, end, _ in head.values()) else None
    except (OSError, ValueError, KeyError):
        return None


def save(arrays, file):
    """Write an index, whole or not at all; where that is not allowed the next start lists again."""
    head, start = {}, 4096
    for name, array in arrays.items():
        head[name] = (start, start + array.nbytes, array.dtype.str)
        start += -(-array.nbytes // 8) * 8
    told = json.dumps(head).encode()
    partial = file.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as f:
            f.write(len(told).to_bytes(8, "little") + told)
            for name, array in arrays.items():
                f.seek(head[name][0])
                f.write(array.tobytes())
            f.truncate(max(end for _, end, _ in head.values()))
        os.replace(partial, file)
    except OSError as error:
        logger.warning("%s: not written (%s); the next start lists the folder again", file, error.strerror)
        with contextlib.suppress(OSError):
            partial.unlink()


def some(clips):
    """Places in a sequence to look at before a run starts: all, or of more than LOOKED_AT as many, spread evenly."""
    return np.unique(np.linspace(0, len(clips) - 1, LOOKED_AT).astype(int))


class Clips:
    """The videos of some base folders that have at least `least` frames, a sequence of (frames, {fps, motion_bucket_id}):
    made when asked for, so that a million of them is a few arrays."""

    def __init__(self, base_folders, least, fps, motion_bucket_id):
        self.told = {"fps": fps, "motion_bucket_id": motion_bucket_id}
        roots = [base_folders] if isinstance(base_folders, (str, Path)) else base_folders
        self.listings = [Listing(root) for root in roots]
        self.kept = [np.flatnonzero(listing.arrays["counts"] >= least) for listing in self.listings]
        self.sizes = [len(kept) for kept in self.kept]
        for listing, kept in zip(self.listings, self.kept):
            self.report(listing, kept, least)

    @staticmethod
    def report(listing, kept, least):
        """Warn of what is left out; raise where that is all."""
        counts = listing.arrays["counts"]
        short = np.flatnonzero(counts < least)
        if len(short) or listing.stray:
            told = [f"{listing.name(i)} ({counts[i]} frames)" for i in short[:5]]
            told += [f"{n} (a file)" for n in listing.stray]
            shown = ", ".join(told[:5]) + ", ..." * (len(told) > 5 or len(short) > 5)
            count = len(short) + len(listing.stray)
            logger.warning(
                "--base_folder %s: skipped %d entries without %d frames: %s", listing.root, count, least, shown
            )
        if not len(kept):
            raise ValueError(
                f"--base_folder {listing.root}: no video folder holds {least} frames. Expected "
                f"{listing.root}/<video>/<frame>.jpg; lower --num_frames or extract more frames."
            )

    def digest(self):
        """The same wherever the same videos of the same frames were found."""
        digest = hashlib.blake2b(repr(self.sizes).encode(), digest_size=16)
        for listing in self.listings:
            for name in ("names", "name_ends", "counts", "frames"):
                digest.update(np.ascontiguousarray(listing.arrays[name]))
        return digest.hexdigest()

    def twice(self):
        """The name of a video that two of the base folders have, or None."""
        names = [name for listing in self.listings for name in listing.names()] if len(self.listings) > 1 else []
        return next((name for name, count in collections.Counter(names).items() if count > 1), None)

    def __len__(self):
        return sum(self.sizes)

    def __getitem__(self, clip):
        for listing, kept in zip(self.listings, self.kept):
            if clip < len(kept):
                i = kept[clip]
                folder = listing.root / listing.name(i)
                told = read_clip_json(folder, self.told) if listing.arrays["told"][i] else self.told
                return [folder / name for name in listing.frame_names(i)], told
            clip -= len(kept)
        raise IndexError(clip)


class Order:
    """Which clips, of pools of `sizes`, a global sample index shows. Each pass over a pool is a fresh permutation keyed by
    (seed, pass). Without weights all are one pool; with them each is one, and of every CYCLE samples, in an order keyed by
    (seed, cycle), a pool has its share. Any index can be asked for, in any order."""

    def __init__(self, sizes, weights, seed):
        self.seed = seed
        self.sizes = [sum(sizes)] if weights is None else list(sizes)
        self.starts = [0, *itertools.accumulate(self.sizes)]
        self.shares, self.kept = self.share(weights or [1]), {}

    @staticmethod
    def share(weights):
        """Samples of a cycle that each pool has: largest remainders, and at least one."""
        exact = np.array(weights, float) / sum(weights) * CYCLE
        shares = np.floor(exact).astype(int)
        shares[np.argsort(shares - exact, kind="stable")[: CYCLE - shares.sum()]] += 1
        if not shares.all():
            raise ValueError(
                f"--folder_weights {' '.join(map(str, weights))}: one is less than 1/{CYCLE} of their sum"
            )
        return shares

    def remembered(self, key, make):
        """make(), once in a row for a key: samples of a pass follow each other. Of each kind and pool one is kept."""
        if self.kept.get(key[:2], (None,))[0] != key:
            self.kept[key[:2]] = key, make()
        return self.kept[key[:2]][1]

    def place(self, index):
        """(pool, how many of its samples came before) of a sample index."""
        if len(self.sizes) == 1:
            return 0, index
        cycle, i = divmod(index, CYCLE)

        def turns():
            pools = np.repeat(np.arange(len(self.sizes)), self.shares)
            return np.random.default_rng((self.seed, cycle, 2)).permutation(pools)

        pools = self.remembered(("turns", 0, cycle), turns)
        return int(pools[i]), int(cycle * self.shares[pools[i]] + (pools[:i] == pools[i]).sum())

    def choices(self, index):
        """The clip of a sample index, and then those that stand in, one after the other, where it cannot be read."""
        pool, before = self.place(index)
        size = self.sizes[pool]
        epoch, place = divmod(before, size)
        key = (self.seed, epoch) if len(self.sizes) == 1 else (self.seed, epoch, 3, pool)
        order = self.remembered(("pass", pool, epoch), lambda: np.random.default_rng(key).permutation(size))
        for i in range(size):
            yield self.starts[pool] + int(order[(place + i) % size])
