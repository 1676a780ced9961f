"""Pictures in, videos out."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import infer_svd
from svd_xtend.data import images
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.inference import video_writer
from svd_xtend.models import precision
from svd_xtend.models.loading import load_svd

ROOT = Path(__file__).parents[2]


def probe(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return (
            float(stream.average_rate),
            len(list(container.decode(stream))),
            (stream.width, stream.height),
        )


def test_a_written_clip_has_the_right_rate_length_and_size(tmp_path):
    frames = [Image.new("RGB", (63, 47), (i * 20, 80, 90)) for i in range(8)]
    video_writer.write_clip(tmp_path / "deep" / "clip", frames, 7)
    rate, count, size = probe(tmp_path / "deep" / "clip.mp4")
    assert (rate, count) == (7, 8) and size == (
        190,
        142,
    )  # shown 3 times larger, padded to even sides
    gif = Image.open(tmp_path / "deep" / "clip.gif")
    assert gif.n_frames == 8 and gif.info["duration"] == 140 and gif.info["loop"] == 0
    assert Image.open(tmp_path / "deep" / "clip.png").width > 8 * 160


def test_mp4_keeps_the_pictures(tmp_path):
    y, x = np.mgrid[:96, :128]
    frames = [Image.fromarray(np.stack([x + i, y + i, x], -1).astype(np.uint8)) for i in range(5)]
    video_writer.write_mp4(tmp_path / "a.mp4", frames, 25)
    read = images.read_video(tmp_path / "a.mp4")
    assert len(read) == 5
    assert np.abs(np.asarray(read[3], float) - np.asarray(frames[3], float)).mean() < 4


def test_infer_renders_several_images_as_the_user_runs_it(clips, tmp_path):
    pictures = [str(clips / f"fall000{i}" / "000.png") for i in range(2)]
    command = [
        sys.executable,
        "infer_svd.py",
        "--image",
        *pictures,
        f"--output_dir={tmp_path}",
        "--num_inference_steps=2",
        "--fps=5",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in ("fall0000_000", "fall0001_000"):
        assert probe(tmp_path / f"{name}.mp4")[:2] == (5, 8)
        assert (tmp_path / f"{name}.gif").exists() and (tmp_path / f"{name}.png").exists()


def test_infer_takes_a_full_checkpoint_its_averages_and_the_export(run):
    out = run("--max_train_steps=2", "--use_ema", "--train_params", "conv_out")
    unets = {}
    for name, ema in (("trained", False), ("ema", True)):
        unet = load_svd(str(TINY_SVD), torch.float32).unet
        infer_svd.load_checkpoint(unet, out / "checkpoint-2", ema)
        unets[name] = unet.conv_out.weight
    exported = load_svd(str(out), torch.float32).unet.conv_out.weight
    assert torch.equal(exported, unets["ema"]) and not torch.equal(exported, unets["trained"])


def test_infer_names_what_is_missing(run, tmp_path):
    out = run("--max_train_steps=1", "--train_params", "conv_out")
    unet = load_svd(str(TINY_SVD), torch.float32).unet
    with pytest.raises(
        ValueError,
        match="^--checkpoint .*no ema.safetensors in it; it was trained without --use_ema",
    ):
        infer_svd.load_checkpoint(unet, out / "checkpoint-1", ema=True)
    with pytest.raises(ValueError, match="nowhere.jpg: cannot be read as a picture"):
        infer_svd.main(infer_svd.build_parser().parse_args(["--image", "nowhere.jpg"]))


def test_push_to_hub_writes_a_card_and_leaves_checkpoints_at_home(run, monkeypatch):
    import huggingface_hub
    from diffusers.utils import hub_utils
    from huggingface_hub.utils import filter_repo_objects

    sent = {}

    class Repo:
        repo_id = "me/out"

    class NoCardYet(huggingface_hub.errors.EntryNotFoundError):
        def __init__(self):
            pass

    def no_card(*_, **__):
        raise NoCardYet

    monkeypatch.setattr(
        huggingface_hub, "create_repo", lambda name, **kw: sent.update(name=name, **kw) or Repo
    )
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **kw: sent.update(kw))
    monkeypatch.setattr(hub_utils.ModelCard, "load", no_card)
    out = run(
        "--max_train_steps=1", "--train_params", "conv_out", "--push_to_hub", "--hub_token=secret"
    )
    assert sent["name"] == "out" and sent["token"] == "secret" and sent["repo_id"] == "me/out"
    files = [str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()]
    uploaded = list(filter_repo_objects(files, ignore_patterns=sent["ignore_patterns"]))
    assert "README.md" in uploaded and "unet/diffusion_pytorch_model.safetensors" in uploaded
    assert not [f for f in uploaded if "checkpoint" in f]
    assert "stable-video-diffusion" in (out / "README.md").read_text()
    assert "secret" not in (out / "args.json").read_text()


def test_precision_falls_back_to_nothing_silently(monkeypatch):
    """What accelerate was configured for counts as asked for."""
    monkeypatch.setattr(precision, "fast_bf16", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="^--mixed_precision bf16"):
        precision.check_precision(None)
    assert precision.check_precision("no") == "no"
