"""Did it learn? The loss on clips that nothing trains on, of the model and of the one that the run began with, on the same draws.

    held = HeldOut(data, args, svd_loss, encode_ahead, pipe, accelerator)
    base = held.losses(unet)                                 # (clips, noise levels)
    ...                                                      # train
    row = compare(held.sigmas, base, held.losses(unet))      # the difference, with an interval, at each sigma and in total

The training loss answers nothing: it mixes noise levels over nine e-folds, and a new one is drawn each time. Here clips, windows,
noise levels and noise are fixed, so that most of what varies is in both losses, and leaves with their difference.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import logging
import re
import time
from pathlib import Path
from statistics import NormalDist

import numpy as np

from svd_xtend import decode, folders, order

logger = logging.getLogger("svd_xtend")

SIGMAS = 5  # noise levels
CONFIDENCE = 0.95


# ---------------------------------------------------------------------------------------------------------- which clips


def film_of(path, ask=True):
    """What must not be on both sides of a split, and is one witness, not several: the video that the clip at this path was
    extracted from, else the clip. ask: its clip.json, if there is one."""
    name = Path(path).name
    if ask:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            name = json.loads(Path(path, "clip.json").read_text())["source"] or name
    return re.sub(r"_scene\d+$", "", Path(name).stem if decode.is_video(name) else Path(name).name)


def sources_of(listing):
    """{source: numbers of its clips}, pictures left out."""
    sources = {}
    for i in np.flatnonzero(listing.arrays["kinds"] != folders.STILL).tolist():
        ask = listing.arrays["kinds"][i] == folders.FRAMES and bool(listing.arrays["jsons"][i])
        sources.setdefault(film_of(listing.root / listing.name(i), ask), []).append(i)
    return sources


def choose(sources, fraction, seed=0, parts=None):
    """Those of {source: clips} that are held out: about this fraction, each by what seed and name alone decide, so that when more come
    none that was trained on is held out. At least one; of each of `parts`, lists of sources, one stays."""

    def key(name):
        return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "big") / 2**64

    may = sources.keys() - {max(part, key=key) for part in parts or [sources]}
    return {name for name in may if key(name) < fraction} or set(sorted(may, key=key)[:1])


def part(roots, fraction):
    """Listings of base folders' clips that train, the others held out."""
    listings, sources = [folders.Listing(root) for root in roots], {}
    parts = [sources_of(listing) for listing in listings]
    for k, own in enumerate(parts):
        for name, clips in own.items():
            sources.setdefault(name, []).extend((k, i) for i in clips)
    chosen = choose(sources, fraction, parts=parts) if all(parts) else ()
    if not chosen:
        names = " ".join(map(str, roots))
        raise ValueError(f"--validation_ratio: {names} holds {len(sources)} video(s); it takes two, not of one film")
    for listing in listings:
        listing.used = np.ones(len(listing.arrays["kinds"]), bool)
    places = [place for name in chosen for place in sources[name]]
    for k, i in places:
        listings[k].used[i] = False
    logger.info("%d of %d clips are held out", len(places), sum(map(len, sources.values())))
    return listings


def others(listings):
    """What `part` has held out, of each folder that has some: the same Listings, not looked into again."""
    copies = [copy.copy(listing) for listing in listings]
    for listing in copies:
        listing.used = ~listing.used
    return [listing for listing in copies if listing.used.any()]


def settle(held, data, seed, check):
    """Of a data set of clips held out: raise, if asked to check, where one of them, or what it links to, is among those that train;
    motion buckets by rank among these; and each clip once, in an order by seed."""
    some = order.some(held.clips) if check else ()
    paths = {(clip := held.clips[int(i)]).path.resolve(): clip.path for i in some}
    for listing, kept in zip(data.clips.listings, data.clips.kept):
        root = listing.root.resolve()
        own = {path.name: told for path, told in paths.items() if path.parent == root}
        if both := own.keys() & {listing.name(i) for i in kept.tolist()} if own else ():
            raise ValueError(f"--validation_folder: {own[min(both)]} is among the clips that train; hold out others")
    held.clips.rank_among(data.clips)
    held.order = order.Order([(range(len(held)), 1)], seed)


@contextlib.contextmanager
def found_in(flag):
    """What is wrong with clips held out is not said of --base_folder."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("--base_folder", flag, 1)) from error


# ----------------------------------------------------------------------------------------------------------------- loss


def noise_levels(P_mean, P_std, count=SIGMAS):
    """Middles of `count` equally likely parts of log sigma ~ N(P_mean, P_std^2): a mean over them stands for that over what
    training draws."""
    return [float(np.exp(P_mean + P_std * NormalDist().inv_cdf((i + 0.5) / count))) for i in range(count)]


class HeldOut:
    """The losses of up to --validation_clips clips of a data set, at each of `sigmas`, with draws of their own that are always the same.

    loss(model, pipe, batch, args): a trainer's own. encode(pipe, batch, args): the batch with what the frozen models say of
    it, done once. process: an Accelerator or PartialState; of several each has its share of the clips."""

    def __init__(self, data, args, loss, encode, pipe, process):
        import torch
        from torch.utils.data import default_collate

        from svd_xtend.checkpoints import at_hand
        from svd_xtend.runs import to_device

        self.loss, self.pipe, self.device = loss, pipe, process.device
        self.count, self.at_once = min(args.validation_clips, len(data)), args.per_gpu_batch_size
        self.own = range(process.process_index, self.count, process.num_processes)
        self.sigmas, self.base, self.seconds = noise_levels(args.P_mean, args.P_std), None, 0.0
        # log sigma is P_mean itself then, nothing is dropped, and noise is keyed by (validation_seed, clip, sigma)
        fixed = {"seed": args.validation_seed, "P_std": 0.0, "conditioning_dropout_prob": (0.0, 0.0, 0.0)}
        self.args, self.batches = argparse.Namespace(**{**vars(args), **fixed}), []
        self.films = [film_of(data.clips[next(data.order.choices(i))].path) for i in range(self.count)]
        with torch.no_grad(), at_hand(pipe, self.device):
            for i in self.own:
                batch = encode(pipe, to_device(default_collate([data[i]]), self.device), args)
                self.batches.append(moved({**batch, "pixel_values": batch["pixel_values"][:, :1]}, "cpu"))

    def losses(self, model):
        """(clips, sigmas) float64, the same on every process."""
        import torch
        from accelerate.utils import gather_object

        began, table = time.perf_counter(), np.zeros((self.count, len(self.sigmas)))
        log_sigma = torch.tensor(self.sigmas).log()
        for i, batch in zip(self.own, self.batches):
            for levels in torch.arange(len(self.sigmas)).split(self.at_once):
                args = argparse.Namespace(**{**vars(self.args), "P_mean": log_sigma[levels].to(self.device)})
                draws = {**moved(batch, self.device, len(levels)), "index": i * len(self.sigmas) + levels}
                with torch.no_grad():
                    table[i, levels.numpy()] = self.loss(model, self.pipe, draws, args).double().cpu().numpy()
        table = np.sum(gather_object([table]), axis=0)
        self.base = table if self.base is None else self.base  # the first model asked for
        self.seconds += time.perf_counter() - began
        return table

    def compare(self, step, losses):
        """(the row of <output_dir>/held_out.jsonl, what a tracker gets) of {"raw": losses, "ema": losses}; says it, too."""
        row, shown = {"step": step, "seconds": round(self.seconds, 3)}, {}
        for name, table in losses.items():
            row[name] = compare(self.sigmas, self.base, table, self.films)
            shown |= curves(row[name], "held_out" if name == "raw" else f"held_out_{name}")
            logger.info("step %d: held-out loss%s %s", step, " of the averages" * (name == "ema"), told(row[name]))
        self.seconds = 0.0
        return row, shown


def moved(batch, device, times=None):
    """The tensors of a batch, those in nested dicts too, on a device; of a single sample so many, which share its memory."""
    kept = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            kept[name] = moved(value, device, times)
        elif hasattr(value, "to") and name != "index":
            kept[name] = value.to(device)
            kept[name] = kept[name].expand(times, *value.shape[1:]) if times else kept[name]
    return kept


# -------------------------------------------------------------------------------------------------------------- compare


def interval(differences):
    """(mean, low, high) of differences of pairs (n,), n independent films: Student's t, CONFIDENCE; of one film no ends."""
    from scipy.stats import t

    differences = np.asarray(differences, np.float64)
    mean, n = differences.mean(), len(differences)
    if n < 2:
        return float(mean), None, None
    reach = t.ppf((1 + CONFIDENCE) / 2, n - 1) * differences.std(ddof=1) / n**0.5
    return float(mean), float(mean - reach), float(mean + reach)


def by_film(values, films):
    """Means (films, ...) over the clips (n, ...) of each film: clips of one film are no independent witnesses."""
    names, which = np.unique(films, return_inverse=True)
    return np.stack([values[which == k].mean(0) for k in range(len(names))])


def compare(sigmas, base, tuned, films=None):
    """What two tables of losses (clips, sigmas) say: {sigma, base, loss: of each sigma; difference: (mean, low, high) in total,
    by_sigma: at each}. films: of each clip its film; each film counts the same. Default: a clip each."""
    count, films = len(base), range(len(base)) if films is None else films
    base, tuned = (by_film(table, films) for table in (base, tuned))
    difference = tuned - base
    return {
        "clips": count, "films": len(base), "sigma": sigmas, "base": base.mean(0).tolist(), "loss": tuned.mean(0).tolist(),
        "difference": interval(difference.mean(1)), "by_sigma": [interval(column) for column in difference.T],
    }  # fmt: skip


def comparable(rows):
    """Those rows of held_out.jsonl that are of the same clips and base as the last one: a run may have gone on with others."""
    return [row for row in rows if row["raw"]["base"] == rows[-1]["raw"]["base"]]


def how_many(clips, films=None):
    """Clips, and of how many films where these are fewer, in words."""
    one, other = (f"{n} {what}{'s' * (n != 1)}" for n, what in ((clips, "clip"), (films or clips, "film")))
    return f"{one} of {other}" if films and films != clips else one


def with_ends(difference, what=""):
    """(mean, low, high) of interval in words; "" of None. what: said of the ends."""
    mean, low, high = difference or (None, None, None)
    ends = "" if low is None else f" ({what}{low:+.3g} to {high:+.3g})"
    return "" if mean is None else f"{mean:+.3g}{ends}"


def told(row, base="the start"):
    """A comparison in words. base: what the other model is."""
    difference = with_ends(row["difference"], "95 %: ")
    loss, other = np.mean(row["loss"]), np.mean(row["base"])
    return f"{loss:.4g}, that of {base} {other:.4g}: {difference} on {how_many(row['clips'], row['films'])}"


def curves(row, name):
    """A comparison as numbers for a tracker."""
    mean, low, high = row["difference"]
    shown = {"loss": np.mean(row["loss"]), "base": np.mean(row["base"]), "difference": mean, "low": low, "high": high}
    shown |= {f"difference_sigma_{s:.3g}": d[0] for s, d in zip(row["sigma"], row["by_sigma"])}
    return {f"{name}/{key}": float(value) for key, value in shown.items() if value is not None}
