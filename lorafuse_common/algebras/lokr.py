"""LoKr: a Kronecker product, either factor full or low-rank (LyCORIS `modules/lokr.py`, arXiv 2309.14859)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .algebra import Algebra, Block, Shape, row_count

if TYPE_CHECKING:
    import torch

LEFT = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
RIGHT = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_t2", "lokr_w2_a", "lokr_w2_b"}),
)


@dataclass(frozen=True, slots=True)
class Lokr(Algebra):
    """`D = w1 (x) w2`: w1 `(m, n)` or `w1_a @ w1_b`, w2 `(p, q, *kernel)` or `w2_a @ w2_b` or a Tucker product."""

    name: str = "lokr"

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """One form of each factor."""
        return any(shapes.keys() == left | right for left in LEFT for right in RIGHT)

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        """The rows of w2_b, else of w1_b; with both factors full, alpha means nothing (some write infinity)."""
        return row_count(shapes.get("lokr_w2_b") or shapes.get("lokr_w1_b") or ())

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """Compare `(m * p, n * q * kernel)` with the weight's."""
        kernels = {"lokr_w2", "lokr_t2"} | ({"lokr_w2_b"} if "lokr_t2" not in shapes else set())
        if any(0 in its or len(its) < 2 or (len(its) > 2 and role not in kernels) for role, its in shapes.items()):
            return f"its factors are no matrices: { ({role: list(shape) for role, shape in shapes.items()}) }"
        left, right = _left_shape(shapes), _right_shape(shapes)
        if left is None or right is None:
            return f"the ranks of its factors differ: { ({role: list(shape) for role, shape in shapes.items()}) }"
        made = (left[0] * right[0], left[1] * math.prod(right[1:]))
        if made != (base[0], math.prod(base[1:])):
            return (
                f"the Kronecker product of {list(left)} and {list(right)} is {made[0]}x{made[1]}, "
                f"the base's weight {'x'.join(map(str, base))}"
            )
        return None

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """`delta += strength * scale * D[rows]`, row `i * p + k` of D being `w1[i] (x) w2[k]`."""
        import torch

        left, right = _left(factors), _right(factors)
        rows = torch.arange(block.start, block.stop)
        above, below = left[rows // len(right)], right[rows % len(right)]  # (rows, n), (rows, q, *kernel)
        product = above.unsqueeze(2) * below.flatten(1).unsqueeze(1)
        block.delta.add_(product.flatten(1), alpha=strength * scale)


def _left_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    if "lokr_w1" in shapes:
        return shapes["lokr_w1"]
    first, second = shapes["lokr_w1_a"], shapes["lokr_w1_b"]
    return (first[0], second[1]) if first[1] == second[0] else None


def _right_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    if "lokr_w2" in shapes:
        return shapes["lokr_w2"]
    first, second = shapes["lokr_w2_a"], shapes["lokr_w2_b"]
    if "lokr_t2" in shapes:
        core = shapes["lokr_t2"]
        return (first[1], second[1], *core[2:]) if core[:2] == (first[0], second[0]) else None
    return (first[0], *second[1:]) if first[1] == second[0] else None


def _left(factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]


def _right(factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    import torch

    if "lokr_w2" in factors:
        return factors["lokr_w2"]
    first, second = factors["lokr_w2_a"], factors["lokr_w2_b"]
    if "lokr_t2" in factors:
        made: torch.Tensor = torch.einsum("ij...,jr,ip->pr...", factors["lokr_t2"], second, first)
        return made
    return first @ second.flatten(1)


LOKR = Lokr()
