"""What an update rule is: which factors it needs, what shapes they take, and the rows of the delta they make."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


class Algebra(Protocol):
    """One update rule; deltas come without strength and scale."""

    @property
    def name(self) -> str:
        """`lora`."""
        ...

    def claims(self, roles: Set[str]) -> bool:
        """Whether a module with exactly these roles is complete under this rule."""
        ...

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        """The rank that alpha is divided by; None where the rule takes no notice of alpha."""
        ...

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """Why these factors do not fit a weight of shape `base`, from shapes alone; None where they do."""
        ...

    def delta_rows(
        self, factors: Mapping[str, torch.Tensor], start: int, stop: int, out: torch.Tensor, scale: float
    ) -> None:
        """Add `scale` times rows `start:stop` of the delta to `out`, fp32 `(stop - start, columns)`, in place."""
        ...
