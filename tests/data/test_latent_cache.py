"""Training from the latent cache equals training from pixels, and a wrong cache is noticed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sample_videos
import torch
from datasets import open_dataset
from PIL import Image
from safetensors.torch import load_file

import cache_latents
import train_svd
from svd_xtend.data import latent_cache
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.models import loading
from svd_xtend.models.loading import load_svd


def make_cache(folder, base, *flags):
    """Run cache_latents.py in this process and return the cache's folder."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = [
        f"--base_folder={base}",
        f"--latent_cache={folder}",
        "--width=64",
        "--height=48",
        *flags,
    ]
    cache_latents.main(cache_latents.build_parser().parse_args(arguments))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture
def frames(clips, tmp_path):
    """Copy three clips, which the test may damage."""
    for name in ("fall0000", "fall0001", "fall0002"):
        shutil.copytree(clips / name, tmp_path / "frames" / name)
    return tmp_path / "frames"


@pytest.fixture
def cached(frames, tmp_path):
    return make_cache(tmp_path / "cache", frames)


def batch_of(data, indices):
    items = torch.utils.data.default_collate([data[i] for i in indices])
    return {**items, "pixel_values": items["pixel_values"].float() / 127.5 - 1}


def data_of(frames, cached=None, f=5):
    return open_dataset(frames, 64, 48, f, 7, 127, "crop", 3, cached)


def test_the_loss_from_the_cache_is_the_loss_from_pixels(pipe, frames, cached):
    """With windows of 5 of 8 frames, posterior sampling, noise augmentation and dropout."""
    args = train_svd.LossOptions(4, 0.7, 1.6, (0.0, 0.0, 0.1), vae_encode_chunk=5)
    live = batch_of(data_of(frames), range(4))
    stored = batch_of(data_of(frames, cached), range(4))
    assert live["pixel_values"].shape[1] == 5
    assert stored["pixel_values"].shape[1] == 1
    with torch.no_grad():
        live_loss = train_svd.training_loss(pipe.unet, pipe, live, args)
        stored_loss = train_svd.training_loss(pipe.unet, pipe, stored, args)
    torch.testing.assert_close(live_loss, stored_loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("buckets", [0, 8])
def test_the_losses_of_video_files_agree_too_and_in_every_size_bucket(pipe, tmp_path, buckets):
    videos = tmp_path / "files"
    sample_videos.write_video(videos / "a.mkv", "ffv1", "bgr0", frames=30, size=(96, 64))
    sample_videos.write_video(videos / "b.mp4", frames=30, size=(64, 96), gop=12)
    flags = ["--vae_encode_chunk=7"]
    if buckets:
        flags.append("--buckets")
    folder = make_cache(tmp_path / "cache", videos, *flags)
    args = train_svd.LossOptions(4, 0.7, 1.6, (0.0, 0.0, 0.1))
    live_data = open_dataset(videos, 64, 48, 5, 10, 127, "crop", 3, buckets=buckets)
    stored_data = open_dataset(videos, 64, 48, 5, 10, 127, "crop", 3, folder, buckets=buckets)
    for index in range(4):
        live = batch_of(live_data, [index])
        stored = batch_of(stored_data, [index])
        with torch.no_grad():
            live_loss = train_svd.training_loss(pipe.unet, pipe, live, args)
            stored_loss = train_svd.training_loss(pipe.unet, pipe, stored, args)
        torch.testing.assert_close(live_loss, stored_loss, rtol=1e-4, atol=1e-5)
    if buckets:
        with pytest.raises(ValueError, match="[12] of 2 videos have a .* or one of another size"):
            open_dataset(videos, 64, 48, 5, 10, 127, "crop", 3, folder)


def test_training_from_the_cache_skips_clip_and_encodes_one_frame_per_clip(
    run, frames, cached, monkeypatch
):
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionModelWithProjection

    encoded = []
    encode = AutoencoderKLTemporalDecoder.encode

    def counted(self, x):
        encoded.append(len(x))
        return encode(self, x)

    def never(self, *_, **__):
        raise AssertionError("CLIP was called")

    monkeypatch.setattr(AutoencoderKLTemporalDecoder, "encode", counted)
    monkeypatch.setattr(CLIPVisionModelWithProjection, "forward", never)
    run(
        f"--base_folder={frames}",
        f"--latent_cache={cached}",
        "--max_train_steps=2",
        "--per_gpu_batch_size=2",
    )
    assert encoded == [1] * 4


def test_the_same_command_encodes_only_what_is_missing_and_leaves_no_partial_files(frames, cached):
    before = {p.name: p.stat().st_mtime_ns for p in cached.iterdir()}
    (cached / "fall0001.safetensors").unlink()
    (cached / "fall0002.safetensors").write_bytes(b"damaged")
    make_cache(cached, frames)
    after = {p.name: p.stat().st_mtime_ns for p in cached.iterdir()}
    assert (
        before.keys()
        == after.keys()
        == {latent_cache.DESCRIPTION_FILE, *(f"fall000{i}.safetensors" for i in range(3))}
    )
    changed = {
        name
        for name in after
        if name != latent_cache.DESCRIPTION_FILE and after[name] != before[name]
    }
    assert changed == {"fall0001.safetensors", "fall0002.safetensors"}
    assert len(data_of(frames, cached)) == 3


def test_changed_missing_and_damaged_videos_are_one_error(frames, cached):
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(frames / "fall0001" / "003.png")
    expected = (
        "^--latent_cache .*: 1 of 3 videos have a missing, damaged or outdated cache file, "
        "or one of another size, for example fall0001"
    )
    with pytest.raises(ValueError, match=expected):
        data_of(frames, cached)
    make_cache(cached, frames)
    (cached / "fall0000.safetensors").unlink()
    (cached / "fall0002.safetensors").write_bytes(
        (cached / "fall0002.safetensors").read_bytes()[:100]
    )
    with pytest.raises(ValueError, match="2 of 3 videos .*fall0000"):
        data_of(frames, cached)


def test_a_cache_file_damaged_during_a_run_is_named_and_another_clip_is_used(
    frames, cached, caplog
):
    data = data_of(frames, cached)
    for file in cached.glob("fall000[12].safetensors"):
        os.truncate(file, 200)
    item = data[0]
    other = data[1]
    assert item["moments"].shape == other["moments"].shape == (2, 5, 4, 12, 16)
    assert "run cache_latents.py again" in caplog.text
    assert "another clip is used in its place" in caplog.text


@pytest.mark.parametrize(
    "flag, difference",
    [
        ("--width=128", "width 64, but this run uses 128"),
        ("--resize_mode=stretch", "resize_mode crop, but this run uses stretch"),
    ],
)
def test_a_cache_of_another_size_or_crop_is_refused(run, frames, cached, flag, difference):
    with pytest.raises(ValueError, match=f"^--latent_cache .*: was made with {difference}"):
        run(f"--base_folder={frames}", f"--latent_cache={cached}", "--max_train_steps=1", flag)


def test_a_cache_of_another_model_is_refused_and_half_precision_is_the_same_model(pipe, cached):
    latent_cache.check_cache(cached, pipe, "no", 64, 48, "crop")
    half = load_svd(str(TINY_SVD), torch.float16)
    latent_cache.check_cache(cached, half, "no", 64, 48, "crop")
    with pytest.raises(ValueError, match="was made with precision no, but this run uses bf16"):
        latent_cache.check_cache(cached, pipe, "bf16", 64, 48, "crop")
    pipe.vae.encoder.conv_in.weight.data[0, 0, 0, 0] *= 1.002
    with pytest.raises(ValueError, match="was made with models"):
        latent_cache.check_cache(cached, pipe, "no", 64, 48, "crop")
    with pytest.raises(
        ValueError, match="has no readable cache.json. Make the cache with cache_latents.py"
    ):
        latent_cache.check_cache(cached / "none", pipe, "no", 64, 48, "crop")


def test_the_logged_size_of_the_cache_is_its_size_on_disk(frames, tmp_path, capsys, caplog):
    with caplog.at_level("INFO"):
        out = make_cache(tmp_path / "cache", frames)
    messages = [record.getMessage() for record in caplog.records]
    (message,) = (message for message in messages if "to encode:" in message)
    need = 3 * 8 * (8 * 12 * 16 + 64) * 4
    assert f"3 videos, 3 to encode: {need / 1e9:.2f} GB" in message
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert size == pytest.approx(need, rel=0.05)


def test_too_small_a_disk_is_an_error_before_anything_is_encoded(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(
        ValueError, match="^--latent_cache .*: needs .* GB, but only 0.00 GB are free"
    ):
        make_cache(tmp_path / "cache", frames)
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_clip_and_decoder_stay_on_the_cpu_and_come_to_the_device_only_to_render(pipe):
    """The device `meta` takes the place of a GPU."""
    gpu = torch.device("meta")
    loading.move_encoders(pipe, torch.float32, gpu, whole=False)
    modules = {"encoder": pipe.vae.encoder, "decoder": pipe.vae.decoder, "clip": pipe.image_encoder}
    assert {k: next(m.parameters()).device.type for k, m in modules.items()} == {
        "encoder": "meta", "decoder": "cpu", "clip": "cpu"
    }  # fmt: skip
    moved = []
    for name in ("decoder", "clip"):
        modules[name].to = lambda where, name=name: moved.append((name, str(where)))
    with loading.encoders_on_device(pipe, gpu):
        assert sorted(moved) == [("clip", "meta"), ("decoder", "meta")]
    assert sorted(moved[2:]) == [("clip", "cpu"), ("decoder", "cpu")]


def test_an_unreadable_video_does_not_stop_the_others(frames, tmp_path, caplog):
    """It is named, it is not tried again, and training uses another clip in its place."""
    (frames / "fall0001" / "004.png").write_bytes(b"no picture")
    folder = make_cache(tmp_path / "cache", frames)
    assert "004.png: cannot be read as a picture" in caplog.text
    assert "the video is left out" in caplog.text
    data = data_of(frames, folder)
    items = [data[i] for i in range(3)]
    assert [item["failed"] for item in items].count(1) >= 1
    assert all("moments" in item for item in items)


def test_two_processes_share_the_videos_and_write_the_same_cache(frames, tmp_path):
    env = {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
               "--rdzv_endpoint=localhost:0", "cache_latents.py", f"--base_folder={frames}", "--width=64", "--height=48",
               f"--latent_cache={tmp_path / 'two'}"]  # fmt: skip
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 to encode" in done.stderr and "2 process" in done.stderr
    one = make_cache(tmp_path / "one", frames)
    for file in one.glob("*.safetensors"):
        a, b = load_file(file), load_file(tmp_path / "two" / file.name)
        assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_two_folders_with_a_video_of_one_name_are_an_error(frames, cached, tmp_path):
    shutil.copytree(frames, tmp_path / "other")
    with pytest.raises(
        ValueError,
        match="^--latent_cache .*: two base folders hold a video named [^ ]+. Rename one",
    ):
        open_dataset([frames, tmp_path / "other"], 64, 48, 8, 7, 127, "crop", cached=cached)


def test_cache_json_has_the_size_and_crop_of_the_cache(cached):
    description = json.loads((cached / latent_cache.DESCRIPTION_FILE).read_text())
    assert description["width"] == 64
    assert description["height"] == 48
    assert description["resize_mode"] == "crop"
