"""Pictures from the model at hand: noise from fixed seeds, a schedule, and Euler steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lorafuse_train.dataset.order import seed_for
from lorafuse_train.experts import model_at
from lorafuse_train.precision import Precision
from lorafuse_train.recipes.recipe import Condition, Encoded, Latent, Recipe

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

    @property
    def is_guided(self) -> bool:
        """Whether its steps take a second prediction, for a negative prompt."""
        return self.guidance_scale != 1 and not self.embedded

    def __str__(self) -> str:
        steps = f"{len(self.sigmas)} step{'s' * (len(self.sigmas) != 1)}"
        if self.embedded:
            return f"{steps}, guidance {self.guidance_scale:g}"
        return f"{steps}, no CFG" if self.guidance_scale == 1 else f"{steps}, CFG {self.guidance_scale:g}"


@dataclass(frozen=True, slots=True)
class Column:
    """One prompt of a grid: what is told, where it starts, and how it is drawn in each row."""

    text: str
    encoded: Encoded
    negative: Encoded
    """What guidance leads away from."""
    noise: Tensor
    """The start (C, h, w) or (C, f, h, w), the same in every row."""
    schedules: tuple[Schedule, ...]
    """Few-step first, where there is one; then the long one."""
    bucket: Hashable = ()
    """Columns of one bucket may go through the model together: as many controls of the same sizes."""
    controls: tuple[Image.Image, ...] = ()
    """What an edit model is shown, for the grid."""


def starting_noise(seed: int, column: int, latent: Latent) -> Tensor:
    """eps of a column that has no seed of its own, fp32; a function of the seed and the column only."""
    return noise_from(seed_for("sample", seed, column), latent)


def noise_from(seed: int, latent: Latent) -> Tensor:
    """eps of a prompt's own seed, fp32: what a pipeline draws with `torch.Generator().manual_seed(seed)`.

    FLUX.2's pipelines draw the same numbers in the order of their patches, and so start elsewhere.
    """
    return torch.randn(latent, generator=torch.Generator().manual_seed(seed))


def count_at_once(latent: Latent) -> int:
    """How many pictures or videos of a latent shape go through the model together."""
    return max(1, TOKENS_AT_ONCE * 4 // math.prod(latent[1:]))


def draw_row(
    recipe: Recipe,
    transformer: Any,
    columns: Sequence[Column],
    row: int,
    precision: Precision,
    after_step: Callable[[], object] = lambda: None,
) -> list[Tensor]:
    """x0 of every column under one model and its schedule number `row`, on the CPU."""
    found: dict[int, Tensor] = {}
    for part in _batches(columns, row):
        drawn = denoise(
            recipe,
            transformer,
            torch.stack([columns[index].noise for index in part]),
            columns[part[0]].schedules[row],
            ([columns[index].encoded for index in part], [columns[index].negative for index in part]),
            precision,
            after_step,
        )
        found |= zip(part, drawn.unbind(), strict=True)
    return [found[index] for index in range(len(columns))]


def steps_of_row(columns: Sequence[Column], row: int) -> int:
    """How often `draw_row` calls `after_step`."""
    return sum(len(columns[part[0]].schedules[row].sigmas) for part in _batches(columns, row))


def _batches(columns: Sequence[Column], row: int) -> list[list[int]]:
    """The indices of columns that go through the model together."""
    groups: dict[Hashable, list[int]] = {}
    for index, column in enumerate(columns):
        groups.setdefault((column.noise.shape, column.schedules[row], column.bucket), []).append(index)
    batches = []
    for indices in groups.values():
        column = columns[indices[0]]
        # Control pictures may have many more tokens than what is drawn.
        at_once = 1 if column.controls else count_at_once(column.noise.shape)
        batches += [indices[start : start + at_once] for start in range(0, len(indices), at_once)]
    return batches


@torch.no_grad()
def denoise(
    recipe: Recipe,
    transformer: Any,
    noise: Tensor,
    schedule: Schedule,
    texts: tuple[Sequence[Encoded], Encoded | Sequence[Encoded]],
    precision: Precision,
    after_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Euler steps x' = x + (sigma' - sigma) v from `noise` (B, C, ...) down to sigma = 0; fp32, on the CPU.

    `texts` are the B prompts, and the B negative prompts or the one of all, which only guidance uses.
    """
    told = Told.of(recipe, *texts)
    x = noise.to(precision.device)
    for sigma, following in zip(schedule.sigmas, (*schedule.sigmas[1:], 0.0), strict=True):
        x = x + (following - sigma) * velocity(recipe, transformer, x, sigma, told, schedule, precision)
        after_step()
    return x.cpu()


@dataclass(frozen=True, slots=True)
class Told:
    """A batch of prompts and of negative prompts."""

    positive: Condition
    negative: Condition

    @classmethod
    def of(cls, recipe: Recipe, positive: Sequence[Encoded], negative: Encoded | Sequence[Encoded]) -> Told:
        """`negative` is one for each prompt, or one for all."""
        negatives = [negative] * len(positive) if isinstance(negative, Mapping) else negative
        return cls(recipe.collate(positive), recipe.collate(negatives))


def velocity(
    recipe: Recipe, transformer: Any, x: Tensor, sigma: float, told: Told, schedule: Schedule, precision: Precision
) -> Tensor:
    """v of `x` (B, C, ...) at one noise level, with the schedule's guidance; fp32, on the device."""
    positive = with_guidance(told.positive, schedule, len(x))
    levels = torch.full((len(x),), sigma, device=x.device)
    transformer = model_at(transformer, sigma)
    with precision.compute():
        v = recipe.predict(transformer, x, levels, positive)
        if schedule.is_guided:
            v = recipe.guide(v, recipe.predict(transformer, x, levels, told.negative), schedule.guidance_scale)
    return v


def with_guidance(condition: Condition, schedule: Schedule, count: int) -> Condition:
    """With the guidance scale that a model which embeds it is told."""
    return {**condition, "guidance": torch.full((count,), schedule.guidance_scale)} if schedule.embedded else condition
