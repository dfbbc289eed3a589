"""Which names the modules of a LoRA that is converted may have, and which names a dialect writes for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.crossing import Namespace, Place, survey
from lorafuse_common.dialects import Dialect
from lorafuse_common.errors import ConvertError
from lorafuse_common.families import FAMILIES
from lorafuse_common.lora import LoraFile, Match, guess_dialect, guess_families, last_block, owner_of
from lorafuse_common.naming import Family, Layout, Parts, parts


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The names of one architecture at one size."""

    title: str
    """What to call the architecture in messages."""
    layout: str | None
    """The layout whose names are written; None for names that are kept as they are."""
    namespaces: tuple[Namespace, ...]
    """Where the names that are read are looked up."""
    written: Mapping[str, Parts]
    """The modules of the layout that is written; of several for the same parts the first is meant."""
    family: Family | None = None
    base: Checkpoint | None = None
    """The checkpoint whose names these are; without one, the number of blocks is not known."""
    places: Mapping[str, Mapping[str, Place]] = field(default_factory=dict)
    """`weight` and `bias` -> part -> where `base` has it."""


def of_base(base: Checkpoint, to: Dialect) -> Vocabulary:
    """The names that a checkpoint has and, where its family is known, those that other layouts have for the same."""
    atlas = survey(base)
    if base.family and base.layout:
        layout, written = written_names(base.family, to, 1 + last_block(base.modules))
        # Versions of a model differ in some names (Sana's guidance embedder): those of this one come first.
        written = dict(sorted(written.items(), key=lambda entry: entry[0] not in base.modules))
    else:
        layout, written = None, {module: parts(module) for module in (*base.modules, *base.biases)}
    return Vocabulary(base.title, layout, atlas.namespaces, written, base.family, base, atlas.places)


def of_family(family: Family, to: Dialect, blocks: int) -> Vocabulary:
    """A family's names in all its layouts, for a model of so many blocks."""
    namespaces = tuple(Namespace(layout.name, layout.expand(blocks)) for layout in family.layouts)
    layout, written = written_names(family, to, blocks)
    return Vocabulary(family.title, layout, namespaces, written, family)


def of_file(lora: LoraFile, to: Dialect, component: str | None) -> Vocabulary:
    """A file's own names, for an architecture of which nothing is known: they are kept as they are.

    Raises:
        ConvertError: they would have to be translated, or dots found in them.
    """
    stems = own_stems(lora, component)
    dialect = guess_dialect(lora)
    prefix = next((p for p in dialect.prefixes if all(stem.startswith(p) for stem in stems)), None)
    if dialect.flat or prefix is None or (dialect.layout != to.layout and "" not in dialect.prefixes):
        raise ConvertError(
            f"{lora.path}: has {dialect.name} names of no family that lorafuse knows (first: {(*stems, '-')[0]}), "
            f"which {to.name} spells otherwise. Give the checkpoint it is for with --base BASE."
        )
    own = {stem.removeprefix(prefix): parts(stem.removeprefix(prefix)) for stem in stems}
    return Vocabulary("a model of no known family", None, (Namespace(None, own),), own)


def with_own_names(vocabulary: Vocabulary, lora: LoraFile, match: Match, component: str | None) -> Vocabulary | None:
    """The vocabulary and the names of the file that it lacks, where names are kept anyway; None where it lacks none.

    A file in the layout that is written needs no translation, so that modules which no table has cost nothing.
    """
    if vocabulary.base or match.dialect.flat or match.layout != vocabulary.layout:
        return None
    lacking = [stem for stem in own_stems(lora, component) if stem not in match.targets]
    own = {tail: parts(tail) for stem in lacking for tail in match.dialect.tails(stem)[:1]}
    if not own:
        return None
    namespaces = (*vocabulary.namespaces, Namespace(None, own))
    return replace(vocabulary, namespaces=namespaces, written={**vocabulary.written, **own})


def guessed_families(lora: LoraFile, component: str | None) -> tuple[Family, ...]:
    """The families whose names explain the most of a LoRA's modules, all that tie."""
    own = set(own_stems(lora, component))
    pattern = re.compile(rf"^{re.escape(component or 'transformer')}\.")
    modules = [replace(m, stem=pattern.sub("transformer.", m.stem)) for m in lora.modules if m.stem in own]
    return tuple(dict.fromkeys(family for family, _ in guess_families(replace(lora, modules=tuple(modules)))))


def family_named(name: str) -> Family:
    """The family that `--family` names.

    Raises:
        ConvertError: there is none of that name.
    """
    found = next((family for family in FAMILIES if family.name == name), None)
    if found is None:
        raise ConvertError(f"--family {name}: is none of {', '.join(family.name for family in FAMILIES)}")
    return found


def written_names(family: Family, to: Dialect, blocks: int) -> tuple[str, dict[str, Parts]]:
    """The layout in whose names a dialect writes a family's modules, and these names with their parts.

    A layout called after the dialect comes first, with what it lacks from the dialect's usual one: ComfyUI's layout
    of FLUX.1 holds only the norms, which it calls otherwise. A family without either is written in diffusers' names.
    """
    layouts = [layout for name in (to.name, to.layout) for layout in family.layouts if layout.name == name]
    layouts = list(dict.fromkeys(layouts)) or [family.layouts[0]]
    found: dict[str, Parts] = {}
    for layout in layouts:
        covered = {part for its in found.values() for part in its.names}
        found |= {m: its for m, its in layout.expand(blocks).items() if covered.isdisjoint(its.names)}
    return _chief(layouts).name, found


def _chief(layouts: Sequence[Layout]) -> Layout:
    """The one that has the most modules."""
    return max(layouts, key=lambda layout: len(layout.modules))


def own_stems(lora: LoraFile, component: str | None) -> tuple[str, ...]:
    """The stems of the modules that may be the transformer's."""
    stems = dict.fromkeys(module.stem for module in lora.modules)
    return tuple(stem for stem in stems if owner_of(stem, lora, component) is None)
