"""LoHa: the Hadamard product of two low-rank matrices (FedPara, arXiv 2108.06098; LyCORIS `modules/loha.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .algebra import Algebra, Block, Shape, row_count

if TYPE_CHECKING:
    import torch

ROLES = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
CORES = frozenset({"hada_t1", "hada_t2"})


@dataclass(frozen=True, slots=True)
class Loha(Algebra):
    """`D = (w1_a @ w1_b) * (w2_a @ w2_b)`; with cores `(r, r, *kernel)`, `w_a` is `(r, out)` and `w_b` `(r, in)`."""

    name: str = "loha"

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """All four matrices, with both cores or none."""
        return shapes.keys() in (ROLES, ROLES | CORES)

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        """The rows of w1_b."""
        return row_count(shapes["hada_w1_b"])

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """Compare `(out, in)` of both products with the weight's."""
        for side in ("1", "2"):
            first, second = shapes[f"hada_w{side}_a"], shapes[f"hada_w{side}_b"]
            core = shapes.get(f"hada_t{side}")
            if len(first) != 2 or len(second) != 2 or 0 in (*first, *second):
                return f"its factors {list(first)} and {list(second)} are no matrices"
            if core is None:
                agree, made = first[1] == second[0], (first[0], second[1])
            else:
                agree, made = (first[0], second[0]) == core[:2], (first[1], second[1] * math.prod(core[2:]))
            if not agree or made != (base[0], math.prod(base[1:])):
                return (
                    f"factors {list(first)} and {list(second)}{f' with core {list(core)}' if core else ''} "
                    f"do not make the base's weight {'x'.join(map(str, base))}"
                )
        return None

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """`delta += strength * scale * D[rows]`."""
        first, second = (_product(factors, side, block.start, block.stop) for side in ("1", "2"))
        block.delta.addcmul_(first, second, value=strength * scale)


def _product(factors: Mapping[str, torch.Tensor], side: str, start: int, stop: int) -> torch.Tensor:
    import torch

    first, second = factors[f"hada_w{side}_a"], factors[f"hada_w{side}_b"]
    core = factors.get(f"hada_t{side}")
    if core is None:
        return first[start:stop] @ second  # (rows, in)
    made: torch.Tensor = torch.einsum("ij...,jr,ip->pr...", core, second, first[:, start:stop])  # (rows, in, *kernel)
    return made.flatten(1)


LOHA = Loha()
