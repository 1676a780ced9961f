"""Plot what benchmarks/gpu.sh measured: seconds of a step by phase, and its peak memory.

    python benchmarks/plot_steps.py benchmarks/results/NVIDIA_H100_80GB_HBM3

Reads the *.json files of bench_step.py in the folder, and writes steps.png and steps.md into it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# those of bench_step.py, which is not imported here, because it imports torch
PHASES = ("VAE", "VAE, first frame", "CLIP", "forward", "backward", "optimizer")
OUT_OF_MEMORY = "out of memory"
COLUMNS = {"seconds": ".3f", "x_faster": ".2f", "peak_GiB": ".1f", "mfu": ".1%"}
WIDTH = 8  # inches
WIDTH_WITH_MEMORY = 13
BAR_HEIGHT = 0.36
PLOT_MARGIN = 1.2

Documents = dict[str, dict[str, Any]]  # {name of the measurement: document of bench_step.py}


def format_table(documents: Documents) -> str:
    """Return a Markdown table with one row per variant."""
    lines = ["| | variant | s/step | x faster | peak GiB | MFU |", "|---|---|---|---|---|---|"]
    for name, document in documents.items():
        for variant, row in document["variants"].items():
            cells = [format_cell(row.get(key), layout) for key, layout in COLUMNS.items()]
            lines.append(f"| {name} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_cell(value: float | str | None, layout: str) -> str:
    """Return a number in this layout, text as it is, and None as an empty cell."""
    if isinstance(value, float):
        return format(value, layout)
    return str(value or "")


def plot_seconds(axes: Any, name: str, document: dict[str, Any]) -> None:
    """Draw one bar per variant, of seconds by phase."""
    variants = dict(reversed(document["variants"].items()))
    ends = [0.0] * len(variants)
    for phase in PHASES:
        widths = [row.get(phase, 0.0) for row in variants.values()]
        axes.barh(list(variants), widths, left=ends, label=phase)
        ends = [end + width for end, width in zip(ends, widths)]
    axes.set(
        title=f"{name}: {document['device']}, {document['precision']}", xlabel="seconds per step"
    )


def plot_memory(axes: Any, document: dict[str, Any]) -> None:
    """Draw one bar per variant, of the measured peak memory."""
    variants = dict(reversed(document["variants"].items()))
    peaks = []
    for row in variants.values():
        peaks.append(row["peak_GiB"] if isinstance(row["peak_GiB"], float) else 0.0)
    axes.barh(list(variants), peaks, color="0.6")
    for i, row in enumerate(variants.values()):
        if row["peak_GiB"] == OUT_OF_MEMORY:
            axes.text(0, i, f" {OUT_OF_MEMORY}", va="center")
    axes.set(xlabel="peak, GiB (torch.cuda.max_memory_allocated)", yticklabels=[])


def plot_steps(documents: Documents, file: Path) -> None:
    """Write a picture with one row of plots per measurement; memory only if a GPU measured it."""
    num_variants = [len(document["variants"]) for document in documents.values()]
    has_memory = False
    for document in documents.values():
        has_memory |= any(row["peak_GiB"] for row in document["variants"].values())
    width = WIDTH_WITH_MEMORY if has_memory else WIDTH
    height = PLOT_MARGIN * len(num_variants) + BAR_HEIGHT * sum(num_variants)
    figure, rows = plt.subplots(
        len(num_variants),
        2 if has_memory else 1,
        figsize=(width, height),
        squeeze=False,
        height_ratios=num_variants,
        layout="constrained",
    )
    for row, (name, document) in zip(rows, documents.items()):
        plot_seconds(row[0], name, document)
        if has_memory:
            plot_memory(row[1], document)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PHASES), fontsize="small")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with the JSON documents of gpu.sh")
    folder = parser.parse_args().folder
    documents = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    if not documents:
        parser.error(f"{folder}: expected *.json files in this folder. Run benchmarks/gpu.sh first")
    (folder / "steps.md").write_text(format_table(documents))
    plot_steps(documents, folder / "steps.png")
    print(format_table(documents), end="")
