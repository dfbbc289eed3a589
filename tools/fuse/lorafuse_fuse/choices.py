"""What a command line can ask for, apart from what carries it out: `lorafuse --help` imports little else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafuse_common.manifest import Origin


class Dtype(StrEnum):
    """What edited tensors are stored as."""

    KEEP = "keep"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Device(StrEnum):
    """Where the arithmetic of a fuse is done."""

    CPU = "cpu"
    CUDA = "cuda"


class Rounding(StrEnum):
    """How an fp32 sum becomes a number of the tensor's dtype."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


STORED_AS = {Dtype.KEEP: None, Dtype.BFLOAT16: "BF16", Dtype.FLOAT16: "F16", Dtype.FLOAT32: "F32"}


class Components(StrEnum):
    """How large files of the other components are carried over."""

    LINK = "link"
    COPY = "copy"


class KeepLoras(StrEnum):
    """Whether the fused folder gets copies of its LoRAs."""

    COPY = "copy"
    NONE = "none"


class Losable(StrEnum):
    """What a conversion may leave out."""

    OTHER_COMPONENT = "OTHER_COMPONENT"


class ProblemKind(StrEnum):
    """Why a part of a LoRA cannot be fused as asked."""

    NOT_A_LORA = "NOT_A_LORA"
    UNREAD_KEY = "UNREAD_KEY"
    DUPLICATE_KEY = "DUPLICATE_KEY"
    DUPLICATE_MODULE = "DUPLICATE_MODULE"
    OTHER_COMPONENT = "OTHER_COMPONENT"
    NO_SUCH_MODULE = "NO_SUCH_MODULE"
    AMBIGUOUS_MODULE = "AMBIGUOUS_MODULE"
    INCOMPLETE_MODULE = "INCOMPLETE_MODULE"
    UNKNOWN_ALGEBRA = "UNKNOWN_ALGEBRA"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"
    UNEDITABLE_DTYPE = "UNEDITABLE_DTYPE"
    SCALE_CONFLICT = "SCALE_CONFLICT"
    NOT_FINITE = "NOT_FINITE"
    NO_EFFECT = "NO_EFFECT"
    ALREADY_FUSED = "ALREADY_FUSED"


@dataclass(frozen=True, slots=True)
class LoraRequest:
    """A LoRA as the user asked for it."""

    path: Path
    strength: float = 1.0
    component: str | None = None
    """The transformer of the pipeline that it is for; None for the one that is fused anyway."""
    alpha: float | None = None
    """The alpha that the user states for all its modules."""
    origin: Origin | None = None
    """Where on the hub it came from."""

    @property
    def label(self) -> str:
        """What to call it in messages: the path as it was given, and the component where one was."""
        name = self.origin.uri if self.origin else str(self.path)
        return f"{name}@{self.component}" if self.component else name
