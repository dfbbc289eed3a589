"""Which noise levels a training draws, and how much the loss at each counts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafuse_common.errors import ConfigError
from lorafuse_train.base import Base
from lorafuse_train.options.config import TrainConfig

UNIFORM = "uniform"
LEAST_SHARE = 1e-6
"""Of a density that must lie between the smallest and the largest noise level, to be drawn there with any accuracy."""


@dataclass(frozen=True, slots=True)
class NoiseLevels:
    """The density that sigma is drawn from."""

    is_uniform: bool = False
    """Whether u is uniform in 0..1, else logit-normal."""
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    """Of sigma; the density is cut off there and at `high`."""
    high: float = 1.0
    few: tuple[float, ...] = ()
    """A few-step schedule's own noise levels."""
    few_share: float = 0.0
    """How often one of them is drawn, each alike."""

    def draw(self, shift: float, generator: torch.Generator) -> Tensor:
        """One sigma in 0..1, fp32, shape ().

        u = sigmoid(mean + std n), or uniform (SD3, https://arxiv.org/abs/2403.03206, section 3.1);
        sigma = s u / (1 + (s - 1) u) (equation 23 there).
        """
        if self.few_share and torch.rand((), generator=generator) < self.few_share:
            return torch.tensor(self.few)[torch.randint(len(self.few), (), generator=generator)]
        if (self.low, self.high) != (0.0, 1.0):
            return self._draw_between(shift, generator)
        if self.is_uniform:
            u = torch.rand((), generator=generator)
        else:
            u = torch.sigmoid(self.mean + self.std * torch.randn((), generator=generator))
        return shift * u / (1 + (shift - 1) * u)

    def _draw_between(self, shift: float, generator: torch.Generator) -> Tensor:
        """By the inverse of the distribution, whose values at the two ends are known."""
        first, last = self._below(self.low, shift), self._below(self.high, shift)
        p = first + (last - first) * torch.rand((), generator=generator, dtype=torch.float64)
        u = p if self.is_uniform else torch.sigmoid(self.mean + self.std * torch.special.ndtri(p))
        return (shift * u / (1 + (shift - 1) * u)).clamp(self.low, self.high).float()

    def _below(self, sigma: float, shift: float) -> Tensor:
        """The share of the density below sigma, fp64."""
        u = torch.tensor(sigma / (shift - (shift - 1) * sigma), dtype=torch.float64)
        return u if self.is_uniform else torch.special.ndtr((torch.logit(u) - self.mean) / self.std)

    def share_between(self, shift: float) -> float:
        """How much of the density lies between `low` and `high`."""
        return float(self._below(self.high, shift) - self._below(self.low, shift))


def choose_levels(config: TrainConfig, base: Base) -> NoiseLevels:
    """What the options say, with the noise levels that the manifest records.

    Raises:
        ConfigError: it records none that may be drawn.
    """
    low, high = base.expert.range if base.expert else (0.0, 1.0)
    low = low if config.min_timestep is None else config.min_timestep / 1000
    high = high if config.max_timestep is None else config.max_timestep / 1000
    schedule = base.manifest.schedule if base.manifest else None
    few = tuple(sigma for sigma in (schedule.sigmas if schedule else ()) if low <= sigma <= high)
    if base.expert:  # the boundary itself is the high-noise expert's
        few = tuple(sigma for sigma in few if sigma in base.expert)
    if config.few_step_share and not few:
        lack = "lorafuse.json records no few-step schedule; fuse with --schedule"
        if schedule:
            lack = f"none of the noise levels {schedule.sigmas} lies between {low:g} and {high:g}"
        raise ConfigError(f"--timestep_sampling {config.timestep_sampling}: {base.folder}: {lack}")
    return NoiseLevels(
        is_uniform=config.timestep_sampling == UNIFORM,
        mean=config.logit_mean,
        std=config.logit_std,
        low=low,
        high=high,
        few=few if config.few_step_share else (),
        few_share=config.few_step_share,
    )


def require_density(levels: NoiseLevels, shifts: Iterable[float]) -> None:
    """Make sure that there is something to draw between the smallest and the largest noise level.

    Raises:
        ConfigError: next to nothing of the density lies there.
    """
    if levels.few_share == 1:
        return
    for shift in sorted(set(shifts)):
        if levels.share_between(shift) < LEAST_SHARE:
            raise ConfigError(
                f"--min_timestep {1000 * levels.low:g} --max_timestep {1000 * levels.high:g}: next to nothing of the "
                f"density that --timestep_sampling asks for lies there (shift {shift:.4g}); widen them, change "
                "--logit_mean and --logit_std, or take --timestep_sampling uniform"
            )


def loss_weights(scheme: str, sigma: Tensor) -> Tensor | None:
    """The weight of each picture's loss, (B,), by its noise level; None where all count alike.

    As diffusers' `compute_loss_weighting_for_sd3`, which the paper names differently: sigma_sqrt is 1 / sigma^2.
    """
    if scheme == "sigma_sqrt":
        return sigma**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return None
