"""The validation loss: did a run learn? Measured on clips that do not train, against the base model.

    validation_loss = ValidationLoss(dataset, args, pipe, accelerator, loss_at_sigma=..., ...)
    base = validation_loss.losses(unet)                      # (clips, noise levels)
    ...                                                      # train
    row = compare_losses(validation_loss.sigmas, base, validation_loss.losses(unet))

The training loss does not answer this: each step draws one noise level from a wide distribution, and
its loss depends on that level far more than on the model. Here clips, windows, noise levels and noise
are fixed, and both models see the same ones, so most of the variance cancels in the difference.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from svd_xtend.data.split import source_video

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger("svd_xtend")

NUM_SIGMAS = 5  # noise levels that the loss is measured at
CONFIDENCE = 0.95

Interval = tuple[float, float | None, float | None]  # mean, lower end, upper end


# -------------------------------------------------------------------------------------------- loss


def noise_levels(P_mean: float, P_std: float, count: int = NUM_SIGMAS) -> list[float]:
    """Return the medians of `count` equally likely parts of log sigma ~ N(P_mean, P_std^2).

    The mean over them stands for the mean over the noise levels that training draws.
    """
    normal = NormalDist()
    quantiles = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    return [float(np.exp(P_mean + P_std * quantile)) for quantile in quantiles]


class ValidationLoss:
    """Losses of up to --validation_clips clips at each of `sigmas`, on noise that is always the same.

    loss_at_sigma: (model, pipe, batch, sigma, seed) -> (b,). add_encodings: (pipe, batch, chunk) ->
    batch with what the frozen encoders make of it. prepare_batch: (batch, pipe) -> batch. process: an
    Accelerator or PartialState; each process measures its share of the clips.
    """

    def __init__(
        self,
        dataset,
        args: argparse.Namespace,
        pipe,
        process,
        *,
        loss_at_sigma: Callable[..., Tensor],
        add_encodings: Callable[..., dict],
        prepare_batch: Callable[..., dict] = lambda batch, pipe: batch,
    ) -> None:
        import torch

        from svd_xtend.models.loading import encoders_on_device

        self.pipe = pipe
        self.device = process.device
        self.loss_at_sigma = loss_at_sigma
        self.seed = args.validation_seed
        self.batch_size = args.per_gpu_batch_size
        self.num_clips = min(args.validation_clips, len(dataset))
        self.clip_indices = range(process.process_index, self.num_clips, process.num_processes)
        self.sigmas = noise_levels(args.P_mean, args.P_std)
        self.base: np.ndarray | None = None
        self.seconds = 0.0
        self.sources = []
        for index in range(self.num_clips):
            clip = dataset.clips[next(dataset.sampler.choices(index))]
            self.sources.append(source_video(clip.path))
        self.batches = []
        with torch.no_grad(), encoders_on_device(pipe, self.device):
            for index in self.clip_indices:
                batch = self.encode(dataset[index], args, add_encodings, prepare_batch)
                self.batches.append(batch)

    def encode(
        self, item: dict, args: argparse.Namespace, add_encodings: Callable, prepare_batch: Callable
    ) -> dict:
        """Return an item as an encoded batch on the CPU. Of its frames only the first is kept."""
        from torch.utils.data import default_collate

        from svd_xtend.training.distributed import batch_to_device

        batch = batch_to_device(default_collate([item]), self.device)
        batch = prepare_batch(add_encodings(self.pipe, batch, args.vae_encode_chunk), self.pipe)
        first_frame = batch["pixel_values"][:, :1]
        return move_batch({**batch, "pixel_values": first_frame}, "cpu")

    def losses(self, model) -> np.ndarray:
        """Return the losses (clips, sigmas) of a model in float64, the same on every process.

        Losses of the first model that is asked for are kept as the base model's.
        """
        import torch
        from accelerate.utils import gather_object

        began = time.perf_counter()
        table = np.zeros((self.num_clips, len(self.sigmas)))
        log_sigma = torch.tensor(self.sigmas).log()
        for clip_index, batch in zip(self.clip_indices, self.batches):
            for levels in torch.arange(len(self.sigmas)).split(self.batch_size):
                repeated = move_batch(batch, self.device, len(levels))
                # keys the noise by (clip, noise level)
                repeated["index"] = clip_index * len(self.sigmas) + levels
                sigma = log_sigma[levels].to(self.device).exp()
                with torch.no_grad():
                    loss = self.loss_at_sigma(model, self.pipe, repeated, sigma, self.seed)
                table[clip_index, levels.numpy()] = loss.double().cpu().numpy()
        table = np.sum(gather_object([table]), axis=0)
        if self.base is None:
            self.base = table
        self.seconds += time.perf_counter() - began
        return table

    def compare(
        self, step: int, losses: dict[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Compare losses with the base model's, and log the result.

        losses: tables of the trained weights, `raw`, and of their EMA, `ema`. Return the row of
        <output_dir>/held_out.jsonl, and the curves for a tracker.
        """
        assert self.base is not None, "losses() of the base model comes first"
        row: dict[str, Any] = {"step": step, "seconds": round(self.seconds, 3)}
        curves: dict[str, float] = {}
        for name, table in losses.items():
            row[name] = compare_losses(self.sigmas, self.base, table, self.sources)
            if name == "raw":
                curves |= tracker_curves(row[name], "held_out")
                weights = ""
            else:
                curves |= tracker_curves(row[name], f"held_out_{name}")
                weights = " of the EMA weights"
            logger.info(
                "step %d: validation loss%s %s", step, weights, format_comparison(row[name])
            )
        self.seconds = 0.0
        return row, curves


def move_batch(batch: dict, device: torch.device | str, times: int | None = None) -> dict:
    """Return the tensors of a batch, in nested dicts too, on a device. Drop everything else.

    times: repeat a batch of one clip this often, without copying it.
    """
    moved = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            moved[name] = move_batch(value, device, times)
        elif hasattr(value, "to") and name != "index":
            tensor = value.to(device)
            if times:
                tensor = tensor.expand(times, *value.shape[1:])
            moved[name] = tensor
    return moved


# ------------------------------------------------------------------------------------- comparison


def confidence_interval(differences: Sequence[float] | np.ndarray) -> Interval:
    """Return (mean, low, high) of the differences (n,) of n independent source videos.

    The ends are those of Student's t at CONFIDENCE, or None if n is 1.
    """
    from scipy.stats import t

    differences = np.asarray(differences, np.float64)
    n = len(differences)
    mean = differences.mean()
    if n < 2:
        return float(mean), None, None
    reach = t.ppf((1 + CONFIDENCE) / 2, n - 1) * differences.std(ddof=1) / n**0.5
    return float(mean), float(mean - reach), float(mean + reach)


def mean_by_source(values: np.ndarray, sources: Sequence | np.ndarray) -> np.ndarray:
    """Return the means (sources, ...) over the clips (n, ...) of each source video.

    Clips of one video are not independent, so the statistics are over videos.
    """
    names, source_of_clip = np.unique(sources, return_inverse=True)
    return np.stack([values[source_of_clip == i].mean(0) for i in range(len(names))])


def compare_losses(
    sigmas: list[float],
    base: np.ndarray,
    tuned: np.ndarray,
    sources: Sequence | None = None,
) -> dict[str, Any]:
    """Compare two tables of losses (clips, sigmas).

    sources: the source video of each clip; each counts the same. Default: each clip is one.
    Return sigma, mean base and loss at each sigma, and the difference tuned - base with its confidence
    interval, in total (`difference`) and at each sigma (`by_sigma`).
    """
    num_clips = len(base)
    if sources is None:
        sources = range(num_clips)
    base = mean_by_source(base, sources)
    tuned = mean_by_source(tuned, sources)
    difference = tuned - base
    return {
        "clips": num_clips,
        "films": len(base),
        "sigma": sigmas,
        "base": base.mean(0).tolist(),
        "loss": tuned.mean(0).tolist(),
        "difference": confidence_interval(difference.mean(1)),
        "by_sigma": [confidence_interval(column) for column in difference.T],
    }


def comparable_rows(rows: list[dict]) -> list[dict]:
    """Return the rows of held_out.jsonl whose base model's losses are those of the last row.

    A run may have continued with other validation clips. Another GPU gives the same losses up to
    rounding.
    """
    if not rows:
        return []
    last = rows[-1]["raw"]["base"]
    comparable = []
    for row in rows:
        base = row["raw"]["base"]
        if len(base) == len(last) and np.allclose(base, last, rtol=1e-3):
            comparable.append(row)
    return comparable


def count_in_words(clips: int, sources: int | None = None) -> str:
    """Return "16 clips", or "16 clips of 3 videos" if several clips come from one video."""
    text = f"{clips} clip" if clips == 1 else f"{clips} clips"
    if sources and sources != clips:
        text += f" of {sources} video" if sources == 1 else f" of {sources} videos"
    return text


def format_interval(difference: Sequence | None, label: str = "") -> str:
    """Return (mean, low, high) as "-0.2 (-0.3 to -0.1)", or "" for None. label: put before the ends."""
    if difference is None or difference[0] is None:
        return ""
    mean, low, high = difference
    if low is None:
        return f"{mean:+.3g}"
    return f"{mean:+.3g} ({label}{low:+.3g} to {high:+.3g})"


def format_comparison(row: dict, base: str = "base model") -> str:
    """Return a comparison as one line. base: what the loss is compared with."""
    difference = format_interval(row["difference"], "95 %: ")
    loss = np.mean(row["loss"])
    base_loss = np.mean(row["base"])
    count = count_in_words(row["clips"], row["films"])
    return f"{loss:.4g}, {base} {base_loss:.4g}: {difference} on {count}"


def tracker_curves(row: dict, prefix: str) -> dict[str, float]:
    """Return a comparison as numbers for a tracker."""
    mean, low, high = row["difference"]
    values = {
        "loss": np.mean(row["loss"]),
        "base": np.mean(row["base"]),
        "difference": mean,
        "low": low,
        "high": high,
    }
    for sigma, difference in zip(row["sigma"], row["by_sigma"]):
        values[f"difference_sigma_{sigma:.3g}"] = difference[0]
    return {f"{prefix}/{name}": float(value) for name, value in values.items() if value is not None}
