"""Video files and folders of frames train alike, and what cannot be used is named and left out."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import sample_videos
import torch
from datasets import open_dataset
from PIL import Image

import train_svd
from svd_xtend.data import sampler, video_decode

DATA = Path(__file__).parents[3] / "shared" / "data"


def dataset(folder, num_frames=8, fps=25, motion_bucket_id=127, **options):
    return open_dataset(folder, 64, 48, num_frames, fps, motion_bucket_id, "crop", 1, **options)


def sampled_rates(data):
    """Return {clip name: frames per second of a sample}."""
    return {clip.path.name: round(clip.metadata["fps"], 2) for clip in data.clips}


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    """Make a folder with a video of 40 frames of each codec."""
    root = tmp_path_factory.mktemp("codecs")
    for name, (codec, pix_fmt, options) in sample_videos.CODECS.items():
        rate = 10 if name.endswith("gif") else 25
        sample_videos.write_video(root / name, codec, pix_fmt, options, rate=rate)
    return root


# ------------------------------------------------------------------------------------- frame rates


def test_files_and_folders_can_be_mixed_and_keep_their_own_rate(codecs, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(codecs, root)
    sample_videos.write_frame_folder(root / "frames", 20)
    (root / "frames" / "clip.json").write_text('{"fps": 12}')
    data = dataset(root, fps="native")
    native = {**dict.fromkeys(sample_videos.CODECS, 25), "anim.gif": 10, "frames": 12}
    assert sampled_rates(data) == native
    assert {round(float(data[i]["fps"]), 2) for i in range(12)} == {25, 10, 12}
    at_most_11 = {**dict.fromkeys(sample_videos.CODECS, 11), "anim.gif": 10, "frames": 11}
    assert sampled_rates(dataset(root, fps=11, num_frames=4)) == at_most_11


def test_source_fps_is_the_rate_of_folders_without_metadata(tmp_path):
    sample_videos.write_frame_folder(tmp_path / "frames", 20)
    assert dataset(tmp_path, fps=7).clips[0].metadata["fps"] == 7
    clip = dataset(tmp_path, fps=10, source_fps=20).clips[0]
    assert clip.metadata["fps"] == 10
    assert clip.frame_indices(0, 8, 10).tolist() == list(range(0, 16, 2))
    assert dataset(tmp_path, fps="native", source_fps=24).clips[0].metadata["fps"] == 24


def test_a_video_file_gives_the_samples_of_its_extracted_frames(tmp_path):
    """The file is lossless, so that both hold the same pixels."""
    sample_videos.write_video(tmp_path / "file" / "a.mkv", "ffv1", "bgr0", frames=30)
    sample_videos.write_frame_folder(tmp_path / "folder" / "a", 30, (96, 64))
    from_file = dataset(tmp_path / "file", fps=12.5)
    from_folder = dataset(tmp_path / "folder", fps=12.5, source_fps=25)
    for index in range(6):
        a = from_file[index]
        b = from_folder[index]
        assert np.array_equal(a["pixel_values"], b["pixel_values"])
        assert a["fps"] == pytest.approx(b["fps"])


# ---------------------------------------------------------------------------------------- the index


def test_files_are_inspected_only_once(codecs, monkeypatch):
    for file in codecs.iterdir():
        os.utime(file, (1e9, 1e9))
    first = dataset(codecs, num_frames=4).clips
    monkeypatch.setattr(
        video_decode, "probe_video", lambda path: pytest.fail(f"{path} was opened again")
    )
    second = dataset(codecs, num_frames=4).clips
    assert [clip.path for clip in first] == [clip.path for clip in second]
    assert first.digest() == second.digest()
    assert all(np.array_equal(a.times, b.times) for a, b in zip(first, second))


def test_a_run_killed_during_inspection_continues_where_it_was(codecs, tmp_path, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(codecs, root)
    for file in root.iterdir():
        os.utime(file, (1e9, 1e9))
    probe_video = video_decode.probe_video
    probed = []

    def killed_at_the_eighth(path):
        probed.append(path.name)
        if len(probed) == 8:
            raise KeyboardInterrupt
        return probe_video(path)

    monkeypatch.setattr("svd_xtend.data.folder_index.SAVED_EVERY", -1)
    monkeypatch.setattr(video_decode, "probe_video", killed_at_the_eighth)
    with pytest.raises(KeyboardInterrupt):
        dataset(root, num_frames=4)
    probed[:] = [None] * 9  # the eighth is past
    assert len(dataset(root, num_frames=4)) == len(sample_videos.CODECS)
    assert len(probed) - 9 < len(sample_videos.CODECS)


# ------------------------------------------------------------------------------ unusable videos


def test_thirty_kinds_of_bad_files_are_named_and_left_out(tmp_path, caplog):
    bad_names = sample_videos.write_bad_files(tmp_path)
    sample_videos.write_video(tmp_path / "a good clip ü.mp4")
    with caplog.at_level(logging.WARNING):
        data = dataset(tmp_path, fps=7, motion_bucket_id="auto")
    assert len(bad_names) == 30
    assert [clip.path.name for clip in data.clips] == ["a good clip ü.mp4"]
    lines = caplog.text.splitlines()
    for name in bad_names:
        (line,) = (line for line in lines if line.startswith(f"  {name}: "))
        assert len(line) > len(name) + 8, line
        assert "object at" not in line, line
    assert not any(data[i]["failed"] for i in range(1000))


def test_what_may_not_be_read_is_named_and_left_out(tmp_path, monkeypatch, caplog):
    """Root may read everything, so the system's errors are simulated."""
    sample_videos.write_video(tmp_path / "good.mp4")
    sample_videos.write_video(tmp_path / "secret.mp4")
    sample_videos.write_frame_folder(tmp_path / "secret folder")

    def refusing(function):
        def refuse(path):
            if "secret" in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path)

        return refuse

    monkeypatch.setattr(os, "listdir", refusing(os.listdir))
    monkeypatch.setattr(video_decode, "open_video", refusing(video_decode.open_video))
    with caplog.at_level(logging.WARNING):
        data = dataset(tmp_path)
    assert len(data) == 1
    for name in ("secret.mp4", "secret folder"):
        assert f"  {name}: Permission denied" in caplog.text


def test_a_file_that_breaks_during_a_run_is_named_and_another_clip_is_used(tmp_path, caplog):
    for name in ("a.mp4", "b.mp4"):
        sample_videos.write_video(tmp_path / name)
    data = dataset(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"")
    items = [data[i] for i in range(4)]
    assert sum(item["failed"] for item in items) == 2
    assert "a.mp4: cannot be opened as a video" in caplog.text


# ------------------------------------------------------------------------------ captions, training


def test_captions_come_from_text_files_clip_json_and_metadata_jsonl(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        sample_videos.write_video(tmp_path / name)
    sample_videos.write_frame_folder(tmp_path / "d", 30)
    sample_videos.write_frame_folder(tmp_path / "e", 30)
    (tmp_path / "a.txt").write_text("a dog\n")
    (tmp_path / "d" / "clip.json").write_text('{"caption": "a horse", "fps": 25}')
    rows = [
        {"file_name": "b.mp4", "text": "a cat", "motion_bucket_id": 200},
        {"file_name": "e", "caption": "a cow", "fps": 5},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = dataset(tmp_path, num_frames=3)
    metadata = {clip.path.name: clip.metadata for clip in data.clips}
    captions = {name: own["caption"] for name, own in metadata.items()}
    assert captions == {
        "a.mp4": "a dog",
        "b.mp4": "a cat",
        "c.mp4": "",
        "d": "a horse",
        "e": "a cow",
    }
    assert metadata["b.mp4"]["motion_bucket_id"] == 200
    assert metadata["e"]["fps"] == 5
    batch = torch.utils.data.default_collate([data[i] for i in range(5)])
    assert sorted(batch["caption"]) == ["", "a cat", "a cow", "a dog", "a horse"]
    (tmp_path / "metadata.jsonl").write_text('{"caption": "whose?"}')
    with pytest.raises(ValueError, match=r"metadata.jsonl: line 1: expected .*file_name"):
        dataset(tmp_path)


@pytest.mark.skipif(not DATA.exists(), reason="needs the real clips")
def test_real_clips_train_as_they_are(tmp_path, run):
    shutil.copy(DATA / "bigbuckbunny.mp4", tmp_path)
    shutil.copytree(DATA / "mammoth_rhino" / "img1", tmp_path / "rhino")
    data = dataset(tmp_path, fps=7)
    lengths = {clip.path.name: len(clip) for clip in data.clips}
    assert lengths == {"bigbuckbunny.mp4": 132, "rhino": 49}
    out = run(
        f"--base_folder={tmp_path}",
        "--max_train_steps=2",
        "--train_params=conv_out",
        "--motion_bucket_id=auto",
    )
    assert (out / "motion.png").stat().st_size > 5000


def test_every_codec_trains(codecs, run):
    out = run(
        f"--base_folder={codecs}",
        "--max_train_steps=2",
        "--per_gpu_batch_size=6",
        "--fps=native",
        "--train_params=conv_out",
    )
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_video_file_can_be_the_validation_image(run, tmp_path):
    video = sample_videos.write_video(tmp_path / "clips" / "a.mp4", frames=60)
    out = run(
        f"--base_folder={tmp_path / 'clips'}",
        "--validation_steps=2",
        "--num_inference_steps=1",
        "--max_train_steps=2",
        "--train_params=conv_out",
        "--fps=native",
    )
    args = json.loads((out / "args.json").read_text())
    assert args["validation_image"] == [str(video)]
    assert args["validation"][0]["fps"] == 25
    assert args["validation"][0]["frames"] == list(range(8))
    assert (out / "comparison.gif").exists()


# ------------------------------------------------------------------------------ sizes and pictures


def test_bucket_sizes_have_at_most_as_many_pixels_and_reach_every_aspect_ratio():
    for width, height, step in ((1024, 576, 64), (512, 320, 64), (64, 48, 8)):
        sizes = sampler.bucket_sizes(width, height, step)
        assert (width, height) in sizes
        for w, h in sizes:
            assert w % step == h % step == 0
            assert w * h <= width * height
        aspect_ratios = [w / h for w, h in sizes]
        assert aspect_ratios == sorted(aspect_ratios)
        assert aspect_ratios[0] < 0.7
        assert aspect_ratios[-1] > 1.5
    assert len(sampler.bucket_sizes(1024, 576, 64)) > 10


@pytest.fixture
def shaped(tmp_path):
    """Make a folder of three wide, three tall and one square video."""
    for i in range(3):
        sample_videos.write_video(tmp_path / f"wide{i}.mp4", size=(128, 64), frames=16)
        sample_videos.write_video(tmp_path / f"tall{i}.mp4", size=(64, 128), frames=16)
    sample_videos.write_video(tmp_path / "square.mp4", size=(96, 96), frames=16)
    return tmp_path


def test_buckets_keep_the_aspect_ratio_and_a_batch_has_one_size(shaped):
    data = dataset(shaped, buckets=8, batch=4)
    sizes = {clip.stem: clip.size for clip in data.clips}
    aspect_ratios = {name: width / height for name, (width, height) in sizes.items()}
    assert aspect_ratios["wide0"] > 1.5
    assert aspect_ratios["tall0"] < 0.7
    assert 0.8 < aspect_ratios["square"] < 1.25
    seen = []
    for batch in range(40):
        items = [data[4 * batch + i] for i in range(4)]
        assert len({item["pixel_values"].shape for item in items}) == 1
        seen += [item["pixel_values"].shape[2:] for item in items]
    num_wide, num_tall, num_square = (
        seen.count(sizes[name][::-1]) for name in ("wide0", "tall0", "square")
    )
    assert num_wide + num_tall + num_square == 160
    assert abs(num_wide - 160 * 3 / 7) < 40
    assert num_square > 0


def test_every_batch_of_four_is_from_one_pool(shaped):
    """So two processes with batches of 2 see the sizes that one with batches of 4 sees."""
    data = dataset(shaped, buckets=8, batch=4)
    places = [data.sampler.locate(i) for i in range(200)]
    opened_again = dataset(shaped, buckets=8, batch=4)
    assert places == [opened_again.sampler.locate(i) for i in range(200)]
    pools = [pool for pool, _ in places]
    for first in range(0, 200, 4):
        assert len(set(pools[first : first + 4])) == 1
    assert len(set(pools)) == 3


def test_a_run_with_buckets_and_pictures_trains(shaped, run):
    for i in range(4):
        Image.fromarray(sample_videos.make_frame(i, (90, 60))).save(shaped / f"photo{i}.png")
    shapes = []

    def recording_loss(model, pipe, batch, options):
        shapes.append(tuple(batch["pixel_values"].shape))
        return train_svd.training_loss(model, pipe, batch, options)

    run(
        f"--base_folder={shaped}",
        "--max_train_steps=8",
        "--per_gpu_batch_size=2",
        "--image_ratio=0.5",
        "--buckets",
        "--fps=25",
        "--train_params=conv_out",
        loss=recording_loss,
    )
    lengths = {shape[1] for shape in shapes}
    sizes = {shape[2:] for shape in shapes}
    assert lengths == {1, 8}
    assert len(sizes) > 2


def test_pictures_have_their_share_of_the_samples_and_no_motion(tmp_path):
    sample_videos.write_video(tmp_path / "a.mp4")
    for i in range(3):
        Image.fromarray(sample_videos.make_frame(i)).save(tmp_path / f"photo{i}.jpg")
    data = dataset(tmp_path, image_ratio=0.25)
    items = [data[i] for i in range(sampler.MIN_CYCLE // 5)]
    pictures = [item for item in items if len(item["pixel_values"]) == 1]
    assert abs(len(pictures) - 50) < 20
    assert {item["motion_bucket_id"] for item in pictures} == {0}
    pools = [data.sampler.locate(i)[0] for i in range(sampler.MIN_CYCLE)]
    assert pools.count(1) == sampler.MIN_CYCLE // 4


def test_image_ratio_needs_pictures(tmp_path):
    sample_videos.write_video(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="^--image_ratio: --base_folder holds no pictures"):
        dataset(tmp_path, image_ratio=0.25)


def test_a_single_frame_trains_only_the_spatial_layers_of_the_unet(pipe):
    """As SVD's image_only_indicator has it.

    For a clip of one frame, the temporal weights change nothing and get no gradient. For two frames
    they do.
    """
    from svd_xtend.models import unet_optimizations

    unet = unet_optimizations.speed_up(pipe.unet)
    generator = torch.Generator().manual_seed(0)

    def predict(num_frames):
        sample = torch.randn(1, num_frames, 8, 12, 16, generator=torch.Generator().manual_seed(1))
        context = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(2))
        return unet(sample, torch.zeros(1), context, torch.tensor([[6.0, 127, 0.02]])).sample

    one_frame = predict(1)
    two_frames = predict(2)
    temporal = [p for name, p in unet.named_parameters() if "temporal" in name]
    assert temporal
    predict(1).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in temporal)
    with torch.no_grad():
        for p in temporal:
            p.add_(torch.randn(p.shape, generator=generator))
    assert torch.equal(predict(1), one_frame)
    assert not torch.allclose(predict(2), two_frames)


# ------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--fps=0"], "argument --fps: expected a number above 0, or native; got 0"),
        (["--fps=fast"], "argument --fps: expected a number above 0, or native; got fast"),
        (
            ["--motion_bucket_id=much"],
            "argument --motion_bucket_id: expected a number, or auto; got much",
        ),
        (["--source_fps=-1"], "argument --source_fps: expected a number above 0; got -1"),
        (
            ["--image_ratio=1"],
            "argument --image_ratio: expected a fraction from 0 to less than 1; got 1",
        ),
        (["--image_ratio=0.1", "--latent_cache=x"], "--image_ratio: cannot be used with"),
    ],
)
def test_wrong_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        train_svd.parse(train_svd.build_parser(), flags)
    assert message in capsys.readouterr().err
