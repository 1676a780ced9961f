"""Tracklets: reading annotation files, crops, soft boxes, drawing and scores."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svd_xtend.data import annotations, images
from svd_xtend.data.tracklets import (
    Tracklets,
    beside_boxes,
    box_iou,
    crop_window,
    draw_boxes,
    fit_to_picture,
    palette,
)
from svd_xtend.demo.synthetic_clips import (
    make_clip,
    score_box_following,
    segment_boxes,
    with_contrasting_colors,
    write_clips,
)
from svd_xtend.evaluation import tracklet_score
from svd_xtend.evaluation.tracklet_score import score_tracklets

DATA = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="real annotations are not part of the repo"
)


def random_tracklets(f=6, n=3, seed=0):
    """Return n random tracklets of f frames, with gaps."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 0.6, (f, n, 2))
    size = rng.uniform(0.1, 0.4, (f, n, 2))
    boxes = np.concatenate([corner, corner + size], -1).astype(np.float32)
    valid = rng.random((f, n)) < 0.8
    ids = tuple(str(i) for i in range(n))
    return Tracklets(boxes, valid, valid.copy(), palette(n), ids, ("car",) * n)


def one_tracklet(boxes):
    """Return a tracklet that is valid and hard in all frames. boxes: [x0, y0, x1, y1] of each."""
    boxes = np.array(boxes, np.float32).reshape(-1, 1, 4)
    valid = np.ones((len(boxes), 1), bool)
    return Tracklets(boxes, valid, valid, palette(1), ("0",), ("",))


def write(path, document):
    """Write text, or another value as JSON. Return the path."""
    if not isinstance(document, str):
        document = json.dumps(document)
    path.write_text(document)
    return path


# ------------------------------------------------------------------------------------------------------------- formats


def bdd_frames():
    box = {"x1": 0, "y1": 36, "x2": 63, "y2": 71}
    return [
        {"name": "v-0000001.jpg", "videoName": "v", "frameIndex": 0, "labels": [
            {"id": "7", "category": "car", "attributes": {"Occluded": True}, "box2d": box},
            {"id": 8, "category": "pedestrian", "attributes": {"crowd": False}, "box2d": box},
            {"id": "9", "category": "lane", "poly2d": []},
        ]},
        {"name": "v-0000002.jpg", "videoName": "v", "frameIndex": 1, "labels": None},
        {"name": "v-0000003.jpg", "videoName": "v", "frameIndex": 2},
        {"name": "v-0000004.jpg", "videoName": "v", "frameIndex": 3, "labels": [{"id": 7, "category": "car", "box2d": box}]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrap", [lambda frames: frames, lambda frames: {"frames": frames, "config": {}}]
)
def test_bdd100k_files_may_have_either_layout_any_id_null_labels_and_labels_without_box(
    tmp_path, wrap
):
    got = annotations.read_tracklets(write(tmp_path / "v.json", wrap(bdd_frames())), (128, 72))["v"]
    assert got.ids == ("7", "8") and got.categories == ("car", "pedestrian")
    assert got.valid.tolist() == [[True, True], [False, False], [False, False], [True, False]]
    np.testing.assert_allclose(
        got.boxes[0, 0], [0, 0.5, 0.5, 1]
    )  # the right and lower pixel belong to the box


def test_the_size_in_a_scalabel_file_takes_precedence_over_the_pictures(tmp_path):
    document = {"frames": bdd_frames(), "config": {"imageSize": {"width": 128, "height": 72}}}
    got = annotations.read_tracklets(write(tmp_path / "v.json", document), (1, 1))["v"]
    np.testing.assert_allclose(got.boxes[0, 0], [0, 0.5, 0.5, 1])


def test_older_bdd_files_count_frames_as_index_or_not_at_all(tmp_path):
    with_index = bdd_frames()
    without_index = bdd_frames()
    for i, frame in enumerate(with_index):
        del frame["frameIndex"]
        frame["index"] = i
    for frame in without_index:
        del frame["frameIndex"]
    for frames in (with_index, without_index):
        got = annotations.read_tracklets(write(tmp_path / "v.json", frames), (128, 72))["v"]
        assert got.valid[:, 0].tolist() == [True, False, False, True]


@pytest.mark.parametrize("columns", ["1,1,1", "1,-1,-1,-1"])
def test_motchallenge_counts_frames_and_pixels_from_one(tmp_path, columns):
    (tmp_path / "seq" / "gt").mkdir(parents=True)
    (tmp_path / "seq" / "seqinfo.ini").write_text("[Sequence]\nimWidth=100\nimHeight=50\n")
    file = tmp_path / "seq" / "gt" / "gt.txt"
    file.write_text(f"1,4,1,1,50,25,{columns}\n3,4,51,26,50,25,{columns}\n3,9,-9,1,20,25,0,1,1\n\n")
    got = annotations.read_tracklets(file)["seq"]
    assert got.ids == ("4",) and got.valid[:, 0].tolist() == [True, False, True]
    np.testing.assert_allclose(got.boxes[[0, 2], 0], [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])


def test_kitti_leaves_out_dontcare_but_counts_its_frame(tmp_path):
    tail = " -1" * 7
    file = write(
        tmp_path / "0001.txt",
        f"0 2 Car 0 0 1.5 10 0 20 5{tail}\n4 -1 DontCare -1 -1 -10 1 1 2 2{tail}\n",
    )
    got = annotations.read_tracklets(file, (20, 10))["0001"]
    assert got.ids == ("2",) and got.categories == ("Car",) and len(got) == 5
    np.testing.assert_allclose(got.boxes[0, 0], [0.5, 0, 1, 0.5])


def test_youtube_vis_null_is_absent(tmp_path):
    document = {
        "videos": [{"id": 3, "width": 10, "height": 10, "length": 3, "file_names": ["abc/0.jpg", "abc/5.jpg", "abc/10.jpg"]}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"id": 5, "video_id": 3, "category_id": 1, "bboxes": [[0, 0, 5, 5], None, [5, 5, 5, 5]]}],
    }  # fmt: skip
    got = annotations.read_tracklets(write(tmp_path / "y.json", document))["abc"]
    assert got.valid[:, 0].tolist() == [True, False, True] and got.categories == ("dog",)
    np.testing.assert_allclose(got.boxes[2, 0], [0.5, 0.5, 1, 1])


def test_json_boxes_are_hard_at_keyframes_soft_between_them_and_absent_from_null_on(tmp_path):
    boxes = {"0": [0, 0, 20, 10], "4": [40, 20, 60, 30], "6": None, "8": [0, 0, 10, 10]}
    document = {
        "size": [100, 50],
        "frames": 10,
        "tracklets": [{"id": "a", "category": "rhino", "boxes": boxes}],
    }
    got = annotations.read_tracklets(write(tmp_path / "clip.json", document))["clip"]
    assert got.valid[:, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 1, 0]
    assert got.hard[:, 0].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    np.testing.assert_allclose(
        got.boxes[[0, 2, 4], 0], [[0, 0, 0.2, 0.2], [0.2, 0.2, 0.4, 0.4], [0.4, 0.4, 0.6, 0.6]]
    )


def test_json_files_can_contain_several_videos_and_read_back_what_was_written(tmp_path):
    ours = random_tracklets()
    annotations.write_tracklets(tmp_path / "a.json", ours)
    document = json.loads((tmp_path / "a.json").read_text())
    got = annotations.read_tracklets(
        write(tmp_path / "all.json", {"videos": {"a": document, "b": document}})
    )
    assert got.keys() == {"a", "b"} and got["b"].ids == ours.ids
    assert (got["a"].valid == ours.valid).all() and (got["a"].hard == ours.hard).all()
    np.testing.assert_allclose(got["a"].boxes[ours.valid], ours.boxes[ours.valid], atol=1e-5)


def test_the_example_in_the_documentation_is_read(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "box-control.md"
    text = page.read_text().split("```json\n")[1].split("```")[0]
    got = annotations.read_tracklets(write(tmp_path / "a.json", text))["a"]
    assert got.ids == ("rhino", "mammoth") and len(got) == 14
    assert got.valid.sum(0).tolist() == [14, 7] and got.hard.sum(0).tolist() == [2, 2]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{", "expected JSON"),
        ('{"a": 1}', "tracklets"),
        ("7", "17 or 18 words"),
        ("1,2,abc,4,5,6,1,1,1", "line 1: expected 9 or 10 numbers"),
        ("1,1,1,1,5,5,1,1,1\n0,1,1,1,5,5,1,1,1", "line 2"),
        ("1,-1,1,1,5,5,1,1,1", "run a tracker"),
        ("0 1 Car 0 0", "line 1: expected 17 or 18 words"),
        (
            '[{"name": "a", "labels": [{"id": 1, "box2d": {"x1": 0, "y1": "b", "x2": 1, "y2": 1}}]}]',
            "frame 0, label 0",
        ),
        ('[{"name": "a", "labels": [{"box2d": {}}]}]', "id and box2d"),
        ('["a"]', "frame 0"),
        ('{"tracklets": [{"boxes": {"0": [0, 0, 1]}}]}', "tracklets[0], frame 0"),
        ('{"tracklets": [{"boxes": {"x": [0, 0, 1, 1]}}]}', "frames counted from 0"),
        ('{"tracklets": [{"boxes": {"0": [0.5, 0, 0.4, 1]}}]}', "x1 <= x2"),
        ('{"tracklets": [], "size": [1]}', "one of the formats"),
        ('{"videos": {"a": []}}', "one of the formats"),
        ('{"annotations": null}', "one of the formats"),
        ('[{"labels": 3}]', "one of the formats"),
        ('{"frames": "14"}', "a list"),
        ("[]", "at least one video"),
        ("", "at least one video"),
        ('{"tracklets": {}}', "a list"),
        ('{"videos": [], "annotations": [{"video_id": 1}]}', "annotations[0]: video_id"),
    ],
)
def test_a_malformed_file_is_one_error_with_file_record_and_expectation(tmp_path, text, expected):
    file = write(tmp_path / "bad.txt", text)
    with pytest.raises(ValueError) as error:
        annotations.read_tracklets(file, (10, 10))
    assert str(error.value).startswith(str(file))
    assert expected in str(error.value)


def test_missing_files_binary_files_and_unknown_sizes_are_named(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="binary.txt: cannot be read"):
        annotations.read_tracklets(tmp_path / "binary.txt")
    with pytest.raises(ValueError, match="none.txt: cannot be read"):
        annotations.read_tracklets(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="size"):
        annotations.read_tracklets(write(tmp_path / "a.txt", "1,1,1,1,5,5,1,1,1"))


def test_boxes_that_are_nan_or_have_no_area_are_left_out_with_a_warning(tmp_path, caplog):
    file = write(
        tmp_path / "a.txt",
        "1,1,1,1,5,5,1,1,1\n2,1,nan,1,5,5,1,1,1\n3,1,1,1,0,5,1,1,1\n4,1,1,1,-3,5,1,1,1\n",
    )
    got = annotations.read_tracklets(file, (10, 10))["a"]
    assert got.valid[:, 0].tolist() == [True, False, False, False]
    assert "left out 3 boxes" in caplog.text


@real_data
def test_real_annotations_parse():
    expected = {
        "bdd100k/b1c66a42-6f7d68ca.json": ((1280, 720), 202, 144, "car"),
        "kitti/label_02/0001.txt": ((1242, 375), 447, 98, "Car"),
        "mot15/TUD-Campus/gt/gt.txt": ((640, 480), 71, 8, ""),
        "mammoth_rhino/gt/gt.txt": (None, 49, 2, "1"),
    }
    for name, (size, frames, objects, category) in expected.items():
        (got,) = annotations.read_tracklets(DATA / name, size).values()
        assert (len(got), len(got.ids)) == (frames, objects) and category in got.categories
        seen = fit_to_picture(got, size or (854, 480), 512, 320, "crop", range(14), 8)
        assert seen.boxes.min() >= 0 and seen.boxes.max() <= 1 and seen.valid.any()


def test_the_boxes_of_a_picture_are_found_by_the_name_of_its_folder_or_its_own(tmp_path):
    annotations.write_tracklets(tmp_path / "a.json", random_tracklets(4, 1))
    annotations.write_tracklets(tmp_path / "b.json", random_tracklets(5, 1))
    videos = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "b")}
    file = write(tmp_path / "many.json", {"videos": videos})
    by_folder = annotations.find_picture_tracklets(file, "x/b/000.png", (8, 8))
    by_name = annotations.find_picture_tracklets(file, "x/a.png", (8, 8))
    only_video = annotations.find_picture_tracklets(tmp_path / "a.json", "x/photo.png", (8, 8))
    assert (len(by_folder), len(by_name), len(only_video)) == (5, 4, 4)
    with pytest.raises(
        ValueError, match=r"has 2 videos, none of them named x or photo: \['a', 'b'\]"
    ):
        annotations.find_picture_tracklets(file, "x/photo.png", (8, 8))


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    annotations.write_tracklets(tmp_path / "a.json", random_tracklets(4, 1))
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.json").read_bytes())
    assert len(annotations.read_tracklets(tmp_path / "b.json")["b"]) == 4


def test_a_folder_of_annotations_is_searched_for_the_name_of_the_video(tmp_path):
    annotations.write_tracklets(tmp_path / "a.json", random_tracklets(4, 1))
    (tmp_path / "b").mkdir()
    annotations.write_tracklets(tmp_path / "b" / "tracklets.json", random_tracklets(5, 2))
    assert len(annotations.find_tracklets(tmp_path, "a", (8, 8))) == 4
    assert len(annotations.find_tracklets(tmp_path, "b", (8, 8))) == 5
    assert annotations.find_tracklets(tmp_path, "c", (8, 8)) is None
    assert annotations.find_tracklets(tmp_path / "a.json", "c", (8, 8)) is None
    assert (
        len(annotations.find_tracklets(tmp_path / "a.json", "c", (8, 8), is_only_video=True)) == 4
    )


# ---------------------------------------------------------------------------------------------------- crops and windows


@pytest.mark.parametrize("size, target, mode", [((100, 50), (48, 48), "crop"), ((50, 100), (64, 48), "crop"), ((90, 50), (64, 48), "stretch")])  # fmt: skip
def test_projected_boxes_are_where_load_image_put_the_object(tmp_path, size, target, mode):
    """A white rectangle is annotated. After load_image and project it fills its box."""
    w, h = size
    picture = np.zeros((h, w, 3), np.uint8)
    picture[h // 3 : h // 2, w // 3 : w // 2] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    tracklets = one_tracklet([w // 3 / w, h // 3 / h, w // 2 / w, h // 2 / h])
    is_white = np.asarray(images.load_image(tmp_path / "a.png", *target, mode))[..., 0] > 127
    y, x = np.nonzero(is_white)
    corners = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
    found = corners / [target[0], target[1], target[0], target[1]]
    projected = tracklets.project(crop_window(size, *target, mode)).boxes[0, 0]
    np.testing.assert_allclose(projected, found, atol=1 / 48)


def test_a_box_outside_the_crop_becomes_a_line_on_its_border():
    tracklets = one_tracklet([0.8, 0.4, 0.9, 0.6])
    np.testing.assert_allclose(tracklets.project((0.25, 0, 0.75, 1)).boxes[0, 0], [1, 0.4, 1, 0.6])


def test_flip_mirrors_and_flipping_twice_changes_nothing():
    ours = random_tracklets()
    np.testing.assert_allclose(ours.flip().flip().boxes, ours.boxes, atol=1e-6)
    np.testing.assert_allclose(ours.flip().boxes[..., 0], 1 - ours.boxes[..., 2])


def test_frames_after_the_annotation_contain_no_objects():
    ours = random_tracklets(6)
    late = ours.at(range(4, 9))
    assert len(late) == 5
    assert not late.valid[2:].any()
    assert (late.valid[:2] == ours.valid[4:]).all()
    assert not ours.at(range(9, 12)).valid.any() and len(ours.at(range(9, 12))) == 3


def test_the_largest_objects_are_selected_and_those_outside_the_picture_are_not():
    boxes = np.zeros((4, 4, 4), np.float32)
    boxes[:, 0] = [0, 0, 0.2, 0.2]  # small, always there
    boxes[:, 1] = [0, 0, 0.9, 0.9]  # large, one frame
    boxes[:, 2] = [1, 0.2, 1, 0.4]  # outside: a line
    boxes[:, 3] = [0, 0, 0.005, 0.005]  # a speck
    valid = np.ones((4, 4), bool)
    valid[1:, 1] = False
    ours = Tracklets(boxes, valid, valid, palette(4), ("a", "b", "c", "d"), ("",) * 4)
    assert ours.select_largest(8).ids == ("a", "b", "d")
    assert ours.select_largest(8, min_size=0.02).ids == ("a", "b")
    assert ours.select_largest(1).ids == ("b",)
    assert ours.select_largest(2).pad(5).ids == ("a", "b", "", "", "")
    with pytest.raises(ValueError, match="4 objects do not fit 2 slots"):
        ours.pad(2)


# ------------------------------------------------------------------------------------------------------ soft and drawn


def test_soft_boxes_contain_the_hard_ones_and_grow_by_a_ninth_on_average():
    boxes = np.full((4000, 1, 4), 0.5, np.float32)
    ours = one_tracklet(boxes)
    rng = np.random.default_rng(0)
    soft = ours.mark_soft(rng, 1.0).grow_soft_boxes(rng)
    margins = (soft.boxes - boxes) * [-1, -1, 1, 1]
    assert not soft.hard.any()
    assert (margins >= 0).all()
    assert margins.mean() == pytest.approx(1 / 9, rel=0.03)
    assert soft.boxes.min() >= 0 and soft.boxes.max() <= 1
    mean_soft = ours.mark_soft(rng, 1.0).grow_soft_boxes()
    low, high = 0.5 - 1 / 9, 0.5 + 1 / 9
    np.testing.assert_allclose(mean_soft.boxes[0, 0], [low, low, high, high])
    assert (ours.mark_soft(rng, 0.0).grow_soft_boxes(rng).boxes == boxes).all()


def test_half_of_the_objects_are_hard_or_soft_in_all_frames_alike():
    rng = np.random.default_rng(0)
    valid = np.ones((8, 500), bool)
    names = ("",) * 500
    ours = Tracklets(np.zeros((8, 500, 4), np.float32), valid, valid, palette(500), names, names)
    hard = ours.mark_soft(rng, 0.8).hard
    assert hard.mean() == pytest.approx(0.2, abs=0.04)
    assert hard.all(0).mean() == pytest.approx(0.1, abs=0.05)


def test_drawn_boxes_are_found_again_by_their_colour_and_frame_0_is_clean():
    """Nothing is drawn for slots without an object."""
    ours = random_tracklets(5, 3, seed=4).pad(6)
    grey = np.full((5, 3, 48, 64), 100, np.uint8)
    drawn = draw_boxes(grey, ours)
    assert (drawn[0] == 100).all()
    for f in range(1, 5):
        color = (ours.colors * 255).round()
        difference = np.abs(drawn[f].transpose(1, 2, 0)[None] - color[:, None, None]).max(-1)
        is_drawn = (difference < 2).any((1, 2))
        assert not is_drawn[~ours.valid[f]].any()
        assert is_drawn.any()
    alone = one_tracklet(random_tracklets(2, 1, seed=1).boxes)
    y, x = np.nonzero((draw_boxes(grey[:2], alone)[1] != 100).any(0))
    found = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / [64, 48, 64, 48]
    np.testing.assert_allclose(found, alone.boxes[1, 0], atol=1 / 48)


def test_lines_never_leave_a_thin_box():
    thin = one_tracklet([[0.25, 0.25, 0.25 + 1 / 64, 0.75]] * 2)
    drawn = draw_boxes(np.zeros((2, 3, 48, 64), np.uint8), thin, line_width=3)
    y, x = np.nonzero(drawn[1, 0])
    assert (x.min(), x.max(), y.min(), y.max()) == (16, 16, 12, 35)


def test_lines_are_4_pixels_thick_per_1024_of_width_and_at_least_2():
    ours = one_tracklet([[0.25, 0.25, 0.75, 0.75]] * 2)
    for width, line in ((512, 2), (1024, 4), (2048, 8), (64, 2)):
        drawn = draw_boxes(np.zeros((2, 3, width // 2, width), np.uint8), ours)[1, 0]
        assert (drawn[width // 4, : width // 2] > 0).sum() == line


def test_only_ends_keeps_the_first_and_last_box_and_interpolates_soft_boxes_between():
    whole = make_clip((1, 1), "roam").tracklets()
    ends = whole.only_ends()
    np.testing.assert_array_equal(ends.boxes[[0, -1]], whole.boxes[[0, -1]])
    np.testing.assert_allclose(
        ends.boxes, np.linspace(whole.boxes[0], whole.boxes[-1], 8), atol=1e-6
    )
    assert ends.hard[[0, -1]].all() and not ends.hard[1:-1].any() and ends.valid.all()


def test_shuffled_colours_are_a_permutation_of_the_palette():
    ours = random_tracklets().pad(8)
    shuffled = ours.shuffled_colors(np.random.default_rng(0))
    assert not (shuffled.colors == ours.colors).all()
    assert sorted(map(tuple, shuffled.colors.tolist())) == sorted(map(tuple, ours.colors.tolist()))
    assert len({tuple(c) for c in ours.colors.tolist()}) == 8


def test_rendered_boxes_are_beside_the_unchanged_frames():
    clip = make_clip((1, 1), "roam")
    frames = [Image.fromarray(frame) for frame in clip.frames]
    pictures = beside_boxes(frames, clip.tracklets())
    assert len(pictures) == 8 and pictures[0].size == (2 * 256 + images.SHEET_GAP, 192)
    left = np.asarray(pictures[3])[:, :256]
    right = np.asarray(pictures[3])[:, -256:]
    assert (left == np.asarray(images.enlarge(frames[3], 256))).all()
    assert (left != right).any()


# ------------------------------------------------------------------------------------------------------------- measure


def test_written_clips_bring_their_boxes(tmp_path):
    write_clips(tmp_path, "roam", 1, seed=3)
    clip = make_clip((3, 0), "roam")
    (got,) = annotations.read_tracklets(tmp_path / "roam0000" / "tracklets.json").values()
    np.testing.assert_allclose(got.boxes, clip.boxes, atol=1e-5)
    assert got.hard.all() and got.categories == tuple(clip.kinds)


def test_roaming_shapes_do_not_go_where_they_point():
    """So that only boxes tell where: the angle between a pointed shape's first steps and its nose is at least about
    60 degrees. The nose is where the white pixels are."""
    for i in range(30):
        clip = make_clip((8, i), "roam")
        if len(clip.kinds) > 1 or clip.kinds[0] in ("disc", "ring"):
            continue
        y, x = np.nonzero(clip.frames[0].min(-1) > 230)
        nose = np.array([x.mean(), y.mean()]) - clip.centroids[0, 0]
        step = clip.centroids[1, 0] - clip.centroids[0, 0]
        cos = nose @ step / np.linalg.norm(nose) / np.linalg.norm(step)
        assert cos < 0.7, (i, cos)


def test_control_is_measured_by_the_objects_own_pixels():
    """The truth follows its own boxes, another clip's picture does not, an empty picture not at all."""
    clips = [make_clip((9, i), "roam") for i in range(12)]
    assert np.mean([score_box_following(c.frames, c)["mean_iou"] for c in clips]) > 0.9
    assert min(score_box_following(c.frames, c)["success"] for c in clips) == 1
    grey = np.full_like(clips[0].frames, 100)
    assert score_box_following(grey, clips[0]) == {"mean_iou": 0.0, "success": 0.0}
    assert all((found == 0).all() for found in segment_boxes(grey, clips[0].colors))


def test_boxes_drawn_by_mistake_are_not_taken_for_objects():
    """The asked outlines alone, on grey, in the colours that the evaluation uses."""
    scores = []
    for i in range(12):
        clip = make_clip((9, i), "roam")
        asked = with_contrasting_colors(clip.tracklets().pad(8), clip.colors)
        drawn = draw_boxes(np.full((8, 3, 48, 64), 100, np.uint8), asked).transpose(0, 2, 3, 1)
        scores.append(score_box_following(drawn, clip)["mean_iou"])
    assert np.mean(scores) < 0.05


def test_roaming_shapes_go_far():
    """A picture that stands still does not follow the boxes by accident."""
    clips = [make_clip((9, i), "roam") for i in range(24)]
    still = [score_box_following(np.repeat(c.frames[:1], 8, 0), c)["mean_iou"] for c in clips]
    assert np.mean(still) < 0.3


def test_iou_of_known_boxes():
    a = np.array([0, 0, 0.5, 0.5])
    for b, expected in (
        ([0, 0, 0.5, 0.5], 1),
        ([0.25, 0, 0.75, 0.5], 1 / 3),
        ([0.5, 0.5, 1, 1], 0),
        ([0, 0, 0, 0], 0),
    ):
        assert box_iou(a, np.array(b)) == pytest.approx(expected)


def test_scores_count_missed_and_shifted_boxes():
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 0.4, (1, 2, 2)) + [[[0, 0], [0.5, 0.5]]]
    boxes = np.concatenate([start, start + 0.1], -1).repeat(6, 0).astype(np.float32)
    valid = np.ones((6, 2), bool)
    asked = Tracklets(boxes, valid, valid, palette(2), ("0", "1"), ("", ""))
    perfect = {"boxes": 10, "mean_iou": 1, "success": 1, "mota": 1, "idf1": 1}
    assert score_tracklets(asked, asked) == perfect

    shifted = replace(asked, boxes=boxes + np.array([0.02, 0, 0.02, 0], np.float32))
    shifted_iou = 0.08 / 0.12
    scores = score_tracklets(asked, shifted)
    assert scores["mean_iou"] == pytest.approx(shifted_iou, abs=1e-5)

    scores = score_tracklets(asked, shifted.take_slots([0]))
    assert scores["success"] == 0.5
    assert scores["mota"] == 0.5
    assert scores["mean_iou"] == pytest.approx(shifted_iou / 2, abs=1e-5)
    assert score_tracklets(asked, asked.without_objects())["success"] == 0


@pytest.mark.parametrize("score", [False, True])
def test_the_command_line_renders_an_annotation_or_prints_scores(tmp_path, capsys, score):
    clip = make_clip((1, 1), "roam")
    annotations.write_tracklets(tmp_path / "clip.json", clip.tracklets())
    (tmp_path / "frames").mkdir()
    for f, frame in enumerate(clip.frames):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{f}.png")
    flags = [str(tmp_path / "clip.json"), "--frames", str(tmp_path / "frames"), "--num_frames=3"]
    flags += ["--output_dir", str(tmp_path / "out")]
    if score:
        flags += ["--score", str(tmp_path / "clip.json")]
    tracklet_score.main(tracklet_score.build_parser().parse_args(flags))
    printed = capsys.readouterr().out
    if score:
        assert json.loads(printed)["mean_iou"] == pytest.approx(1)
    else:
        assert (tmp_path / "out" / "clip.mp4").is_file()
        assert str(tmp_path / "out" / "clip") in printed
