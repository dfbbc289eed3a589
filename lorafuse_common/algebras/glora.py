"""GLoRA: a low-rank change of what goes into a weight, and one of the weight (arXiv 2306.07967; LyCORIS `glora.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from .algebra import Algebra, Block, Shape, Weight
from .lora import LORA

if TYPE_CHECKING:
    import torch

_ROLES = frozenset({"glora_a1", "glora_a2", "glora_b1", "glora_b2"})
_CORE = "glora_bm"
_T = TypeVar("_T")


class _Form(NamedTuple):
    """Which factor is which in `W @ first @ second + up @ down`."""

    first: str
    second: str
    up: str
    down: str

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        """The rank that all four factors agree on, read this way."""
        if any(len(shapes[role]) < 2 for role in self):
            return None
        ranks = {shapes[self.first][1], shapes[self.second][0], shapes[self.up][1], shapes[self.down][0]}
        return (ranks.pop() or None) if len(ranks) == 1 else None


_NEW = _Form("glora_a1", "glora_a2", "glora_b1", "glora_b2")
_OLD = _Form("glora_a2", "glora_a1", "glora_b2", "glora_b1")


@dataclass(frozen=True, slots=True)
class Glora(Algebra):
    """`D = W @ a1 @ a2 + b1 @ b2`, a's `(in, r)` and `(r, in)` acting on input channels, b's as in LoRA.

    LyCORIS before 3.0 named them the other way round: `D = W @ a2 @ a1 + b2 @ b1`. For a square weight both readings
    fit; the one of the smaller rank is meant, as in ComfyUI's `weight_adapter/glora.py`.
    """

    name: str = "glora"

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """All four factors, with a core for the b's or without."""
        return shapes.keys() in (_ROLES, _ROLES | {_CORE})

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        """The rank of both products."""
        return _form(shapes).rank(shapes)

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """Both a's take the weight's input channels to the rank and back; the b's make the weight."""
        form = _form(shapes)
        rank, first, second = form.rank(shapes), shapes[form.first], shapes[form.second]
        if rank is None:
            return f"the ranks of its factors differ: { ({role: list(shape) for role, shape in shapes.items()}) }"
        if len(base) < 2 or _trimmed(first) != (base[1], rank) or _trimmed(second) != (rank, base[1]):
            return f"its a's {list(first)} and {list(second)} do not act on the base's {'x'.join(map(str, base))}"
        return LORA.misfit(_low_rank(shapes, form), base)

    def prepare(
        self, factors: Mapping[str, torch.Tensor], weight: Weight, scale: float, alpha: float | None
    ) -> Mapping[str, torch.Tensor]:
        """The factors under the names of their places in the formula."""
        form = _form({role: tuple(factor.shape) for role, factor in factors.items()})
        low_rank = LORA.prepare(_low_rank(factors, form), weight, scale, alpha)
        return {"first": factors[form.first].flatten(1), "second": factors[form.second].flatten(1), **low_rank}

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """`delta += strength * scale * (W[rows] @ first @ second + up[rows] @ down)`."""
        import torch

        first, second = factors["first"], factors["second"]
        weight = block.weight.reshape(len(block.weight), len(first), -1)  # (rows, in, kernel)
        moved = torch.einsum("ork,ri->oik", torch.einsum("oik,ir->ork", weight, first), second)
        block.delta.add_(moved.flatten(1), alpha=strength * scale)
        LORA.add_delta(factors, block, scale, strength)


def _form(shapes: Mapping[str, Shape]) -> _Form:
    ranks = {form: rank for form in (_NEW, _OLD) if (rank := form.rank(shapes)) is not None}
    return min(ranks, key=ranks.__getitem__, default=_NEW)


def _low_rank(factors: Mapping[str, _T], form: _Form) -> dict[str, _T]:
    its = {"up": factors[form.up], "down": factors[form.down]}
    return its | {"mid": factors[_CORE]} if _CORE in factors else its


def _trimmed(shape: Shape) -> Shape:
    """A matrix' shape, less the kernels of 1 that convolutions give it."""
    return shape if set(shape[2:]) - {1} else shape[:2]


GLORA = Glora()
