"""What can be wrong with a fused checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FaultKind(StrEnum):
    """In what a fused checkpoint, or what it is said to be made of, is not as recorded."""

    MISSING = "MISSING"
    SIZE = "SIZE"
    SHA256 = "SHA256"
    UNRECORDED = "UNRECORDED"
    OTHER_BASE = "OTHER_BASE"
    OTHER_LORA = "OTHER_LORA"
    OTHER_STRENGTH = "OTHER_STRENGTH"
    OTHER_PLAN = "OTHER_PLAN"
    HEADER = "HEADER"
    UNTOUCHED = "UNTOUCHED"
    DEVIATION = "DEVIATION"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong."""

    kind: FaultKind
    subject: str
    """The file, LoRA or tensor."""
    detail: str
