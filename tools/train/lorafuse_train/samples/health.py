"""Whether a few-step base still draws as it did: two figures that the loss does not show.

agreement: along the trajectory of the frozen base through its few-step schedule, for prompts that have nothing to do
with the training, x0_on and x0_off are what the model with and without the new LoRA takes the picture to be,
x0 = x - sigma v. With norms over all prompts,

    agreement = mean over the schedule's steps of 1 - |x0_on - x0_off| / |x0_off|

1: these prompts draw what they drew before; 0: as far from it as an empty latent.

sharpness: E(x0) is the energy of a latent above half the Nyquist frequency. With the pictures of the grid's prompts,

    sharpness = geometric mean over prompts of [E(few, on) / E(long, on)] / [E(few, off) / E(long, off)]

1: few-step pictures are as crisp beside long ones as they were before the training; below 1 they have become softer.
Above 1 is no fault: of prompts that the base did not know it drew mush in few steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafuse_train.experts import Expert
from lorafuse_train.lora.adapter import without
from lorafuse_train.precision import Precision
from lorafuse_train.recipes.recipe import Encoded, Latent, Recipe
from lorafuse_train.samples.sample import Schedule, Told, count_at_once, starting_noise, velocity
from lorafuse_train.steps.log import JSONL

AGREEMENT, SHARPNESS = "health_agreement", "health_sharpness"
PLOT_NAME = "health.png"
LEAST_AGREEMENT = 0.7
LEAST_SHARPNESS = 0.75
CUTOFF = 0.25
"""Half the Nyquist frequency, in cycles a latent."""


@dataclass(frozen=True, slots=True)
class Health:
    """The figures of one validation."""

    step: int
    agreement: float
    sharpness: float

    @property
    def drift(self) -> tuple[str, ...]:
        """What has gone too far, in words; empty where nothing has."""
        found = []
        if not self.agreement >= LEAST_AGREEMENT:  # also where it is no number
            found.append(
                f"agreement {self.agreement:.2f} is below {LEAST_AGREEMENT:g}: prompts that have nothing to do with "
                "the training no longer draw in few steps what the fused base drew"
            )
        if not self.sharpness >= LEAST_SHARPNESS:
            found.append(
                f"sharpness {self.sharpness:.2f} is below {LEAST_SHARPNESS:g}: beside long ones, few-step pictures are "
                "softer than before the training"
            )
        return tuple(found)

    def __str__(self) -> str:
        return f"few-step health: agreement {self.agreement:.3f}, sharpness {self.sharpness:.3f} (1: as before)"


ADVICE = "Train for fewer steps, at a lower --learning_rate or --lora_rank, or with more --preserve_weight."


def describe(health: Health) -> str:
    """The figures, and what is to be done where they have drifted."""
    if not health.drift:
        return str(health)
    return "\n".join([str(health), *(f"  {text}" for text in health.drift), f"  {ADVICE}"])


@dataclass
class Agreement:
    """Measures the agreement; what the frozen base does is computed once."""

    recipe: Recipe
    prompts: tuple[Encoded, ...]
    negatives: tuple[Encoded, ...]
    """One for each prompt; only guidance uses them."""
    schedule: Schedule
    latent: Latent
    seed: int
    precision: Precision
    model: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    """What to draw with, of the transformer that is trained (`Gallery.model`)."""
    expert: Expert | None = None
    """Where it is one of two, only the steps that are its own are counted."""
    _states: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    """For each batch of prompts and each step: x and x0_off (B, C, ...), fp32, on the CPU."""

    @torch.no_grad()
    def measure(self, transformer: Any) -> float:
        """The agreement of `transformer` with itself without its LoRA."""
        if not self._states:
            with without(transformer), self.model(transformer) as model:
                self._states = [self._trajectory(model, told, start) for told, start in self._batches()]
        own = [index for index, sigma in enumerate(self.schedule.sigmas) if self.expert is None or sigma in self.expert]
        if not own:
            return 1.0  # no step of the schedule asks the expert that is trained
        apart, size = dict.fromkeys(own, 0.0), dict.fromkeys(own, 0.0)
        for (told, _), states in zip(self._batches(), self._states, strict=True):
            for index in own:
                x, x0_off = states[index]
                x0_on = self._x0(transformer, x.to(self.precision.device), self.schedule.sigmas[index], told).cpu()
                apart[index] += (x0_on - x0_off).double().square().sum().item()
                size[index] += x0_off.double().square().sum().item()
        return sum(1 - math.sqrt(apart[index] / size[index]) for index in own) / len(own)

    def _batches(self) -> Iterable[tuple[Told, Tensor]]:
        """Prompts that go through the model together, and the noise that each starts from."""
        at_once = count_at_once(self.latent)
        for start in range(0, len(self.prompts), at_once):
            part = slice(start, start + at_once)
            told = Told.of(self.recipe, self.prompts[part], self.negatives[part])
            noise = [starting_noise(self.seed, start + place, self.latent) for place in range(len(self.prompts[part]))]
            yield told, torch.stack(noise)

    def _trajectory(self, transformer: Any, told: Told, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        """x and x0 at every step of the schedule, from `noise` (B, C, ...)."""
        x, found = noise.to(self.precision.device), []
        for sigma, following in zip(self.schedule.sigmas, (*self.schedule.sigmas[1:], 0.0), strict=True):
            x0 = self._x0(transformer, x, sigma, told)
            found.append((x.cpu(), x0.cpu()))
            x = x0 + following / sigma * (x - x0)  # = x + (sigma' - sigma) v
        return found

    def _x0(self, transformer: Any, x: Tensor, sigma: float, told: Told) -> Tensor:
        return x - sigma * velocity(self.recipe, transformer, x, sigma, told, self.schedule, self.precision)


@dataclass(frozen=True, slots=True)
class Pictures:
    """x0 of every column of a grid, drawn by both schedules."""

    few: Sequence[Tensor]
    long: Sequence[Tensor]


def sharpness(on: Pictures, off: Pictures) -> float:
    """Of pictures drawn with and without the new LoRA."""
    logs = [
        math.log(fine_energy(few_on) * fine_energy(long_off) / (fine_energy(long_on) * fine_energy(few_off)))
        for few_on, long_on, few_off, long_off in zip(on.few, on.long, off.few, off.long, strict=True)
    ]
    return math.exp(sum(logs) / len(logs))


def fine_energy(x0: Tensor) -> float:
    """E(x0): the mean square, over channels and places, of what lies above `CUTOFF` in a latent (..., h, w)."""
    height, width = x0.shape[-2:]
    spectrum = torch.fft.fft2(x0.double())
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None, :])
    fine = spectrum.abs().square()[..., radius > CUTOFF].sum() / (height * width)  # Parseval
    return max(float(fine) / x0.numel(), 1e-30)  # a flat latent has none, and its logarithm is asked for


def read_health(folder: Path) -> tuple[Health, ...]:
    """The figures of a run, from the metrics that it wrote; empty where its base has no few-step schedule."""
    try:
        lines = (folder / JSONL).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    rows = [json.loads(line) for line in lines]
    return tuple(Health(row["step"], row[AGREEMENT], row[SHARPNESS]) for row in rows if row.get(AGREEMENT) is not None)
