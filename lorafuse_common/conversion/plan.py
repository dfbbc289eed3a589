"""A LoRA in another dialect, planned: which modules are written, of whose rows, at what scale; or why it cannot be.

A function of the header and the alphas. Factors are only read of modules that belong to another component, or whose
rows others in the file have too: to see whether they hold anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.dialects import DIALECTS, AlphaStyle, Dialect
from lorafuse_common.errors import ConvertError
from lorafuse_common.lora import LoraFile
from lorafuse_common.naming import Family

from .factors import Slice
from .reading import Draft, Problem, Sorting, Source, choose_draft
from .routes import Key, Route
from .rows import CORES, ROW_ROLES, has_column_magnitude, unreadable, weight_shape
from .vocabulary import Vocabulary

_NAMES_SHOWN = 3
LOW_RANK_ONLY = (AlphaStyle.NEVER, AlphaStyle.CONFIG)
"""Of dialects whose readers know LoRA, DoRA and LoRA's bias, and no other rule."""
VECTOR = ".lora_magnitude_vector"
"""PEFT's magnitude; its readers take a whole file for DoRA or for LoRA."""
_INSTEAD = "--to comfyui or kohya"


@dataclass(frozen=True, slots=True)
class Output:
    """A module's weight or bias that is written."""

    module: str
    parameter: str
    slices: tuple[Slice, ...]
    is_whole: bool
    """Whether it is one module under another name, whose rows need not be known."""
    scale: float
    """What the file says of its scale."""
    is_scaled: bool
    """Whether its rule divides alpha by a rank."""
    bias_role: str | None
    """For a bias, the role in which it is written."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """Everything that is written."""

    lora: LoraFile
    read_as: Dialect
    read_layout: str | None
    to: Dialect
    vocabulary: Vocabulary
    outputs: tuple[Output, ...]
    modules_read: int
    left_out: Mapping[str, int]
    """Reason -> modules that are not written for it."""


def writable() -> tuple[Dialect, ...]:
    """The dialects that can be written."""
    return tuple(dialect for dialect in DIALECTS if dialect.alpha)


def plan_conversion(
    lora: LoraFile,
    to: Dialect,
    *,
    base: Checkpoint | None = None,
    family: Family | None = None,
    component: str | None = None,
    leaves_others: bool = False,
) -> Conversion:
    """How a LoRA is written as `to`; `base` or `family` say for what it is, where its names do not.

    With `leaves_others`, modules of other components are left out.

    Raises:
        ConvertError: with all that stands against it.
    """
    draft = choose_draft(lora, to, base, family, component)
    sorting = Sorting(lora, draft, component, leaves_others)
    sources = sorting.sources()
    problems = [*sorting.problems, *draft.problems]
    outputs: tuple[Output, ...] = ()
    if not problems:
        outputs, problems = _outputs(draft, sources, to)
    if problems:
        raise ConvertError(_described(lora, to, problems))
    if not outputs:
        raise ConvertError(f"{lora.path}: has no module of the transformer to write")
    return Conversion(
        lora=lora,
        read_as=draft.match.dialect,
        read_layout=draft.match.layout,
        to=to,
        vocabulary=draft.vocabulary,
        outputs=outputs,
        modules_read=len({stem for stem, _ in sources}),
        left_out=dict(sorting.left_out),
    )


def _outputs(draft: Draft, sources: Mapping[Key, Source], to: Dialect) -> tuple[tuple[Output, ...], list[Problem]]:
    """Every module that is written, and what stands against it."""
    outputs: list[Output] = []
    problems: list[Problem] = []
    for module in dict.fromkeys(module for module, _ in draft.routes):
        routes = {p: draft.routes[module, p] for p in ("weight", "bias") if (module, p) in draft.routes}
        making = _Making(module, routes, sources, to, draft.vocabulary)
        outputs += [output for parameter in routes if (output := making.output(parameter))]
        problems += making.problems
    if not problems and to.suffix("magnitude") == VECTOR:
        problems += _mixed_magnitudes(outputs)
    return tuple(outputs), problems


def _mixed_magnitudes(outputs: Sequence[Output]) -> list[Problem]:
    weights = [output for output in outputs if output.parameter == "weight"]
    plain = [o for o in weights if not any(s.module and "magnitude" in s.module.factors for s in o.slices)]
    if len(plain) in (0, len(weights)):
        return []
    detail = f"is no DoRA, and others here are, which readers of one such file take for all or none: {_INSTEAD}"
    return [Problem(stem, detail) for output in plain for stem in {s.module.stem for s in output.slices if s.module}]


@dataclass(slots=True)
class _Making:
    """One module that is written, weight and bias."""

    module: str
    routes: Mapping[str, Route]
    sources: Mapping[Key, Source]
    to: Dialect
    vocabulary: Vocabulary
    problems: list[Problem] = field(default_factory=list)

    def output(self, parameter: str) -> Output | None:
        """Its weight or bias; None where there is a problem."""
        route = self.routes[parameter]
        sources = {stem: self.sources[stem, parameter] for stem in route.stems}
        role = self._bias_role(sources) if parameter == "bias" else None
        why = self._bias_limit(sources, role) if role else self._weight_limit(sources)
        if why is None and not route.is_whole:
            why = self._row_limit(route, sources)
        slices = () if why else self._slices(route, sources, parameter)
        if not why and not slices:
            why = f"its rows do not divide into those of {', '.join(slot.part for slot in route.slots)}"
        if not why:
            why = _dtype_limit(slices)
        if why:
            self.problems += [Problem(stem, why) for stem in route.stems]
            return None
        scaled = any(source.is_scaled for source in sources.values())
        return Output(self.module, parameter, slices, route.is_whole, self._scale(), scaled, role)

    def _scale(self) -> float:
        """What is stated: the scale that all of its modules have, or 1, with other scales multiplied into them."""
        read = [self.sources[stem, parameter] for parameter, route in self.routes.items() for stem in route.stems]
        found = {source.scale for source in read if source.is_scaled}
        return found.pop() if len(found) == 1 and self.to.alpha is not AlphaStyle.NEVER else 1.0

    def _bias_role(self, sources: Mapping[str, Source]) -> str:
        """A bias of B is scaled like B, and only PEFT's readers know it; the others take a difference."""
        if any("set_weight" in source.module.factors for source in sources.values()):
            return "set_weight"
        return "up_bias" if self.to.alpha in LOW_RANK_ONLY else "diff"

    def _bias_limit(self, sources: Mapping[str, Source], role: str) -> str | None:
        """Why the dialect cannot hold a bias."""
        if role == "up_bias" and "weight" not in self.routes:
            return f"changes a bias without its weight, which {self.to.name} files cannot: {_INSTEAD}"
        if role == "set_weight" and self.to.alpha in LOW_RANK_ONLY:
            return f"replaces a bias, which {self.to.name} files cannot: {_INSTEAD}"
        if role == "set_weight" and any("set_weight" not in source.module.factors for source in sources.values()):
            return f"changes a part of {self.module}'s bias, of which another module replaces a part"
        return None

    def _weight_limit(self, sources: Mapping[str, Source]) -> str | None:
        """Why the dialect cannot hold an update rule."""
        if self.to.alpha not in LOW_RANK_ONLY:
            return None
        for source in sources.values():
            roles = source.module.factors.keys()
            if not {"down", "up"} <= roles <= {"down", "up", "magnitude"}:
                what = f"{source.algebra.name}{' with a core' if roles & set(CORES) else ''}"
                return f"is {what}, which {self.to.name} files cannot hold: {_INSTEAD}"
            if self.to.suffix("magnitude") == VECTOR and has_column_magnitude(source.module.shapes):
                return f"is dora by columns, which {self.to.name} files cannot hold: {_INSTEAD}"
        return None

    def _row_limit(self, route: Route, sources: Mapping[str, Source]) -> str | None:
        """Why its modules cannot be cut or joined."""
        why = f"cannot be cut or joined, and the {self.vocabulary.layout} layout has its rows in other modules"
        roles: set[str] = set()
        rules = set()
        for source in sources.values():
            own = source.module.factors.keys()
            if not own <= ROW_ROLES:
                return f"is {source.algebra.name}, which {why}"
            if has_column_magnitude(source.module.shapes):
                return f"is dora by columns, which {why}"
            if dtype := unreadable(source.module.factors):
                return f"has factors in {dtype}, which {why}"
            roles |= own
            rules.add(frozenset(own - {"up_bias", "diff", "down"} if source.module.parameter == "bias" else own))
        if len(rules) > 1:
            return f"has another rule than others that {self.module} would be joined from"
        lacking = [slot.part for slot in route.slots if slot.stem is None]
        if (lacking or len(sources) > 1) and roles & set(CORES):
            return f"has a core, with which it {why}"
        if lacking and roles & {"magnitude", "set_weight"}:
            name = next(iter(sources.values())).algebra.name
            return f"is {name} and would be joined to {lacking[0]}, which is not in the file"
        return None

    def _slices(self, route: Route, sources: Mapping[str, Source], parameter: str) -> tuple[Slice, ...]:
        """Whose rows it has; none where they do not divide as its parts do, or as the base's."""
        stated = self._scale()
        if route.is_whole:
            source = sources[route.stems[0]]
            return (Slice(source.module, 0, 0, 0, self._factor(source, stated)),)
        places = self.vocabulary.places.get(parameter, {})
        found: list[Slice | None] = []
        units: set[tuple[int, int]] = set()
        for slot in route.slots:
            if slot.stem is None:
                found.append(None)
                continue
            source = sources[slot.stem]
            total = (weight_shape(source.module.shapes) or (0,))[0]
            divided = source.target.parts.rows(total)
            if not divided or (slot.part in places and places[slot.part].rows != divided[slot.number][2]):
                return ()
            _, first, count = divided[slot.number]
            units.add(divmod(count, slot.share))
            found.append(Slice(source.module, first, count, total, self._factor(source, stated)))
        rows, rest = units.pop()
        if units or rest:
            return ()
        named = zip(route.slots, found, strict=True)
        return tuple(made or Slice(None, 0, rows * slot.share, 0, 1.0) for slot, made in named)

    def _factor(self, source: Source, stated: float) -> float:
        """What a module's delta is multiplied with, so that the stated scale makes of it what it was."""
        if "set_weight" in source.module.factors:
            return 1.0
        if source.module.parameter == "bias":
            return source.scale / stated if self.to.alpha in LOW_RANK_ONLY else source.scale
        return source.scale / stated if source.is_scaled else source.scale


def _dtype_limit(slices: Sequence[Slice]) -> str | None:
    for s in slices:
        if s.module and s.factor != 1 and (dtype := unreadable(s.module.factors)):
            return f"has factors in {dtype}, into which its scale of {s.factor:g} cannot be multiplied: {_INSTEAD}"
    return None


def _described(lora: LoraFile, to: Dialect, problems: Sequence[Problem]) -> str:
    """All problems by their reason, with counts and the first names."""
    by_detail: dict[str, list[str]] = {}
    for problem in dict.fromkeys(problems):
        by_detail.setdefault(problem.detail, []).append(problem.subject)
    count = sum(map(len, by_detail.values()))
    lines = [f"{lora.path}: cannot be written as {to.name}: {count} problem{'s' if count > 1 else ''}"]
    for detail, subjects in by_detail.items():
        more = f", and {len(subjects) - _NAMES_SHOWN} more" if len(subjects) > _NAMES_SHOWN else ""
        lines.append(f"  {len(subjects)} x {', '.join(subjects[:_NAMES_SHOWN])}{more}: {detail}")
    return "\n".join(lines)
