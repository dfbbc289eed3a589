"""LoRA and LoCon: `D = B @ A` (Hu et al. 2021, arXiv 2106.09685, eq. 3), kernels flattened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .algebra import Algebra, Block, Shape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Lora(Algebra):
    """`down` is A `(r, in, *kernel)`, `up` is B `(out, r, 1...)`; a linear pair also fits a convolution by count."""

    name: str = "lora"

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """Both factors, with or without alpha."""
        return shapes.keys() == {"down", "up"}

    def rank(self, shapes: Mapping[str, Shape]) -> int:
        """The rows of A."""
        return shapes["down"][0]

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """Compare `(out, in)` of both factors with the weight's."""
        down, up = shapes["down"], shapes["up"]
        if len(down) < 2 or len(up) < 2 or len(base) < 2 or 0 in (*down, *up):
            return f"A {list(down)} and B {list(up)} are no matrices for a weight {list(base)}"
        if math.prod(up[1:]) != down[0]:
            return f"the ranks of A {list(down)} and B {list(up)} differ"
        made = (up[0], math.prod(down[1:]))
        if made != (base[0], math.prod(base[1:])) or (len(down) > 2 and down[1:] != base[1:]):
            return f"B @ A is {up[0]} x {'x'.join(map(str, down[1:]))}, the base's weight {'x'.join(map(str, base))}"
        return None

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """`delta += strength * scale * B[rows] @ A`."""
        down = factors["down"].flatten(1)  # (r, in * kernel)
        up = factors["up"].flatten(1)[block.start : block.stop]  # (rows, r)
        block.delta.addmm_(up, down, alpha=strength * scale)


LORA = Lora()
