"""LoRA and LoCon: `D = B @ A` (Hu et al. 2021, arXiv 2106.09685, eq. 3), kernels flattened; with a core, Tucker's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .algebra import Algebra, Block, Shape, Weight, row_count

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Lora(Algebra):
    """`down` is A `(r, in, *kernel)`, `up` is B `(out, r, 1...)`; a linear pair also fits a convolution by count.

    With a core `mid` `(r, r, *kernel)`, A is `(r, in, 1...)` and `D[i, j, ...] = sum_mn mid[m, n, ...] B[i, m] A[n, j]`
    (LyCORIS `functional/general.py`, `tucker_weight_from_conv`).
    """

    name: str = "lora"

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """Both factors, with a core or without."""
        return shapes.keys() in ({"down", "up"}, {"down", "up", "mid"})

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        """The rows of A."""
        return row_count(shapes["down"])

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """Compare `(out, in)` of both factors with the weight's."""
        down, up = shapes["down"], shapes["up"]
        if len(down) < 2 or len(up) < 2 or len(base) < 2 or 0 in (*down, *up):
            return f"A {list(down)} and B {list(up)} are no matrices for a weight {list(base)}"
        if "mid" in shapes:
            return _core_misfit(down, up, shapes["mid"], base)
        if math.prod(up[1:]) != down[0]:
            return f"the ranks of A {list(down)} and B {list(up)} differ"
        made = (up[0], math.prod(down[1:]))
        if made != (base[0], math.prod(base[1:])) or (len(down) > 2 and down[1:] != base[1:]):
            return f"B @ A is {up[0]} x {'x'.join(map(str, down[1:]))}, the base's weight {'x'.join(map(str, base))}"
        return None

    def prepare(
        self, factors: Mapping[str, torch.Tensor], weight: Weight, scale: float, alpha: float | None
    ) -> Mapping[str, torch.Tensor]:
        """Fold a core into A, which leaves the plain rule."""
        if "mid" not in factors:
            return factors
        import torch

        down = torch.einsum("mn...,nj->mj...", factors["mid"], factors["down"].flatten(1))  # (r, in, *kernel)
        return {"down": down, "up": factors["up"]}

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """`delta += strength * scale * B[rows] @ A`."""
        down = factors["down"].flatten(1)  # (r, in * kernel)
        up = factors["up"].flatten(1)[block.start : block.stop]  # (rows, r)
        block.delta.addmm_(up, down, alpha=strength * scale)


def _core_misfit(down: Shape, up: Shape, mid: Shape, base: Shape) -> str | None:
    if mid[:2] == (math.prod(up[1:]), down[0]) and (up[0], math.prod(down[1:]), *mid[2:]) == base:
        return None
    shape = "x".join(map(str, base))
    return f"A {list(down)} and B {list(up)} with core {list(mid)} do not make the base's weight {shape}"


LORA = Lora()
