"""Draw curves.png: the training curves of the embedded SVD.

python -m svd_xtend.demo.tiny_svd --output_dir RUN     # trains it
python .asset/make_curves.py RUN
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt

SMOOTHING_WINDOW = 50  # steps


def read_rows(file: Path) -> list[dict]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


run = Path(sys.argv[1])
vae = read_rows(run / "vae_metrics.jsonl")
unet = read_rows(run / "trained" / "metrics.jsonl")
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")

left.plot([row["step"] for row in vae], [row["psnr"] for row in vae], "o-")
left.set(title="VAE: reconstruction of validation clips", xlabel="step", ylabel="PSNR, dB")

loss = np.array([row["loss"] for row in unet])
kernel = np.ones(SMOOTHING_WINDOW) / SMOOTHING_WINDOW
smoothed = np.convolve(loss, kernel, "valid")
right.plot(loss, alpha=0.2)
right.plot(np.arange(SMOOTHING_WINDOW - 1, len(loss)), smoothed, color="C0")
right.set(
    title=f"UNet: training loss (mean of {SMOOTHING_WINDOW} steps)",
    xlabel="step",
    ylabel="|F - v|²",
    ylim=(0, 1),
)
figure.savefig(Path(__file__).with_name("curves.png"), dpi=110)
