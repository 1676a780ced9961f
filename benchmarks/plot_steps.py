"""Draw what benchmarks/gpu.sh measured: seconds of a step by phase, and peak memory beside what was predicted.

python benchmarks/plot_steps.py benchmarks/results/NVIDIA_H100      # reads its *.json, writes steps.png and steps.md
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PHASES = ("VAE", "VAE, first frame", "CLIP", "forward", "backward", "optimizer")


def table(documents):
    """Markdown: one row for each variant."""
    lines = ["| | variant | s/step | x faster | peak GiB | MFU |", "|---|---|---|---|---|---|"]
    for name, document in documents.items():
        for variant, v in document["variants"].items():
            cells = [f"{v[key]:{form}}" if isinstance(v.get(key), float) else str(v.get(key) or "")
                     for key, form in (("seconds", ".3f"), ("x_faster", ".2f"), ("peak_GiB", ".1f"), ("mfu", ".1%"))]  # fmt: skip
            lines.append(f"| {name} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(documents, file):
    """Bars of seconds by phase and, of a GPU, of memory beside them; a row of pictures for each measurement."""
    counts = [len(d["variants"]) for d in documents.values()]
    measured = any(v["peak_GiB"] for d in documents.values() for v in d["variants"].values())
    size = (13 if measured else 8, 1.2 * len(counts) + 0.36 * sum(counts))
    figure, rows = plt.subplots(len(counts), 1 + measured, figsize=size, squeeze=False, height_ratios=counts, layout="constrained")  # fmt: skip
    for (seconds, *memory), (name, document) in zip(rows, documents.items()):
        variants = dict(reversed(document["variants"].items()))
        left = [0.0] * len(variants)
        for phase in PHASES:
            widths = [v.get(phase, 0.0) for v in variants.values()]
            seconds.barh(list(variants), widths, left=left, label=phase)
            left = [a + b for a, b in zip(left, widths)]
        seconds.set(
            title=f"{name}: {document['device']}, {document['precision']}", xlabel="seconds a step"
        )
        for axes in memory:
            peaks = [
                v["peak_GiB"] if isinstance(v["peak_GiB"], float) else 0.0
                for v in variants.values()
            ]
            axes.barh(list(variants), peaks, color="0.6")
            for i, v in enumerate(variants.values()):
                axes.text(0, i, " out of memory" * (v["peak_GiB"] == "out of memory"), va="center")
            axes.set(xlabel="peak, GiB (torch.cuda.max_memory_allocated)", yticklabels=[])
    figure.legend(
        *rows[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(PHASES),
        fontsize="small",
    )
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where gpu.sh wrote its JSON documents")
    folder = parser.parse_args().folder
    documents = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    if not documents:
        parser.error(f"{folder}: no *.json in it; run benchmarks/gpu.sh first")
    (folder / "steps.md").write_text(table(documents))
    draw(documents, folder / "steps.png")
    print(table(documents), end="")
