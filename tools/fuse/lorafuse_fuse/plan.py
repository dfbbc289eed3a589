"""What a fuse will do: a pure function of headers and alphas that accounts for every tensor of every LoRA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from lorafuse_common.algebras import UNSUPPORTED, Algebra, algebra_of
from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.crossing import Atlas, Run, runs_of, survey, target_shape
from lorafuse_common.errors import LoraFileError
from lorafuse_common.lora import LoraFile, LoraModule, Match, is_other_component, match_lora, read_lora
from lorafuse_common.scale import ScaleConflictError, resolve_scale
from lorafuse_common.tensorfile import FLOAT_DTYPES

from .causes import likely_cause

LARGEST_SCALE, MOST_VARIATION = 16.0, 8.0
"""Beyond these, scales are pointed out: files that are meant so were not seen."""


class ProblemKind(StrEnum):
    """Why a part of a LoRA cannot be fused as asked."""

    NOT_A_LORA = "NOT_A_LORA"
    UNREAD_KEY = "UNREAD_KEY"
    DUPLICATE_KEY = "DUPLICATE_KEY"
    OTHER_COMPONENT = "OTHER_COMPONENT"
    NO_SUCH_MODULE = "NO_SUCH_MODULE"
    INCOMPLETE_MODULE = "INCOMPLETE_MODULE"
    UNKNOWN_ALGEBRA = "UNKNOWN_ALGEBRA"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"
    UNEDITABLE_DTYPE = "UNEDITABLE_DTYPE"
    SCALE_CONFLICT = "SCALE_CONFLICT"
    NOT_FINITE = "NOT_FINITE"
    NO_EFFECT = "NO_EFFECT"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that cannot be fused as asked."""

    kind: ProblemKind
    lora: str
    """The LoRA's path as it was given."""
    subject: str
    """The key or module it is about, as the file spells it."""
    detail: str


@dataclass(frozen=True, slots=True)
class LoraRequest:
    """A LoRA as the user asked for it."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Patch:
    """One module of one LoRA, to be added to one tensor of the base."""

    lora: str
    """The LoRA's path as it was given."""
    module: LoraModule
    algebra: Algebra
    scale: float
    strength: float
    runs: tuple[Run, ...]
    """Which rows of the delta go where in the tensor."""


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """What becomes of one LoRA."""

    request: LoraRequest
    dialect: str | None
    """None where the file could not be read as a LoRA."""
    layout: str | None
    """The layout of its names."""
    scale: str
    """Where the scale came from, and its values."""
    suspicion: str | None
    """What is unusual about the scales, which may still be meant."""
    modules: int
    """Diffusion-transformer modules as the file names them."""
    applied: int
    ignored: Mapping[str, int]
    """Problem kind -> modules (or keys) not applied for it."""
    metadata: Mapping[str, str]
    cause: str | None
    """The likeliest reason where much of it does not fit."""


@dataclass(frozen=True, slots=True)
class FusePlan:
    """Everything that `execute` will do."""

    base: Checkpoint
    loras: tuple[LoraPlan, ...]
    patches: Mapping[str, tuple[Patch, ...]]
    """Tensor of the base -> what is added to it, in the order of the LoRAs."""
    problems: tuple[Problem, ...]


def plan_fuse(base: Checkpoint, requests: Sequence[LoraRequest]) -> FusePlan:
    """Look every module of every LoRA up in the base; nothing is written and no factor is read."""
    patches: dict[str, list[Patch]] = {}
    plans, problems = [], []
    atlas = survey(base)
    for request in requests:
        plan, found, faults = _plan_lora(base, atlas, request)
        plans.append(plan)
        problems += faults
        for tensor, patch in found:
            patches.setdefault(tensor, []).append(patch)
    return FusePlan(base, tuple(plans), {name: tuple(ps) for name, ps in patches.items()}, tuple(problems))


def blocking(problems: Sequence[Problem], allowed: Collection[ProblemKind]) -> tuple[Problem, ...]:
    """The problems that the user did not allow; a file that is no LoRA cannot be allowed."""
    passing = set(allowed) - {ProblemKind.NOT_A_LORA}
    return tuple(problem for problem in problems if problem.kind not in passing)


def without_damaged(plan: FusePlan, problems: Sequence[Problem]) -> FusePlan:
    """The plan less the modules that turned out to be damaged, for a user who allows that."""
    damaged = {(p.lora, p.subject) for p in problems if p.kind is ProblemKind.NOT_FINITE}
    if not damaged:
        return plan
    kept = {
        name: tuple(patch for patch in patches if (patch.lora, patch.module.stem) not in damaged)
        for name, patches in plan.patches.items()
    }
    counts = Counter(lora for lora, _ in damaged)
    loras = tuple(
        replace(lora, applied=lora.applied - lost, ignored={**lora.ignored, ProblemKind.NOT_FINITE.value: lost})
        if (lost := counts[str(lora.request.path)])
        else lora
        for lora in plan.loras
    )
    return replace(plan, loras=loras, patches={name: patches for name, patches in kept.items() if patches})


def _plan_lora(
    base: Checkpoint, atlas: Atlas, request: LoraRequest
) -> tuple[LoraPlan, list[tuple[str, Patch]], list[Problem]]:
    name = str(request.path)
    try:
        lora = read_lora(request.path)
        match = match_lora(lora, atlas.namespaces)
    except LoraFileError as error:
        problem = Problem(ProblemKind.NOT_A_LORA, name, str(request.path), str(error))
        return LoraPlan(request, None, None, "", None, 0, 0, {}, {}, None), [], [problem]
    problems = [Problem(ProblemKind.UNREAD_KEY, name, key, "its suffix is not known") for key in lora.unread]
    problems += [
        Problem(ProblemKind.DUPLICATE_KEY, name, key, "its module has this factor already") for key in lora.duplicates
    ]
    patches, faults, scales = _plan_modules(base, atlas, lora, match, request.strength)
    problems += faults
    if not patches or request.strength == 0:
        why = "its strength is 0" if patches else f"none of its {len(lora.modules)} modules can be applied"
        problems.append(Problem(ProblemKind.NO_EFFECT, name, str(request.path), why))
    plan = LoraPlan(
        request=request,
        dialect=match.dialect.name,
        layout=match.layout,
        scale=_describe_scales(scales),
        suspicion=_suspicion({patch.scale for _, patch in patches if "down" in patch.module.factors}),
        modules=len({module.stem for module in lora.modules if _is_ours(module, match)}),
        applied=len({patch.module.stem for _, patch in patches}),
        ignored=dict(Counter(p.kind.value for p in problems if p.kind is not ProblemKind.NO_EFFECT)),
        metadata=lora.source.metadata,
        cause=likely_cause(lora, base) if problems else None,
    )
    return plan, patches, problems


def _plan_modules(
    base: Checkpoint, atlas: Atlas, lora: LoraFile, match: Match, strength: float
) -> tuple[list[tuple[str, Patch]], list[Problem], Counter[str]]:
    """The patches by tensor, what stands against the others, and how often each scale occurs."""
    patches, problems, scales = [], [], Counter[str]()
    for module in lora.modules:
        planned = _plan_module(base, atlas, lora, match, module)
        if isinstance(planned, Problem):
            problems.append(planned)
            continue
        scales[f"{planned.source} = {planned.scale:g}"] += 1
        for tensor in dict.fromkeys(run.weight.name for run in planned.runs):
            runs = tuple(run for run in planned.runs if run.weight.name == tensor)
            patches.append((tensor, Patch(str(lora.path), module, planned.algebra, planned.scale, strength, runs)))
    faulty = {problem.subject for problem in problems}  # a module whose bias does not fit is not applied by half
    return [(tensor, patch) for tensor, patch in patches if patch.module.stem not in faulty], problems, scales


def _is_ours(module: LoraModule, match: Match) -> bool:
    return module.stem in match.targets or not is_other_component(module.stem)


def _suspicion(scales: Collection[float]) -> str | None:
    """Scales that are mostly a trainer's mistake: a wrong alpha after ranks were changed by layer, or rslora twice."""
    low, high = min(scales, default=1.0), max(scales, default=1.0)
    if high > LARGEST_SCALE:
        return f"its scale of {high:g} is unusually large; expect a strength of {1 / high:.2g} to be needed"
    if high > MOST_VARIATION * low:
        return f"its scales vary between {low:g} and {high:g} from module to module"
    return None


def _describe_scales(scales: Counter[str]) -> str:
    common = [f"{text} ({count}x)" if len(scales) > 1 else text for text, count in scales.most_common(3)]
    return ", ".join(common) + (f" and {len(scales) - 3} more" if len(scales) > 3 else "")


class _Fitted(NamedTuple):
    algebra: Algebra
    runs: tuple[Run, ...]
    scale: float
    source: str


def _plan_module(base: Checkpoint, atlas: Atlas, lora: LoraFile, match: Match, module: LoraModule) -> _Fitted | Problem:
    """How one module is applied, or why it cannot be."""

    def problem(kind: ProblemKind, detail: str) -> Problem:
        return Problem(kind, str(lora.path), module.stem, detail)

    target = match.targets.get(module.stem)
    if target is None:
        if is_other_component(module.stem):
            return problem(ProblemKind.OTHER_COMPONENT, "belongs to a text encoder or another transformer")
        return problem(ProblemKind.NO_SUCH_MODULE, f"{base.title} in {base.root.name} has no such module")
    algebra = algebra_of(module.roles)
    if algebra is None or (lora.config and lora.config.unfusable):
        return _no_algebra(problem, module, lora)
    shapes = {role: ref.shape for role, ref in module.factors.items()}
    places = atlas.places[module.parameter]
    shape = target_shape(target.parts, places)
    if shape is None:
        lacking = ", ".join(f"{part}.{module.parameter}" for part in target.parts.names if part not in places)
        if lacking:
            return problem(ProblemKind.NO_SUCH_MODULE, f"the base lacks {lacking}")
        return problem(ProblemKind.SHAPE_MISMATCH, f"its parts {target.parts.names} have different widths in the base")
    runs = runs_of(target.parts, shape[0], places)
    if (misfit := algebra.misfit(shapes, shape)) or runs is None:
        return problem(ProblemKind.SHAPE_MISMATCH, misfit or f"its parts {target.parts.names} have other sizes")
    for ref in (*(run.weight for run in runs), *module.factors.values()):
        if ref.dtype not in FLOAT_DTYPES:
            return problem(ProblemKind.UNEDITABLE_DTYPE, _dtype_fault(ref.dtype, ref not in module.factors.values()))
    try:
        scale, source = resolve_scale(target.module, algebra.rank(shapes), module.alpha, lora.config)
    except ScaleConflictError as error:
        return problem(ProblemKind.SCALE_CONFLICT, str(error))
    return _Fitted(algebra, runs, scale, source)


def _no_algebra(problem: Callable[[ProblemKind, str], Problem], module: LoraModule, lora: LoraFile) -> Problem:
    if lora.config and lora.config.unfusable:
        return problem(ProblemKind.UNKNOWN_ALGEBRA, lora.config.unfusable)
    if foreign := sorted({UNSUPPORTED[role] for role in module.factors if role in UNSUPPORTED}):
        return problem(ProblemKind.UNKNOWN_ALGEBRA, f"is {' and '.join(foreign)}, which is not supported yet")
    names = sorted(ref.name for ref in module.factors.values()) or ["alpha"]
    return problem(ProblemKind.INCOMPLETE_MODULE, f"has only {', '.join(names)}: the file is incomplete")


def _dtype_fault(dtype: str, is_base: bool) -> str:
    if is_base:
        return (
            f"the base's weight is {dtype}; only {', '.join(FLOAT_DTYPES)} can be edited. "
            "Fuse into the bf16 or fp16 checkpoint and quantise the result"
        )
    return f"its factors are {dtype}; expected one of {', '.join(FLOAT_DTYPES)}"
