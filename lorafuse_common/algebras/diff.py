"""A full difference: `D` as the file holds it, scaled by the strength alone (LightX2V, ComfyUI `comfy/lora.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .algebra import Algebra, Block, Shape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Diff(Algebra):
    """`diff` has the shape of the weight, bias, norm or modulation that it changes."""

    name: str = "diff"

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """The difference and nothing else."""
        return shapes.keys() == {"diff"}

    def rank(self, shapes: Mapping[str, Shape]) -> None:
        """Alpha has no meaning here."""
        return

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """Compare the shapes."""
        if shapes["diff"] != base:
            return f"the difference is {'x'.join(map(str, shapes['diff']))}, the base's {'x'.join(map(str, base))}"
        return None

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """`delta += strength * D[rows]`; the scale is 1."""
        difference = factors["diff"][block.start : block.stop]
        block.delta.add_(difference.reshape(block.delta.shape), alpha=strength * scale)


DIFF = Diff()
