"""A replacement: the whole weight as the file holds it (`.set_weight` in ComfyUI `comfy/lora.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .algebra import Algebra, Block, Shape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Replace(Algebra):
    """`D = S - W`; the strength interpolates between the base and the file, so that strength 0 is exactly the base."""

    name: str = "replace"

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """The replacement and nothing else."""
        return shapes.keys() == {"set_weight"}

    def rank(self, shapes: Mapping[str, Shape]) -> None:
        """Alpha has no meaning here."""
        return

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """Compare the shapes."""
        if shapes["set_weight"] != base:
            new, old = ("x".join(map(str, shape)) for shape in (shapes["set_weight"], base))
            return f"the new weight is {new}, the base's {old}"
        return None

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """`delta += strength * (S[rows] - W[rows])`."""
        new = factors["set_weight"][block.start : block.stop].reshape(block.delta.shape)
        block.delta.add_(new - block.weight.reshape(block.delta.shape), alpha=strength)


REPLACE = Replace()
