"""OFT as LyCORIS' diag-oft: each block of output channels is rotated (arXiv 2306.07280; `modules/diag_oft.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .algebra import Algebra, Block, Shape, Weight, row_blocks
from .replace import REPLACE

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Oft(Algebra):
    """`W1 = rescale * R^T W`, R of blocks `(n, b, b)` on the diagonal, `R = (I + Q)(I - Q)^-1`, `Q = X - X^T`.

    Alpha is no scale: LyCORIS stores a constraint there, and shortens Q to alpha times the output channels. The
    strength interpolates between W and W1, so that strength 0 is exactly the base.
    """

    name: str = "oft"

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """The blocks in three dimensions (`boft` has four), with a rescale for each row or without."""
        return shapes.keys() - {"rescale"} == {"oft_blocks"} and len(shapes["oft_blocks"]) == 3

    def rank(self, shapes: Mapping[str, Shape]) -> None:
        """Alpha is a constraint here."""
        return

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """Compare the channels of all blocks with the weight's rows."""
        return rotation_misfit(shapes, base)

    def prepare(
        self, factors: Mapping[str, torch.Tensor], weight: Weight, scale: float, alpha: float | None
    ) -> Mapping[str, torch.Tensor]:
        """W1, as a replacement: one copy of the weight, read by whole blocks."""
        rotations = cayley(factors["oft_blocks"], alpha, weight.shape[0]).mT  # (n, b, b)
        size = rotations.shape[-1]
        rotated = rotations.new_empty(weight.shape[0], math.prod(weight.shape[1:]))
        for start, stop, rows in row_blocks(weight, multiple=size):
            turned = rotations[start // size : stop // size] @ rows.reshape(-1, size, rows.shape[1])
            rotated[start:stop] = turned.flatten(0, 1)
        return {"set_weight": rescaled(rotated, factors)}

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """`delta += strength * (W1[rows] - W[rows])`."""
        REPLACE.add_delta(factors, block, scale, strength)


def rotation_misfit(shapes: Mapping[str, Shape], base: Shape) -> str | None:
    """Compare square blocks `(..., n, b, b)` and a rescale with a weight's rows."""
    blocks, scales = shapes["oft_blocks"], shapes.get("rescale", base[:1])
    if blocks[-1] != blocks[-2] or len(base) < 2 or blocks[-3] * blocks[-2] != base[0] or 0 in blocks:
        return f"its blocks {list(blocks)} do not turn the {base[0] if base else 0} rows of the base's weight"
    if scales[:1] != base[:1] or math.prod(scales) != base[0]:
        return f"its rescale {list(scales)} is not one for each of the {base[0]} rows"
    return None


def cayley(blocks: torch.Tensor, alpha: float | None, channels: int) -> torch.Tensor:
    """The rotations of `(..., b, b)` blocks, in their dtype; the constraint is on the norm of all blocks together."""
    import torch

    skew = blocks.double() - blocks.double().mT
    constraint, norm = (alpha or 0.0) * channels, float(skew.norm()) + 1e-8
    if 0 < constraint < norm:
        skew *= constraint / norm
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    rotations: torch.Tensor = torch.linalg.solve(identity - skew, identity + skew)  # functions of one Q commute
    return rotations.to(blocks.dtype)


def rescaled(rotated: torch.Tensor, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The rows times their rescale, in place, where there is one."""
    return rotated.mul_(factors["rescale"].reshape(-1, 1)) if "rescale" in factors else rotated


OFT = Oft()
