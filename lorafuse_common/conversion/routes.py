"""Which modules of a LoRA become which modules of another layout: a matter of names and parts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorafuse_common.lora import Target
from lorafuse_common.naming import Parts

Key = tuple[str, str]
"""A stem or a module's name, and `weight` or `bias`."""


class Slot(NamedTuple):
    """One part of a module that is written."""

    part: str
    share: int
    """Of the module's rows, in units that the other slots share."""
    stem: str | None
    """Whose rows they are; None for a part that the LoRA does not change."""
    number: int
    """Which of the parts of `stem` they are."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where the rows of a module that is written come from."""

    slots: tuple[Slot, ...]
    is_whole: bool
    """Whether they are all rows of one module, in its order: then only the name changes."""

    @property
    def stems(self) -> tuple[str, ...]:
        """The modules that it is made of."""
        return tuple(dict.fromkeys(slot.stem for slot in self.slots if slot.stem))

    @property
    def way(self) -> tuple[object, ...]:
        """What two routes of one module that come to the same have in common."""
        return self.stems if self.is_whole else tuple((slot.share, slot.stem, slot.number) for slot in self.slots)


class Routes(NamedTuple):
    """The way of every module."""

    routes: Mapping[Key, Route]
    """Module and parameter, as they are written -> where their rows come from."""
    nameless: Mapping[str, str]
    """Stem -> the part of it that no written module has."""


def find_routes(targets: Mapping[Key, Target], written: Mapping[str, Parts]) -> Routes:
    """Where each module that is read (stem and parameter -> what it is) goes among the modules that are written."""
    by_parts: dict[tuple[str, ...], str] = {}
    owners: dict[str, str] = {}
    for module, its in written.items():
        by_parts.setdefault(its.names, module)
        for part in its.names:
            owners.setdefault(part, module)
    routes: dict[Key, Route] = {}
    nameless: dict[str, str] = {}
    scattered: dict[Key, dict[str, tuple[str, int]]] = {}
    for (stem, parameter), target in targets.items():
        own = written.get(target.module)
        same = target.module if own and own.names == target.parts.names else by_parts.get(target.parts.names)
        if same:
            named = zip(target.parts.names, target.parts.shares, strict=True)
            slots = tuple(Slot(part, share, stem, index) for index, (part, share) in enumerate(named))
            routes[same, parameter] = Route(slots, is_whole=True)
            continue
        for index, part in enumerate(target.parts.names):
            if part in owners:
                scattered.setdefault((owners[part], parameter), {})[part] = (stem, index)
            else:
                nameless[stem] = part
    for (module, parameter), found in scattered.items():
        named = zip(written[module].names, written[module].shares, strict=True)
        slots = tuple(Slot(part, share, *found.get(part, (None, 0))) for part, share in named)
        routes[module, parameter] = Route(slots, is_whole=False)
    return Routes(routes, nameless)


def overlaps(targets: Mapping[Key, Target]) -> Sequence[tuple[Key, Key]]:
    """The modules that change a part which an earlier one changes too: the earlier and the later, in their order."""
    taken: dict[Key, Key] = {}
    found = []
    for key, target in targets.items():
        clash = next((taken[part, key[1]] for part in target.parts.names if (part, key[1]) in taken), None)
        if clash:
            found.append((clash, key))
            continue
        taken |= {(part, key[1]): key for part in target.parts.names}
    return found
