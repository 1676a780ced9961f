"""Draw the embedded SVD's training curves from the logs of `python -m svd_xtend.tiny --output_dir RUN`.

pip install matplotlib && python .asset/make_curves.py RUN        # -> .asset/curves.png
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt

run = Path(sys.argv[1])
vae, unet = (
    [json.loads(line) for line in (run / name).read_text().splitlines()]
    for name in ("vae_metrics.jsonl", "trained/metrics.jsonl")
)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.plot([row["step"] for row in vae], [row["psnr"] for row in vae], "o-")
left.set(title="VAE: reconstruction of held-out clips", xlabel="step", ylabel="PSNR, dB")
loss = np.array([row["loss"] for row in unet])
right.plot(loss, alpha=0.2)
window = 50
right.plot(
    np.arange(window - 1, len(loss)),
    np.convolve(loss, np.ones(window) / window, "valid"),
    color="C0",
)
right.set(
    title=f"UNet: training loss (mean of {window} steps)",
    xlabel="step",
    ylabel="|F - v|²",
    ylim=(0, 1),
)
figure.savefig(Path(__file__).with_name("curves.png"), dpi=110)
