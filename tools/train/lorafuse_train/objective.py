"""Flow matching: noise levels, noised latents and the velocity to learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .order import seed_for


@dataclass(frozen=True, slots=True)
class NoiseLevels:
    """The density that sigma is drawn from, before its shift."""

    scheme: str
    """`logit_normal`, or `none` for uniform."""
    mean: float
    std: float

    def draw(self, shift: float, generator: torch.Generator) -> Tensor:
        """One sigma in 0..1, fp32, shape ().

        u = sigmoid(mean + std n), or uniform (SD3, https://arxiv.org/abs/2403.03206, section 3.1);
        sigma = s u / (1 + (s - 1) u) (equation 23 there).
        """
        if self.scheme == "none":
            u = torch.rand((), generator=generator)
        else:
            u = torch.sigmoid(self.mean + self.std * torch.randn((), generator=generator))
        return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True, slots=True)
class Draw:
    """The random part of a micro-batch."""

    noise: Tensor
    """eps (B, C, h, w), fp32."""
    sigma: Tensor
    """(B,), fp32."""


def draw(
    levels: NoiseLevels, shift: float, shape: tuple[int, ...], seed: int, step: int, first: int, count: int
) -> Draw:
    """Noise and sigma of the pictures `first` ... `first + count - 1` of a step, each of `shape` (C, h, w).

    Every picture has its own generator, a function of (seed, step, place in the step), on the CPU: so the numbers do
    not depend on device, batch size or number of processes.
    """
    noise, sigma = [], []
    for place in range(first, first + count):
        generator = torch.Generator().manual_seed(seed_for("noise", seed, step, place))
        sigma.append(levels.draw(shift, generator))
        noise.append(torch.randn(shape, generator=generator))
    return Draw(torch.stack(noise), torch.stack(sigma))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x = (1 - sigma) x0 + sigma eps, for x0 and eps (B, C, h, w) and sigma (B,)."""
    s = sigma[:, None, None, None]
    return (1 - s) * x0 + s * noise


def loss_sum(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """The sum over pictures of mean |v - (eps - x0)|^2, fp32, shape (); the caller divides by the step's pictures.

    A sum, because micro-batches of a step may differ in number and size, and each picture is to weigh the same.
    """
    return ((velocity.float() - (noise - x0)) ** 2).mean(dim=(1, 2, 3)).sum()
