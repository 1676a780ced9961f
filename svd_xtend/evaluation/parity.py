"""Check that training and inference agree, tensor by tensor.

    stock = [pipeline_tensors(pipe, batch, sigma, noise_aug_strength, loss_weight(sigma)) for sigma in SIGMAS]
    trainer = [...]    # the same tensors, by the trainer: see evaluate_svd.py
    rows = compare_tensors(stock, trainer)
    print(format_parity_table(rows))

The trainer has its own code for conditioning, preconditioning and loss. If any of it differs from diffusers'
pipeline and scheduler, for instance in a new version of diffusers, a model is trained for inputs that
inference never shows. Here both get the same clip and the same noise, and everything that goes into the
UNet or follows from its output must be equal.

The tensors, in the order of the way from a clip to the loss; f frames, latents of h/8 x w/8:

    image_embeds           (1, d)               CLIP embedding of the first frame
    image_latents          (f, 4, h/8, w/8)     VAE latents of the first frame
    added_time_ids         (3,)                 fps - 1, motion_bucket_id, noise_aug_strength
    dropped image_embeds   (1, d)               the same without conditioning,
    dropped image_latents  (f, 4, h/8, w/8)     for classifier-free guidance
    c_noise                ()                   noise level, as the UNet gets it
    noisy_latents          (f, 4, h/8, w/8)     c_in * (latents + sigma * noise)
    F_x, dropped F_x       (f, 4, h/8, w/8)     output of the UNet with and without conditioning
    denoised               (f, 4, h/8, w/8)     D(x) under guidance
    loss                   ()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from svd_xtend.data import images
from svd_xtend.training import distributed

if TYPE_CHECKING:
    import torch
    from diffusers import StableVideoDiffusionPipeline
    from torch import Tensor

SEED = 0
SIGMAS = (0.05, 1.0, 10.0, 200.0)
FPS = 6.0
MOTION_BUCKET_ID = 180.0
GUIDANCE_SCALE = 2.0
# The largest difference that is allowed, as a share of the tensor's largest value. The VAE rounds
# differently by memory layout.
TOLERANCES = {
    "image_embeds": 1e-3,
    "image_latents": 5e-3,
    "added_time_ids": 1e-6,
    "dropped image_embeds": 0.0,
    "dropped image_latents": 0.0,
    "c_noise": 1e-6,
    "noisy_latents": 1e-3,
    "F_x": 5e-3,
    "dropped F_x": 5e-3,
    "denoised": 5e-3,
    "loss": 1e-3,
}


class FixedNoise:
    """Takes the place of the trainer's SampleNoise: draws that the pipeline can repeat, the same for each shape."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        """Return (1, *shape) from N(0, 1), from the generator that the pipeline is given."""
        import torch

        generator = torch.Generator().manual_seed(SEED)
        return torch.randn((1, *shape), generator=generator).to(self.device)

    def uniform(self) -> Tensor:
        """Return (1,), the middle of [0, 1)."""
        import torch

        return torch.full((1,), 0.5, device=self.device)


def make_batch(
    frames: np.ndarray, width: int, height: int, num_frames: int, device: torch.device
) -> dict:
    """Return a batch of one clip from frames (n, h, w, 3) uint8, which are repeated if they are too few."""
    import torch

    resized = np.stack([images.resize_frame(frame, width, height) for frame in frames])
    clip = torch.from_numpy(resized[np.arange(num_frames) % len(resized)])
    batch = {
        "fps": torch.tensor([FPS]),
        "motion_bucket_id": torch.tensor([MOTION_BUCKET_ID]),
        "index": [0],
        "pixel_values": clip.permute(0, 3, 1, 2)[None],
    }
    return distributed.batch_to_device(batch, device)


def pipeline_tensors(
    pipe: StableVideoDiffusionPipeline,
    batch: dict,
    sigma: float,
    noise_aug_strength: float,
    loss_weight: float,
) -> dict[str, Tensor]:
    """Return the tensors of one step of the stock pipeline and scheduler, from noise level sigma to 0.

    noise_aug_strength: that of the trainer. loss_weight: lambda(sigma) of the trainer's loss.
    """
    import torch
    from PIL import Image

    pixel_values = batch["pixel_values"]
    noise = FixedNoise(pipe.device)
    scheduler = pipe.scheduler
    with torch.no_grad():
        posterior = pipe.vae.encode(pixel_values[0]).latent_dist
    z = noise.normal(*posterior.mean.shape)[0]
    latents = (posterior.mean + posterior.std * z) * pipe.vae.config.scaling_factor
    noisy = latents + sigma * z
    first_frame = pixel_values[0, 0].permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(((first_frame + 1) * 127.5).round().astype(np.uint8))

    calls = []

    def record(module, args, kwargs, output):
        calls.append((args, kwargs, output))

    scheduler.set_timesteps(sigmas=[sigma, 0.0])
    handle = pipe.unet.register_forward_hook(record, with_kwargs=True)
    try:
        denoised = pipe(
            image,
            *pixel_values.shape[-2:],
            len(latents),
            sigmas=[sigma, 0.0],
            min_guidance_scale=GUIDANCE_SCALE,
            max_guidance_scale=GUIDANCE_SCALE,
            fps=batch["fps"].item(),
            motion_bucket_id=batch["motion_bucket_id"].item(),
            noise_aug_strength=noise_aug_strength,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            latents=noisy[None] / scheduler.init_noise_sigma,
        ).frames
    finally:
        handle.remove()
    (sample, c_noise), kwargs, output = calls[0]
    F_x = output[0]
    embeds = kwargs["encoder_hidden_states"]
    added_time_ids = kwargs["added_time_ids"]
    # the loss is without guidance: the step once more, from the conditional half of the batch alone
    scheduler.set_timesteps(sigmas=[sigma, 0.0])
    step = scheduler.step(F_x[1:], scheduler.timesteps[0], noisy[None])
    loss = loss_weight * ((step.pred_original_sample - latents) ** 2).mean()
    # the pipeline's batch is (unconditional, conditional)
    return {
        "image_embeds": embeds[1],
        "image_latents": sample[1, :, 4:],
        "added_time_ids": added_time_ids[1],
        "dropped image_embeds": embeds[0],
        "dropped image_latents": sample[0, :, 4:],
        "c_noise": c_noise,
        "noisy_latents": sample[1, :, :4],
        "F_x": F_x[1],
        "dropped F_x": F_x[0],
        "denoised": denoised[0],
        "loss": loss,
    }


@dataclass(frozen=True)
class TensorParity:
    """How much a tensor of the trainer differs from the pipeline's, over all noise levels."""

    name: str
    shape: tuple[int, ...]
    largest: float  # largest absolute value
    difference: float  # largest absolute difference
    allowed: float

    @property
    def passed(self) -> bool:
        """Return whether the difference is allowed; nan is not."""
        return self.difference <= self.allowed


def compare_tensors(
    stock: Sequence[dict[str, Tensor]], trainer: Sequence[dict[str, Tensor]]
) -> list[TensorParity]:
    """Compare the tensors of pipeline and trainer, a dict for each noise level."""
    rows = []
    for name, tolerance in TOLERANCES.items():
        largest = [tensors[name].abs().max().item() for tensors in stock]
        differences = []
        for expected, actual in zip(stock, trainer):
            difference = expected[name] - actual[name].reshape(expected[name].shape)
            differences.append(difference.abs().max().item())
        rows.append(
            TensorParity(
                name=name,
                shape=tuple(stock[0][name].shape),
                largest=float(np.max(largest)),
                difference=float(np.max(differences)),  # nan if any is
                allowed=tolerance * float(np.max(largest)),
            )
        )
    return rows


def first_difference(rows: Sequence[TensorParity]) -> str | None:
    """Return the name of the first tensor that differs, or None."""
    for row in rows:
        if not row.passed:
            return row.name
    return None


def format_parity_table(rows: Sequence[TensorParity]) -> str:
    """Format a comparison for a terminal, with the verdict in the last line."""
    lines = [f"{'tensor':24}{'shape':16}{'largest value':>14}{'difference':>14}{'allowed':>12}"]
    for row in rows:
        shape = "x".join(map(str, row.shape)) or "1"
        verdict = "PASS" if row.passed else "FAIL"
        lines.append(
            f"{row.name:24}{shape:16}{row.largest:14.5g}{row.difference:14.3g}{row.allowed:12.3g}"
            f"  {verdict}"
        )
    first = first_difference(rows)
    if first is None:
        lines.append("\nPASS")
    else:
        lines.append(
            f"\nFAIL: {first} is the first tensor that differs; those after it may follow from it"
        )
    return "\n".join(lines)
