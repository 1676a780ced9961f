"""The objective: identities against the paper and against the sampler that will use the result."""

from dataclasses import replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler

import train_svd
from svd_xtend.demo.tiny_svd import TINY_SVD
from train_svd import LossOptions, SampleNoise, default_P, loss_weight, scalings, training_loss

SIGMAS = [0.002, 0.02, 0.5, 1.0, 2.0, 20.0, 700.0]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_input_has_unit_variance_at_every_sigma(sigma):
    generator = torch.Generator().manual_seed(0)
    y, n = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    sigma = torch.tensor(sigma, dtype=torch.float64)
    assert (scalings(sigma)[2] * (y + sigma * n)).std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_weight_times_c_out_squared_is_one(sigma):
    """lambda |D - y|^2 is then the plain mean square of F - v."""
    sigma = torch.tensor(sigma, dtype=torch.float64)
    assert loss_weight(sigma) * scalings(sigma)[1] ** 2 == pytest.approx(1)


@pytest.mark.parametrize("index", [0, 5, 12, 23])
def test_training_denoiser_equals_the_samplers_step(index):
    """EulerDiscreteScheduler, as SVD configures it: same c_in, same c_noise, same D."""
    scheduler = EulerDiscreteScheduler.from_pretrained(TINY_SVD, subfolder="scheduler")
    scheduler.set_timesteps(25)
    t, sigma = scheduler.timesteps[index], scheduler.sigmas[index]
    x, F_x = torch.randn(2, 1, 8, 4, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()
    x = x * (sigma**2 + 1) ** 0.5
    c_skip, c_out, c_in, c_noise = scalings(sigma)
    assert c_noise == pytest.approx(float(t), abs=1e-5)
    torch.testing.assert_close(scheduler.scale_model_input(x, t), c_in * x, rtol=1e-4, atol=1e-5)
    denoised = scheduler.step(F_x, t, x).pred_original_sample
    torch.testing.assert_close(denoised, c_skip * x + c_out * F_x, rtol=1e-4, atol=1e-4)


def make_batch(n, f=8):
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.rand(n, f, 3, 48, 64, generator=generator) * 2 - 1,
        "fps": torch.full((n,), 7.0),
        "motion_bucket_id": torch.linspace(64, 190, n),
        "index": torch.arange(n),
    }


def make_options(**changes):
    options = LossOptions(seed=5, P_mean=0.7, P_std=1.6, dropout=(0.0, 0.0, 0.1))
    return replace(options, **changes)


class Recorder(torch.nn.Module):
    """Stands in for the UNet: keeps what it is given, answers with a fixed F."""

    def forward(self, sample, timestep, encoder_hidden_states, added_time_ids):
        self.given = (sample, timestep, encoder_hidden_states, added_time_ids)
        F_x = torch.sin(sample[:, :, :4] * 3) * 0.5
        return type("Output", (), {"sample": F_x})


def test_edm_loss_equals_the_papers_weighted_denoising_error(pipe):
    """Karras et al. 2022, Eq. 8 in float64, from the same draws, with D formed the long way."""
    batch, model = make_batch(3), Recorder()
    loss = training_loss(model, pipe, batch, make_options(dropout=(0.0, 0.0, 0.0)))
    inputs, c_noise, _, _ = (t.double() for t in model.given)
    sigma = (4 * c_noise).exp()[:, None, None, None, None]
    noise = SampleNoise(5, batch["index"], "cpu")
    latents = train_svd.encode_video(pipe.vae, batch["pixel_values"], noise).double()
    c_skip, c_out, c_in, _ = scalings(sigma)
    x = inputs[:, :, :4] / c_in
    F_x = torch.sin(inputs[:, :, :4] * 3) * 0.5
    expected = (loss_weight(sigma) * (c_skip * x + c_out * F_x - latents) ** 2).mean((1, 2, 3, 4))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-4)


def test_batch_of_two_equals_two_of_one(pipe):
    batch, args = make_batch(2), make_options()
    both = training_loss(pipe.unet, pipe, batch, args)
    single = [
        training_loss(pipe.unet, pipe, {k: v[i : i + 1] for k, v in batch.items()}, args)
        for i in range(2)
    ]
    torch.testing.assert_close(both, torch.cat(single), rtol=1e-4, atol=1e-5)


def test_draws_depend_on_seed_and_sample_index_only():
    def draw(seed, indices):
        return SampleNoise(seed, indices, "cpu").normal(3)

    torch.testing.assert_close(
        draw(1, [4, 9]), torch.cat([draw(1, [4]), draw(1, [9])]), rtol=0, atol=0
    )
    assert not torch.equal(draw(1, [4]), draw(2, [4]))
    assert not torch.equal(draw(1, [4]), draw(1, [5]))


def test_sigma_is_log_normal_with_P_mean_and_P_std(pipe):
    """Through the real loss, 256 clips of one small frame."""
    batch, model = make_batch(256, f=1), Recorder()
    batch["pixel_values"] = batch["pixel_values"][..., :16, :16]
    args = make_options(P_mean=0.3, P_std=1.2, vae_encode_chunk=256)
    training_loss(model, pipe, batch, args)
    log_sigma = 4 * model.given[1]
    assert log_sigma.mean() == pytest.approx(0.3, abs=0.25)
    assert log_sigma.std() == pytest.approx(1.2, abs=0.2)


def test_noise_distribution_follows_the_papers_stage_table():
    assert default_P(512, 320) == default_P(576, 320) == (0.7, 1.6)
    assert default_P(1024, 576) == (1.0, 1.6)


def test_condition_arrives_in_the_models_keywords(pipe):
    class Model(Recorder):
        def forward(self, *tensors, boxes):
            self.boxes = boxes
            return super().forward(*tensors)

    model, boxes = Model(), torch.zeros(2, 8, 1, 4)
    training_loss(model, pipe, {**make_batch(2), "control": {"boxes": boxes}}, make_options())
    assert model.boxes is boxes


def test_training_loss_is_the_denoising_loss_of_its_own_draws(pipe):
    """Step by step, with the public functions in the order in which training draws."""
    batch = make_batch(2)
    options = make_options(dropout=(0.2, 0.2, 0.2))
    noise = SampleNoise(5, batch["index"], "cpu")
    latents = train_svd.encode_video(pipe.vae, batch["pixel_values"], noise)
    conditioning = train_svd.encode_conditioning(pipe, batch, noise)
    conditioning = train_svd.drop_conditioning(conditioning, noise.uniform(), options.dropout)
    sigma = (noise.normal() * 1.6 + 0.7).exp()
    eps = noise.normal(*latents.shape[1:])
    expected = train_svd.denoising_loss(pipe.unet, latents, conditioning, sigma, eps)
    assert torch.equal(training_loss(pipe.unet, pipe, batch, options), expected)


def test_denoising_loss_is_pure():
    """The same inputs give the same loss, and no input is changed."""
    g = torch.Generator().manual_seed(0)
    latents, eps = (torch.randn(2, 3, 4, 6, 8, generator=g) for _ in range(2))
    sigma = torch.tensor([0.5, 20.0])
    conditioning = train_svd.Conditioning(
        image_embeds=torch.randn(2, 1, 5, generator=g),
        image_latents=torch.randn(2, 4, 6, 8, generator=g),
        added_time_ids=torch.ones(2, 3),
    )
    before = [t.clone() for t in (latents, eps, sigma, conditioning.image_latents)]
    first = train_svd.denoising_loss(Recorder(), latents, conditioning, sigma, eps)
    second = train_svd.denoising_loss(Recorder(), latents, conditioning, sigma, eps)
    assert first.shape == (2,) and torch.equal(first, second)
    after = (latents, eps, sigma, conditioning.image_latents)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_a_pixel_weight_of_mean_one_that_is_flat_changes_nothing(pipe):
    batch = make_batch(2)
    plain = training_loss(pipe.unet, pipe, batch, make_options())
    flat = {**batch, "pixel_weight": torch.ones(2, 8, 1, 12, 16)}
    torch.testing.assert_close(training_loss(pipe.unet, pipe, flat, make_options()), plain)
