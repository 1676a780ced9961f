"""Did it learn? The loss on clips that nothing trains on, of the model and of the one that the run began with, on the same draws.

    held = HeldOut(data, args, svd_loss, encode_ahead, pipe, accelerator)
    base = held.losses(unet)                                 # (clips, noise levels)
    ...                                                      # train
    row = compare(held.sigmas, base, held.losses(unet))      # the difference, with an interval, at each sigma and in total

The training loss answers nothing: it mixes noise levels over nine e-folds, and a new one is drawn each time. Here clips, windows,
noise levels and noise are fixed, so that most of what varies is in both losses, and leaves with their difference.
"""

import argparse
import logging
import time
from statistics import NormalDist

import numpy as np

from svd_xtend.data.split import source_video

logger = logging.getLogger("svd_xtend")

SIGMAS = 5  # noise levels
CONFIDENCE = 0.95


# ----------------------------------------------------------------------------------------------------------------- loss


def noise_levels(P_mean, P_std, count=SIGMAS):
    """Middles of `count` equally likely parts of log sigma ~ N(P_mean, P_std^2): a mean over them stands for that over what
    training draws."""
    return [
        float(np.exp(P_mean + P_std * NormalDist().inv_cdf((i + 0.5) / count)))
        for i in range(count)
    ]


class ValidationLoss:
    """The losses of up to --validation_clips clips of a data set, at each of `sigmas`, with draws of their own that are always the same.

    loss(model, pipe, batch, args): a trainer's own. encode(pipe, batch, args): the batch with what the frozen models say of
    it, done once. process: an Accelerator or PartialState; of several each has its share of the clips."""

    def __init__(self, data, args, loss, encode, pipe, process):
        import torch
        from torch.utils.data import default_collate

        from svd_xtend.models.loading import encoders_on_device
        from svd_xtend.training.distributed import batch_to_device

        self.loss, self.pipe, self.device = loss, pipe, process.device
        self.count, self.at_once = min(args.validation_clips, len(data)), args.per_gpu_batch_size
        self.own = range(process.process_index, self.count, process.num_processes)
        self.sigmas, self.base, self.seconds = noise_levels(args.P_mean, args.P_std), None, 0.0
        # log sigma is P_mean itself then, nothing is dropped, and noise is keyed by (validation_seed, clip, sigma)
        fixed = {
            "seed": args.validation_seed,
            "P_std": 0.0,
            "conditioning_dropout_prob": (0.0, 0.0, 0.0),
        }
        self.args, self.batches = argparse.Namespace(**{**vars(args), **fixed}), []
        self.films = [
            source_video(data.clips[next(data.order.choices(i))].path) for i in range(self.count)
        ]
        with torch.no_grad(), encoders_on_device(pipe, self.device):
            for i in self.own:
                batch = encode(pipe, batch_to_device(default_collate([data[i]]), self.device), args)
                self.batches.append(
                    move_batch({**batch, "pixel_values": batch["pixel_values"][:, :1]}, "cpu")
                )

    def losses(self, model):
        """(clips, sigmas) float64, the same on every process."""
        import torch
        from accelerate.utils import gather_object

        began, table = time.perf_counter(), np.zeros((self.count, len(self.sigmas)))
        log_sigma = torch.tensor(self.sigmas).log()
        for i, batch in zip(self.own, self.batches):
            for levels in torch.arange(len(self.sigmas)).split(self.at_once):
                args = argparse.Namespace(
                    **{**vars(self.args), "P_mean": log_sigma[levels].to(self.device)}
                )
                draws = {
                    **move_batch(batch, self.device, len(levels)),
                    "index": i * len(self.sigmas) + levels,
                }
                with torch.no_grad():
                    table[i, levels.numpy()] = (
                        self.loss(model, self.pipe, draws, args).double().cpu().numpy()
                    )
        table = np.sum(gather_object([table]), axis=0)
        self.base = table if self.base is None else self.base  # the first model asked for
        self.seconds += time.perf_counter() - began
        return table

    def compare(self, step, losses):
        """(the row of <output_dir>/held_out.jsonl, what a tracker gets) of {"raw": losses, "ema": losses}; says it, too."""
        row, shown = {"step": step, "seconds": round(self.seconds, 3)}, {}
        for name, table in losses.items():
            row[name] = compare_losses(self.sigmas, self.base, table, self.films)
            shown |= tracker_curves(row[name], "held_out" if name == "raw" else f"held_out_{name}")
            logger.info(
                "step %d: held-out loss%s %s",
                step,
                " of the averages" * (name == "ema"),
                format_comparison(row[name]),
            )
        self.seconds = 0.0
        return row, shown


def move_batch(batch, device, times=None):
    """The tensors of a batch, those in nested dicts too, on a device; of a single sample so many, which share its memory."""
    kept = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            kept[name] = move_batch(value, device, times)
        elif hasattr(value, "to") and name != "index":
            kept[name] = value.to(device)
            kept[name] = kept[name].expand(times, *value.shape[1:]) if times else kept[name]
    return kept


# -------------------------------------------------------------------------------------------------------------- compare


def confidence_interval(differences):
    """(mean, low, high) of differences of pairs (n,), n independent films: Student's t, CONFIDENCE; of one film no ends."""
    from scipy.stats import t

    differences = np.asarray(differences, np.float64)
    mean, n = differences.mean(), len(differences)
    if n < 2:
        return float(mean), None, None
    reach = t.ppf((1 + CONFIDENCE) / 2, n - 1) * differences.std(ddof=1) / n**0.5
    return float(mean), float(mean - reach), float(mean + reach)


def mean_by_source(values, films):
    """Means (films, ...) over the clips (n, ...) of each film: clips of one film are no independent witnesses."""
    names, which = np.unique(films, return_inverse=True)
    return np.stack([values[which == k].mean(0) for k in range(len(names))])


def compare_losses(sigmas, base, tuned, films=None):
    """What two tables of losses (clips, sigmas) say: {sigma, base, loss: of each sigma; difference: (mean, low, high) in total,
    by_sigma: at each}. films: of each clip its film; each film counts the same. Default: a clip each."""
    count, films = len(base), range(len(base)) if films is None else films
    base, tuned = (mean_by_source(table, films) for table in (base, tuned))
    difference = tuned - base
    return {
        "clips": count, "films": len(base), "sigma": sigmas, "base": base.mean(0).tolist(), "loss": tuned.mean(0).tolist(),
        "difference": confidence_interval(difference.mean(1)), "by_sigma": [confidence_interval(column) for column in difference.T],
    }  # fmt: skip


def comparable_rows(rows):
    """Those rows of held_out.jsonl that are of the same clips and base as the last one: a run may have gone on with others."""
    return [row for row in rows if row["raw"]["base"] == rows[-1]["raw"]["base"]]


def count_in_words(clips, films=None):
    """Clips, and of how many films where these are fewer, in words."""
    one, other = (
        f"{n} {what}{'s' * (n != 1)}" for n, what in ((clips, "clip"), (films or clips, "film"))
    )
    return f"{one} of {other}" if films and films != clips else one


def format_interval(difference, what=""):
    """(mean, low, high) of interval in words; "" of None. what: said of the ends."""
    mean, low, high = difference or (None, None, None)
    ends = "" if low is None else f" ({what}{low:+.3g} to {high:+.3g})"
    return "" if mean is None else f"{mean:+.3g}{ends}"


def format_comparison(row, base="the start"):
    """A comparison in words. base: what the other model is."""
    difference = format_interval(row["difference"], "95 %: ")
    loss, other = np.mean(row["loss"]), np.mean(row["base"])
    return f"{loss:.4g}, that of {base} {other:.4g}: {difference} on {count_in_words(row['clips'], row['films'])}"


def tracker_curves(row, name):
    """A comparison as numbers for a tracker."""
    mean, low, high = row["difference"]
    shown = {
        "loss": np.mean(row["loss"]),
        "base": np.mean(row["base"]),
        "difference": mean,
        "low": low,
        "high": high,
    }
    shown |= {f"difference_sigma_{s:.3g}": d[0] for s, d in zip(row["sigma"], row["by_sigma"])}
    return {f"{name}/{key}": float(value) for key, value in shown.items() if value is not None}
