"""Flow matching: random draws, noised latents and the velocity to learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafuse_train.dataset.order import seed_for
from lorafuse_train.few_step.coupling import Coupling
from lorafuse_train.steps.timesteps import NoiseLevels


@dataclass(frozen=True, slots=True)
class Draw:
    """The random part of a micro-batch."""

    noise: Tensor
    """eps (B, C, h, w), fp32."""
    sigma: Tensor
    """(B,), fp32."""


def draw(
    levels: NoiseLevels,
    shift: float,
    shape: tuple[int, ...],
    seed: int,
    step: int,
    first: int,
    count: int,
    coupling: Coupling | None = None,
) -> Draw:
    """Noise and sigma of the pictures `first` ... `first + count - 1` of a step, each of `shape` (C, h, w).

    Every picture has its own generator, a function of (seed, step, place in the step), on the CPU: so the numbers do
    not depend on device, batch size or number of processes.
    """
    noise, sigma = [], []
    for place in range(first, first + count):
        generator = torch.Generator().manual_seed(seed_for("noise", seed, step, place))
        sigma.append(levels.draw(shift, generator))
        own = torch.randn(shape, generator=generator)
        noise.append(coupling.choose(place - first, own, generator) if coupling else own)
    noises = torch.stack(noise)
    return Draw(coupling.deal(noises) if coupling else noises, torch.stack(sigma))


def drops_caption(share: float, seed: int, step: int, place: int) -> bool:
    """Whether the picture at `place` of a step trains with an empty caption; `share` of them do."""
    if not share:
        return False
    generator = torch.Generator().manual_seed(seed_for("caption", seed, step, place))
    return bool(torch.rand((), generator=generator) < share)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x = (1 - sigma) x0 + sigma eps, for x0 and eps (B, C, ...) and sigma (B,)."""
    s = sigma.view(-1, *[1] * (x0.ndim - 1))
    return (1 - s) * x0 + s * noise


def loss_sum(
    velocity: Tensor, x0: Tensor, noise: Tensor, weights: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """The sum over pictures of mean |v - (eps - x0)|^2, fp32, shape (); the caller divides by the step's pictures.

    A sum, because micro-batches of a step may differ in number and size, and each picture is to weigh the same, or as
    `weights` (B,) say. `mask` (B, ..., h, w) makes the mean a weighted one.
    """
    error = (velocity.float() - (noise - x0)) ** 2
    dims = tuple(range(1, error.ndim))
    if mask is None:
        each = error.mean(dim=dims)
    else:
        mask = mask.view(len(mask), *[1] * (error.ndim - mask.ndim), *mask.shape[1:]).expand_as(error)
        each = (mask * error).sum(dim=dims) / mask.sum(dim=dims)
    return (each if weights is None else weights * each).sum()
