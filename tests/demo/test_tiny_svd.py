"""The embedded SVD and the clips it lives on: what every other claim is seen on."""

import json

import numpy as np
import pytest
import torch

import train_svd
from svd_xtend.demo.synthetic_clips import (
    HELD_OUT_SEED,
    make_clip,
    measure_clip,
    pixels_per_frame_of,
    segment_shapes,
    write_clips,
)
from svd_xtend.demo.tiny_svd import TINY_BOXES, TINY_SVD, evaluate_control, evaluate_tiny, vae_psnr
from svd_xtend.models.precision import best_precision
from train_svd import training_loss


def test_a_seed_is_a_clip_and_the_written_one_is_the_drawn_one(tmp_path):
    from PIL import Image

    clip = make_clip((0, 3), "fall")
    write_clips(tmp_path, "fall", 4)
    frames = np.stack(
        [np.asarray(Image.open(p)) for p in sorted((tmp_path / "fall0003").glob("*.png"))]
    )
    assert (frames == clip.frames).all() and (make_clip((0, 3), "fall").frames == frames).all()
    assert (
        json.loads((tmp_path / "fall0003" / "clip.json").read_text())["motion_bucket_id"]
        == clip.motion_bucket_id
    )


@pytest.mark.parametrize("domain", ["shapes", "pointed", "fall"])
def test_boxes_hold_what_the_segmenter_finds(domain):
    for i in range(10):
        clip = make_clip((5, i), domain)
        centroids, areas = segment_shapes(clip.frames, clip.colors)
        x, y = (centroids[..., 0] + 0.5) / 64, (centroids[..., 1] + 0.5) / 48
        inside = (
            (clip.boxes[..., 0] < x)
            & (x < clip.boxes[..., 2])
            & (clip.boxes[..., 1] < y)
            & (y < clip.boxes[..., 3])
        )
        assert inside.all()
        perfect = measure_clip(clip.frames, clip)
        assert perfect["kept"] == 1 and perfect["centroid_error"] < 0.5


def test_pointed_shapes_move_at_the_buckets_speed_and_falling_ones_fall():
    for i in range(10):
        clip = make_clip((6, i), "pointed")
        steps = np.linalg.norm(np.diff(clip.centroids, axis=0), axis=-1)
        assert steps.mean() == pytest.approx(pixels_per_frame_of(clip.motion_bucket_id), rel=0.1)
        fallen = make_clip((6, i), "fall").centroids
        assert (np.diff(fallen[..., 1], axis=0)[2:] > 0).all() and np.ptp(
            fallen[..., 0], axis=0
        ).max() < 1.5


def test_vae_reconstructs_held_out_clips():
    """The bar is 33 dB; the model card has the figures of all 64 clips."""
    from svd_xtend.models.loading import load_svd

    vae = load_svd(str(TINY_SVD), torch.float32).vae
    assert vae_psnr(vae, "shapes", 8) >= 33


def test_shapes_move_where_they_point():
    """The bars, on 8 clips; the model card has the figures of 64."""
    figures = evaluate_tiny(TINY_SVD, count=8)
    assert figures["model"]["centroid_error"] <= 1.2
    assert figures["model"]["kept"] >= 0.95
    assert figures["model"]["psnr"] >= figures["static copy"]["psnr"] + 6


def test_objects_follow_boxes_that_nothing_else_announces(tmp_path):
    """The bars, on 8 clips; the README has the figures of 64. Frames without boxes are the base's, which knows no such path."""
    figures = evaluate_control(TINY_SVD, TINY_BOXES, tmp_path / "control", count=8)
    assert figures["with boxes"]["mean_iou"] >= max(0.60, 3 * figures["without boxes"]["mean_iou"])
    assert figures["with boxes"]["success"] >= 0.75
    assert figures["ends only"]["mean_iou"] >= 2 * figures["without boxes"]["mean_iou"]
    assert (tmp_path / "control.gif").exists() and (tmp_path / "control.png").exists()


def test_shipped_weights_are_small_and_stock():
    assert sum(f.stat().st_size for f in TINY_SVD.rglob("*.safetensors")) <= 14e6
    assert sum(f.stat().st_size for f in TINY_BOXES.rglob("*.safetensors")) <= 4e6
    assert json.loads((TINY_SVD / "model_index.json").read_text())["feature_extractor"] == [
        "transformers",
        "CLIPImageProcessor",
    ]


def held_out_loss(pipe, unet):
    """Mean loss on fixed falling clips, noise and sigmas, without dropout."""
    args = train_svd.LossOptions(seed=99, P_mean=0.7, P_std=1.6, vae_encode_chunk=64)
    clips = [make_clip((HELD_OUT_SEED, i), "fall") for i in range(16)]
    total = 0.0
    for start in range(0, 16, 8):
        some = clips[start : start + 8]
        batch = {
            "pixel_values": torch.from_numpy(np.stack([c.frames for c in some])).permute(0, 1, 4, 2, 3).float() / 127.5 - 1,
            "fps": torch.full((8,), 7.0), "motion_bucket_id": torch.tensor([float(c.motion_bucket_id) for c in some]),
            "index": torch.arange(start, start + 8),
        }  # fmt: skip
        with torch.no_grad():
            total += training_loss(unet, pipe, batch, args).mean().item() / 2
    return total


@pytest.mark.parametrize("lora", [False, True])
def test_a_hundred_steps_lower_the_held_out_loss_on_the_shifted_domain(run, tmp_path, lora):
    """Full by a third and LoRA by a quarter, on the same noise. The run itself is sure of it, from eight clips."""
    write_clips(tmp_path / "fall", "fall", 24, seed=2)
    write_clips(tmp_path / "held_out", "fall", 8, seed=HELD_OUT_SEED)
    losses = {}

    def validate(pipe, unet, step, args):
        losses[step] = held_out_loss(pipe, unet)
        return []

    flags = [
        "--max_train_steps=100",
        "--per_gpu_batch_size=2",
        "--validation_steps=100",
        f"--base_folder={tmp_path / 'fall'}",
        f"--validation_folder={tmp_path / 'held_out'}",
        f"--mixed_precision={best_precision()}",
    ]
    flags += (
        [
            "--lora_targets",
            "attention",
            "feed_forward",
            "projection",
            "conv",
            "--learning_rate=2e-3",
        ]
        if lora
        else ["--learning_rate=5e-4"]
    )
    out = run(*flags, lora=lora, validate=validate)
    assert losses[100] < losses[0] * (0.75 if lora else 0.67), losses
    first, last = (json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines())
    mean, low, high = last["raw"]["difference"]
    assert first["raw"]["difference"] == [0.0, 0.0, 0.0] and last["step"] == 100
    assert low < mean < high < 0, last
