"""BOFT: rotations of ever wider pairs of output channels, a butterfly (arXiv 2311.06243; LyCORIS `modules/boft.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .algebra import BLOCK_ELEMENTS, Algebra, Block, Shape, Weight, row_blocks
from .oft import cayley, rescaled, rotation_misfit
from .replace import REPLACE

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Boft(Algebra):
    """`W1 = rescale * R_m ... R_1 W`, blocks `(m, n, b, b)`; stage i turns channels that lie `2^i * b / 2` apart.

    Alpha is the constraint of `oft`, on all stages together. The strength interpolates between W and W1, so that
    strength 0 is exactly the base; LyCORIS interpolates each stage instead, which at strengths other than 0 and 1
    gives another weight.
    """

    name: str = "boft"

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """The blocks in four dimensions (`oft` has three), with a rescale for each row or without."""
        return shapes.keys() - {"rescale"} == {"oft_blocks"} and len(shapes["oft_blocks"]) == 4

    def rank(self, shapes: Mapping[str, Shape]) -> None:
        """Alpha is a constraint here."""
        return

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """Compare the channels of each stage with the weight's rows, which the widest stage must divide."""
        if misfit := rotation_misfit(shapes, base):
            return misfit
        stages, _, size, _ = shapes["oft_blocks"]
        if size % 2 or base[0] % (size * 2 ** (stages - 1)):
            return f"its {stages} stages of blocks of {size} are no butterfly of {base[0]} rows"
        return None

    def prepare(
        self, factors: Mapping[str, torch.Tensor], weight: Weight, scale: float, alpha: float | None
    ) -> Mapping[str, torch.Tensor]:
        """W1, as a replacement: one copy of the weight, turned by blocks of columns."""
        rotations = cayley(factors["oft_blocks"], alpha, weight.shape[0])  # (m, n, b, b)
        turned = rotations.new_empty(weight.shape[0], math.prod(weight.shape[1:]))
        for start, stop, rows in row_blocks(weight):
            turned[start:stop] = rows
        step = max(1, BLOCK_ELEMENTS // weight.shape[0])
        for first in range(0, turned.shape[1], step):
            columns = turned[:, first : first + step]
            columns.copy_(_butterfly(rotations, columns))
        return {"set_weight": rescaled(turned, factors)}

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """`delta += strength * (W1[rows] - W[rows])`."""
        REPLACE.add_delta(factors, block, scale, strength)


def _butterfly(rotations: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """All stages; channels `(out, columns)`."""
    count, size, _ = rotations.shape[1:]
    for stage, rotation in enumerate(rotations):
        apart = 2**stage * size // 2
        paired = channels.reshape(-1, 2, apart, channels.shape[1]).transpose(1, 2)
        turned = rotation @ paired.reshape(count, size, -1)  # (n, b, columns)
        channels = turned.view(-1, apart, 2, channels.shape[1]).transpose(1, 2).reshape(channels.shape)
    return channels


BOFT = Boft()
