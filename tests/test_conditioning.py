"""What SVD is told in training is what the pipeline tells it."""

import pytest
import torch
from PIL import Image

from svd_xtend.demo.synthetic_clips import make_clip
from svd_xtend.demo.tiny_svd import clips_to_pixels
from train_svd import (
    Conditioning,
    SampleNoise,
    drop_conditioning,
    embed_image,
    encode_conditioning,
    encode_video,
)


class NoNoise(SampleNoise):
    """Draws of zero."""

    def __init__(self, b):
        self.b = b

    def normal(self, *shape):
        return torch.zeros(self.b, *shape)


def condition(pipe, first_frame, fps, motion_bucket_id, noise):
    """Return (image_embeds, image_latents, added_time_ids) of clean first frames."""
    batch = {
        "pixel_values": first_frame[:, None],
        "fps": fps,
        "motion_bucket_id": motion_bucket_id,
    }
    conditioning = encode_conditioning(pipe, batch, noise)
    return conditioning.image_embeds, conditioning.image_latents, conditioning.added_time_ids


@pytest.fixture
def clip():
    return make_clip((3, 1), "shapes")


def test_training_and_pipeline_agree_on_every_conditioning_tensor(pipe, clip):
    """Runs the real pipeline on the clip's first frame and compares all that its UNet gets at noise_aug_strength 0."""
    given = {}

    def spy(module, args, kwargs):
        given.setdefault("sample", args[0])
        given.setdefault("embeds", kwargs["encoder_hidden_states"])
        given.setdefault("ids", kwargs["added_time_ids"])

    handle = pipe.unet.register_forward_pre_hook(spy, with_kwargs=True)
    pipe(
        Image.fromarray(clip.frames[0]), 48, 64, 8, num_inference_steps=1, fps=9, motion_bucket_id=64,
        noise_aug_strength=0.0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    handle.remove()
    first_frame = clips_to_pixels([clip])[:, 0]
    embeds, latents, ids = condition(
        pipe, first_frame, torch.tensor([9]), torch.tensor([64]), NoNoise(1)
    )
    torch.testing.assert_close(
        embeds, given["embeds"][1:], rtol=1e-4, atol=1e-5
    )  # the second half is conditional
    torch.testing.assert_close(latents, given["sample"][1:, 0, 4:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ids[:, :2], given["ids"][1:, :2])
    assert ids[0].tolist() == pytest.approx(
        [8, 64, 0.0498], abs=1e-3
    )  # exp(-3): the log-normal's median
    assert (
        given["embeds"][0].abs().max() == given["sample"][0, 0, 4:].abs().max() == 0
    )  # and what dropping must match


def test_clip_sees_the_clean_frame_and_the_vae_a_noised_one(pipe, clip):
    first_frame = clips_to_pixels([clip])[:, 0]
    noise = SampleNoise(0, [0], "cpu")
    embeds, latents, _ = condition(pipe, first_frame, torch.tensor([7]), torch.tensor([127]), noise)
    assert torch.equal(embeds, embed_image(pipe, first_frame))
    clean = pipe.vae.encode(first_frame).latent_dist.mode()
    assert 0 < (latents - clean).abs().mean() < 1


def test_noise_aug_is_per_clip(pipe, clip):
    first_frame = clips_to_pixels([clip, clip, clip])[:, 0]
    seven = torch.tensor([7, 7, 7])
    ids = condition(pipe, first_frame, seven, seven, SampleNoise(0, [0, 1, 2], "cpu"))[2]
    assert len(set(ids[:, 2].tolist())) == 3


def test_vae_chunks_give_the_same_latents(pipe, clip):
    pixels = clips_to_pixels([clip])
    latents = [
        encode_video(pipe.vae, pixels, SampleNoise(0, [0], "cpu"), chunk) for chunk in (1, 3, 8)
    ]
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents[0], latents[2], rtol=1e-4, atol=1e-5)


def test_latents_have_about_unit_variance(pipe):
    pixels = clips_to_pixels([make_clip((3, i), "shapes") for i in range(8)])
    assert encode_video(
        pipe.vae, pixels, SampleNoise(0, range(8), "cpu"), 64
    ).std() == pytest.approx(1, abs=0.15)


def test_dropout_frequencies_are_the_stated_ones():
    n = 20_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    everything = Conditioning(torch.ones(n, 1, 1), torch.ones(n, 1, 1, 1), torch.ones(n, 3))
    dropped = drop_conditioning(everything, u, (0.05, 0.1, 0.2))
    no_clip = dropped.image_embeds.flatten() == 0
    no_latents = dropped.image_latents.flatten() == 0
    assert (no_clip & ~no_latents).float().mean() == pytest.approx(0.05, abs=0.01)
    assert (~no_clip & no_latents).float().mean() == pytest.approx(0.10, abs=0.01)
    assert (no_clip & no_latents).float().mean() == pytest.approx(0.20, abs=0.01)
