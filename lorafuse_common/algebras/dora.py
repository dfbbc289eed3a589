"""DoRA: an additive change of direction, and a magnitude for each row or column (arXiv 2402.09353, equation 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from .algebra import Algebra, Block, Shape, Weight, row_blocks
from .loha import LOHA
from .lokr import LOKR
from .lora import LORA

if TYPE_CHECKING:
    import torch

_INNER: tuple[Algebra, ...] = (LORA, LOHA, LOKR)
_MAGNITUDE, _RATIO = "magnitude", "column_ratio"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Dora(Algebra):
    """`V = W + scale * D` by any additive rule, `W1 = m * V / |V|`, and in all `W1 - W`.

    The norm is the merged weight's, over rows (PEFT `tuners/lora/dora.py`, LyCORIS `wd_on_out`) or over columns with
    their kernels (older LyCORIS, OneTrainer). LyCORIS adds one rounding's worth to it; here a norm of 0 gives 0, which
    that leads to too. The strength interpolates between W and W1, so that strength 0 is exactly the base.
    """

    name: str = "dora"

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """A complete additive rule and the magnitude."""
        return _MAGNITUDE in shapes and any(rule.claims(_without_magnitude(shapes)) for rule in _INNER)

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        """The additive rule's."""
        return _inner(shapes).rank(shapes)

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """The additive rule's fit, and one magnitude for each row or each column."""
        if misfit := _inner(shapes).misfit(shapes, base):
            return misfit
        magnitude = shapes[_MAGNITUDE]
        if len(base) < 2:
            return f"a magnitude has no meaning for a weight {list(base)}"
        rows, columns = _readings(magnitude, base)
        if rows and columns:
            return f"its magnitude {list(magnitude)} can mean the base's rows (PEFT's) or its columns (LyCORIS')"
        if not (rows or columns):
            return f"its magnitude {list(magnitude)} is not one for each of the {base[0]} rows or {base[1]} columns"
        return None

    def prepare(
        self, factors: Mapping[str, torch.Tensor], weight: Weight, scale: float, alpha: float | None
    ) -> Mapping[str, torch.Tensor]:
        """Where the magnitude is one for each column, `m / |V|` from all rows of the weight."""
        inner, magnitude = _inner({role: tuple(factor.shape) for role, factor in factors.items()}), factors[_MAGNITUDE]
        prepared = inner.prepare(_without_magnitude(factors), weight, scale, alpha)
        if _readings(tuple(magnitude.shape), weight.shape)[0]:
            return {**prepared, _MAGNITUDE: magnitude.flatten()}
        squares = magnitude.new_zeros(weight.shape[1])
        for start, stop, rows in row_blocks(weight):
            merged = _merged(inner, prepared, Block(start, stop, rows, rows), scale)
            squares += merged.reshape(stop - start, weight.shape[1], -1).square().sum((0, 2))
        ratio = _ratio(magnitude.flatten(), squares.sqrt())  # (in,)
        return {**prepared, _RATIO: ratio.repeat_interleave(math.prod(weight.shape[2:]))}

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """`delta += strength * (m * V / |V| - W)` for the block's rows."""
        rest = {role: factor for role, factor in factors.items() if role not in (_MAGNITUDE, _RATIO)}
        merged = _merged(_inner({role: tuple(factor.shape) for role, factor in rest.items()}), rest, block, scale)
        if _RATIO in factors:
            merged.mul_(factors[_RATIO])  # (in * kernel,)
        else:
            magnitude = factors[_MAGNITUDE][block.start : block.stop, None]  # (rows, 1)
            merged.mul_(_ratio(magnitude, merged.norm(dim=1, keepdim=True)))
        block.delta.add_(merged.sub_(block.weight), alpha=strength)


def _without_magnitude(roles: Mapping[str, _T]) -> dict[str, _T]:
    return {role: value for role, value in roles.items() if role != _MAGNITUDE}


def _inner(shapes: Mapping[str, Shape]) -> Algebra:
    return next(rule for rule in _INNER if rule.claims(_without_magnitude(shapes)))


def _readings(magnitude: Shape, base: Shape) -> tuple[bool, bool]:
    """Whether it can be one for each row, and whether for each column: `[out, 1...]` and `[1, in, 1...]`.

    Only PEFT writes bare vectors, for rows, and for the rows of a convolution `[1, out, 1...]`.
    """
    count = math.prod(magnitude)
    if len(magnitude) < 2:
        return count == base[0], count == base[1] != base[0]
    as_peft = len(magnitude) == len(base) > 2 and magnitude[1] == count == base[0]
    return magnitude[0] == count == base[0] or as_peft, magnitude[1] == count == base[1]


def _merged(inner: Algebra, factors: Mapping[str, torch.Tensor], block: Block, scale: float) -> torch.Tensor:
    merged = block.weight.clone()
    inner.add_delta(factors, block._replace(delta=merged), scale, 1.0)
    return merged


def _ratio(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return magnitude / norm.masked_fill(norm == 0, math.inf)


DORA = Dora()
