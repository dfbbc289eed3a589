"""What a fuse will do: a pure function of headers and alphas that accounts for every tensor of every LoRA."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from lorafuse_common.algebras import Algebra, Shape
from lorafuse_common.checkpoint import Checkpoint, open_checkpoint
from lorafuse_common.crossing import Run
from lorafuse_common.errors import CheckpointError, ConfigError, LoraFileError
from lorafuse_common.lora import LoraFile, LoraModule, Match, match_lora, owner_of, read_lora
from lorafuse_common.quantised import Fp8Scale, packed_format
from lorafuse_common.tensorfile import Stored, TensorRef

from .causes import likely_cause
from .fit import Fitted, Ground, Harmless, Misfit, ProblemKind, fit_module, ground_of

LARGEST_SCALE, MOST_VARIATION = 16.0, 8.0
"""Beyond these, scales are pointed out: files that are meant so were not seen."""


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
class LoraRequest:
    """A LoRA as the user asked for it."""

    path: Path
    strength: float = 1.0
    component: str | None = None
    """The transformer of the pipeline that it is for; None for the one that is fused anyway."""
    alpha: float | None = None
    """The alpha that the user states for all its modules."""

    @property
    def label(self) -> str:
        """What to call it in messages: the path as it was given, and the component where one was."""
        return f"{self.path}@{self.component}" if self.component else str(self.path)


@dataclass(frozen=True, slots=True)
class Patch:
    """One module of one LoRA, to be added to one tensor of the base."""

    lora: str
    """The LoRA's label."""
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


@dataclass(frozen=True, slots=True)
class ComponentPlan:
    """What becomes of the tensors of one transformer."""

    base: Checkpoint
    patches: Mapping[str, tuple[Patch, ...]]
    """Tensor of the base -> what is added to it, in the order of the LoRAs."""
    scales: Mapping[str, Fp8Scale]
    """Tensor -> its scale, for scaled fp8 weights."""
    widened: Mapping[str, Shape]
    """Tensor -> the shape it gets, where a LoRA brings more input columns."""
    stored: Mapping[str, Stored] = field(default_factory=dict)
    """Tensor -> how it is stored, where that changes."""
    seed: int | None = None
    """Of stochastic rounding; None rounds to the nearest."""

    @property
    def scale_owners(self) -> dict[str, str]:
        """Scale tensor -> the edited fp8 weight that it belongs to."""
        return {self.scales[name].ref.name: name for name in self.patches if name in self.scales}

    def stored_as(self, ref: TensorRef) -> Stored:
        """How a tensor is stored in the output."""
        return self.stored.get(ref.name, Stored(ref.dtype, ref.shape))


@dataclass(frozen=True, slots=True)
class FusePlan:
    """Everything that `execute` will do."""

    components: tuple[ComponentPlan, ...]
    """One, or both experts of a pipeline that has two."""
    loras: tuple[LoraPlan, ...]
    problems: tuple[Problem, ...]
    dtype: str | None = None
    """What edited tensors are stored as; None for what they are."""
    seed: int | None = None
    """Of stochastic rounding; None rounds to the nearest."""

    @property
    def bases(self) -> tuple[Checkpoint, ...]:
        """The transformers that are fused."""
        return tuple(component.base for component in self.components)

    @property
    def base(self) -> Checkpoint:
        """The first component's checkpoint: its root and form are those of all."""
        return self.components[0].base

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files that are written."""
        return sum(component.base.nbytes for component in self.components)

    @property
    def patches(self) -> tuple[Patch, ...]:
        """All patches of all tensors."""
        return tuple(p for component in self.components for patches in component.patches.values() for p in patches)


def open_bases(root: Path, component: str | None, requests: Sequence[LoraRequest]) -> tuple[Checkpoint, ...]:
    """The transformers that the LoRAs are for, in the order in which they are named.

    Raises:
        CheckpointError: one is not there, cannot be read, or has a packed format.
    """
    named = dict.fromkeys(request.component or component for request in requests)
    bases = tuple(open_checkpoint(root, name) for name in named)
    for base in bases:
        if packed := packed_format(base.tensors):
            raise CheckpointError(
                f"{base.root}: is quantised ({packed}), and such packed weights cannot be edited. "
                "Fuse into the bf16 or fp16 checkpoint and quantise the result."
            )
    return bases


def plan_fuse(
    bases: Checkpoint | Sequence[Checkpoint],
    requests: Sequence[LoraRequest],
    *,
    plain_fp8: bool = False,
    dtype: str | None = None,
    seed: int | None = None,
) -> FusePlan:
    """Look every module of every LoRA up in its base; nothing is written and no factor is read.

    Of several bases, a request is for that of its component. Edited tensors are stored as `dtype` (the safetensors
    spelling; None keeps theirs), rounded to the nearest, or stochastically with a `seed`.

    Raises:
        ConfigError: another dtype is asked for scaled fp8 weights. What does not fit is no error but a problem.
    """
    grounds = [ground_of(base, plain_fp8) for base in ([bases] if isinstance(bases, Checkpoint) else bases)]
    patches: list[dict[str, list[Patch]]] = [{} for _ in grounds]
    widened: list[dict[str, Shape]] = [{} for _ in grounds]
    plans, problems = [], []
    for request in requests:
        index = next((i for i, g in enumerate(grounds) if request.component == g.base.component), 0)
        planned = _plan_lora(grounds[index], request, requests)
        plans.append(planned.plan)
        problems += planned.problems
        for tensor, shape in planned.widened.items():
            widened[index][tensor] = max(shape, widened[index].get(tensor, shape))
        for tensor, patch in planned.patches:
            patches[index].setdefault(tensor, []).append(patch)
    components = tuple(
        _component(ground, {name: tuple(ps) for name, ps in found.items()}, wide, dtype, seed)
        for ground, found, wide in zip(grounds, patches, widened, strict=True)
    )
    return FusePlan(components, tuple(plans), tuple(problems), dtype, seed)


def _component(
    ground: Ground,
    patches: Mapping[str, tuple[Patch, ...]],
    widened: Mapping[str, Shape],
    dtype: str | None,
    seed: int | None,
) -> ComponentPlan:
    if dtype and (scaled := [name for name in patches if name in ground.scales]):
        raise ConfigError(
            f"--dtype: {scaled[0]} and {len(scaled) - 1} more are fp8 weights with scales, which stay fp8; "
            "fuse into the bf16 or fp32 checkpoint to store another dtype"
        )
    tensors = ground.base.tensors
    stored = {name: Stored(dtype or tensors[name].dtype, widened.get(name, tensors[name].shape)) for name in patches}
    changed = {name: its for name, its in stored.items() if its != (tensors[name].dtype, tensors[name].shape)}
    return ComponentPlan(ground.base, patches, ground.scales, widened, changed, seed)


def blocking(problems: Sequence[Problem], allowed: Collection[ProblemKind]) -> tuple[Problem, ...]:
    """The problems that the user did not allow; a file that is no LoRA cannot be allowed."""
    passing = set(allowed) - {ProblemKind.NOT_A_LORA}
    return tuple(problem for problem in problems if problem.kind not in passing)


def without_damaged(plan: FusePlan, problems: Sequence[Problem]) -> FusePlan:
    """The plan less the modules that turned out to be damaged, for a user who allows that."""
    damaged = {(p.lora, p.subject) for p in problems if p.kind is ProblemKind.NOT_FINITE}
    if not damaged:
        return plan

    def intact(patches: Mapping[str, tuple[Patch, ...]]) -> dict[str, tuple[Patch, ...]]:
        kept = {
            name: tuple(patch for patch in its if (patch.lora, patch.module.stem) not in damaged)
            for name, its in patches.items()
        }
        return {name: its for name, its in kept.items() if its}

    counts = Counter(lora for lora, _ in damaged)
    loras = tuple(
        replace(lora, applied=lora.applied - lost, ignored={**lora.ignored, ProblemKind.NOT_FINITE.value: lost})
        if (lost := counts[lora.request.label])
        else lora
        for lora in plan.loras
    )
    components = tuple(replace(component, patches=intact(component.patches)) for component in plan.components)
    return replace(plan, loras=loras, components=components)


@dataclass(slots=True)
class _Planned:
    """One LoRA's plan while it grows."""

    plan: LoraPlan
    patches: list[tuple[str, Patch]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    widened: dict[str, Shape] = field(default_factory=dict)


def _plan_lora(ground: Ground, request: LoraRequest, requests: Sequence[LoraRequest]) -> _Planned:
    label, component = request.label, ground.base.component
    try:
        lora = read_lora(request.path, component)
        match = match_lora(lora, ground.atlas.namespaces, component)
    except LoraFileError as error:
        problem = Problem(ProblemKind.NOT_A_LORA, label, str(request.path), str(error))
        return _Planned(LoraPlan(request, component, None, None, "", (), 0, 0, {}, {}, {}, None), problems=[problem])
    problems = [Problem(ProblemKind.UNREAD_KEY, label, key, "its suffix is not known") for key in lora.unread]
    problems += [
        Problem(ProblemKind.DUPLICATE_KEY, label, key, "its module has this factor already") for key in lora.duplicates
    ]
    fits = _fit_modules(ground, lora, match, request, _elsewhere(request, requests))
    problems += fits.problems
    patches = [
        (tensor, _patch(request, module, fitted, tensor))
        for module, fitted in fits.fitted
        for tensor in dict.fromkeys(run.weight.name for run in fitted.runs)
    ]
    if not patches or request.strength == 0:
        why = "its strength is 0" if patches else f"none of its {len(lora.modules)} modules can be applied"
        problems.append(Problem(ProblemKind.NO_EFFECT, label, str(request.path), why))
    plan = LoraPlan(
        request=request,
        component=component,
        dialect=match.dialect.name,
        layout=match.layout,
        scale=_describe_scales(Counter(f"{fitted.source} = {fitted.scale:g}" for _, fitted in fits.fitted)),
        notes=_notes(lora, request, ground, [fitted.scale for m, fitted in fits.fitted if "down" in m.factors]),
        modules=len({m.stem for m in lora.modules if m.stem in match.targets or not owner_of(m.stem, lora, component)}),
        applied=len({module.stem for module, _ in fits.fitted}),
        ignored=dict(Counter(p.kind.value for p in problems if p.kind is not ProblemKind.NO_EFFECT)),
        harmless=dict(Counter(fits.harmless.values())),
        metadata=lora.source.metadata,
        cause=likely_cause(lora, ground.base) if problems else None,
    )
    widened = {fitted.runs[0].weight.name: fitted.shape for _, fitted in fits.fitted if fitted.is_wider}
    return _Planned(plan, patches, problems, widened)


def _elsewhere(request: LoraRequest, requests: Sequence[LoraRequest]) -> set[str]:
    """The other components that the same file is also fused into by this command."""
    return {r.component or "transformer" for r in requests if r.path == request.path} - {
        request.component or "transformer"
    }


def _patch(request: LoraRequest, module: LoraModule, fitted: Fitted, tensor: str) -> Patch:
    runs = tuple(run for run in fitted.runs if run.weight.name == tensor)
    return Patch(request.label, module, fitted.algebra, fitted.shape, fitted.scale, request.strength, runs, fitted.runs)


class _Fits(NamedTuple):
    fitted: list[tuple[LoraModule, Fitted]]
    problems: list[Problem]
    harmless: dict[str, str]
    """Stem -> reason."""


def _fit_modules(
    ground: Ground, lora: LoraFile, match: Match, request: LoraRequest, elsewhere: Collection[str]
) -> _Fits:
    """The modules that fit and what stands against the others."""
    fitted: list[tuple[LoraModule, Fitted]] = []
    problems: list[Problem] = []
    harmless: dict[str, str] = {}
    for module in lora.modules:
        owner = owner_of(module.stem, lora, ground.base.component)
        if owner in elsewhere:
            harmless[module.stem] = f"modules of the {owner}, fused there"
            continue
        found = fit_module(ground, lora, match, module, request.alpha)
        if isinstance(found, Misfit):
            problems.append(Problem(found.kind, request.label, module.stem, found.detail))
        elif isinstance(found, Harmless):
            harmless[module.stem] = found.reason
        else:
            fitted.append((module, found))
    faulty = {problem.subject for problem in problems}  # a module whose bias does not fit is not applied by half
    fitted = [(module, found) for module, found in fitted if module.stem not in faulty]
    kept, clashes = _without_overlaps(fitted)
    for module, first in clashes:
        detail = f"changes the same rows as {first.stem}, in the same file"
        if module.is_untrained():
            harmless[module.stem] = "untrained modules that others cover"
        elif first.is_untrained():
            harmless[first.stem] = "untrained modules that others cover"
            kept = [(m, f) for m, f in kept if m is not first] + [(m, f) for m, f in fitted if m is module]
        else:
            problems.append(Problem(ProblemKind.DUPLICATE_MODULE, request.label, module.stem, detail))
    return _Fits(kept, problems, harmless)


def _without_overlaps(
    fitted: Iterable[tuple[LoraModule, Fitted]],
) -> tuple[list[tuple[LoraModule, Fitted]], list[tuple[LoraModule, LoraModule]]]:
    """The modules less those that change rows which an earlier one changes, and these with the earlier one."""
    taken: dict[str, list[tuple[int, int, LoraModule]]] = {}
    kept, clashes = [], []
    for module, found in fitted:
        clash = next(
            (
                other
                for run in found.runs
                for first, last, other in taken.get(run.weight.name, ())
                if run.first < last and first < run.first + run.rows
            ),
            None,
        )
        if clash:
            clashes.append((module, clash))
            continue
        kept.append((module, found))
        for run in found.runs:
            taken.setdefault(run.weight.name, []).append((run.first, run.first + run.rows, module))
    return kept, clashes


def _notes(lora: LoraFile, request: LoraRequest, ground: Ground, scales: Collection[float]) -> tuple[str, ...]:
    """Scales that are mostly a trainer's mistake (a wrong alpha, rslora twice), and names of the other expert."""
    notes = []
    low, high = min(scales, default=1.0), max(scales, default=1.0)
    if high > LARGEST_SCALE:
        notes.append(f"its scale of {high:g} is unusually large; expect a strength of {1 / high:.2g} to be needed")
    elif high > MOST_VARIATION * low:
        notes.append(f"its scales vary between {low:g} and {high:g} from module to module")
    header = lora.scale_sources.header
    if header and header.is_setting and header.rank and scales and request.alpha is None:
        stated = header.alpha / header.rank
        if all(abs(scale - stated) > 1e-3 * stated for scale in scales):
            notes.append(f"its header says that it was trained with a scale of {stated:g}, its alphas say otherwise")
    theirs, ours = _expert(request.path.name), _expert_of_base(ground.base)
    if theirs and ours and theirs != ours:
        notes.append(f"its name says {theirs} noise, and it is fused into the {ours}-noise expert")
    return tuple(notes)


def _expert(name: str) -> str | None:
    """`high` or `low` where a file's name says for which of Wan 2.2's experts it is."""
    found = set(re.findall(r"(?<![a-z])(high|low)(?=[_\-. ]|noise|$)", name.lower()))
    return found.pop() if len(found) == 1 else None


def _expert_of_base(base: Checkpoint) -> str | None:
    """Which of Wan 2.2's experts a base is: diffusers' pipelines keep the high-noise one in `transformer`."""
    if not base.family or base.family.name != "wan":
        return None
    if base.component and (base.root / "transformer_2").is_dir():
        return {"transformer": "high", "transformer_2": "low"}.get(base.component)
    return _expert(base.root.name)


def _describe_scales(scales: Counter[str]) -> str:
    common = [f"{text} ({count}x)" if len(scales) > 1 else text for text, count in scales.most_common(3)]
    return ", ".join(common) + (f" and {len(scales) - 3} more" if len(scales) > 3 else "")
