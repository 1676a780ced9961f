"""Check a folder of videos before training, extract frames, convert annotations, or split a folder.

    python prepare_data.py check data/mine                           # list and check clips
    python prepare_data.py frames a.mp4 more/ data/mine --scenes     # videos -> folders of frames
    python prepare_data.py tracklets labels.json data/mine           # annotations -> tracklets.json
    python prepare_data.py split data/mine data/halves               # -> train/ and held_out/

Trainers read video files directly. Extract frames to edit them, or to split videos that hold
several scenes. Running `check` or `frames` again does only what is missing.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svd_xtend.data import folder_index, images, motion, split, video_decode
from svd_xtend.data.annotations import read_tracklets, write_tracklets
from svd_xtend.data.clip import DURATION_TOLERANCE, Clip, ClipSpec
from svd_xtend.data.folder_index import FolderIndex
from svd_xtend.data.sampler import ClipCollection
from svd_xtend.training import flag_types

logger = logging.getLogger("svd_xtend")

MIN_SCENE_DURATION = 0.5  # seconds
MAX_SKIPPED_SHOWN = 20  # skipped entries that are printed; report.json has all of them
MAX_COMMON_SHOWN = 6  # frame rates or sizes that are printed, the most common ones
MAX_CUT_CLIPS_SHOWN = 5  # clips with several scenes that are printed
JPEG_QUALITY = 95  # of extracted frames; also that of webp


# ----------------------------------------------------------------------------------------- scenes


class SceneDetector:
    """Find cuts in frames that are added one after the other, with PySceneDetect's content
    detector.

    rate: frames per second. Scenes shorter than MIN_SCENE_DURATION are not split off.
    """

    def __init__(self, rate: float) -> None:
        from scenedetect import FrameTimecode
        from scenedetect.detectors import ContentDetector

        min_scene_frames = max(round(MIN_SCENE_DURATION * rate), 1)
        self.detector = ContentDetector(min_scene_len=min_scene_frames)
        self.timecode_class = FrameTimecode
        self.rate = float(rate)
        self.num_frames = 0
        self.detected: list[Any] = []

    def timecode(self, frame_index: int) -> Any:
        """Return the time of a frame as PySceneDetect's type."""
        return self.timecode_class(frame_index, self.rate)

    def add(self, frame: np.ndarray) -> None:
        """Add the next frame, (h, w, 3) uint8 RGB, made small by `motion.shrink_frame`."""
        bgr = np.ascontiguousarray(frame[..., ::-1])
        self.detected += self.detector.process_frame(self.timecode(self.num_frames), bgr)
        self.num_frames += 1

    def cuts(self) -> list[int]:
        """Return the indices of the frames that begin a new scene, without frame 0. Call it once,
        at the end."""
        if self.num_frames == 0:
            return []
        detected_at_end = self.detector.post_process(self.timecode(self.num_frames - 1))
        frame_indices = {int(cut.frame_num) for cut in [*self.detected, *detected_at_end]}
        return sorted(frame_indices - {0})


# ------------------------------------------------------------------------------------------ check


def decode_fully(clip: Clip, keyframes: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Decode every frame of a clip; return {"motions": motion score, "cuts": frames that begin a
    new scene}.

    Replaces Clip.measure_motion and gives the same score. Raises ValueError if a frame is damaged.
    """
    scenes = SceneDetector(clip.rate)
    runs = motion.select_frame_runs(len(clip), clip.rate, keyframes)
    scored_indices = set(np.concatenate(runs).tolist())
    scored_frames = {}
    for frame_index, frame in enumerate(clip.iter_small_frames(range(len(clip)))):
        small = motion.shrink_frame(frame)
        scenes.add(small)
        if frame_index in scored_indices:
            scored_frames[frame_index] = small

    def read_scored(frame_indices: np.ndarray) -> list[np.ndarray]:
        return [scored_frames[index] for index in frame_indices.tolist()]

    score = motion.clip_motion_score(read_scored, len(clip), clip.rate, keyframes)
    return {"motions": score, "cuts": scenes.cuts()}


def check_folder(args: argparse.Namespace) -> None:
    """Print what a folder holds, and write report.json with every clip and check.png."""
    index = FolderIndex(args.folder)
    index.inspect(measure=decode_fully)
    clips = ClipCollection(
        index,
        ClipSpec(width=0, height=0, num_frames=args.num_frames, fps=args.fps),
        source_fps=args.source_fps,
        with_pictures=True,
        quiet=True,
    )
    frame_rates, _ = clips.frame_rates(index)
    reports = []
    for row, score in zip(clips.video_rows[0].tolist(), clips.motions.tolist()):
        reports.append(describe_clip(index, row, float(frame_rates[row]), score))
    skipped = dict(clips.skipped_entries(0))
    num_pictures = len(clips.picture_rows[0])
    document = {
        "folder": str(args.folder),
        "clips": reports,
        "pictures": num_pictures,
        "skipped": skipped,
    }
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    report_file = output_dir / "report.json"
    report_file.write_text(json.dumps(document, indent=1, ensure_ascii=False))
    for line in summary_lines(args, reports, num_pictures, skipped):
        print(line)
    print(f"{report_file} lists every clip")
    if reports:
        plot_file = output_dir / "check.png"
        plot_clips(plot_file, reports, args.folder)
        print(f"{plot_file} shows motion, durations, frame rates and sizes")


def describe_clip(index: FolderIndex, row: int, rate: float, score: float) -> dict[str, Any]:
    """Return the entry of a clip in report.json. rate: frames per second; score: frame lengths per
    second."""
    report = {
        "name": index.name(row),
        "frames": int(index.arrays["counts"][row]),
        "fps": round(rate, 3),
        "motion": round(score, 4),
        "width": int(index.arrays["widths"][row]),
        "height": int(index.arrays["heights"][row]),
    }
    note = index.note(row)
    for key in ("cuts", "caption"):
        if note.get(key):
            report[key] = note[key]
    return report


def format_range(values: Sequence[float]) -> str:
    """Return the smallest, largest and median value as text."""
    low, median, high = np.quantile(values, [0, 0.5, 1])
    return f"{low:.4g} to {high:.4g}, median {median:.4g}"


def format_most_common(counts: collections.Counter[str]) -> str:
    """Return the most common values and their counts as text."""
    common = counts.most_common(MAX_COMMON_SHOWN)
    text = ", ".join(f"{value} ({count})" for value, count in common)
    if len(counts) > len(common):
        text += f" and {len(counts) - len(common)} others"
    return text


def summary_lines(
    args: argparse.Namespace,
    reports: Sequence[dict[str, Any]],
    num_pictures: int,
    skipped: dict[str, str],
) -> Iterator[str]:
    """Yield the lines that `check` prints. skipped: {entry of the folder: reason}."""
    yield (
        f"{args.folder}: {len(reports)} clips of at least {args.num_frames} frames at --fps "
        f"{args.fps}, {num_pictures} pictures, {len(skipped)} skipped"
    )
    if reports:
        num_frames = [report["frames"] for report in reports]
        seconds = [report["frames"] / report["fps"] for report in reports]
        frame_rates = collections.Counter(f"{report['fps']:g}" for report in reports)
        sizes = collections.Counter(f"{report['width']}x{report['height']}" for report in reports)
        motions = [report["motion"] for report in reports]
        num_captions = sum("caption" in report for report in reports)
        yield f"  frames    {sum(num_frames)} in all; {format_range(num_frames)}"
        yield f"  seconds   {format_range(seconds)}"
        yield f"  rates     {format_most_common(frame_rates)} frames per second"
        yield f"  sizes     {format_most_common(sizes)}"
        yield f"  motion    {format_range(motions)} frame lengths per second"
        yield f"  captions  {num_captions}"
        cut_names = [report["name"] for report in reports if report.get("cuts")]
        line = f"  cuts      {len(cut_names)} clips hold more than one scene"
        if cut_names:
            line += f": {', '.join(cut_names[:MAX_CUT_CLIPS_SHOWN])}"
            if len(cut_names) > MAX_CUT_CLIPS_SHOWN:
                line += ", ..."
            line += "; prepare_data.py frames --scenes splits them"
        yield line
    for name, reason in list(skipped.items())[:MAX_SKIPPED_SHOWN]:
        yield f"  skipped   {name}: {reason}"
    if len(skipped) > MAX_SKIPPED_SHOWN:
        yield f"  skipped   ... {len(skipped) - MAX_SKIPPED_SHOWN} others"


def plot_clips(
    file: str | os.PathLike, reports: Sequence[dict[str, Any]], folder: str | os.PathLike
) -> None:
    """Write a picture of the distributions of motion, duration, frame rate and size."""
    from matplotlib.figure import Figure

    figure = Figure((11, 6.5), layout="constrained")
    (motion_axes, seconds_axes), (rate_axes, size_axes) = figure.subplots(2, 2)
    figure.suptitle(f"{folder}: {len(reports)} clips")
    motion.draw_motion_histogram(motion_axes, [report["motion"] for report in reports])

    seconds_axes.hist(
        [report["frames"] / report["fps"] for report in reports], bins=40, color=motion.BLUE
    )
    seconds_axes.set(xlabel="seconds", ylabel="clips", xlim=(0, None))

    rate_axes.hist([report["fps"] for report in reports], bins=40, color=motion.BLUE)
    rate_axes.set(xlabel="frames per second", ylabel="clips", xlim=(0, None))

    counts = collections.Counter((report["width"], report["height"]) for report in reports)
    widths, heights = zip(*counts)
    marker_areas = 20 + 400 * np.array(list(counts.values())) / len(reports)
    size_axes.scatter(widths, heights, marker_areas, color=motion.BLUE, alpha=0.6)
    size_axes.set(
        xlabel="width, pixels",
        ylabel="height, pixels",
        xlim=(0, 1.1 * max(widths)),
        ylim=(0, 1.1 * max(heights)),
    )
    figure.savefig(file, dpi=100)


# ----------------------------------------------------------------------------------------- frames


@dataclass
class ExtractionCounts:
    """Count what `extract_video` did."""

    written: int = 0  # folders of frames
    too_short: int = 0  # scenes with fewer than --min_frames frames
    already_done: int = 0  # videos that an earlier run had extracted with the same flags

    def __iadd__(self, other: ExtractionCounts) -> ExtractionCounts:
        self.written += other.written
        self.too_short += other.too_short
        self.already_done += other.already_done
        return self


def find_videos(paths: Sequence[str]) -> dict[Path, str]:
    """Return {video file: name of its folder of frames} of the files, and of all videos in the
    folders.

    Ends the script if a path does not exist, if there are no videos, or if two would get the same
    name.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.is_file() and video_decode.is_video(p)]
            files += sorted(inside, key=images.natural_key)
        elif path.is_file():
            files.append(path)
        else:
            raise SystemExit(f"{path}: no such file or folder")
    if not files:
        raise SystemExit(f"{' '.join(paths)}: no video files")
    stem_counts = collections.Counter(file.stem for file in files)
    names = []
    for file in files:
        is_unique = stem_counts[file.stem] == 1
        names.append(file.stem if is_unique else file.name.replace(".", "_"))
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise SystemExit(f"{count} videos would be extracted to {name}. Rename all but one.")
    return dict(zip(files, names))


def find_scenes(path: Path, video: video_decode.VideoInfo) -> list[tuple[int, int]]:
    """Return (first frame, end) of each scene of a video; `end` is the frame after its last one."""
    num_frames = len(video.times)
    scenes = SceneDetector(video.rate)
    for frame in video_decode.read_frames(path, video.times, range(num_frames)):
        scenes.add(motion.shrink_frame(frame))
    cuts = scenes.cuts()
    return list(zip([0, *cuts], [*cuts, num_frames]))


def extract_video(path: Path, name: str, args: argparse.Namespace) -> ExtractionCounts:
    """Extract one video to <out>/<name>, or to a folder per scene: <out>/<name>_scene000 and so on.

    A hidden file in <out> marks a finished video and records the flags. Raises ValueError if the
    video is damaged.
    """
    marker = args.out / f".{name}.extracted"
    options = [args.fps, args.width, args.height, args.resize_mode, args.scenes, args.format]
    state = json.dumps([str(path.absolute()), path.stat().st_mtime_ns, *options])
    if marker.exists() and marker.read_text() == state:
        return ExtractionCounts(already_done=1)
    video = video_decode.probe_video(path)
    metadata = folder_index.read_metadata(path.parent).get(path.name, {})
    clip = Clip(path, [], video.rate, video.times, metadata=metadata)
    fps = video.rate if args.fps == "native" else min(args.fps, video.rate)
    scenes = find_scenes(path, video) if args.scenes else [(0, len(video.times))]
    frame_times = clip.frame_times()
    counts = ExtractionCounts()
    for scene_number, (first, end) in enumerate(scenes):
        duration = frame_times[end - 1] - frame_times[first]
        num_frames = int(duration * fps + 1 + DURATION_TOLERANCE)
        if num_frames < args.min_frames:
            counts.too_short += 1
            continue
        scene_name = name if len(scenes) == 1 else f"{name}_scene{scene_number:03d}"
        frame_indices = np.minimum(clip.frame_indices(first, num_frames, fps), end - 1)
        write_frames(args.out / scene_name, clip, frame_indices, fps, args)
        counts.written += 1
    marker.write_text(state)
    return counts


def write_frames(
    folder: Path, clip: Clip, frame_indices: np.ndarray, fps: float, args: argparse.Namespace
) -> None:
    """Write frames of a clip and their clip.json, completely or not at all.

    The caption is that of the clip's metadata, or of a text file beside the video.
    """
    from PIL import Image

    partial_folder = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    for i, frame in enumerate(clip.iter_frames(frame_indices)):
        if args.width:
            frame = images.resize_frame(frame, args.width, args.height, args.resize_mode)
        file = partial_folder / f"{i:05d}.{args.format}"
        Image.fromarray(frame).save(file, quality=JPEG_QUALITY)
    metadata = dict(clip.metadata)
    caption_file = clip.path.with_suffix(".txt")
    if caption_file.is_file():
        metadata["caption"] = caption_file.read_text("utf-8", "replace").strip()
    metadata["fps"] = round(fps, 4)
    metadata["source"] = clip.path.name
    (partial_folder / "clip.json").write_text(json.dumps(metadata, ensure_ascii=False))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial_folder, folder)


def extract_videos(args: argparse.Namespace) -> None:
    """Extract all videos in parallel; name those that cannot be read. Exit with 1 if none can."""
    names = find_videos(args.video)
    args.out.mkdir(parents=True, exist_ok=True)
    counts = ExtractionCounts()
    num_failed = 0

    def extract_or_explain(path: Path) -> ExtractionCounts | ValueError:
        try:
            return extract_video(path, names[path], args)
        except ValueError as error:
            return error

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        folder_index.progress_bar(len(names), "extracting") as bar,
    ):
        for _, result in folder_index.results_as_completed(pool, extract_or_explain, names):
            bar.update()
            if isinstance(result, ValueError):
                num_failed += 1
                logger.warning("%s", result)
            else:
                counts += result
    print(
        f"{args.out}: wrote {counts.written} folders of frames; left out {counts.too_short} scenes "
        f"of less than {args.min_frames} frames. Of {len(names)} videos, {counts.already_done} "
        f"were already extracted and {num_failed} could not be read."
    )
    if num_failed == len(names):
        raise SystemExit(1)


# -------------------------------------------------------------------------------------- tracklets


def convert_annotations(args: argparse.Namespace) -> None:
    """Write tracklets.json into each video's folder, or <video>.json where there is no such
    folder."""
    args.out.mkdir(parents=True, exist_ok=True)
    num_videos = 0
    num_objects = 0
    for file in args.file:
        for name, tracklets in read_tracklets(file, args.size).items():
            if (args.out / name).is_dir():
                target = args.out / name / "tracklets.json"
            else:
                target = args.out / f"{name}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_tracklets(target, tracklets)
            num_videos += 1
            num_objects += len(tracklets.ids)
    print(
        f"{args.out}: wrote tracklets of {num_videos} videos with {num_objects} objects. "
        f"To look at them: python -m svd_xtend.evaluation.tracklet_score {target} --frames ..."
    )


# ------------------------------------------------------------------------------------------ split


def split_folder(args: argparse.Namespace) -> None:
    """Make the folders <out>/train and <out>/held_out, of links to the clips by default.

    Captions, annotations and rows of metadata.jsonl go with their clip.
    """
    index = FolderIndex(args.folder)
    sources = split.clips_by_source_video(index)
    if len(sources) < 2:
        raise SystemExit(
            f"{args.folder}: holds {len(sources)} source video(s). The split is by source video "
            "and needs at least two."
        )
    for part in ("train", "held_out"):
        if (args.out / part).exists():
            raise SystemExit(
                f"{args.out / part}: already exists. Remove it, or choose another output folder."
            )
    validation_sources = split.choose_validation_sources(sources, args.held_out, args.seed)
    metadata_lines = folder_index.read_metadata_lines(args.folder)
    rows_of_part: dict[str, list[int]] = {"train": [], "held_out": []}
    for source, rows in sources.items():
        part = "held_out" if source in validation_sources else "train"
        rows_of_part[part] += rows
    for part, rows in rows_of_part.items():
        names = [index.name(row) for row in rows]
        fill_part(args.folder, args.out / part, names, PLACE_FILE[args.how], metadata_lines)
    print(
        f"{args.out}: {len(rows_of_part['train'])} training clips, "
        f"{len(rows_of_part['held_out'])} validation clips"
    )


def fill_part(
    folder: Path,
    target_folder: Path,
    names: Sequence[str],
    place_file: Callable[[Path, Path], Any],
    metadata_lines: dict[str, list[str]],
) -> None:
    """Make one part of a split: the named clips, the text and annotation files beside them,
    metadata.jsonl."""
    target_folder.mkdir(parents=True)
    for name in names:
        stem = name if (folder / name).is_dir() else Path(name).stem
        for file_name in {name, f"{stem}.txt", f"{stem}.json"}:
            if (folder / file_name).exists():
                place_file(folder / file_name, target_folder / file_name)
    lines = [line for name in names for line in metadata_lines.get(name, [])]
    if lines:
        text = "".join(f"{line}\n" for line in lines)
        (target_folder / "metadata.jsonl").write_text(text)


def link_path(source: Path, target: Path) -> None:
    """Link to a file or folder."""
    target.symlink_to(source.absolute())


def copy_path(source: Path, target: Path) -> None:
    """Copy a file or folder."""
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


PLACE_FILE: dict[str, Callable[[Path, Path], Any]] = {
    "link": link_path,
    "copy": copy_path,
    "move": shutil.move,
}


# ------------------------------------------------------------------------------------ command line


def parse_size(text: str) -> tuple[int, int]:
    """Return (854, 480) for "854x480"."""
    width, height = (int(side) for side in text.lower().split("x"))
    return width, height


parse_size.__name__ = "WIDTHxHEIGHT"  # argparse's errors show it


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the four commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fps_type = flag_types.number_or_word("native", flag_types.positive_float)
    # fmt: off
    check = commands.add_parser("check", help="list the clips of a folder; say what is skipped and why")
    check.add_argument("folder", type=Path, help="folder of video files or folders of frames")
    check.add_argument("--fps", type=fps_type, default=7.0, help="frames per second of a sample as in training, or native; default: %(default)s")
    check.add_argument("--source_fps", type=flag_types.positive_float, help="frames per second of folders without clip.json, as in training; default: --fps")
    check.add_argument("--num_frames", type=flag_types.positive_int, default=14, help="frames of a sample, as in training; default: %(default)s")
    check.add_argument("--output_dir", default="outputs/check", help="folder for report.json and check.png; default: %(default)s")

    frames = commands.add_parser("frames", help="extract videos to folders of frames")
    frames.add_argument("video", nargs="+", help="video files, or folders that hold them")
    frames.add_argument("out", type=Path, help="folder for the folders of frames")
    frames.add_argument("--fps", type=fps_type, default="native", help="frames per second to extract, or native for each video's own; default: %(default)s")
    frames.add_argument("--width", type=flag_types.positive_int, help="pixels; default: each video's own")
    frames.add_argument("--height", type=flag_types.positive_int, help="pixels; default: each video's own")
    frames.add_argument("--resize_mode", choices=["crop", "stretch"], default="crop", help="crop the centre, or ignore the aspect ratio; default: %(default)s")
    frames.add_argument("--scenes", action="store_true", help="write a folder per scene")
    frames.add_argument("--min_frames", type=flag_types.positive_int, default=14, help="leave out scenes with fewer frames; default: %(default)s")
    frames.add_argument("--format", choices=["jpg", "png", "webp"], default="jpg", help="picture format; default: %(default)s")

    tracklets = commands.add_parser("tracklets", help="convert public annotations to this project's tracklets.json")
    tracklets.add_argument("file", nargs="+", help="annotation files: BDD100K, MOTChallenge, KITTI tracking, YouTube-VIS")
    tracklets.add_argument("out", type=Path, help="folder of the videos")
    tracklets.add_argument("--size", type=parse_size, help="width and height in pixels, such as 854x480, for formats that do not state them")

    split_parser = commands.add_parser("split", help="split a folder into training clips and validation clips")
    split_parser.add_argument("folder", type=Path, help="folder of video files or folders of frames")
    split_parser.add_argument("out", type=Path, help="folder for train/ and held_out/")
    split_parser.add_argument("--held_out", type=float, default=0.1, help="fraction of the source videos that form the validation set; default: %(default)s")
    split_parser.add_argument("--how", choices=PLACE_FILE, default="link", help="link to the clips, copy or move them; default: %(default)s")
    split_parser.add_argument("--seed", type=int, default=0, help="changes which source videos are chosen; default: %(default)s")
    # fmt: on
    return parser


def main() -> None:
    """Run one command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = build_parser()
    args = parser.parse_args()
    if args.command == "frames" and (args.width is None) != (args.height is None):
        parser.error("--width and --height: pass both or neither")
    if args.command == "split" and not 0 < args.held_out < 1:
        parser.error(f"--held_out {args.held_out}: must be above 0 and below 1")
    try:
        COMMANDS[args.command](args)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    except OSError as error:  # for example a full disk; what was written before is complete
        path = error.filename or getattr(args, "out", None) or args.output_dir
        raise SystemExit(f"{path}: {error.strerror or error}") from error


COMMANDS = {
    "check": check_folder,
    "frames": extract_videos,
    "tracklets": convert_annotations,
    "split": split_folder,
}

if __name__ == "__main__":
    main()
