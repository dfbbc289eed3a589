"""What the modules of a LoRA that is converted are: those that are written, those left out, and the problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lorafuse_common.algebras import UNSUPPORTED, Algebra, algebra_of
from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.crossing import target_shape
from lorafuse_common.dialects import Dialect
from lorafuse_common.errors import ConvertError
from lorafuse_common.lora import LoraFile, LoraModule, Match, Target, common_width, last_block, match_lora, owner_of
from lorafuse_common.naming import Family
from lorafuse_common.scale import ScaleConflictError, resolve_scale

from .routes import Key, Route, find_routes, overlaps
from .rows import weight_shape
from .vocabulary import (
    Vocabulary,
    guessed_families,
    of_base,
    of_family,
    of_file,
    own_stems,
    with_own_names,
)


class Problem(NamedTuple):
    """Why a module or a key cannot be written."""

    subject: str
    detail: str


@dataclass(frozen=True, slots=True)
class Source:
    """A module that is read."""

    module: LoraModule
    target: Target
    algebra: Algebra
    scale: float
    is_scaled: bool
    """Whether its rule divides alpha by a rank."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A LoRA's modules as one vocabulary has them."""

    vocabulary: Vocabulary
    match: Match
    targets: Mapping[Key, Target]
    """Without those that are left out or clash."""
    routes: Mapping[Key, Route]
    nameless: frozenset[str]
    """Stems of which some part has no name where they are written."""
    problems: tuple[Problem, ...]
    covered: frozenset[Key]
    """Untrained modules whose rows others have."""

    @property
    def explained(self) -> int:
        """How many modules are known, and have a name where they are written."""
        return len({stem for route in self.routes.values() for stem in route.stems}) - len(self.nameless)

    @property
    def ways(self) -> dict[Key, tuple[object, ...]]:
        """What is the same for two drafts that come to the same."""
        return {key: route.way for key, route in self.routes.items()}


def choose_draft(
    lora: LoraFile, to: Dialect, base: Checkpoint | None, family: Family | None, component: str | None
) -> Draft:
    """What the file's modules are; one answer, or several that come to the same.

    Raises:
        ConvertError: there is none, or there are several.
    """
    if not own_stems(lora, component):
        stem = lora.modules[0].stem
        owner = owner_of(stem, lora, component)
        raise ConvertError(f"{lora.path}: has no module of a diffusion transformer (first: {stem} of the {owner})")
    if base:
        return _draft(lora, of_base(base, to), component)
    families = (family,) if family else guessed_families(lora, component)
    if not families:
        return _draft(lora, of_file(lora, to, component), component)
    blocks = 1 + last_block(own_stems(lora, component))
    drafts = [_draft(lora, of_family(each, to, blocks), component) for each in families]
    most = max(draft.explained for draft in drafts)
    drafts = [draft for draft in drafts if draft.explained == most]
    if any(draft.ways != drafts[0].ways for draft in drafts):
        known = ", ".join(f"{d.vocabulary.family.name} ({d.vocabulary.title})" for d in drafts if d.vocabulary.family)
        raise ConvertError(
            f"{lora.path}: its names may be those of {known}, and {to.name} spells them differently for these. "
            "Say which it is with --family NAME, or give the checkpoint it is for with --base BASE."
        )
    family = drafts[0].vocabulary.family
    assert family
    if any((size.width, size.blocks) == (common_width(lora), blocks) for size in family.sizes):
        return drafts[0]  # as many blocks as a published model of this width
    return _of_some_depth(drafts[0], _draft(lora, of_family(family, to, blocks + 1), component), blocks)


def _of_some_depth(draft: Draft, deeper: Draft, blocks: int) -> Draft:
    """The answer for a model whose last block is the highest here, or for a deeper one: as the names say.

    Modules that they leave open, as SD3's last block has other rows under the same name, are problems.
    """
    if draft.explained != deeper.explained:
        return max(draft, deeper, key=lambda each: each.explained)
    detail = (
        f"is in block {blocks - 1}, the highest here, and the last block of {draft.vocabulary.title} has other rows "
        "or names; --base BASE tells whether it is the last"
    )
    keys = [key for key, way in draft.ways.items() if deeper.ways.get(key) != way]
    unsure = [Problem(stem, detail) for key in keys for stem in draft.routes[key].stems]
    return replace(draft, problems=(*draft.problems, *unsure))


def _draft(lora: LoraFile, vocabulary: Vocabulary, component: str | None) -> Draft:
    match = match_lora(lora, vocabulary.namespaces, component)
    if extended := with_own_names(vocabulary, lora, match, component):
        vocabulary, match = extended, match_lora(lora, extended.namespaces, component)
    modules = {(module.stem, module.parameter): module for module in lora.modules}
    targets = {key: match.targets[key[0]] for key in modules if key[0] in match.targets}
    problems, covered = [], set()
    for first, second in overlaps(targets):
        untrained = next((key for key in (second, first) if modules[key].is_untrained()), None)
        if untrained:
            covered.add(untrained)
        else:
            problems.append(Problem(second[0], f"changes the same rows as {first[0]}, in the same file"))
    targets = {key: target for key, target in targets.items() if key not in covered}
    found = find_routes(targets, vocabulary.written)
    problems += [
        Problem(stem, f"the {vocabulary.layout} layout of {vocabulary.title} has no name for it")
        for stem in found.nameless
    ]
    return Draft(
        vocabulary, match, targets, found.routes, frozenset(found.nameless), tuple(problems), frozenset(covered)
    )


@dataclass(slots=True)
class Sorting:
    """Each of a file's modules: one that is written, left out with a reason, or a problem."""

    lora: LoraFile
    draft: Draft
    component: str | None
    leaves_others: bool
    problems: list[Problem] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def sources(self) -> dict[Key, Source]:
        """What is known of each module that is written."""
        lora, config = self.lora, self.lora.scale_sources.config
        self.problems += [Problem(key, "its suffix is not known") for key in lora.unread]
        self.problems += [Problem(key, "its module has this factor already") for key in lora.duplicates]
        if config and config.unfusable:
            self.problems.append(Problem(config.source, config.unfusable))
        found = {}
        for module in lora.modules:
            key = module.stem, module.parameter
            if key in self.draft.covered:
                self.left_out["untrained modules that others cover"] += 1
            elif key in self.draft.targets:
                source = self._source(module, self.draft.targets[key])
                if isinstance(source, str):
                    self.problems.append(Problem(module.stem, source))
                else:
                    found[key] = source
            else:
                self._strange(module)
        return found

    def _source(self, module: LoraModule, target: Target) -> Source | str:
        """What is known of it, or why it cannot be written."""
        if why := self.draft.match.ambiguous.get(module.stem):
            return f"could be {why}"
        algebra = algebra_of(module.shapes)
        if algebra is None:
            foreign = sorted({UNSUPPORTED[role] for role in module.factors if role in UNSUPPORTED})
            names = sorted(ref.name.removeprefix(module.stem) for ref in module.factors.values()) or ["alpha"]
            return f"is {' and '.join(foreign)}" if foreign else f"is incomplete: has only {', '.join(names)}"
        if misfit := self._misfit(module, target, algebra):
            return misfit
        try:
            rank = algebra.rank(module.shapes)
            scale, _ = resolve_scale(target.module, rank, module.alpha, self.lora.scale_sources)
        except ScaleConflictError as error:
            return str(error)
        return Source(module, target, algebra, scale, rank is not None)

    def _misfit(self, module: LoraModule, target: Target, algebra: Algebra) -> str | None:
        """Why it does not fit the base's weight or, where there is no base, why its factors do not fit each other."""
        vocabulary = self.draft.vocabulary
        if vocabulary.family and not vocabulary.family.widenable.keys().isdisjoint(target.parts.names):
            return None  # a control LoRA may bring more columns than the base has
        places = vocabulary.places.get(module.parameter, {})
        shape = target_shape(target.parts, places) or weight_shape(module.shapes)
        return algebra.misfit(module.shapes, shape) if shape else None

    def _strange(self, module: LoraModule) -> None:
        """Sort a module that is none of the transformer's."""
        owner = owner_of(module.stem, self.lora, self.component)
        vocabulary = self.draft.vocabulary
        if owner is None:
            hint = "" if vocabulary.base else "; --base BASE tells all names that a checkpoint has"
            self.problems.append(Problem(module.stem, f"{vocabulary.title} has no such module{hint}"))
        elif module.is_untrained():
            self.left_out[f"untrained modules of the {owner}"] += 1
        elif self.leaves_others:
            self.left_out[f"modules of the {owner}"] += 1
        else:
            detail = f"belongs to the {owner} and would be lost; --allow OTHER_COMPONENT leaves it out"
            self.problems.append(Problem(module.stem, detail))
