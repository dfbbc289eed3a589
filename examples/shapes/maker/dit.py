"""Builds, calls and samples the demo's QwenImageTransformer2DModel."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn

from maker.text import WIDTH, Context
from maker.vae import CHANNELS

SIDE = 16  # latent pixels
SHIFT = 3.0
LAYERS, HEADS, HEAD_WIDTH = 4, 4, 32


def build_transformer() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    # adaLN-zero: every block starts as the identity and the output as zero.
    zeroed = [module[1] for block in model.transformer_blocks for module in (block.img_mod, block.txt_mod)]
    for layer in (*zeroed, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def velocity(model: Callable[..., tuple[Tensor]], noisy: Tensor, sigma: Tensor, context: Context) -> Tensor:
    return model(
        hidden_states=noisy,
        encoder_hidden_states=context.features,
        encoder_hidden_states_mask=context.mask,
        timestep=sigma,
        img_shapes=[[(1, SIDE // 2, SIDE // 2)]] * len(noisy),
        return_dict=False,
    )[0]


def pack(latents: Tensor) -> Tensor:
    """(n, c, h, w) to the transformer's 2x2 patches (n, h * w / 4, 4 * c)."""
    n, c, h, w = latents.shape
    patches = latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor) -> Tensor:
    n, half = len(tokens), SIDE // 2
    patches = tokens.view(n, half, half, CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, CHANNELS, SIDE, SIDE)


def _statistics(vae: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    mean, std = _statistics(vae)
    parts = [(vae.encode(part[:, :, None]).latent_dist.mean - mean) / std for part in torch.split(pictures, 64)]
    return pack(torch.cat(parts)[:, :, 0])


@torch.no_grad()
def decode(vae: AutoencoderKLQwenImage, tokens: Tensor) -> Tensor:
    mean, std = _statistics(vae)
    parts = [vae.decode(unpack(part)[:, :, None] * std + mean).sample[:, :, 0] for part in torch.split(tokens, 64)]
    return torch.cat(parts).clamp(-1, 1)


def shifted(sigma: Tensor, shift: float = SHIFT) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)


def noise_levels(steps: int) -> Tensor:
    """The sigmas FlowMatchEulerDiscreteScheduler visits, with the final 0."""
    return torch.cat([shifted(torch.linspace(1, 1 / steps, steps)), torch.zeros(1)])


class Guidance(NamedTuple):
    """Classifier-free guidance away from the empty prompt."""

    scale: float
    empty: Context  # one row


def _guided(model: nn.Module, noisy: Tensor, sigma: Tensor, context: Context, guidance: Guidance) -> Tensor:
    wanted = velocity(model, noisy, sigma, context)
    empty = Context(*(part.expand(len(noisy), *part.shape[1:]) for part in guidance.empty))
    away = velocity(model, noisy, sigma, empty)
    combined = away + guidance.scale * (wanted - away)
    # QwenImagePipeline keeps the length of the conditional prediction.
    lengths: Tensor = torch.linalg.vector_norm(torch.stack([wanted, combined]), dim=-1, keepdim=True)
    scaled: Tensor = combined * (lengths[0] / lengths[1])
    return scaled


@torch.no_grad()
def trajectory(
    model: nn.Module, noise: Tensor, context: Context, steps: int, guidance: Guidance | None = None
) -> list[Tensor]:
    """Euler steps from noise to picture: all steps + 1 states."""
    levels = noise_levels(steps)
    states = [noise]
    for level, following in pairwise(levels):
        sigma, noisy = level.expand(len(noise)), states[-1]
        direction = (
            _guided(model, noisy, sigma, context, guidance) if guidance else velocity(model, noisy, sigma, context)
        )
        states.append(noisy + (following - level) * direction)
    return states


def starting_noise(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, SIDE * SIDE // 4, 4 * CHANNELS, generator=generator)
