"""DoRA: a low-rank change of direction, and a magnitude for each output row (arXiv 2402.09353, equation 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .algebra import Algebra, Block, Shape
from .lora import LORA

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Dora(Algebra):
    """`V = W + scale * B @ A`, `W1 = m * V / |V|` by rows, `D = W1 - W`; the norm is the merged weight's, as in PEFT.

    The strength interpolates between W and W1, so that strength 0 is exactly the base.
    """

    name: str = "dora"

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """Both factors and the magnitude."""
        return shapes.keys() == {"down", "up", "magnitude"}

    def rank(self, shapes: Mapping[str, Shape]) -> int:
        """The rows of A."""
        return LORA.rank(shapes)

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """The fit of A and B, and one magnitude for each output row."""
        if misfit := LORA.misfit(shapes, base):
            return misfit
        magnitude = shapes["magnitude"]
        if math.prod(magnitude) == magnitude[0] == base[0]:
            return None
        if len(magnitude) > 1 and magnitude[0] == 1:
            return f"its magnitude {list(magnitude)} is one for each input column; only one for each row is supported"
        return f"its magnitude {list(magnitude)} is not one for each of the {base[0]} rows"

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """`delta += strength * (m * V / |V| - W)` for the block's rows."""
        merged = block.weight.clone()
        LORA.add_delta(factors, block._replace(delta=merged), scale, 1.0)
        magnitude = factors["magnitude"].flatten()[block.start : block.stop, None]  # (rows, 1)
        merged.mul_(magnitude / merged.norm(dim=1, keepdim=True))
        block.delta.add_(merged.sub_(block.weight), alpha=strength)


DORA = Dora()
