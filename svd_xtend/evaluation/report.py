"""Write report.html, one page that shows a training run.

    python -m svd_xtend.evaluation.report outputs/lora      # at any time, also while the run goes on

Trainers write the page when they finish. It shows the rendered videos beside the ground truth, the
training curves, the validation loss, metrics if evaluate_svd.py was run, and the command. Everything is
inside the file, so it opens without a network and can be sent to anyone. What a run does not have, such as
a validation set, the page leaves out. report_template.html is its layout.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from svd_xtend.data import images
from svd_xtend.data.clip import find_continuation, load_picture
from svd_xtend.training import run_record, validation_loss

if TYPE_CHECKING:
    import jinja2
    from matplotlib.axes import Axes

logger = logging.getLogger("svd_xtend")

MAX_VIDEO_CHARACTERS = 4_000_000  # of all videos together, in base64; the page stays under 6 MB
SHEET_SIZES = (  # (width of a frame in pixels, quality of WebP); the first that fits is used
    (384, 80),
    (320, 75),
    (256, 70),
    (192, 60),
    (128, 50),
)
MAX_IMAGES = 8  # validation images that are shown
MAX_STEPS = 12  # validations that are shown of each
DEFAULT_FPS = 7.0  # of a video whose frame rate is not recorded
MAX_POINTS = 300  # of a curve
SMOOTHED_POINTS = 20  # of the smoothed training loss
MIN_STEPS_TO_SMOOTH = 40

# Placeholders in the plots. draw_svg replaces them with variables of the page's style sheet, so that the
# plots follow its light and dark scheme.
COLORS = {
    "ink": "#010203",
    "faint": "#040506",
    "line": "#070809",
    "blue": "#0a0b0c",
    "orange": "#0d0e0f",
    "sigma0": "#131415",
    "sigma1": "#161718",
    "sigma2": "#191a1b",
    "sigma3": "#1c1d1e",
    "sigma4": "#1f2021",
}
NUM_SIGMA_COLORS = 5
PLOT_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": COLORS["ink"],
    "axes.labelcolor": COLORS["faint"],
    "axes.edgecolor": COLORS["line"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": COLORS["line"],
    "ytick.color": COLORS["line"],
    "xtick.labelcolor": COLORS["faint"],
    "ytick.labelcolor": COLORS["faint"],
    "axes.grid": True,
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.4,
    "legend.frameon": False,
    "legend.labelcolor": COLORS["faint"],
    "axes.formatter.useoffset": False,
}


# -------------------------------------------------------------------------------------------------------------- videos


@dataclass
class Reference:
    """The clips that a validation image is compared with. They are None if their file is gone."""

    fps: float = DEFAULT_FPS
    first_frame: Image.Image | None = None
    ground_truth: list[Image.Image] | None = None


def find_videos(output_dir: str | Path) -> dict[str, dict[int, Path]]:
    """Find the videos that validations rendered: {name of the image: {step: mp4}}."""
    videos: dict[str, dict[int, Path]] = {}
    files = Path(output_dir, "validation").glob("step*.mp4")
    for file in sorted(files, key=images.natural_key):
        match = re.fullmatch(r"step(\d+)_(.+)", file.stem)
        if match:
            step, name = int(match[1]), match[2]
            videos.setdefault(name, {})[step] = file
    return videos


def select_videos(videos: dict[str, dict[int, Path]]) -> dict[str, dict[int, Path]]:
    """Select the first MAX_IMAGES images, and MAX_STEPS evenly spread steps, the first and last among them."""
    selected = dict(list(videos.items())[:MAX_IMAGES])
    steps = sorted({step for files in selected.values() for step in files})
    count = min(MAX_STEPS, len(steps))
    kept = {steps[i] for i in np.linspace(0, len(steps) - 1, count).round().astype(int)}
    for name, files in selected.items():
        selected[name] = {step: file for step, file in files.items() if step in kept}
    return selected


def load_references(args: dict[str, Any]) -> tuple[dict[str, Reference], list[str]]:
    """Load the reference of each validation image.

    Returns ({name of the image: Reference}, paths that cannot be read, for instance because they were
    deleted after the run).
    """
    references = {}
    missing = []
    for path, metadata in zip(args.get("validation_image") or [], args.get("validation") or []):
        reference = Reference(fps=metadata["fps"])
        try:
            reference.first_frame = load_picture(
                path, args["width"], args["height"], args["resize_mode"]
            )
            reference.ground_truth = read_ground_truth(path, metadata, args)
        except (ValueError, OSError) as error:
            logger.warning("%s; the page leaves it out", error)
            missing.append(path)
        references[images.clip_name(path)] = reference
    return references, missing


def read_ground_truth(
    path: str, metadata: dict[str, Any], args: dict[str, Any]
) -> list[Image.Image] | None:
    """Read the frames that follow a validation image in its source video; None if there are too few."""
    if not metadata["clip"]:
        return None
    found = find_continuation(path, [Path(metadata["clip"]).parent], metadata["fps"])
    if found is None:
        return None
    clip, _ = found
    if metadata["frames"][-1] >= len(clip):
        return None
    frames = clip.read(metadata["frames"], args["width"], args["height"], args["resize_mode"])
    return [Image.fromarray(frame) for frame in frames]


def read_frames(file: Path) -> list[Image.Image] | None:
    """Read all frames of an mp4; None if it is damaged, or still being written."""
    try:
        return images.read_video(file) or None
    except (OSError, ValueError) as error:
        logger.warning("%s: cannot be read (%s); the page leaves it out", file, error)
        return None


def make_sheet(frames: Sequence[Image.Image], width: int, quality: int) -> dict[str, Any]:
    """Put all frames into one WebP, row by row.

    Returns {"uri": data URI, "count": frames, "columns", and the "width" and "height" of a frame}.
    """
    width = min(width, frames[0].width)
    height = max(round(frames[0].height * width / frames[0].width), 1)
    columns = math.ceil(len(frames) ** 0.5)
    rows = math.ceil(len(frames) / columns)
    canvas = Image.new("RGB", (columns * width, rows * height))
    for i, frame in enumerate(frames):
        row, column = divmod(i, columns)
        small = frame.convert("RGB").resize((width, height))
        canvas.paste(small, (column * width, row * height))
    content = io.BytesIO()
    canvas.save(content, "WEBP", quality=quality)
    uri = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
    return {"uri": uri, "count": len(frames), "columns": columns, "width": width, "height": height}


def choose_sheet_size(videos: dict[str, dict[int, Path]]) -> tuple[int, int]:
    """Choose (width, quality) so that all sheets fit the page, judged by the last video of each image."""
    last_videos = []
    for files in videos.values():
        if files:
            frames = read_frames(files[max(files)])
            if frames:
                last_videos.append(frames)
    num_sheets = sum(len(files) for files in videos.values())
    num_sheets += 2 * len(videos)  # first frame and ground truth
    for size in SHEET_SIZES:
        characters = sum(len(make_sheet(frames, *size)["uri"]) for frames in last_videos)
        if characters / max(len(last_videos), 1) * num_sheets <= MAX_VIDEO_CHARACTERS:
            return size
    return SHEET_SIZES[-1]


def make_players(output_dir: str | Path, args: dict[str, Any]) -> dict[str, Any]:
    """Prepare what the page plays.

    Returns {"steps": steps that are shown; "clips": [{"name", "fps", "first_frame": sheet or None,
    "ground_truth": sheet or None, "steps": [a sheet or None for each step]}]; "left_out": number of videos
    that are not shown; "missing": paths of validation images that cannot be read}.
    """
    all_videos = find_videos(output_dir)
    references, missing = load_references(args)
    videos = select_videos(all_videos)
    size = choose_sheet_size(videos)
    clips = []
    for name, files in tqdm(videos.items(), desc="report.html", leave=False, delay=2):
        reference = references.get(name, Reference())
        sheets = {}
        for step, file in files.items():
            frames = read_frames(file)
            if frames:
                sheets[step] = make_sheet(frames, *size)
        first_frame = None
        if reference.first_frame:
            first_frame = make_sheet([images.enlarge(reference.first_frame)], *size)
        ground_truth = None
        if reference.ground_truth:
            enlarged = [images.enlarge(frame) for frame in reference.ground_truth]
            ground_truth = make_sheet(enlarged, *size)
        clips.append(
            {
                "name": name,
                "fps": reference.fps,
                "first_frame": first_frame,
                "ground_truth": ground_truth,
                "sheets": sheets,
            }
        )
    steps = thin_out_steps(clips)
    for clip in clips:
        sheets = clip.pop("sheets")
        clip["steps"] = [sheets.get(step) for step in steps]
    num_videos = sum(len(files) for files in all_videos.values())
    num_shown = sum(sheet is not None for clip in clips for sheet in clip["steps"])
    return {
        "steps": steps,
        "clips": clips,
        "left_out": num_videos - num_shown,
        "missing": missing,
    }


def thin_out_steps(clips: Sequence[dict[str, Any]]) -> list[int]:
    """Return the steps to show: every second one is dropped until the sheets fit the page.

    The size of the sheets was chosen by the last video of each image, which may be smaller than others.
    """
    steps = sorted({step for clip in clips for step in clip["sheets"]})
    while len(steps) > 2 and count_characters(clips, steps) > MAX_VIDEO_CHARACTERS:
        last = steps[-1]
        steps = [*steps[:-1:2], last]
    return steps


def count_characters(clips: Iterable[dict[str, Any]], steps: Iterable[int]) -> int:
    """Count the characters of the references and of the sheets at these steps."""
    total = 0
    for clip in clips:
        at_steps = [clip["sheets"].get(step) for step in steps]
        for sheet in (clip["first_frame"], clip["ground_truth"], *at_steps):
            if sheet:
                total += len(sheet["uri"])
    return total


# --------------------------------------------------------------------------------------------------------------- plots


def average_neighbours(
    steps: Sequence[int], values: Sequence[float], count: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to at most `count` points, each the mean of neighbours."""
    parts = np.array_split(np.arange(len(steps)), min(count, len(steps)))
    step_array = np.asarray(steps, float)
    value_array = np.asarray(values, float)
    mean_steps = np.array([np.mean(step_array[part]) for part in parts])
    mean_values = np.array([np.mean(value_array[part]) for part in parts])
    return mean_steps, mean_values


def draw_svg(
    title: str, plot: Callable[[Axes], None], ylabel: str = "", from_zero: bool = False
) -> dict[str, str]:
    """Draw a plot over training steps: {"title", "svg"}.

    plot(axes) draws the curves. from_zero: the vertical axis begins at 0.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # A page holds several plots, and their SVG ids must differ: the title is the salt.
    style: Any = {**PLOT_STYLE, "svg.hashsalt": title}
    content = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure((4.6, 2.7), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot(xlabel="step", ylabel=ylabel)
        axes.patch.set_visible(False)
        plot(axes)
        if from_zero:
            axes.set_ylim(bottom=0)
        locator: Any = axes.xaxis.get_major_locator()
        locator.set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        figure.savefig(content, format="svg", metadata={"Date": None})
    text = content.getvalue()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return {"title": title, "svg": svg}


def draw_plots(
    metrics: Sequence[dict[str, Any]],
    validation_rows: Sequence[dict[str, Any]],
    motion: Sequence[dict[str, Any]],
) -> list[dict[str, str]]:
    """Draw those plots that the run has data for: [{"title", "svg"}].

    The arguments are the rows of metrics.jsonl, held_out.jsonl and motion.jsonl.
    """
    plots = []
    metrics = [row for row in metrics if row["step"]]
    if metrics:
        plots.append(draw_svg("Training loss", partial(plot_training_loss, metrics=metrics)))
    if len(validation_rows) > 1:
        plots.append(
            draw_svg(
                "Validation loss vs base model",
                partial(plot_validation_loss, rows=validation_rows),
                ylabel="difference",
            )
        )
        plots.append(
            draw_svg(
                "Validation loss by noise level",
                partial(plot_loss_by_sigma, rows=validation_rows),
                ylabel="difference, % of base model",
            )
        )
    if motion:
        plots.append(
            draw_svg(
                "Motion of rendered clips",
                partial(plot_rendered_motion, rows=motion),
                ylabel="frame lengths per second",
                from_zero=True,
            )
        )
    for key, title in (("s/step", "Seconds per step"), ("peak_GiB", "Peak memory, GiB")):
        rows = [row for row in metrics if key in row]
        if rows:
            steps, values = average_neighbours(
                [row["step"] for row in rows], [row[key] for row in rows]
            )
            plots.append(
                draw_svg(title, partial(plot_curve, steps=steps, values=values), from_zero=True)
            )
    return plots


def plot_curve(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """Plot one curve without a legend."""
    axes.plot(steps, values, color=COLORS["blue"])


def plot_training_loss(axes: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    """Plot the loss of each step, and its smoothed curve if there are enough steps."""
    from matplotlib.ticker import LogLocator, NullLocator

    steps = [row["step"] for row in metrics]
    losses = [row["loss"] for row in metrics]
    is_smoothed = len(steps) >= MIN_STEPS_TO_SMOOTH
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.plot(
        *average_neighbours(steps, losses),
        color=COLORS["blue"],
        lw=0.8,
        alpha=0.35 if is_smoothed else 1,
    )
    if is_smoothed:
        axes.plot(
            *average_neighbours(steps, losses, SMOOTHED_POINTS),
            color=COLORS["blue"],
            lw=2,
            label=f"mean of {len(steps) / SMOOTHED_POINTS:.0f} steps",
        )


def plot_validation_loss(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Plot validation loss minus the base model's, with its confidence interval, by step."""
    steps = [row["step"] for row in rows]
    axes.axhline(0, color=COLORS["faint"], lw=1)
    curves = (("raw", "trained weights", "blue"), ("ema", "EMA weights", "orange"))
    for name, label, color in curves:
        differences = [row[name]["difference"] for row in rows if name in row]
        if len(differences) < len(steps):
            continue
        # the interval of one source video has no ends
        mean = np.array([difference[0] for difference in differences])
        low = np.array([d[0] if d[1] is None else d[1] for d in differences])
        high = np.array([d[0] if d[2] is None else d[2] for d in differences])
        axes.plot(steps, mean, color=COLORS[color], marker="o", ms=3, lw=2, label=label)
        axes.fill_between(steps, low, high, color=COLORS[color], alpha=0.2, lw=0)


def plot_loss_by_sigma(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Plot the change of the validation loss at each noise level, in percent of the base model's."""
    steps = [row["step"] for row in rows]
    exported = exported_rows(rows)
    axes.axhline(0, color=COLORS["faint"], lw=1)
    for i, sigma in enumerate(exported[0]["sigma"]):
        change = [100 * (row["loss"][i] / row["base"][i] - 1) for row in exported]
        axes.plot(
            steps,
            change,
            color=COLORS[f"sigma{i % NUM_SIGMA_COLORS}"],
            marker="o",
            ms=3,
            label=f"sigma {sigma:.3g}",
        )


def plot_rendered_motion(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Plot the motion of the rendered clips and of their ground truth by step."""
    curves = (("motion", "rendered", "blue"), ("motion_truth", "ground truth", "orange"))
    for key, label, color in curves:
        steps = [row["step"] for row in rows if key in row]
        values = [row[key] for row in rows if key in row]
        if steps:
            axes.plot(steps, values, color=COLORS[color], marker="o", ms=3, lw=2, label=label)


# ------------------------------------------------------------------------------------------------------------- verdict


def exported_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the losses of the weights that are exported, the EMA weights if there are any.

    rows: of held_out.jsonl.
    """
    return [row.get("ema", row["raw"]) for row in rows]


def judge_run(rows: Sequence[dict[str, Any]], args: dict[str, Any]) -> tuple[str, str]:
    """Judge whether a run learned: ("good", "bad" or "open", a sentence).

    rows: comparable rows of held_out.jsonl. A run learned if the confidence interval of its validation
    loss minus the base model's lies below 0.
    """
    has_validation_set = args.get("validation_folder") or args.get("validation_ratio")
    if len(rows) < 2 and not has_validation_set:
        return (
            "open",
            "There is no validation set, so it is unknown whether the run learned. "
            "Pass --validation_folder or --validation_ratio.",
        )
    if len(rows) < 2:
        reason = "no validation has run since training began"
        if not args.get("validation_steps"):
            reason = "--validation_steps is 0"
        return "open", f"It is not known yet whether the run learned: {reason}."
    row = exported_rows(rows)[-1]
    mean, low, high = row["difference"]
    intervals = (row["difference"], *row["by_sigma"])
    if not any(any(interval) for interval in intervals):
        return (
            "open",
            "Nothing was learned: the validation loss is exactly that of the base model.",
        )
    percent = f"{abs(mean) / np.mean(row['base']):.1%}"
    direction = "below" if mean < 0 else "above"
    count = validation_loss.count_in_words(row["clips"], row.get("films"))
    comparison = f"The validation loss is {percent} {direction} the base model's on {count}"
    if low is None:
        return (
            "open",
            f"{comparison}. There is only one source video, so there is no confidence interval, and "
            "this may be chance.",
        )
    interval = f"95 % confidence interval {low:+.3g} to {high:+.3g}"
    if high < 0:
        return "good", f"It learned. {comparison} (difference {mean:+.3g}, {interval})."
    if low > 0:
        return (
            "bad",
            f"It got worse. {comparison} (difference {mean:+.3g}, {interval}). "
            "Train for fewer steps, on more clips, or at a lower learning rate.",
        )
    return (
        "open",
        f"No clear difference from the base model. {comparison} (difference {mean:+.3g}), but the "
        f"{interval} contains 0.",
    )


# ---------------------------------------------------------------------------------------------------------------- page


@dataclass
class RunFacts:
    """The content of a run's files, as templates use it."""

    args: dict[str, Any]  # args.json
    metrics: list[dict[str, Any]]  # metrics.jsonl
    validation_rows: list[
        dict[str, Any]
    ]  # held_out.jsonl, those that can be compared with the last
    validation: dict[str, Any] | None  # losses of the exported weights at the last validation
    validation_step: int | None
    motion: list[dict[str, Any]]  # motion.jsonl
    verdict_kind: str
    verdict: str
    evaluation: dict[str, Any] | None  # evaluation/evaluation.json
    start: dict[str, Any] | None  # the last entry of run.json
    num_starts: int


def read_run(output_dir: str | Path) -> RunFacts:
    """Read the files of a run. Raises ValueError if there is no args.json, or a file is damaged."""
    folder = Path(output_dir)
    args = read_json_file(folder / "args.json")
    if args is None:
        raise ValueError(f"{folder}: no args.json in it; pass the --output_dir of a training run")
    validation_rows = validation_loss.comparable_rows(
        run_record.read_rows(folder / "held_out.jsonl")
    )
    validation = None
    validation_step = None
    if validation_rows:
        validation_step = validation_rows[-1]["step"]
    if len(validation_rows) > 1:
        validation = exported_rows(validation_rows)[-1]
    starts = run_record.read_starts(folder)
    verdict_kind, verdict = judge_run(validation_rows, args)
    return RunFacts(
        args=args,
        metrics=run_record.read_rows(folder / "metrics.jsonl"),
        validation_rows=validation_rows,
        validation=validation,
        validation_step=validation_step,
        motion=run_record.read_rows(folder / "motion.jsonl"),
        verdict_kind=verdict_kind,
        verdict=verdict,
        evaluation=read_json_file(folder / "evaluation" / "evaluation.json"),
        start=starts[-1] if starts else None,
        num_starts=len(starts),
    )


def read_json_file(file: Path) -> dict[str, Any] | None:
    """Read a JSON file; None if there is no such file. Raises ValueError with its path if it is damaged."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}); delete it, or write it again") from error


def describe_page(folder: Path) -> dict[str, Any]:
    """Return the variables of report_template.html for a run."""
    run = read_run(folder)
    start = run.start or {}
    return {
        **vars(run),
        "name": folder.resolve().name,
        "start": start,
        "summary": summarize_run(run, start),
        "players": make_players(folder, run.args),
        "plots": draw_plots(run.metrics, run.validation_rows, run.motion),
        "motion_png": embed_png(folder / "motion.png"),
        "flags": format_flags(run.args),
    }


def summarize_run(run: RunFacts, start: dict[str, Any]) -> list[str]:
    """Return a few facts for the head of the page: step, size, time, device."""
    last_step = run.metrics[-1]["step"] if run.metrics else 0
    max_steps = run.args["max_train_steps"]
    progress = f"step {last_step}"
    if last_step != max_steps:
        progress += f" of {max_steps}"
    size = f"{run.args['width']}x{run.args['height']}"
    facts = [progress, f"{run.args['num_frames']} frames of {size}"]
    if run.metrics:
        seconds = sum(row["s/step"] for row in run.metrics)
        facts.append(f"{format_duration(seconds)} of training")
    facts += start.get("device", "").splitlines()
    return facts


def format_flags(args: dict[str, Any]) -> dict[str, str]:
    """Return the flags of a run that have a value, as text."""
    flags = {}
    for name, value in args.items():
        if name == "validation" or value in (None, [], False):
            continue
        flags[name] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return flags


def format_duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def format_number(value: float | None) -> str:
    """Format a number with four digits; "" for None."""
    return "" if value is None else f"{value:.4g}"


def embed_png(file: Path) -> str | None:
    """Return a PNG as a data URI; None if there is no such file."""
    if not file.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def load_template(name: str) -> jinja2.Template:
    """Load a template of this folder, with filters and functions that format numbers."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith("html"),
        trim_blocks=True,
    )
    environment.filters["number"] = format_number
    environment.filters["interval"] = validation_loss.format_interval
    environment.globals["count_in_words"] = validation_loss.count_in_words
    return environment.get_template(name)


def write_report(output_dir: str | Path) -> Path:
    """Write <output_dir>/report.html and return its path.

    Raises:
        ValueError: the folder holds no run, or a file of it is damaged.
        OSError: the page cannot be written.
    """
    folder = Path(output_dir)
    page = load_template("report_template.html").render(describe_page(folder))
    run_record.write_atomically(folder / "report.html", page)
    return folder / "report.html"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", help="output folder of a training run")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        print(write_report(parser.parse_args().output_dir))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
