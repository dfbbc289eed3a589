"""What families with a transformer of 2x2 patches have in common, to be inherited: latents and noise levels."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from torch import Tensor, nn

from .recipe import Latent, TextOnly

PATCH = 2
MANY_STEPS = 200
"""Where FLUX.2's shift ends to make up for a small number of steps, for which training has no need."""


class KlLatents(TextOnly):
    """Latents of an `AutoencoderKL`, shifted and scaled by two numbers of its config.json."""

    def pixel_multiple(self, pipeline: Path) -> int:
        """VAE reduction times patch."""
        return _reduction(pipeline) * PATCH

    def latent_shape(self, pipeline: Path, height: int, width: int, frames: int = 1) -> Latent:
        """(latent_channels, H / reduction, W / reduction)."""
        scale = _reduction(pipeline)
        return int(AutoencoderKL.load_config(pipeline / "vae")["latent_channels"]), height // scale, width // scale

    def load_vae(self, pipeline: Path, device: torch.device) -> nn.Module:
        """In fp32 whatever it is stored in: it is small, and what it encodes is kept for all trainings."""
        vae = AutoencoderKL.from_pretrained(pipeline / "vae", dtype=torch.float32)
        return vae.to(device).eval()  # type: ignore[no-any-return]  # diffusers is untyped

    @torch.no_grad()
    def encode_image(self, vae: AutoencoderKL, pixels: Tensor) -> Tensor:
        """x0 = (mode - shift_factor) * scaling_factor."""
        z: Tensor = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()[0].float()
        x0: Tensor = (z - vae.config.shift_factor) * vae.config.scaling_factor
        return x0.cpu()

    @torch.no_grad()
    def decode(self, vae: AutoencoderKL, x0: Tensor) -> Tensor:
        """The inverse of `encode_image`."""
        z = x0.to(vae.device, torch.float32) / vae.config.scaling_factor + vae.config.shift_factor
        pixels: Tensor = vae.decode(z[None].to(vae.dtype)).sample[0]
        return pixels.float().cpu()


class EulerShift:
    """The levels of a `FlowMatchEulerDiscreteScheduler`, shifted by a fixed number or by that of the patches."""

    evenly_spaced = True
    """Whether the pipeline gives the scheduler even levels, or leaves them to it."""

    def sigmas(self, pipeline: Path, steps: int, latent: Latent) -> tuple[float, ...]:
        """As the pipeline asks the scheduler for them."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline / "scheduler")
        even = [1 - k / steps for k in range(steps)] if self.evenly_spaced else None
        retrieve_timesteps(scheduler, steps, "cpu", sigmas=even, mu=self.mu(scheduler, latent, steps))
        return tuple(float(sigma) for sigma in scheduler.sigmas[:-1])

    def shift(self, pipeline: Path, latent: Latent) -> float:
        """exp(mu) or mu of many steps where the scheduler shifts by size, else its fixed shift.

        A stretch to a last sigma is left out, for training is to cover every noise level.
        """
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline / "scheduler")
        if not scheduler.config.use_dynamic_shifting:
            return float(scheduler.config.shift)
        mu = self.mu(scheduler, latent, MANY_STEPS)
        return math.exp(mu) if scheduler.config.time_shift_type == "exponential" else mu

    def mu(self, scheduler: FlowMatchEulerDiscreteScheduler, latent: Latent, steps: int) -> float:
        """What the pipeline tells a scheduler that shifts by size: linear in the patches, whatever the steps."""
        config = scheduler.config
        limits = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        return float(calculate_shift(patches_of(latent), *limits))


def patches_of(latent: Latent) -> int:
    """How many patches cover (C, h, w)."""
    return (latent[1] // PATCH) * (latent[2] // PATCH)


def _reduction(pipeline: Path) -> int:
    return int(2 ** (len(AutoencoderKL.load_config(pipeline / "vae")["block_out_channels"]) - 1))
