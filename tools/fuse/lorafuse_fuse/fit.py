"""Whether one module of a LoRA fits a base, and how it is applied; or why it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lorafuse_common.algebras import UNSUPPORTED, Algebra, Shape, algebra_of
from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.crossing import Atlas, Run, runs_of, survey, target_shape
from lorafuse_common.lora import LoraFile, LoraModule, Match, Target, owner_of
from lorafuse_common.quantised import FP8_DTYPES, Fp8Scale, scale_of
from lorafuse_common.scale import ScaleConflictError, resolve_scale
from lorafuse_common.tensorfile import FLOAT_DTYPES, TensorRef

from .choices import ProblemKind


class Misfit(NamedTuple):
    """Why a module is not applied."""

    kind: ProblemKind
    detail: str


class Harmless(NamedTuple):
    """A module that is rightly not applied."""

    reason: str


@dataclass(frozen=True, slots=True)
class Fitted:
    """How a module is applied."""

    algebra: Algebra
    shape: Shape
    """Of the weight that it stands for."""
    runs: tuple[Run, ...]
    """Where all rows of that weight are in the base."""
    scale: float
    source: str
    """Where the scale came from."""
    is_wider: bool
    """Whether it has more input columns than the base's weight."""


@dataclass(frozen=True, slots=True)
class Ground:
    """A base as a LoRA meets it."""

    base: Checkpoint
    atlas: Atlas
    scales: Mapping[str, Fp8Scale]
    """Tensor -> its scale, for scaled fp8 weights."""
    plain_fp8: bool
    """Whether fp8 weights without a scale may be edited."""


def ground_of(base: Checkpoint, plain_fp8: bool) -> Ground:
    """Survey a base once for all its LoRAs."""
    scales = {
        name: scale
        for name, ref in base.tensors.items()
        if ref.dtype in FP8_DTYPES and (scale := scale_of(ref, name, base.tensors))
    }
    return Ground(base, survey(base), scales, plain_fp8)


def fit_module(
    ground: Ground, lora: LoraFile, match: Match, module: LoraModule, alpha: float | None
) -> Fitted | Harmless | Misfit:
    """How one module is applied, or why it is not; `alpha` is the one that the user states."""
    if why := match.ambiguous.get(module.stem):
        return Misfit(ProblemKind.AMBIGUOUS_MODULE, f"could be {why}")
    target = match.targets.get(module.stem)
    if target is None:
        return _unmatched(ground, lora, module)
    algebra = algebra_of(module.shapes)
    config = lora.scale_sources.config
    if algebra is None or (config and config.unfusable) or _is_kohya_oft(lora, module):
        return _no_algebra(module, lora)
    places = ground.atlas.places[module.parameter]
    shape = target_shape(target.parts, places)
    if shape is None:
        return _no_shape(ground, target, module.parameter)
    if any(0 in places[part].weight.shape for part in target.parts.names):
        return Misfit(ProblemKind.SHAPE_MISMATCH, "the base's weight is empty")
    wider = _wider_shape(ground, target, module, algebra, shape)
    runs = runs_of(target.parts, shape[0], places)
    if (misfit := algebra.misfit(module.shapes, wider or shape)) or runs is None:
        return Misfit(ProblemKind.SHAPE_MISMATCH, misfit or f"its parts {target.parts.names} have other sizes")
    if fault := _dtype_fault(ground, [run.weight for run in runs], list(module.factors.values())):
        return Misfit(ProblemKind.UNEDITABLE_DTYPE, fault)
    try:
        rank = algebra.rank(module.shapes)
        scale, source = resolve_scale(target.module, rank, module.alpha, lora.scale_sources, alpha)
    except ScaleConflictError as error:
        return Misfit(ProblemKind.SCALE_CONFLICT, str(error))
    return Fitted(algebra, wider or shape, runs, scale, source, is_wider=wider is not None)


def _unmatched(ground: Ground, lora: LoraFile, module: LoraModule) -> Harmless | Misfit:
    component = owner_of(module.stem, lora, ground.base.component)
    if component is None:
        return Misfit(ProblemKind.NO_SUCH_MODULE, f"{ground.base.title} in {_place(ground.base)} has no such module")
    if module.is_untrained():
        return Harmless(f"untrained modules of the {component}")
    return Misfit(ProblemKind.OTHER_COMPONENT, f"belongs to the {component}")


def _place(base: Checkpoint) -> str:
    """The base's name on the hub, where it came from there, or else its file's or folder's."""
    return base.origin.uri if base.origin else base.root.name


def _no_shape(ground: Ground, target: Target, parameter: str) -> Harmless | Misfit:
    places = ground.atlas.places[parameter]
    lacking = [part for part in target.parts.names if part not in places]
    reasons = [ground.atlas.optional.get(part) for part in lacking]
    if reasons and all(reasons):
        return Harmless(str(reasons[0]))
    if lacking:
        return Misfit(
            ProblemKind.NO_SUCH_MODULE, f"the base lacks {', '.join(f'{part}.{parameter}' for part in lacking)}"
        )
    return Misfit(ProblemKind.SHAPE_MISMATCH, f"its parts {target.parts.names} have different widths in the base")


def _wider_shape(ground: Ground, target: Target, module: LoraModule, algebra: Algebra, shape: Shape) -> Shape | None:
    """The shape that an input embedder has to get, where a LoRA brings more input columns; None elsewhere."""
    family = ground.base.family
    if not family or target.parts.names[0] not in family.widenable or "down" not in module.factors:
        return None
    columns = module.factors["down"].shape[1:]
    return (shape[0], *columns) if len(columns) == len(shape) - 1 == 1 and columns[0] > shape[1] else None


def _is_kohya_oft(lora: LoraFile, module: LoraModule) -> bool:
    return "oft_blocks" in module.factors and "networks.oft" in lora.source.metadata.get("ss_network_module", "")


def _no_algebra(module: LoraModule, lora: LoraFile) -> Misfit:
    config = lora.scale_sources.config
    if config and config.unfusable:
        return Misfit(ProblemKind.UNKNOWN_ALGEBRA, config.unfusable)
    if _is_kohya_oft(lora, module):
        return Misfit(
            ProblemKind.UNKNOWN_ALGEBRA,
            "is kohya's own OFT, which has LyCORIS' names but constrains and splits its blocks otherwise",
        )
    if foreign := sorted({UNSUPPORTED[role] for role in module.factors if role in UNSUPPORTED}):
        return Misfit(ProblemKind.UNKNOWN_ALGEBRA, f"is {' and '.join(foreign)}, which cannot be fused")
    names = sorted(ref.name for ref in module.factors.values()) or ["alpha"]
    return Misfit(ProblemKind.INCOMPLETE_MODULE, f"has only {', '.join(names)}: the file is incomplete")


def _dtype_fault(ground: Ground, weights: list[TensorRef], factors: list[TensorRef]) -> str | None:
    for ref in factors:
        if ref.dtype not in FLOAT_DTYPES:
            return f"its factors are {ref.dtype}; expected one of {', '.join(FLOAT_DTYPES)}"
    for ref in weights:
        if ref.dtype in FP8_DTYPES and ref.name not in ground.scales and not ground.plain_fp8:
            return (
                f"the base's weight is {ref.dtype} without a scale, which keeps 3 bits of a number: most of a LoRA's "
                "delta is lost in it. Fuse into the bf16 checkpoint, or accept the loss with --plain-fp8"
            )
        if ref.dtype not in FLOAT_DTYPES and ref.dtype not in FP8_DTYPES:
            return (
                f"the base's weight is {ref.dtype}; only {', '.join((*FLOAT_DTYPES, *FP8_DTYPES))} can be edited. "
                "Fuse into the bf16 or fp16 checkpoint and quantise the result"
            )
    return None
