"""infer_svd.py: images in, videos out."""

import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

import infer_svd
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.inference import pipeline
from svd_xtend.models.loading import load_svd

ROOT = Path(__file__).parents[1]


def probe(path):
    """(frame rate, number of frames, size) of a video."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return (
            float(stream.average_rate),
            len(list(container.decode(stream))),
            (stream.width, stream.height),
        )


def test_it_renders_several_images_as_its_user_runs_it(clips, tmp_path):
    pictures = [str(clips / f"fall000{i}" / "000.png") for i in range(2)]
    flags = [f"--output_dir={tmp_path}", "--num_inference_steps=2", "--fps=5"]
    command = [sys.executable, "infer_svd.py", "--image", *pictures, *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in ("fall0000_000", "fall0001_000"):
        rate, count, _ = probe(tmp_path / f"{name}.mp4")
        assert (rate, count) == (5, 8)
        assert (tmp_path / f"{name}.gif").exists()
        assert (tmp_path / f"{name}.png").exists()


def test_it_loads_a_checkpoint_its_ema_weights_and_the_exported_model(run):
    out = run("--max_train_steps=2", "--use_ema", "--train_params", "conv_out")
    unets = {}
    for name, ema in (("trained", False), ("ema", True)):
        unet = load_svd(str(TINY_SVD), torch.float32).unet
        pipeline.load_checkpoint(unet, out / "checkpoint-2", ema)
        unets[name] = unet.conv_out.weight
    exported = load_svd(str(out), torch.float32).unet.conv_out.weight
    assert torch.equal(exported, unets["ema"])
    assert not torch.equal(exported, unets["trained"])


def test_errors_name_the_file_that_is_missing(run):
    out = run("--max_train_steps=1", "--train_params", "conv_out")
    unet = load_svd(str(TINY_SVD), torch.float32).unet
    with pytest.raises(
        ValueError,
        match="^--checkpoint .*no ema.safetensors in it; the run was trained without --use_ema",
    ):
        pipeline.load_checkpoint(unet, out / "checkpoint-1", ema=True)
    with pytest.raises(ValueError, match="nowhere.jpg: cannot be read as a picture"):
        infer_svd.main(infer_svd.build_parser().parse_args(["--image", "nowhere.jpg"]))
