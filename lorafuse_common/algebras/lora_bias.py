"""LoRA's bias: what B adds to the module's bias (PEFT `lora_bias`, `tuners/lora/layer.py`, `merge`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .algebra import Algebra, Block, Shape, row_count

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LoraBias(Algebra):
    """`D` is the bias of B, scaled like `B @ A`; `down` is the weight's A, which is here for its rank alone."""

    name: str = "lora_bias"

    def claims(self, shapes: Mapping[str, Shape]) -> bool:
        """The bias of B beside A."""
        return shapes.keys() == {"up_bias", "down"}

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        """The rows of A."""
        return row_count(shapes["down"])

    def misfit(self, shapes: Mapping[str, Shape], base: Shape) -> str | None:
        """Compare the biases."""
        if len(shapes["down"]) < 2 or 0 in shapes["down"]:
            return f"A {list(shapes['down'])}, which tells the rank, is no matrix"
        if shapes["up_bias"] != base:
            return f"B's bias is {'x'.join(map(str, shapes['up_bias']))}, the base's {'x'.join(map(str, base))}"
        return None

    def add_delta(self, factors: Mapping[str, torch.Tensor], block: Block, scale: float, strength: float) -> None:
        """`delta += strength * scale * bias[rows]`."""
        bias = factors["up_bias"][block.start : block.stop]
        block.delta.add_(bias.reshape(block.delta.shape), alpha=strength * scale)


LORA_BIAS = LoraBias()
