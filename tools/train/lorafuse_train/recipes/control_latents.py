"""Control pictures whose latents follow the noisy ones through the model, each encoded alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .recipe import Condition, Encoded

PIPELINES_AREA = 1024 * 1024
"""To which the pipelines scale control pictures, whatever is drawn."""
MANY = 10
"""More control pictures than any model is made for."""


def named_controls(latents: Iterable[Tensor]) -> Encoded:
    """The control latents (C, h, w) of one sample, to stand beside what is said of its caption."""
    return {_name(index): each for index, each in enumerate(latents)}


def stacked_controls(samples: Sequence[Encoded]) -> Condition:
    """The controls of a batch, (B, C, h, w) each; nothing where its samples have none."""
    names = [name for name in map(_name, range(MANY)) if name in samples[0]]
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


def control_latents(condition: Condition) -> list[Tensor]:
    """The controls of a batch in the order in which the model sees them, (B, C, h, w) each."""
    return [condition[name] for name in map(_name, range(MANY)) if name in condition]


def _name(index: int) -> str:
    return f"control_{index}"
