"""The registry of update rules; a new one is a file here and an entry in `ALGEBRAS`."""

from collections.abc import Mapping

from .algebra import Algebra, Block, Shape, Weight
from .diff import DIFF
from .dora import DORA
from .loha import LOHA
from .lokr import LOKR
from .lora import LORA

ALGEBRAS: tuple[Algebra, ...] = (LORA, DORA, LOHA, LOKR, DIFF)

UNSUPPORTED = {
    "magnitude": "DoRA on this kind of factors",
    "mid": "LoCon with a Tucker core",
    "up_bias": "LoRA with a bias (lora_bias)",
    "set_weight": "a weight replacement (.set_weight)",
    "reshape_weight": "a widened weight (.reshape_weight)",
    "oft_blocks": "OFT",
    "oft_R": "OFT",
    "rescale": "OFT",
    "on_input": "(IA)^3",
    "glora": "GLoRA",
}
"""Roles that are recognised but that no algebra here computes -> what to call them."""


def algebra_of(shapes: Mapping[str, Shape]) -> Algebra | None:
    """The one update rule that these factors (role -> shape, without alpha) make complete; None where none does."""
    return next((algebra for algebra in ALGEBRAS if algebra.claims(shapes)), None)


__all__ = ["ALGEBRAS", "UNSUPPORTED", "Algebra", "Block", "Shape", "Weight", "algebra_of"]
