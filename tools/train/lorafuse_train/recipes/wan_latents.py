"""Videos as Wan's VAE encodes them, and the first frame that image-to-video models are given."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from lorafuse_train.dataset.pictures import to_pixels

from .recipe import ControlPicture, Latent, TextOnly

PATCH = 2
"""Latents on a side of a token, the same in every Wan."""
PIPELINE_MULTIPLE = 16
"""What every Wan pipeline wants height and width to be multiples of, whatever the VAE."""
FRAME_STEP = 4
"""Frames of a latent frame, all but the first, which is one frame: `AutoencoderKLWan` is built for no other number."""


class WanLatents(TextOnly):
    """Latents of an `AutoencoderKLWan`, normalised per channel: x0 (C, f, h, w) of 4 (f - 1) + 1 frames."""

    frame_step = FRAME_STEP

    def pixel_multiple(self, pipeline: Path) -> int:
        """VAE reduction times patch, and the pipelines' own."""
        return math.lcm(_reduction(pipeline) * PATCH, PIPELINE_MULTIPLE)

    def latent_shape(self, pipeline: Path, height: int, width: int, frames: int = 1) -> Latent:
        """(z_dim, (F - 1) / 4 + 1, H / reduction, W / reduction)."""
        scale = _reduction(pipeline)
        channels = int(AutoencoderKLWan.load_config(pipeline / "vae")["z_dim"])
        return channels, (frames - 1) // FRAME_STEP + 1, height // scale, width // scale

    def load_vae(self, pipeline: Path, device: torch.device) -> nn.Module:
        """In fp32 whatever it is stored in, as Wan's own instructions say."""
        vae = AutoencoderKLWan.from_pretrained(pipeline / "vae", dtype=torch.float32)
        return vae.to(device).eval()  # type: ignore[no-any-return]  # diffusers is untyped

    @torch.no_grad()
    def encode_image(self, vae: Any, pixels: Tensor) -> Tensor:
        """x0 = (mode - latents_mean) / latents_std; pixels are (3, F, H, W), or (3, H, W) of a single frame."""
        video = pixels if pixels.ndim == 4 else pixels[:, None]
        mean, std = _statistics(vae)
        x0: Tensor = (vae.encode(video[None].to(vae.device, vae.dtype)).latent_dist.mode()[0].float() - mean) / std
        return x0.cpu()

    @torch.no_grad()
    def decode(self, vae: Any, x0: Tensor) -> Tensor:
        """The inverse of `encode_image`: (3, F, H, W)."""
        mean, std = _statistics(vae)
        latents = x0.to(vae.device, torch.float32) * std + mean
        pixels: Tensor = vae.decode(latents[None].to(vae.dtype)).sample[0]
        return pixels.float().cpu()


def encode_first(vae: Any, control: ControlPicture, frames: int) -> Tensor:
    """x0 (C, f, h, w) of a video that is the control picture and then nothing."""
    return WanLatents().encode_image(vae, grey_after(to_pixels(*control), frames))


def grey_after(first: Tensor, frames: int) -> Tensor:
    """A video (3, F, H, W) of a first frame (3, H, W) and then nothing, which is 0, as the pipelines encode it."""
    return torch.cat([first[:, None], first.new_zeros(first.shape[0], frames - 1, *first.shape[1:])], 1)


def first_frame_mask(latents: Tensor) -> Tensor:
    """(B, 4, f, h, w) for latents (B, C, f, h, w): 1 for the frames that are given, which is the first.

    Four channels for the four frames of a latent frame; the first latent frame counts as four given ones.
    """
    mask = latents.new_zeros(len(latents), FRAME_STEP, *latents.shape[2:])
    mask[:, :, 0] = 1
    return mask


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, device=vae.device)[:, None, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def _reduction(pipeline: Path) -> int:
    return int(AutoencoderKLWan.load_config(pipeline / "vae").get("scale_factor_spatial", 8))
