"""The plan of one LoRA: its modules, fitted to the base, and why some are not applied."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lorafuse_common.algebras import Shape
from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.errors import LoraFileError
from lorafuse_common.lora import LoraFile, LoraModule, Match, match_lora, owner_of, read_lora

from .causes import likely_cause
from .choices import LoraRequest, ProblemKind
from .entries import LoraPlan, Patch, Problem
from .fit import Fitted, Ground, Harmless, Misfit, fit_module

LARGEST_SCALE, MOST_VARIATION = 16.0, 8.0
"""Beyond these, scales are pointed out: files that are meant so were not seen."""


@dataclass(slots=True)
class Planned:
    """One LoRA's plan while it grows."""

    plan: LoraPlan
    patches: list[tuple[str, Patch]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    widened: dict[str, Shape] = field(default_factory=dict)


def plan_lora(ground: Ground, requests: Sequence[LoraRequest], place: int) -> Planned:
    request = requests[place]
    label, component = request.label, ground.base.component
    try:
        lora = read_lora(request.path, component)
        match = match_lora(lora, ground.atlas.namespaces, component)
    except LoraFileError as error:
        problem = Problem(ProblemKind.NOT_A_LORA, label, str(request.path), str(error))
        return Planned(LoraPlan(request, component, None, None, "", (), 0, 0, {}, {}, {}, None), problems=[problem])
    problems = [Problem(ProblemKind.UNREAD_KEY, label, key, "its suffix is not known") for key in lora.unread]
    problems += [
        Problem(ProblemKind.DUPLICATE_KEY, label, key, "its module has this factor already") for key in lora.duplicates
    ]
    fits = _fit_modules(ground, lora, match, request, _elsewhere(request, requests))
    problems += fits.problems
    patches = [
        (tensor, _patch(request, place, module, fitted, tensor))
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
        identity=lora.source.identity,
    )
    widened = {fitted.runs[0].weight.name: fitted.shape for _, fitted in fits.fitted if fitted.is_wider}
    return Planned(plan, patches, problems, widened)


def _elsewhere(request: LoraRequest, requests: Sequence[LoraRequest]) -> set[str]:
    """The other components that the same file is also fused into by this command."""
    return {r.component or "transformer" for r in requests if r.path == request.path} - {
        request.component or "transformer"
    }


def _patch(request: LoraRequest, place: int, module: LoraModule, fitted: Fitted, tensor: str) -> Patch:
    runs = tuple(run for run in fitted.runs if run.weight.name == tensor)
    rule = fitted.algebra, fitted.shape, fitted.scale
    return Patch(request.label, place, module, *rule, request.strength, runs, fitted.runs)


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
