"""Trains the demo's AutoencoderKLQwenImage: 64x64 pictures to 16x16 latents of 16 channels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import drawing
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders import autoencoder_kl_qwenimage
from torch import Tensor

from maker.pictures import drawn
from maker.progress import Progress

CHANNELS = 16
CROP = 32
BATCH = 16
# A new LoRA must be able to reach pictures the base never drew.
STYLES = ("glow", "wash", "hatch", "neon", "sticker")


@contextmanager
def single_frame() -> Iterator[None]:
    """Runs the causal 3-D convolutions as 2-D ones: for one frame the earlier taps only see zero padding."""
    layer = autoencoder_kl_qwenimage.QwenImageCausalConv3d
    original = layer.forward

    def forward(self: torch.nn.Conv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.shape[2] != 1 or cache_x is not None or self.stride != (1, 1, 1):
            result: Tensor = original(self, x, cache_x)
            return result
        # The layer pads by hand, so its own padding is 0; all its kernels are odd and keep the size.
        height, width = self.kernel_size[1] // 2, self.kernel_size[2] // 2
        flat = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=(height, width))
        return flat[:, :, None]

    layer.forward = forward
    try:
        yield
    finally:
        layer.forward = original


def build_vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def _mixed_styles(count: int, rng: np.random.Generator) -> Tensor:
    half = count // 2
    others = rng.integers(0, len(STYLES), count - half)
    plain = drawn(half, rng)[0]
    styled = [drawn(int((others == k).sum()), rng, style)[0] for k, style in enumerate(STYLES)]
    return torch.cat([plain, *styled])


def _crops(rng: np.random.Generator) -> Tensor:
    # Crops make the same compute show twice as many outlines; the margin of 4 skips plain borders.
    pictures = _mixed_styles(BATCH, rng)
    left, top = rng.integers(4, drawing.SIZE - CROP - 3, 2)
    return pictures[:, :, None, top : top + CROP, left : left + CROP].contiguous()


def train_vae(vae: AutoencoderKLQwenImage, steps: int) -> None:
    rng, noise = np.random.default_rng(1), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1, betas=(0.9, 0.99), weight_decay=0)
    progress = Progress("vae", steps, every=200)
    vae.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / steps) + 1e-5
        picture = _crops(rng)
        mean = vae.encode(picture).latent_dist.mean
        # The decoder must forgive the small errors a diffusion model makes.
        restored = vae.decode(mean + 0.02 * torch.randn(mean.shape, generator=noise)).sample
        error = restored - picture
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-3 * mean.square().mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step(loss.item())
    vae.eval()
    _record_latent_statistics(vae)


@torch.no_grad()
def _record_latent_statistics(vae: AutoencoderKLQwenImage) -> None:
    # Statistics of the plain pictures alone: they are what the base diffuses.
    latents = vae.encode(drawn(512, np.random.default_rng(99))[0][:, :, None]).latent_dist.mean
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )


@torch.no_grad()
def reconstruct(vae: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    restored: Tensor = vae.decode(vae.encode(pictures[:, :, None]).latent_dist.mean).sample[:, :, 0]
    return restored.clamp(-1, 1)


def psnr(vae: AutoencoderKLQwenImage, style: str = "plain") -> float:
    pictures = drawn(256, np.random.default_rng(98), style)[0]
    mean_squared = (reconstruct(vae, pictures) - pictures).square().mean().item()
    return 10 * math.log10(4 / mean_squared)
