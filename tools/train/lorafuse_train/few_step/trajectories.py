"""Where the frozen base goes in its few steps: noises, the states it reaches, and its velocity at each.

The base never changes and many trainings share it, so its trajectories are computed once and kept: beside it, in
`<fused>/lorafuse/trajectories`, or in the cache of encodings where that may not be written. Each lies under the hash
of all that it depends on: weights, recipe, text encoder, prompts, noise levels, guidance, size, number and precision.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lorafuse_common.manifest import KEPT_FOLDER
from lorafuse_train.console import progress, say
from lorafuse_train.dataset.data import Prompt
from lorafuse_train.dataset.order import seed_for
from lorafuse_train.encoding.cache import Cache, intact, store
from lorafuse_train.experts import model_at
from lorafuse_train.precision import Precision
from lorafuse_train.recipes.recipe import Encoded, Recipe
from lorafuse_train.samples.sample import Schedule, Told, count_at_once, with_guidance

FOLDER = "trajectories"
LAYOUT = 1
"""Raised when the files change their form."""


@dataclass(frozen=True, slots=True)
class Request:
    """The trajectories that a training wants."""

    prompts: tuple[Prompt, ...]
    """One for each trajectory; the same prompt twice starts from two noises."""
    schedule: Schedule
    latent: tuple[int, ...]
    """Shape of a state, (C, h, w) or (C, f, h, w)."""
    negative: str
    """The negative prompt of all; only guidance uses it."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A state of a trajectory, and what the base predicts there."""

    x: Tensor
    """(C, h, w), fp32."""
    sigma: float
    velocity: Tensor
    """(C, h, w), fp32."""


@dataclass(frozen=True, slots=True)
class Trajectories:
    """Read access to trajectories that are on disk."""

    request: Request
    paths: tuple[Path, ...]

    @property
    def sha256(self) -> str:
        """Identity of all of them, wherever they lie."""
        return hashlib.sha256(" ".join(path.stem for path in self.paths).encode()).hexdigest()

    def visit(self, number: int, step: int) -> Visit:
        """Trajectory `number` at the noise level that it visits in `step`."""
        with safe_open(self.paths[number], "pt") as file:  # reads this step alone
            x, velocity = (file.get_slice(name)[step : step + 1][0] for name in ("states", "velocities"))
        return Visit(x, self.request.schedule.sigmas[step], velocity)


def choose_folder(fused: Path, cache: Path) -> Path:
    """Beside the base, so that all its trainings find them; else in the cache."""
    beside = fused / KEPT_FOLDER
    nearest = beside if beside.is_dir() else fused
    return beside / FOLDER if os.access(nearest, os.W_OK) else cache / FOLDER


def locate(
    root: Path, request: Request, base_sha256: str, cache: Cache, precision: Precision, dtype: str
) -> Trajectories:
    """Where the trajectories of a base with these weights lie, whether they are there yet or not."""
    schedule = request.schedule
    paths = []
    for number, prompt in enumerate(request.prompts):
        controls = [[control.sha256, list(control.size)] for control in prompt.controls]
        origin = [
            LAYOUT, base_sha256, cache.recipe, cache.vae_sha256, cache.text_sha256, prompt.caption, controls,
            list(schedule.sigmas), schedule.guidance_scale, schedule.embedded, list(request.latent), number, dtype,
            precision.autocast, *([request.negative] if schedule.is_guided else []),
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(origin).encode()).hexdigest()
        paths.append(root / key[:2] / f"{key}.safetensors")
    return Trajectories(request, tuple(paths))


def compute_missing(
    trajectories: Trajectories,
    recipe: Recipe,
    transformer: Any,
    texts: tuple[Sequence[Encoded], Sequence[Encoded]],
    precision: Precision,
) -> None:
    """Compute and keep what is not there; the transformer is the bare base. `texts`: prompts and negative prompts."""
    request, paths = trajectories.request, trajectories.paths
    there = {path for path in paths if intact(path)}
    if len(there) == len(paths):
        say(f"few-step trajectories of the base: all {len(paths)} are there ({paths[0].parents[1]})")
        return
    size = len(paths) * 2 * len(request.schedule.sigmas) * 4 * math.prod(request.latent) / 2**20
    say(
        f"computing {len(paths) - len(there)} of {len(paths)} few-step trajectories of the base "
        f"({size:.1f} MiB in {paths[0].parents[1]})"
    )
    at_once = count_at_once(request.latent)
    blocks = [range(first, min(first + at_once, len(paths))) for first in range(0, len(paths), at_once)]
    for block in progress(blocks, len(blocks), "few-step trajectories"):
        # A block is computed whole or not at all: a picture's last bits may depend on its neighbours.
        if all(paths[number] in there for number in block):
            continue
        noise = torch.stack([starting_noise(number, request.latent) for number in block])
        part = slice(block[0], block[-1] + 1)
        batch = texts[0][part], texts[1][part]
        found = follow(recipe, transformer, noise, request.schedule, batch, precision)
        for place, number in enumerate(block):
            if paths[number] not in there:
                store(paths[number], {"states": found[0][place], "velocities": found[1][place]})


def starting_noise(number: int, latent: tuple[int, ...]) -> Tensor:
    """eps of a trajectory, fp32; a function of its number only."""
    return torch.randn(latent, generator=torch.Generator().manual_seed(seed_for("trajectory", number)))


@torch.no_grad()
def follow(
    recipe: Recipe,
    transformer: Any,
    noise: Tensor,
    schedule: Schedule,
    texts: tuple[Sequence[Encoded], Sequence[Encoded]],
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """States and velocities (B, steps, ...), fp32, on the CPU, of Euler steps from `noise` (B, ...).

    With classifier-free guidance the steps are guided ones, and the velocities those of the positive prompt alone.
    """
    told = Told.of(recipe, *texts)
    positive = with_guidance(told.positive, schedule, len(noise))
    x = noise.to(precision.device)
    states, velocities = [], []
    for sigma, following in zip(schedule.sigmas, (*schedule.sigmas[1:], 0.0), strict=True):
        levels = torch.full((len(x),), sigma, device=x.device)
        model = model_at(transformer, sigma)
        with precision.compute():
            v = recipe.predict(model, x, levels, positive)
            states.append(x.cpu())
            velocities.append(v.cpu())
            if schedule.is_guided:
                v = recipe.guide(v, recipe.predict(model, x, levels, told.negative), schedule.guidance_scale)
        x = x + (following - sigma) * v
    return torch.stack(states, 1), torch.stack(velocities, 1)
