"""One page that shows a run: what it renders beside what it began with and what is true, whether it learned, how it was run.

    python -m svd_xtend.evaluation.report outputs/lora          # at any time, of a run that goes on, too; trainers write it at their end

<output_dir>/report.html holds all of it: it opens without a network, anywhere, and can be sent to anyone. What a run does not
have, its page leaves out. Next: report_template.html, what it looks like.
"""

import argparse
import base64
import io
import json
import logging
import math
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from svd_xtend.data import images
from svd_xtend.data.clip import find_continuation, load_picture
from svd_xtend.training import run_record, validation_loss

logger = logging.getLogger("svd_xtend")

MAX_VIDEO_CHARACTERS = 4_000_000  # characters of all videos together; a page stays under 6 MB
# pixels of a frame's width, and WebP's quality; the first that fits
SIZES = ((384, 80), (320, 75), (256, 70), (192, 60), (128, 50))
IMAGES, STEPS = 8, 12  # shown of more: the first ones, evenly many
POINTS = 300  # of a curve
COLORS = {  # in the plots, each as what the page's style sheet, in light and dark, makes of it
    "ink": "#010203", "faint": "#040506", "line": "#070809", "blue": "#0a0b0c", "orange": "#0d0e0f", "green": "#101112",
    "sigma0": "#131415", "sigma1": "#161718", "sigma2": "#191a1b", "sigma3": "#1c1d1e", "sigma4": "#1f2021",
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none", "font.size": 9, "text.color": COLORS["ink"], "axes.labelcolor": COLORS["faint"],
    "axes.edgecolor": COLORS["line"], "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "xtick.color": COLORS["line"], "ytick.color": COLORS["line"], "xtick.labelcolor": COLORS["faint"],
    "ytick.labelcolor": COLORS["faint"], "axes.grid": True, "grid.color": COLORS["line"], "grid.linewidth": 0.4,
    "legend.frameon": False, "legend.labelcolor": COLORS["faint"], "axes.formatter.useoffset": False,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- videos


def rendered(output_dir):
    """{name: {step: mp4}} of all that validations wrote."""
    found = {}
    for file in sorted(Path(output_dir, "validation").glob("step*.mp4"), key=images.natural_key):
        if match := re.fullmatch(r"step(\d+)_(.+)", file.stem):
            found.setdefault(match[2], {})[int(match[1])] = file
    return found


def few(found):
    """At most IMAGES of these, of at most STEPS."""
    found = dict(list(found.items())[:IMAGES])
    steps = sorted({step for files in found.values() for step in files})
    kept = {
        steps[i] for i in np.linspace(0, len(steps) - 1, min(STEPS, len(steps))).round().astype(int)
    }
    return {
        name: {step: file for step, file in files.items() if step in kept}
        for name, files in found.items()
    }


def beside(args):
    """({name: (fps, the picture to animate or None, its true continuation or None)} of each validation image, paths of those that
    cannot be read any more)."""
    told, gone = {}, []
    for path, own in zip(args.get("validation_image") or [], args.get("validation") or []):
        size, image, true = (args["width"], args["height"], args["resize_mode"]), None, None
        try:
            image = [load_picture(path, *size)]
            clip = (
                own["clip"] and find_continuation(path, [Path(own["clip"]).parent], own["fps"])[0]
            )
            if clip and own["frames"][-1] < len(clip):
                true = [Image.fromarray(frame) for frame in clip.read(own["frames"], *size)]
        except (ValueError, OSError) as error:  # it has gone since
            logger.warning("%s; the page leaves it out", error)
            gone.append(path)
        told[images.clip_name(path)] = own["fps"], image, true
    return told, gone


def readable(file):
    """Frames of an mp4, or None where it is damaged, or being written."""
    try:
        return images.read_video(file) or None
    except (OSError, ValueError) as error:
        logger.warning("%s: cannot be read (%s); the page leaves it out", file, error)


def sheet(frames, width, quality):
    """All frames in one WebP: {uri, count, columns, width, height of each}."""
    width = min(width, frames[0].width)
    height = max(round(frames[0].height * width / frames[0].width), 1)
    columns = math.ceil(len(frames) ** 0.5)
    canvas = Image.new("RGB", (columns * width, math.ceil(len(frames) / columns) * height))
    for i, frame in enumerate(frames):
        canvas.paste(
            frame.convert("RGB").resize((width, height)),
            (i % columns * width, i // columns * height),
        )
    content = io.BytesIO()
    canvas.save(content, "WEBP", quality=quality)
    uri = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
    return {"uri": uri, "count": len(frames), "columns": columns, "width": width, "height": height}


def players(output_dir, args):
    """What the page plays: {steps, clips: [{name, fps, init, truth, steps: sheets}], left_out: files that are not shown,
    gone: pictures that are not where they were}."""
    everything, (told, gone) = rendered(output_dir), beside(args)
    found = few(everything)
    last = [frames for files in found.values() if files and (frames := readable(files[max(files)]))]
    sheets = sum(map(len, found.values())) + 2 * len(found)
    for size in SIZES:
        if (
            sum(len(sheet(frames, *size)["uri"]) for frames in last) / max(len(last), 1) * sheets
            <= MAX_VIDEO_CHARACTERS
        ):
            break
    shown = []
    for name, files in tqdm(found.items(), desc="report.html", leave=False, delay=2):
        fps, image, true = told.get(name, (7, None, None))
        own = {s: sheet(frames, *size) for s, file in files.items() if (frames := readable(file))}
        init, truth = (
            frames and sheet([images.enlarge(f) for f in frames], *size) for frames in (image, true)
        )
        shown.append({"name": name, "fps": fps, "init": init, "truth": truth, "steps": own})
    steps = sorted({step for clip in shown for step in clip["steps"]})
    while (
        len(steps) > 2 and weight(shown, steps) > MAX_VIDEO_CHARACTERS
    ):  # dearer than the last ones promised
        steps = [*steps[:-1:2], steps[-1]]
    for clip in shown:
        clip["steps"] = [clip["steps"].get(step) for step in steps]
    count, played = (
        sum(map(len, everything.values())),
        sum(bool(sheet) for clip in shown for sheet in clip["steps"]),
    )
    return {"steps": steps, "clips": shown, "left_out": count - played, "gone": gone}


def weight(shown, steps):
    """Characters of all sheets of these steps."""
    sheets = [
        sheet
        for clip in shown
        for sheet in (clip["init"], clip["truth"], *map(clip["steps"].get, steps))
    ]
    return sum(len(sheet["uri"]) for sheet in sheets if sheet)


# ---------------------------------------------------------------------------------------------------------------- plots


def binned(steps, values, count=POINTS):
    """At most so many points of a curve: means of neighbours."""
    parts = np.array_split(np.arange(len(steps)), min(count, len(steps)))
    return [
        np.array([np.mean(np.asarray(v, float)[part]) for part in parts]) for v in (steps, values)
    ]


def svg(title, draw, least=None):
    """{title, svg} of a plot. draw(ax) puts the curves in; least: where the axis begins."""
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context(
        {**STYLE, "svg.hashsalt": title}
    ):  # salted: pages hold several, with ids of their own
        figure = Figure((4.6, 2.7), layout="constrained")
        figure.patch.set_visible(False)
        ax = figure.add_subplot(xlabel="step")
        ax.patch.set_visible(False)
        draw(ax)
        ax.set_ylim(bottom=least)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
        figure.savefig(text, format="svg", metadata={"Date": None})
    picture = re.sub(
        r"<metadata>.*?</metadata>",
        "",
        text.getvalue()[text.getvalue().index("<svg") :],
        flags=re.S,
    )
    for name, color in COLORS.items():
        picture = picture.replace(color, f"var(--{name})")
    return {"title": title, "svg": picture}


def plots(metrics, held, motion):
    """The curves of a run, those that it has."""
    made, metrics = [], [row for row in metrics if row["step"]]
    if metrics:
        made.append(svg("Training loss", lambda ax: draw_loss(ax, metrics)))
    if len(held) > 1:
        made.append(
            svg("Held-out loss less that of the start", lambda ax: draw_difference(ax, held))
        )
        made.append(
            svg("The same by noise level, % of the start's", lambda ax: draw_by_sigma(ax, held))
        )
    if motion:
        made.append(
            svg("Motion, picture lengths a second", lambda ax: draw_motion(ax, motion), least=0)
        )
    for key, title in (("s/step", "Seconds a step"), ("peak_GiB", "Peak memory, GiB")):
        rows = [(row["step"], row[key]) for row in metrics if key in row]
        if rows:
            points = binned(*zip(*rows))
            made.append(
                svg(
                    title, lambda ax, points=points: ax.plot(*points, color=COLORS["blue"]), least=0
                )
            )
    return made


def draw_loss(ax, metrics):
    from matplotlib.ticker import LogLocator, NullLocator

    steps, losses = [row["step"] for row in metrics], [row["loss"] for row in metrics]
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.plot(
        *binned(steps, losses), color=COLORS["blue"], lw=0.8, alpha=0.35 if len(steps) >= 40 else 1
    )
    if len(steps) >= 40:
        ax.plot(
            *binned(steps, losses, 20),
            color=COLORS["blue"],
            lw=2,
            label=f"means of {len(steps) / 20:.0f} steps",
        )


def draw_difference(ax, held):
    steps = [row["step"] for row in held]
    ax.axhline(0, color=COLORS["faint"], lw=1)
    for name, label, color in (("raw", "as trained", "blue"), ("ema", "moving averages", "orange")):
        rows = [row[name]["difference"] for row in held if name in row]
        if len(rows) == len(steps):
            mean, low, high = (
                np.array([row[k] if row[k] is not None else row[0] for row in rows])
                for k in range(3)
            )
            ax.plot(steps, mean, color=COLORS[color], marker="o", ms=3, lw=2, label=label)
            ax.fill_between(steps, low, high, color=COLORS[color], alpha=0.2, lw=0)


def draw_by_sigma(ax, held):
    told, steps = trained_rows(held), [row["step"] for row in held]
    ax.axhline(0, color=COLORS["faint"], lw=1)
    for i, sigma in enumerate(told[0]["sigma"]):
        change = [100 * (row["loss"][i] / row["base"][i] - 1) for row in told]
        ax.plot(
            steps,
            change,
            color=COLORS[f"sigma{i % 5}"],
            marker="o",
            ms=3,
            label=f"sigma {sigma:.3g}",
        )


def draw_motion(ax, motion):
    for key, label, color in (("motion", "rendered", "blue"), ("motion_truth", "true", "orange")):
        rows = [(row["step"], row[key]) for row in motion if key in row]
        if rows:
            ax.plot(*zip(*rows), color=COLORS[color], marker="o", ms=3, lw=2, label=label)


# ---------------------------------------------------------------------------------------------------------------- words


def trained_rows(held):
    """Of rows of held_out.jsonl what they say of what is exported: of the moving averages where there are any."""
    return [row.get("ema", row["raw"]) for row in held]


def verdict(held, args):
    """(good, bad or open, a sentence): did it learn?"""
    if len(held) < 2 and not (args.get("validation_folder") or args.get("validation_ratio")):
        told = "pass --validation_folder or --validation_ratio to hold clips out"
        return "open", f"Whether it learned is not known: {told}."
    if len(held) < 2:
        told = (
            "there was no validation since the start"
            if args.get("validation_steps")
            else "--validation_steps=0"
        )
        return "open", f"Whether it learned is not known yet: clips are held out, but {told}."
    row = trained_rows(held)[-1]
    mean, low, high = row["difference"]
    share = f"{abs(mean) / np.mean(row['base']):.1%} {'below' if mean < 0 else 'above'} that of the start"
    where = f"On {validation_loss.count_in_words(row['clips'], row.get('films'))} that nothing was trained on the loss is {share}"
    ends = f"by {mean:+.3g}, 95 % interval {low:+.3g} to {high:+.3g}" if low is not None else ""
    if not any(map(any, (row["difference"], *row["by_sigma"]))):
        return (
            "open",
            "Nothing was learned: on the held-out clips the loss is exactly that of the start.",
        )
    if low is None:
        return "open", f"{where}; one film cannot tell whether that is more than chance."
    if high < 0:
        return "good", f"It learned. {where} ({ends})."
    if low > 0:
        advice = "Train for fewer steps, on more clips, or at a lower learning rate"
        return "bad", f"It got worse. {where} ({ends}). {advice}."
    return "open", f"Not told apart from its start. {where}, but {ends} holds 0."


def number(value):
    return "" if value is None else f"{value:.4g}"


def short(value):
    """A flag's value for the page."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def spent(metrics):
    """Time of all steps, in words."""
    seconds = sum(row["s/step"] for row in metrics)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------------------------- write


def read_json(file):
    """What a file holds, None where it is not there. Raises ValueError with its path where it is damaged."""
    try:
        return json.loads(file.read_text()) if file.is_file() else None
    except ValueError as error:
        raise ValueError(f"{file}: is damaged ({error}); remove it, or make it anew") from error


def read_run_facts(output_dir):
    """What the files of a run say of it, as they are. Raises ValueError where there are none, or one is damaged."""
    folder = Path(output_dir)
    args = read_json(folder / "args.json")
    if args is None:
        raise ValueError(f"{folder}: holds no args.json; pass the --output_dir of a run")
    metrics, held, motion = (
        run_record.read_rows(folder / f"{name}.jsonl") for name in ("metrics", "held_out", "motion")
    )
    held, starts = validation_loss.comparable_rows(held), run_record.read_starts(folder)
    kind, sentence = verdict(held, args)
    return {
        "args": args, "metrics": metrics, "held_rows": held, "held": trained_rows(held)[-1] if len(held) > 1 else None,
        "held_step": held[-1]["step"] if held else None, "motion": motion, "kind": kind, "verdict": sentence,
        "evaluation": read_json(folder / "evaluation" / "evaluation.json"), "start": (starts or [None])[-1], "starts": len(starts),
    }  # fmt: skip


def list_contents(folder):
    """What the page shows of a run."""
    told = read_run_facts(folder)
    args, metrics, start = told["args"], told["metrics"], told["start"] or {}
    step, steps = (metrics[-1]["step"] if metrics else 0), args["max_train_steps"]
    facts = [
        f"step {step}" + f" of {steps}" * (step != steps),
        f"{args['num_frames']} frames of {args['width']}x{args['height']}",
        *[f"{spent(metrics)} of training"] * bool(metrics), *start.get("device", "").splitlines(),
    ]  # fmt: skip
    flags = {
        k: short(v)
        for k, v in args.items()
        if k not in ("hub_token", "validation") and v not in (None, [], False)
    }
    return {
        **told, "how_many": validation_loss.count_in_words, "name": folder.resolve().name, "facts": facts, "start": start, "players": players(folder, args), "flags": flags,
        "plots": plots(metrics, told["held_rows"], told["motion"]), "motion_png": embed_picture(folder / "motion.png"),
    }  # fmt: skip


def embed_picture(file):
    """A PNG as a data URI, or None."""
    return (
        "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        if file.is_file()
        else None
    )


def load_template(name):
    """One of the templates beside this file, with what they write figures by."""
    import jinja2

    found = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=found, autoescape=name.endswith("html"), trim_blocks=True)
    pages.filters |= {"number": number, "with_ends": validation_loss.format_interval}
    return pages.get_template(name)


def write_report(output_dir):
    """Write <output_dir>/report.html; returns its path. Raises ValueError where there was no run, OSError where it cannot be written."""
    folder = Path(output_dir)
    page = load_template("report_template.html").render(list_contents(folder))
    run_record.write_atomically(folder / "report.html", page)
    return folder / "report.html"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", help="of a run")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        print(write_report(parser.parse_args().output_dir))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
