"""The registry of update rules; a new one is a file here and an entry in `ALGEBRAS`."""

from collections.abc import Mapping

from .algebra import Algebra, Block, Shape, Weight
from .boft import BOFT
from .diff import DIFF
from .dora import DORA
from .glora import GLORA
from .loha import LOHA
from .lokr import LOKR
from .lora import LORA
from .lora_bias import LORA_BIAS
from .oft import OFT
from .replace import REPLACE

ALGEBRAS: tuple[Algebra, ...] = (LORA, LORA_BIAS, DORA, LOHA, LOKR, GLORA, OFT, BOFT, DIFF, REPLACE)

UNSUPPORTED = {
    "timestep": "a timestep-dependent LoRA (it has no one weight)",
    "oft_R": "PEFT's OFT or BOFT (oft_R, boft_R)",
    "ia3": "(IA)^3",
    "hra": "HRA",
    "vera": "VeRA",
    "fourierft": "FourierFT",
}
"""Roles that are recognised but that no algebra here computes -> what to call them."""


def algebra_of(shapes: Mapping[str, Shape]) -> Algebra | None:
    """The one update rule that these factors (role -> shape, without alpha) make complete; None where none does."""
    return next((algebra for algebra in ALGEBRAS if algebra.claims(shapes)), None)


__all__ = ["ALGEBRAS", "UNSUPPORTED", "Algebra", "Block", "Shape", "Weight", "algebra_of"]
