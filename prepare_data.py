"""Look at a folder of videos before training on it, and make one: nothing here trains.

    python prepare_data.py check data/mine                              # what is in it, what will be skipped and why, a picture
    python prepare_data.py frames film.mp4 more/ data/mine --scenes     # videos -> folders of frames, one a scene
    python prepare_data.py tracklets labels.json data/mine              # public annotations -> tracklets.json of each video
    python prepare_data.py split data/mine data/halves                  # data/halves/train and data/halves/held_out

Trainers take videos as they are; frames are for editing, for exact reuse, and for videos with several scenes. All of it works in
parallel and, given the same command again, does only what is missing. Next: svd_xtend/folders.py.
"""

import argparse
import collections
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from svd_xtend.data import annotations, folder_index, images, motion, sampler, split, video_decode
from svd_xtend.data.clip import DURATION_TOLERANCE, Clip, ClipSpec
from svd_xtend.training import flag_types

logger = logging.getLogger("svd_xtend")

SHORTEST_SCENE = 0.5  # seconds
SHOWN = 20  # lines of a report on the screen; report.json has all


# ------------------------------------------------------------------------------------------------------------- scenes


class Scenes:
    """Finds cuts in frames that are handed to it one after the other: PySceneDetect's content detector, on small pictures."""

    def __init__(self, rate):
        from scenedetect import FrameTimecode
        from scenedetect.detectors import ContentDetector

        self.detector = ContentDetector(min_scene_len=max(round(SHORTEST_SCENE * rate), 1))
        self.when, self.rate, self.count, self.cuts = FrameTimecode, float(rate), 0, []

    def add(self, frame):
        """frame: (h, w, 3) uint8, of motion.smaller."""
        frame = np.ascontiguousarray(frame[..., ::-1])  # OpenCV's order of colours
        self.cuts += self.detector.process_frame(self.when(self.count, self.rate), frame)
        self.count += 1

    def found(self):
        """Numbers of the frames that begin a new scene."""
        if not self.count:
            return []
        ends = self.detector.post_process(self.when(self.count - 1, self.rate))
        return sorted({int(cut.frame_num) for cut in [*self.cuts, *ends]} - {0})


# -------------------------------------------------------------------------------------------------------------- check


def look_at_all(clip, keys):
    """In place of Clip.measure_motion: {motions, cuts}, every frame decoded; ValueError where one is damaged."""
    scenes, kept = Scenes(clip.rate), {}
    needed = set(np.concatenate(motion.select_frame_runs(len(clip), clip.rate, keys)).tolist())
    for number, frame in enumerate(clip.iter_small_frames(range(len(clip)))):
        small = motion.shrink_frame(frame)
        scenes.add(small)
        if number in needed:
            kept[number] = small
    score = motion.clip_motion_score(
        lambda run: [kept[n] for n in run.tolist()], len(clip), clip.rate, keys
    )
    return {"motions": score, "cuts": scenes.found()}


def check(args):
    """Print what a folder holds; write report.json, all of it, and check.png."""
    listing = folder_index.FolderIndex(args.folder)
    listing.fill(measure=look_at_all)
    found = sampler.ClipCollection(
        listing,
        ClipSpec(width=0, height=0, num_frames=args.num_frames, fps=args.fps),
        source_fps=args.source_fps,
        with_pictures=True,
        quiet=True,
    )
    (kept,), rows = found.kept, []
    a, (own, _) = listing.arrays, found.rates(listing)
    for i, moves in zip(kept.tolist(), found.motions.tolist()):
        note = listing.note(i)
        row = {
            "name": listing.name(i),
            "frames": int(a["counts"][i]),
            "fps": round(float(own[i]), 3),
            "motion": round(moves, 4),
        }
        row.update(width=int(a["widths"][i]), height=int(a["heights"][i]))
        rows.append({**row, **{k: note[k] for k in ("cuts", "caption") if note.get(k)}})
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    skipped, pictures = dict(found.left_out(0)), len(found.stills[0])
    document = {"folder": str(args.folder), "clips": rows, "pictures": pictures, "skipped": skipped}
    (out / "report.json").write_text(json.dumps(document, indent=1, ensure_ascii=False))
    print("\n".join(summary(args, rows, pictures, skipped)))
    if rows:
        draw(out / "check.png", rows, args.folder)
    print(f"{out / 'report.json'} names every clip" + f"; look at {out / 'check.png'}" * bool(rows))


def spread(values):
    """Least, median and largest."""
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{low:.4g} to {high:.4g}, median {middle:.4g}"


def most(counts, n=6):
    """The most common, with how many there are."""
    shown = ", ".join(f"{what} ({count})" for what, count in counts.most_common(n))
    return shown + f" and {len(counts) - n} others" * (len(counts) > n)


def summary(args, rows, pictures, skipped):
    """The report's lines."""
    cut = [row["name"] for row in rows if row.get("cuts")]
    yield f"{args.folder}: {len(rows)} clips of at least {args.num_frames} frames at --fps {args.fps}, {pictures} pictures, {len(skipped)} skipped"
    if rows:
        sizes = collections.Counter("{width}x{height}".format(**row) for row in rows)
        yield f"  frames    {sum(row['frames'] for row in rows)} in all; {spread([row['frames'] for row in rows])}"
        yield f"  seconds   {spread([row['frames'] / row['fps'] for row in rows])}"
        yield f"  rates     {most(collections.Counter(format(row['fps'], 'g') for row in rows))}"
        yield f"  sizes     {most(sizes)}"
        yield f"  motion    {spread([row['motion'] for row in rows])} picture lengths a second"
        yield f"  captions  {sum('caption' in row for row in rows)}"
        hint = f": {', '.join(cut[:5])}; prepare_data.py frames --scenes parts them" if cut else ""
        yield f"  cuts      {len(cut)} clips hold more than one scene{hint}"
    for name, reason in list(skipped.items())[:SHOWN]:
        yield f"  skipped   {name}: {reason}"
    if len(skipped) > SHOWN:
        yield f"  skipped   ... {len(skipped) - SHOWN} others"


def draw(file, rows, folder):
    """A picture of motion, with the motion_bucket_id that follows, durations, rates and sizes."""
    from matplotlib.figure import Figure

    figure = Figure((11, 6.5), layout="constrained")
    (top, seconds), (rates, sizes) = figure.subplots(2, 2)
    figure.suptitle(f"{folder}: {len(rows)} clips")
    motion.draw_motion_histogram(top, [row["motion"] for row in rows])
    for axes, title, values in (
        (seconds, "seconds", [row["frames"] / row["fps"] for row in rows]),
        (rates, "frames a second", [row["fps"] for row in rows]),
    ):
        axes.hist(values, bins=40, color=motion.BLUE)
        axes.set(xlabel=title, ylabel="clips", xlim=(0, None))
    counts = collections.Counter((row["width"], row["height"]) for row in rows)
    width, height = zip(*counts)
    area = 20 + 400 * np.array(list(counts.values())) / len(rows)
    sizes.scatter(width, height, area, color=motion.BLUE, alpha=0.6)
    sizes.set(
        xlabel="width, pixels",
        ylabel="height, pixels",
        xlim=(0, 1.1 * max(width)),
        ylim=(0, 1.1 * max(height)),
    )
    figure.savefig(file, dpi=100)


# ------------------------------------------------------------------------------------------------------------- frames


def videos_in(paths):
    """{file: name of its folder of frames} of the video files among `paths`, and in the folders among them."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(
                (p for p in path.rglob("*") if p.is_file() and video_decode.is_video(p)),
                key=images.natural_key,
            )
        elif path.is_file():
            found.append(path)
        else:
            raise SystemExit(f"{path}: no such file or folder")
    if not found:
        raise SystemExit(f"{' '.join(map(str, paths))}: no video files")
    stems = collections.Counter(path.stem for path in found)
    names = [path.stem if stems[path.stem] == 1 else path.name.replace(".", "_") for path in found]
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise SystemExit(
            f"two videos would be extracted to {twice[0]}: give them names of their own"
        )
    return dict(zip(found, names))


def scenes_of(path, film):
    """[(first frame, end)] of a video's scenes."""
    scenes = Scenes(film.rate)
    for frame in video_decode.read_frames(path, film.times, range(len(film.times))):
        scenes.add(motion.shrink_frame(frame))
    cuts = scenes.found()
    return list(zip([0, *cuts], [*cuts, len(film.times)]))


def extract(path, stem, args):
    """Folders of frames of one video, one for each scene. Returns how many, how many were too short, and whether it was done."""
    done = args.out / f".{stem}.extracted"  # a folder that starts with a dot is no clip
    flags = args.fps, args.width, args.height, args.resize_mode, args.scenes, args.format
    how = json.dumps([str(path.absolute()), path.stat().st_mtime_ns, *flags])
    if done.exists() and done.read_text() == how:
        return 0, 0, 1
    film = video_decode.probe_video(path)
    whole = Clip(
        path,
        [],
        film.rate,
        film.times,
        metadata=folder_index.read_metadata(path.parent).get(path.name, {}),
    )
    fps = film.rate if args.fps == "native" else min(args.fps, film.rate)
    parts, made, short = scenes_of(path, film) if args.scenes else [(0, len(film.times))], 0, 0
    clock = whole.frame_times()
    for k, (first, end) in enumerate(parts):
        length = int((clock[end - 1] - clock[first]) * fps + 1 + DURATION_TOLERANCE)
        if length < args.min_frames:
            short += 1
            continue
        name = stem if len(parts) == 1 else f"{stem}_scene{k:03d}"
        write_frames(
            args.out / name,
            whole,
            np.minimum(whole.frame_indices(first, length, fps), end - 1),
            fps,
            args,
        )
        made += 1
    done.write_text(how)
    return made, short, 0


def write_frames(folder, clip, numbers, fps, args):
    """Write a clip's frames and its clip.json, whole or not at all."""
    from PIL import Image

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for k, frame in enumerate(clip.iter_frames(numbers)):
        frame = (
            images.resize_frame(frame, args.width, args.height, args.resize_mode) if args.width else frame
        )
        Image.fromarray(frame).save(partial / f"{k:05d}.{args.format}", quality=95)
    text = clip.path.with_suffix(".txt")
    caption = {"caption": text.read_text("utf-8", "replace").strip()} if text.is_file() else {}
    told = {**clip.metadata, **caption, "fps": round(fps, 4), "source": clip.path.name}
    (partial / "clip.json").write_text(json.dumps(told, ensure_ascii=False))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def frames(args):
    """Extract all videos, in parallel; name those that cannot be read."""
    paths = videos_in(args.video)
    args.out.mkdir(parents=True, exist_ok=True)
    counts, failed = np.zeros(3, int), 0
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        folder_index.progress_bar(len(paths), "extracting") as bar,
    ):
        for _, answer in folder_index.results_in_order(
            pool, lambda path: attempt(extract, path, paths[path], args), paths
        ):
            bar.update()
            if isinstance(answer, str):
                failed += 1
                logger.warning("%s", answer)
            else:
                counts += answer
    made, short, there = counts
    print(f"{args.out}: {made} folders of frames made, {short} scenes of less than {args.min_frames} frames left out; "
          f"of {len(paths)} videos {there} were done before, {failed} could not be read")  # fmt: skip
    if failed == len(paths):
        raise SystemExit(1)


def attempt(function, *how):
    """What it answers, or what is wrong with the file."""
    try:
        return function(*how)
    except ValueError as error:
        return str(error)


# ---------------------------------------------------------------------------------------------------------- tracklets


def convert(args):
    """Annotation files -> tracklets.json in each video's folder, or <video>.json where there is none."""
    args.out.mkdir(parents=True, exist_ok=True)
    count = objects = 0
    for file in args.file:
        for name, found in annotations.read_tracklets(file, args.size).items():
            inside = args.out / name
            target = inside / "tracklets.json" if inside.is_dir() else args.out / f"{name}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            annotations.write_tracklets(target, found)
            count, objects = count + 1, objects + len(found.ids)
    print(
        f"{args.out}: tracklets of {count} videos, {objects} objects. Look: python -m svd_xtend.evaluation.tracklet_score {target} --frames ..."
    )


# -------------------------------------------------------------------------------------------------------------- split


def split_folder(args):
    """Two folders of links: train and held_out. Texts and annotations beside a clip go with it."""
    listing = folder_index.FolderIndex(args.folder)
    sources = split.clips_by_source_video(listing)
    if len(sources) < 2:
        raise SystemExit(
            f"{args.folder}: {len(sources)} video(s); to hold some out takes two that are not of one film"
        )
    for part in ("train", "held_out"):
        if (args.out / part).exists():
            raise SystemExit(
                f"{args.out / part}: is there already; remove it, or choose another folder"
            )
    chosen = split.choose_validation_sources(sources, args.held_out, args.seed)
    metadata, counts = folder_index.metadata_rows(args.folder), {}
    for part in ("train", "held_out"):
        own = [
            i
            for source in sources
            if (source in chosen) == (part == "held_out")
            for i in sources[source]
        ]
        names = [listing.name(i) for i in own]
        (args.out / part).mkdir(parents=True)
        for name in names:
            stem = name if (args.folder / name).is_dir() else Path(name).stem
            for beside in {name, f"{stem}.txt", f"{stem}.json"}:
                if (args.folder / beside).exists():
                    HOW[args.how](args.folder / beside, args.out / part / beside)
        rows = [row for name in names for row in metadata.get(name, [])]
        if rows:
            (args.out / part / "metadata.jsonl").write_text("".join(row + "\n" for row in rows))
        counts[part] = len(names)
    print(f"{args.out}: {counts['train']} clips to train on, {counts['held_out']} held out")


def link(source, target):
    target.symlink_to(source.absolute())


def copy(source, target):
    (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)


HOW = {"link": link, "copy": copy, "move": shutil.move}

# ---------------------------------------------------------------------------------------------------------------- CLI


def size_of(text):
    """854x480 -> (854, 480)"""
    width, height = (int(side) for side in text.lower().split("x"))
    return width, height


size_of.__name__ = "WIDTHxHEIGHT"  # argparse's errors name it


def build_parser():
    """A command each, with its flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    # fmt: off
    c = commands.add_parser("check", help="what a folder holds, what will be skipped and why")
    c.add_argument("folder", type=Path)
    c.add_argument("--fps", type=flag_types.number_or_word("native"), default=7.0, help="as in training: a number, or native; default: %(default)s")
    c.add_argument("--source_fps", type=float, help="as in training: of frame folders without clip.json")
    c.add_argument("--num_frames", type=int, default=14, help="as in training; default: %(default)s")
    c.add_argument("--output_dir", default="outputs/check", help="for report.json and check.png; default: %(default)s")
    c = commands.add_parser("frames", help="extract videos to folders of frames")
    c.add_argument("video", nargs="+", help="files, or folders of them")
    c.add_argument("out", type=Path)
    c.add_argument("--fps", type=flag_types.number_or_word("native"), default="native", help="frames a second, by time; default: each video's own")
    c.add_argument("--width", type=int, help="pixels; default: as it is")
    c.add_argument("--height", type=int)
    c.add_argument("--resize_mode", choices=["crop", "stretch"], default="crop")
    c.add_argument("--scenes", action="store_true", help="part each video where a new scene begins")
    c.add_argument("--min_frames", type=int, default=14, help="leave out scenes with fewer; default: %(default)s")
    c.add_argument("--format", choices=["jpg", "png", "webp"], default="jpg")
    c = commands.add_parser("tracklets", help="public annotation formats to this project's JSON")
    c.add_argument("file", nargs="+", help="BDD100K, MOTChallenge, KITTI tracking, YouTube-VIS")
    c.add_argument("out", type=Path, help="the folder of videos")
    c.add_argument("--size", type=size_of, help="of the pictures, 854x480 for one, where the file does not tell")
    c = commands.add_parser("split", help="hold clips out of training")
    c.add_argument("folder", type=Path)
    c.add_argument("out", type=Path)
    c.add_argument("--held_out", type=float, default=0.1, help="about this fraction of the films, by name; default: %(default)s")
    c.add_argument("--how", choices=HOW, default="link", help="default: %(default)s")
    c.add_argument("--seed", type=int, default=0)
    # fmt: on
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = build_parser()
    args = parser.parse_args()
    if args.command == "frames" and bool(args.width) != bool(args.height):
        parser.error("--width and --height: pass both, or none")
    if args.command == "split" and not 0 < args.held_out < 1:
        parser.error(f"--held_out {args.held_out}: above 0, below 1")
    try:
        {"check": check, "frames": frames, "tracklets": convert, "split": split_folder}[
            args.command
        ](args)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    except OSError as error:  # a full disk, for one; what was made before is whole
        where = error.filename or getattr(args, "out", None) or args.output_dir
        raise SystemExit(f"{where}: {error.strerror or error}") from error
