"""What an update rule is: which factors it needs, what shapes they take, and the rows of the delta they make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

BLOCK_ELEMENTS = 1 << 22
"""What rules read of a whole weight at a time: 16 MiB in fp32."""


class Block(NamedTuple):
    """Some rows of one module while it is fused, in fp32 (fp64 for fp64 weights)."""

    start: int
    """The first of the module's rows."""
    stop: int
    """One past the last."""
    weight: torch.Tensor
    """The base's rows as they were, `(stop - start, columns)`: every rule starts from the unchanged base, so that the
    order of several LoRAs cannot matter."""
    delta: torch.Tensor
    """Where deltas are summed, same shape."""


class Weight(Protocol):
    """The whole weight that a module stands for, as it is in the base, gathered from wherever the base keeps its rows.

    A fused module of a LoRA (`qkv`) has one weight of all its rows, even where the base keeps them in three tensors.
    """

    @property
    def shape(self) -> Shape:
        """`(out, in, *kernel)`, or `(n,)` for a bias or norm."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Some of its rows, read from the base: `(stop - start, in * kernel)` in fp32 (fp64 for fp64 weights)."""
        ...


def row_count(shape: Shape) -> int | None:
    """The rows of a factor, which are its rank; None for one without any, which fits no weight."""
    return (shape[0] or None) if shape else None


def row_blocks(weight: Weight, multiple: int = 1) -> Iterator[tuple[int, int, torch.Tensor]]:
    """All rows of a weight in blocks `(start, stop, rows)`, each but the last a multiple of so many rows."""
    most = BLOCK_ELEMENTS // max(1, math.prod(weight.shape[1:]))
    step = max(most // multiple, 1) * multiple
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        yield start, stop, weight.rows(start, stop)


class Algebra(Protocol):
    """One update rule; a delta is a function of the factors, the scale, the strength and the base."""

    @property
    def name(self) -> str:
        """`lora`."""
        ...

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether a module with exactly these roles (alpha left out) is complete under this rule."""
        ...

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        """The rank that alpha is divided by; None where the rule does not scale by alpha."""
        ...

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """Why these factors do not fit a weight of shape `base`, from shapes alone; None where they do."""
        ...

    def prepare(
        self, factors: Mapping[str, torch.Tensor], weight: Weight, scale: float, alpha: float | None
    ) -> Mapping[str, torch.Tensor]:
        """What `add_delta` is given as factors, once for each tensor that a module changes.

        A rule whose rows depend on other rows than their own looks at the whole weight here; others need not define it.
        `alpha` is what the file says, for rules that mean something else by it than a scale.
        """
        return factors

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """Add the block's rows of the delta to `block.delta` in place; `factors` have the dtype of the block."""
        ...
