"""Experimental: which noise a picture trains with, where it is not just its own draw.

A few-step model takes each noise to one picture. Training with noises drawn without looking at the picture teaches the
mean of all pictures at high noise levels, which is where sharpness is lost. Pairing each picture with a noise near it
makes the paths cross less (https://arxiv.org/abs/2302.00482, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.config_few_step import MINIBATCH_OT, MOST_MATCHED


@dataclass(frozen=True, slots=True)
class Coupling:
    """How the noises of one micro-batch are chosen."""

    x0: Tensor
    """(B, ...), fp32, on the CPU."""
    nearest_of: int
    """The noise of a picture is the nearest of so many."""
    deals: bool
    """Whether the noises of the batch are then dealt out anew."""

    def choose(self, number: int, own: Tensor, generator: torch.Generator) -> Tensor:
        """The noise of picture `number`, whose own draw is `own`; further ones come from its generator."""
        return nearest_noise(self.x0[number], own, generator, self.nearest_of)

    def deal(self, noises: Tensor) -> Tensor:
        """The noises (B, ...) in the order in which the pictures get them."""
        return match_noise(self.x0, noises) if self.deals else noises


def choose_coupling(config: TrainConfig, x0: Tensor) -> Coupling | None:
    """`--noise_coupling` for the pictures x0 (B, ...) of a micro-batch; None where each has its own noise."""
    deals = config.noise_coupling == MINIBATCH_OT
    return Coupling(x0, config.nearest_of, deals) if deals or config.nearest_of > 1 else None


def nearest_noise(x0: Tensor, first: Tensor, generator: torch.Generator, count: int) -> Tensor:
    """Of `first` and `count - 1` more draws the one with the least |eps - x0|; all fp32, on the CPU, of one shape."""
    best, least = first, (first - x0).square().sum()
    for _ in range(count - 1):
        noise = torch.randn(x0.shape, generator=generator)
        distance = (noise - x0).square().sum()
        if distance < least:
            best, least = noise, distance
    return best


def match_noise(x0: Tensor, noise: Tensor) -> Tensor:
    """The noises (B, ...), dealt out so that the sum of |eps - x0|^2 over the batch x0 (B, ...) is least."""
    return noise[assign(torch.cdist(x0.flatten(1).double(), noise.flatten(1).double()).square())]


def assign(cost: Tensor) -> Tensor:
    """Row i of a square `cost` (n, n) -> its column, each column once, at the least total; exact, in O(2^n n).

    Dynamic programming over sets of columns: best[S] is the least cost of giving the first |S| rows the columns in S
    (the set is a number with a bit for each column).
    """
    n = len(cost)
    assert n <= MOST_MATCHED, "the configuration refuses larger batches"
    sets = torch.arange(2**n)
    bits = torch.stack([(sets >> column) & 1 for column in range(n)])  # (n, 2^n)
    sizes = bits.sum(0)
    best = torch.full((2**n,), torch.inf, dtype=cost.dtype)
    best[0] = 0
    last = torch.zeros(2**n, dtype=torch.long)
    for row in range(n):
        before = sets[sizes == row]
        for column in range(n):
            smaller = before[bits[column, before] == 0]
            larger = smaller | (1 << column)
            total = best[smaller] + cost[row, column]
            better = total < best[larger]
            best[larger[better]] = total[better]
            last[larger[better]] = column
    columns = torch.empty(n, dtype=torch.long)
    left = 2**n - 1
    for row in reversed(range(n)):
        columns[row] = last[left]
        left ^= 1 << int(columns[row])
    return columns
