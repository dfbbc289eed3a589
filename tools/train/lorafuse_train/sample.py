"""Pictures from the model at hand: noise from fixed seeds, a schedule, and Euler steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import TrainConfig
from .order import seed_for
from .precision import Precision
from .recipes.recipe import Encoded, Recipe

TOKENS_AT_ONCE = 4096
"""Latent patches that go through the model together: one picture of 1024 x 1024, or many small ones."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How to walk from noise to a picture."""

    sigmas: tuple[float, ...]
    """Noise levels visited, without the final 0."""
    guidance_scale: float
    """1: no guidance, half the work."""
    embedded: bool = False
    """Whether the model is told the scale, and needs no second prediction (`Guidance.EMBEDDED`)."""

    def __str__(self) -> str:
        steps = f"{len(self.sigmas)} step{'s' * (len(self.sigmas) != 1)}"
        if self.embedded:
            return f"{steps}, guidance {self.guidance_scale:g}"
        return f"{steps}, no CFG" if self.guidance_scale == 1 else f"{steps}, CFG {self.guidance_scale:g}"


@dataclass(frozen=True, slots=True)
class Prompts:
    """The columns of a grid."""

    texts: tuple[str, ...]
    encoded: tuple[Encoded, ...]
    negative: Encoded
    noise: tuple[Tensor, ...]
    """The start (C, h, w) of each column, the same in every row."""


def starting_noise(config: TrainConfig, columns: int, latent: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """eps (C, h, w) for each column, fp32; a function of the seed and the column only."""
    return tuple(
        torch.randn(latent, generator=torch.Generator().manual_seed(seed_for("sample", config.validation_seed, column)))
        for column in range(columns)
    )


def draw_row(
    recipe: Recipe, transformer: Any, prompts: Prompts, schedule: Schedule, precision: Precision
) -> list[Tensor]:
    """x0 (C, h, w) of every prompt under one model and schedule, on the CPU."""
    _, height, width = prompts.noise[0].shape
    at_once = max(1, TOKENS_AT_ONCE * 4 // (height * width))
    found: list[Tensor] = []
    for start in range(0, len(prompts.noise), at_once):
        part = slice(start, start + at_once)
        found += denoise(
            recipe,
            transformer,
            torch.stack(prompts.noise[part]),
            schedule,
            (prompts.encoded[part], prompts.negative),
            precision,
        ).unbind()
    return found


@torch.no_grad()
def denoise(
    recipe: Recipe,
    transformer: Any,
    noise: Tensor,
    schedule: Schedule,
    texts: tuple[Sequence[Encoded], Encoded],
    precision: Precision,
) -> Tensor:
    """Euler steps x' = x + (sigma' - sigma) v from `noise` (B, C, h, w) down to sigma = 0; fp32, on the CPU.

    `texts` are the B prompts and the one negative prompt, which only guidance uses.
    """
    scale = schedule.guidance_scale
    positive = recipe.collate(texts[0])
    negative = recipe.collate([texts[1]] * len(noise))
    if schedule.embedded:
        positive = {**positive, "guidance": torch.full((len(noise),), scale)}
    x = noise.to(precision.device)
    for sigma, following in zip(schedule.sigmas, (*schedule.sigmas[1:], 0.0), strict=True):
        levels = torch.full((len(x),), sigma, device=x.device)
        with precision.compute():
            v = recipe.predict(transformer, x, levels, positive)
            if scale != 1 and not schedule.embedded:
                v = recipe.guide(v, recipe.predict(transformer, x, levels, negative), scale)
        x = x + (following - sigma) * v
    return x.cpu()
