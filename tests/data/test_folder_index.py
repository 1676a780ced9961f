"""Folders of many videos: listed once, watched for changes, drawn by weight, read again."""

import errno
import json
import logging
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_dummy_dataset import dataset, picture

import train_svd
from svd_xtend.data import folder_index, images, sampler
from svd_xtend.data.clip import ClipSpec
from svd_xtend.data.folder_index import FolderIndex
from svd_xtend.data.sampler import ClipCollection, ClipSampler, draws_per_pool


def videos(root, count, frames=3, old=True):
    """Make folders of empty files. old: they changed long enough ago to be trusted."""
    for v in range(count):
        (root / f"v{v}").mkdir(parents=True)
        for f in range(frames):
            (root / f"v{v}" / f"{f}.png").touch()
        if old:
            os.utime(root / f"v{v}", (time.time() - 60,) * 2)
    return root


def spec(num_frames):
    """Return a spec of that many frames, 7 per second, of any size."""
    return ClipSpec(width=0, height=0, num_frames=num_frames, fps=7)


def names(clips):
    return [[f"{clip.path.name}/{name}" for name in clip.files] for clip in clips]


def metadata(clips):
    return [clip.metadata for clip in clips]


@pytest.fixture
def looked(monkeypatch):
    """Return a list to which the name of each clip that is listed is appended."""
    seen = []
    list_clip = FolderIndex.list_clip

    def watched(self, scan, name):
        seen.append(name)
        return list_clip(self, scan, name)

    monkeypatch.setattr(FolderIndex, "list_clip", watched)
    return seen


def test_the_second_start_lists_nothing_and_finds_the_same_clips(tmp_path, looked):
    root = videos(tmp_path / "root", 12)
    first = ClipCollection(root, spec(3))
    assert sorted(looked) == sorted(f"v{v}" for v in range(12))
    looked.clear()
    again = ClipCollection(root, spec(3))
    assert looked == []
    assert names(again) == names(first) and metadata(again) == metadata(first)
    assert [clip.path.name for clip in first] == [f"v{v}" for v in range(12)]  # natural order
    assert [first[3].path / name for name in first[3].files] == images.list_frames(root / "v3")


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "v1" / "1.png").unlink(),
        lambda root: (root / "v1" / "9.png").touch(),
        lambda root: (root / "v1" / "0.png").rename(root / "v1" / "5.png"),
        lambda root: (root / "v1").rename(root / "w1"),
        lambda root: videos(root / "more", 1) and (root / "more" / "v0").rename(root / "v99"),
        lambda root: [f.unlink() for f in (root / "v1").iterdir()] and (root / "v1").rmdir(),
        lambda root: (root / "v1" / "clip.json").write_text('{"fps": 3}'),
    ],
    ids=["fewer", "more", "renamed", "moved", "new", "gone", "clip_json"],
)
def test_what_changed_is_listed_again_and_nothing_else(tmp_path, looked, change):
    root = videos(tmp_path / "root", 6)
    before = ClipCollection(root, spec(2))
    looked.clear()
    change(root)
    found = ClipCollection(root, spec(2))
    assert len(looked) <= 2 and not set(looked) & {"v0", "v2", "v3"}
    folder_index.index_file(root).unlink()
    fresh = ClipCollection(root, spec(2))
    assert names(found) == names(fresh) and metadata(found) == metadata(fresh)
    assert names(before) != names(found) or before[1].rate != found[1].rate


def test_a_folder_that_changed_a_moment_ago_is_not_trusted(tmp_path, looked):
    """Its time of change may not show the next change, because file systems count time in steps."""
    root = videos(tmp_path / "root", 2, old=False)
    ClipCollection(root, spec(3))
    looked.clear()
    ClipCollection(root, spec(3))
    assert sorted(looked) == ["v0", "v1"]


def test_a_damaged_index_is_written_again(tmp_path, looked):
    root = videos(tmp_path / "root", 3)
    expected = names(ClipCollection(root, spec(3)))
    file = folder_index.index_file(root)
    whole = file.read_bytes()
    for content in (b"", b"no index", whole[:-4], whole[:100], whole[8:], b"\xff" * 5000):
        file.write_bytes(content)
        looked.clear()
        assert names(ClipCollection(root, spec(3))) == expected and len(looked) == 3


def test_an_index_that_cannot_be_written_costs_a_listing_and_no_more(tmp_path, monkeypatch, caplog):
    root = videos(tmp_path / "root", 3)
    expected = names(ClipCollection(root, spec(3)))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert names(ClipCollection(root, spec(3))) == expected
    assert "the next start lists the folder again" in caplog.text


def foreign_tables():
    """Tables that other versions of this module may have left in place of the index."""
    good = folder_index.empty_table()
    version = str(folder_index.FORMAT)
    return {
        "other version": good.replace_schema_metadata({"format": str(folder_index.FORMAT - 1)}),
        "no version": good,
        "other columns": good.drop_columns(["counts"]).replace_schema_metadata({"format": version}),
    }


@pytest.mark.parametrize("table", foreign_tables().values(), ids=foreign_tables().keys())
def test_an_index_that_another_version_wrote_is_not_read(tmp_path, looked, table):
    """Its numbers may mean something else."""
    root = videos(tmp_path / "root", 3)
    ClipCollection(root, spec(3))
    looked.clear()
    folder_index.save_index(table, folder_index.index_file(root))
    assert folder_index.load_index(folder_index.index_file(root)) is None
    assert len(ClipCollection(root, spec(3))) == 3 and len(looked) == 3


def test_files_of_other_versions_have_other_names(tmp_path, monkeypatch):
    current = folder_index.index_file(tmp_path)
    monkeypatch.setattr(folder_index, "FORMAT", folder_index.FORMAT - 1)
    assert folder_index.index_file(tmp_path) != current


def test_the_index_of_many_clips_is_mapped_and_not_copied(tmp_path):
    """A million clips would otherwise be in the memory of every loader process."""
    root = videos(tmp_path / "root", 3)
    index = FolderIndex(root)
    mapped_range = None
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(index.file.name):
            mapped_range = [int(part, 16) for part in line.split()[0].split("-")]
    low, high = mapped_range
    for name, array in index.arrays.items():
        assert low <= array.ctypes.data < high, name
        assert not array.flags.writeable, name
    for name in ("name", "frames", "note"):
        for buffer in index.table.column(name).buffers():
            assert buffer is None or not buffer.size or low <= buffer.address < high, name
    assert index.arrays["unusable"].dtype == bool


def test_an_index_is_replaced_at_once(tmp_path, monkeypatch):
    """A run that cannot finish writing leaves the index as it was, and no other file."""
    root = videos(tmp_path / "root", 3)
    index = FolderIndex(root)
    content = index.file.read_bytes()

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    folder_index.save_index(folder_index.empty_table(), index.file)
    assert index.file.read_bytes() == content
    assert [file.name for file in index.file.parent.glob(f"{index.file.stem}*")] == [
        index.file.name
    ]


def put_names(clips, answer):
    answer.put(names(clips))


def test_loader_processes_that_are_not_forked_map_the_index_file(tmp_path):
    clips = ClipCollection(videos(tmp_path / "root", 3), spec(3))
    state = clips.indexes[0].__getstate__()
    assert state["table"] is None and "arrays" not in state  # only the path and a stamp are sent
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=put_names, args=(clips, answer))
    process.start()
    assert answer.get(timeout=60) == names(clips)
    process.join()


def test_an_index_that_could_not_be_stored_is_sent_whole(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    index = FolderIndex(videos(tmp_path / "root", 3))
    again = pickle.loads(pickle.dumps(index))
    assert again.names() == index.names() and again.frame_names(2) == index.frame_names(2)


def test_a_loader_process_notices_that_another_run_has_replaced_the_index(tmp_path):
    root = videos(tmp_path / "root", 3)
    index = FolderIndex(root)
    sent = pickle.dumps(index)
    index.store(index.table)
    with pytest.raises(ValueError, match="another run has listed the folder again"):
        pickle.loads(sent)


def test_a_folder_whose_clip_json_has_changed_is_listed_once(tmp_path, looked):
    root = videos(tmp_path / "root", 3)
    for text, old in (('{"fps": 3}', 50), ('{"fps": 4}', 40)):
        (root / "v1" / "clip.json").write_text(text)
        for path in (root / "v1" / "clip.json", root / "v1"):
            os.utime(path, (time.time() - old,) * 2)
        assert FolderIndex(root).arrays["rates"][1] == json.loads(text)["fps"]
    looked.clear()
    FolderIndex(root)
    assert looked == []


def test_names_may_be_no_utf_8_and_folders_may_be_empty(tmp_path):
    root = videos(tmp_path / "root", 1)
    os.mkdir(os.path.join(os.fsencode(root), b"v\xff"))
    os.close(os.open(os.path.join(os.fsencode(root), b"v\xff", b"\xfe.png"), os.O_CREAT))
    (root / "empty").mkdir()
    clips = ClipCollection(root, spec(1))
    assert len(clips) == 2
    for clip in clips:
        assert all((clip.path / name).exists() for name in clip.files)


# ----------------------------------------------------------------------------- several folders


def test_folders_without_weights_are_one(tmp_path):
    data = dataset([videos(tmp_path / "a", 2), videos(tmp_path / "b", 4)])
    one = ClipSampler([(range(6), 1)], 0)
    assert len(data) == 6
    for index in range(30):
        assert next(data.sampler.choices(index)) == next(one.choices(index))
    assert data.clips[1].path == tmp_path / "a" / "v1"
    assert data.clips[2].path == tmp_path / "b" / "v0"
    with pytest.raises(IndexError):
        data.clips[6]


def test_each_cycle_keeps_the_weights_exactly_and_each_pass_shows_every_clip_once():
    drawing = ClipSampler([(range(3), 1), (range(3, 53), 2), (range(53, 60), 1)], 4)
    drawn = [next(drawing.choices(i)) for i in range(3 * sampler.MIN_CYCLE)]
    pools = np.searchsorted([3, 53], drawn, side="right")
    for cycle in range(3):
        counts = np.bincount(pools[cycle * sampler.MIN_CYCLE : (cycle + 1) * sampler.MIN_CYCLE])
        assert counts.tolist() == [250, 500, 250]
    for pool, size, start in ((0, 3, 0), (1, 50, 3), (2, 7, 53)):
        drawn_of_pool = np.array(drawn)[pools == pool] - start
        for i in range(0, len(drawn_of_pool) - size, size):
            assert sorted(drawn_of_pool[i : i + size]) == list(range(size))
    assert abs(np.bincount(pools[:100])[1] - 50) < 25  # mixed, not one folder after the other


def test_any_sample_can_be_asked_for_first(tmp_path):
    """Several processes and resumed runs ask for any index first."""
    pools = [(range(3), 0.7), (range(3, 8), 0.3)]
    for unit in (1, 4):
        drawing = ClipSampler(pools, 9, unit)
        drawn = [next(drawing.choices(i)) for i in range(2500)]
        for i in (2499, 0, 1777, 1000, 999):
            assert next(ClipSampler(pools, 9, unit).choices(i)) == drawn[i]
            assert next(drawing.choices(i)) == drawn[i]


def test_replacements_are_all_the_other_clips_of_the_folder():
    drawing = ClipSampler([(range(4), 1), (range(4, 13), 1)], 0)
    for index in range(8):
        choices = list(drawing.choices(index))
        assert sorted(choices) in ([0, 1, 2, 3], list(range(4, 13)))


def test_draws_are_shared_out_by_largest_remainder():
    assert draws_per_pool([1, 1, 1]).tolist() == [334, 333, 333]
    assert draws_per_pool([998, 1, 1]).tolist() == [998, 1, 1]
    # a size that few clips have is still drawn
    assert draws_per_pool([99999, 1, 1]).tolist() == [998, 1, 1]


def test_a_weight_too_small_for_one_draw_in_a_cycle_is_an_error(tmp_path):
    roots = [videos(tmp_path / "a", 2), videos(tmp_path / "b", 2)]
    with pytest.raises(ValueError, match="^--folder_weights 10000 1: one is less than 1/1000"):
        ClipCollection(roots, spec(3)).pools([10000, 1])


@pytest.mark.parametrize(
    "weights, message",
    [
        (["1"], "--folder_weights: expected 2 positive numbers, one per --base_folder; got 1"),
        (["1", "0"], "--folder_weights: expected a number above 0; got 0"),
        (
            ["1", "2", "3"],
            "--folder_weights: expected 2 positive numbers, one per --base_folder; got 3",
        ),
    ],
)
def test_each_folder_needs_a_positive_weight(capsys, weights, message):
    flags = ["--base_folder", "a", "b", "--folder_weights", *weights]
    with pytest.raises(SystemExit):
        train_svd.parse(train_svd.build_parser(), flags)
    assert message in capsys.readouterr().err


def test_weights_of_folders_are_parsed_in_their_order():
    flags = ["--base_folder", "a", "b", "--folder_weights", "3", "1"]
    assert train_svd.parse(train_svd.build_parser(), flags).folder_weights == [3, 1]


def test_two_folders_with_weights_train(run, clips, boxed_clips):
    flags = ["--train_params", "conv_out", "--max_train_steps=2"]
    flags += ["--base_folder", str(clips), str(boxed_clips)]
    seen = []

    def loss(model, pipe, batch, args):
        seen.extend(batch["index"].tolist())
        return train_svd.training_loss(model, pipe, batch, args)

    run(*flags, "--folder_weights", "1", "3", loss=loss)
    assert seen == [0, 1]


# ----------------------------------------------------------------------- networks that stutter


@pytest.fixture
def stutter(monkeypatch):
    """Return a function: stutter(code, times) lets the next reads of files fail with that error.

    It returns the list to which the waiting times are appended.
    """
    state, waits = {"left": 0}, []
    read = Path.read_bytes

    def read_bytes(self):
        if state["left"]:
            state["left"] -= 1
            raise OSError(state["code"], os.strerror(state["code"]), str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(images.time, "sleep", waits.append)

    def start(code, times):
        state.update(code=code, left=times)
        waits.clear()
        return waits

    return start


def test_an_error_that_passes_changes_nothing(tmp_path, stutter, caplog):
    for i in range(3):
        picture(tmp_path / "v" / f"{i}.png", 50 + i)
    data = dataset(tmp_path)
    expected = data[0]["pixel_values"]
    waits = stutter(errno.ESTALE, 3)
    with caplog.at_level(logging.WARNING):
        item = data[0]
    assert (item["pixel_values"] == expected).all() and item["failed"] == 0
    assert waits == [0.5, 1, 2] and "Stale file handle; trying again in 0.5 s" in caplog.text


def test_a_file_system_that_stays_away_stops_the_run_instead_of_changing_what_it_sees(
    tmp_path, stutter
):
    for v in range(2):
        for i in range(3):
            picture(tmp_path / f"v{v}" / f"{i}.png", 50)
    waits = stutter(errno.ETIMEDOUT, 1000)
    with pytest.raises(
        images.UnreachableError,
        match=r"\.png: Connection timed out, for 31.5 s. Run the same command",
    ):
        dataset(tmp_path)[0]
    assert sum(waits) == 31.5


def test_a_missing_or_unreadable_file_is_not_waited_for(tmp_path, stutter):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    waits = stutter(errno.EACCES, 1)
    with pytest.raises(ValueError, match="a.png: cannot be read as a picture .*Permission denied"):
        images.load_frame(tmp_path / "a.png")
    with pytest.raises(ValueError, match="none.png: cannot be read as a picture"):
        images.load_frame(tmp_path / "none.png")
    assert waits == []


def test_a_bad_sector_is_a_damaged_frame_in_the_end(tmp_path, stutter):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    waits = stutter(errno.EIO, 1000)
    with pytest.raises(ValueError, match="a.png: cannot be read as a picture .*Input/output error"):
        images.load_frame(tmp_path / "a.png")
    assert len(waits) == 6
