"""What a plan is made of: what was asked for, what is added to which tensor, and what stands against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorafuse_common.algebras import Algebra, Shape
from lorafuse_common.crossing import Run
from lorafuse_common.lora import LoraModule

from .choices import LoraRequest, ProblemKind


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that cannot be fused as asked."""

    kind: ProblemKind
    lora: str
    """The LoRA as it was asked for."""
    subject: str
    """The key or module it is about, as the file spells it."""
    detail: str


@dataclass(frozen=True, slots=True)
class Patch:
    """One module of one LoRA, to be added to one tensor of the base."""

    lora: str
    """The LoRA's label."""
    place: int
    """Which of the LoRAs that were asked for it is: one file may be asked for twice."""
    module: LoraModule
    algebra: Algebra
    shape: Shape
    """Of the whole weight that the module stands for."""
    scale: float
    strength: float
    runs: tuple[Run, ...]
    """Which rows of the delta go where in the tensor."""
    everywhere: tuple[Run, ...]
    """Where all rows of the module's weight are, in this tensor and others."""


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """What becomes of one LoRA."""

    request: LoraRequest
    component: str | None
    """The transformer that it is fused into; None outside a pipeline folder."""
    dialect: str | None
    """None where the file could not be read as a LoRA."""
    layout: str | None
    """The layout of its names."""
    scale: str
    """Where the scale came from, and its values."""
    notes: tuple[str, ...]
    """What is unusual about it, which may still be meant."""
    modules: int
    """Diffusion-transformer modules as the file names them."""
    applied: int
    ignored: Mapping[str, int]
    """Problem kind -> modules (or keys) not applied for it."""
    harmless: Mapping[str, int]
    """Reason -> modules that are rightly not applied for it."""
    metadata: Mapping[str, str]
    cause: str | None
    """The likeliest reason where much of it does not fit."""
    identity: str = "absent"
    """`TensorFile.identity` of its file."""
