"""Which pictures each optimiser step sees: a pure function of seed, epoch and the pictures' sizes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable
from dataclasses import dataclass

import torch


def seed_for(*origin: Hashable) -> int:
    """A 63-bit seed from anything printable; different origins give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(origin).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Pictures of one size that go through the model together."""

    samples: tuple[int, ...]
    """Indices into the dataset."""
    first: int
    """Place of the first of them among all the pictures of its step."""


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a whole run.

    A step takes `world * accumulation` micro-batches. Dealing them out to processes last makes the pictures of a step,
    and their places in it, independent of the number of processes.
    """

    sizes: tuple[Hashable, ...]
    """The size of each picture; a micro-batch holds one size."""
    seed: int
    repeat: int
    batch_size: int
    accumulation: int
    world: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the dataset."""
        return -(-len(self._micro_batches(0)) // self._per_step)

    @property
    def _per_step(self) -> int:
        return self.accumulation * self.world

    def step(self, number: int) -> tuple[MicroBatch, ...]:
        """All micro-batches of step `number`, counted from 0; the last step of an epoch may have fewer."""
        epoch, step = divmod(number, self.steps_per_epoch)
        chosen = self._micro_batches(epoch)[step * self._per_step : (step + 1) * self._per_step]
        firsts = [0]
        for samples in chosen:
            firsts.append(firsts[-1] + len(samples))
        return tuple(MicroBatch(samples, first) for samples, first in zip(chosen, firsts, strict=False))

    def _micro_batches(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        return _deal(self.sizes, self.seed, self.repeat, self.batch_size, epoch)


@functools.lru_cache(maxsize=2)
def _deal(
    sizes: tuple[Hashable, ...], seed: int, repeat: int, batch_size: int, epoch: int
) -> tuple[tuple[int, ...], ...]:
    """A permutation of the epoch's pictures, dealt into full batches of one size; then what is left over."""
    generator = torch.Generator().manual_seed(seed_for("order", seed, epoch))
    permutation = torch.randperm(len(sizes) * repeat, generator=generator)
    unfilled: dict[Hashable, list[int]] = {}
    full = []
    for index in (permutation % len(sizes)).tolist():
        batch = unfilled.setdefault(sizes[index], [])
        batch.append(index)
        if len(batch) == batch_size:
            full.append(tuple(unfilled.pop(sizes[index])))
    return (*full, *(tuple(batch) for batch in unfilled.values()))
