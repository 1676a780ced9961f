"""The embedded SVD and its synthetic clips, which all other tests use."""

import json

import numpy as np
import pytest
import torch

import train_svd
from svd_xtend.demo.synthetic_clips import (
    HELD_OUT_SEED,
    make_clip,
    pixels_per_frame_of,
    score_synthetic_clip,
    segment_shapes,
    write_clips,
)
from svd_xtend.demo.tiny_svd import (
    TINY_BOXES,
    TINY_SVD,
    clips_to_pixels,
    evaluate_control,
    evaluate_tiny,
    vae_psnr,
)
from svd_xtend.models.precision import best_precision
from train_svd import training_loss


def test_a_seed_determines_a_clip_and_the_written_frames_are_the_drawn_ones(tmp_path):
    from PIL import Image

    clip = make_clip((0, 3), "fall")
    write_clips(tmp_path, "fall", 4)
    files = sorted((tmp_path / "fall0003").glob("*.png"))
    frames = np.stack([np.asarray(Image.open(file)) for file in files])
    assert (frames == clip.frames).all()
    assert (frames == make_clip((0, 3), "fall").frames).all()
    metadata = json.loads((tmp_path / "fall0003" / "clip.json").read_text())
    assert metadata["motion_bucket_id"] == clip.motion_bucket_id


@pytest.mark.parametrize("domain", ["shapes", "pointed", "fall"])
def test_boxes_contain_the_objects_that_the_segmenter_finds(domain):
    for i in range(10):
        clip = make_clip((5, i), domain)
        centroids, areas = segment_shapes(clip.frames, clip.colors)
        x = (centroids[..., 0] + 0.5) / 64
        y = (centroids[..., 1] + 0.5) / 48
        left, top, right, bottom = np.moveaxis(clip.boxes, -1, 0)
        assert ((left < x) & (x < right) & (top < y) & (y < bottom)).all()
        score = score_synthetic_clip(clip.frames, clip)
        assert score["kept"] == 1
        assert score["centroid_error"] < 0.5


def test_pointed_shapes_move_at_the_buckets_speed_and_falling_ones_fall():
    for i in range(10):
        clip = make_clip((6, i), "pointed")
        steps = np.linalg.norm(np.diff(clip.centroids, axis=0), axis=-1)
        assert steps.mean() == pytest.approx(pixels_per_frame_of(clip.motion_bucket_id), rel=0.1)
        falling = make_clip((6, i), "fall").centroids
        downwards = np.diff(falling[..., 1], axis=0)
        assert (downwards[2:] > 0).all()
        assert np.ptp(falling[..., 0], axis=0).max() < 1.5


def test_the_vae_reconstructs_validation_clips():
    """At least 33 dB on 8 clips; the model card has the results on 64."""
    from svd_xtend.models.loading import load_svd

    vae = load_svd(str(TINY_SVD), torch.float32).vae
    assert vae_psnr(vae, "shapes", 8) >= 33


def test_shapes_move_where_they_point():
    """On 8 clips; the model card has the results on 64."""
    metrics = evaluate_tiny(TINY_SVD, count=8)
    assert metrics["model"]["centroid_error"] <= 1.2
    assert metrics["model"]["kept"] >= 0.95
    assert metrics["model"]["psnr"] >= metrics["static copy"]["psnr"] + 6


def test_objects_follow_boxes_that_nothing_else_announces(tmp_path):
    """On 8 clips; docs/box-control.md has the results on 64. Without boxes, the base model cannot know the paths."""
    metrics = evaluate_control(TINY_SVD, TINY_BOXES, tmp_path / "control", count=8)
    assert metrics["with boxes"]["mean_iou"] >= max(0.60, 3 * metrics["without boxes"]["mean_iou"])
    assert metrics["with boxes"]["success"] >= 0.75
    assert metrics["ends only"]["mean_iou"] >= 2 * metrics["without boxes"]["mean_iou"]
    assert (tmp_path / "control.gif").exists()
    assert (tmp_path / "control.png").exists()


def test_the_shipped_weights_are_small_and_in_the_stock_format():
    assert sum(f.stat().st_size for f in TINY_SVD.rglob("*.safetensors")) <= 14e6
    assert sum(f.stat().st_size for f in TINY_BOXES.rglob("*.safetensors")) <= 4e6
    index = json.loads((TINY_SVD / "model_index.json").read_text())
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]


def mean_validation_loss(pipe, unet):
    """Return the mean loss on fixed falling clips, with fixed noise and sigmas, without dropout."""
    options = train_svd.LossOptions(seed=99, P_mean=0.7, P_std=1.6, vae_encode_chunk=64)
    clips = [make_clip((HELD_OUT_SEED, i), "fall") for i in range(16)]
    total = 0.0
    for start in range(0, 16, 8):
        part = clips[start : start + 8]
        buckets = [float(clip.motion_bucket_id) for clip in part]
        batch = {
            "pixel_values": clips_to_pixels(part),
            "fps": torch.full((8,), 7.0),
            "motion_bucket_id": torch.tensor(buckets),
            "index": torch.arange(start, start + 8),
        }
        with torch.no_grad():
            total += training_loss(unet, pipe, batch, options).mean().item() / 2
    return total


@pytest.mark.parametrize("lora", [False, True])
def test_a_hundred_steps_lower_the_validation_loss_on_falling_shapes(run, tmp_path, lora):
    """Full training lowers it by a third, LoRA by a quarter, on the same noise. The interval that the run writes, from eight
    clips, excludes 0."""
    write_clips(tmp_path / "fall", "fall", 24, seed=2)
    write_clips(tmp_path / "held_out", "fall", 8, seed=HELD_OUT_SEED)
    losses = {}

    def validate(pipe, unet, step, args):
        losses[step] = mean_validation_loss(pipe, unet)
        return []

    flags = [
        "--max_train_steps=100",
        "--per_gpu_batch_size=2",
        "--validation_steps=100",
        f"--base_folder={tmp_path / 'fall'}",
        f"--validation_folder={tmp_path / 'held_out'}",
        f"--mixed_precision={best_precision()}",
    ]
    if lora:
        targets = ["attention", "feed_forward", "projection", "conv"]
        flags += ["--lora_targets", *targets, "--learning_rate=2e-3"]
        largest_ratio = 0.75
    else:
        flags += ["--learning_rate=5e-4"]
        largest_ratio = 0.67
    out = run(*flags, lora=lora, validate=validate)
    assert losses[100] < losses[0] * largest_ratio, losses
    first, last = (json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines())
    mean, low, high = last["raw"]["difference"]
    assert first["raw"]["difference"] == [0.0, 0.0, 0.0]
    assert last["step"] == 100
    assert low < mean < high < 0, last
