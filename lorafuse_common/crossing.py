"""From the rows of a LoRA's module to the rows of a base's weights, where the two use different layouts.

A module's rows are its parts in order (`naming`); so is every weight of the base. Split onto fused, fused onto split
and swapped halves are the same look-up: for each part, where its rows lie in the LoRA's delta and in the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .checkpoint import Checkpoint
from .naming import Parts, parts
from .tensorfile import TensorRef


@dataclass(frozen=True, slots=True)
class Place:
    """Where the base keeps a part."""

    weight: TensorRef
    first: int
    """Its first row in the weight."""
    rows: int


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a delta that go to consecutive rows of one weight."""

    weight: TensorRef
    first: int
    """The first row in the weight."""
    delta_first: int
    """The first row in the delta."""
    rows: int


@dataclass(frozen=True, slots=True)
class Namespace:
    """One way to name what a base holds: its own, or another layout's of its family."""

    layout: str | None
    """None for the names of a base of no known family."""
    modules: Mapping[str, Parts]


@dataclass(frozen=True, slots=True)
class Atlas:
    """Every part of a base, and every way to name them."""

    places: Mapping[str, Mapping[str, Place]]
    """`weight` and `bias` -> part -> where it is."""
    namespaces: tuple[Namespace, ...]
    """The base's own names first."""


def survey(base: Checkpoint) -> Atlas:
    """Find every part in a base, and the names that each layout of its family has for them."""
    blocks = 1 + max((int(n) for name in base.modules for n in re.findall(r"(?<=\.)\d+(?=\.)", name)), default=0)
    table = base.layout.expand(blocks) if base.layout else {}
    own: dict[str, Parts] = {}
    places: dict[str, dict[str, Place]] = {"weight": {}, "bias": {}}
    for parameter, tensors in (("weight", base.modules), ("bias", base.biases)):
        for module, tensor in tensors.items():
            rows = tensor.shape[0] if tensor.shape else 1
            its = table.get(module, parts(module))
            own[module] = its if its.rows(rows) is not None else parts(module)
            for part, first, count in own[module].rows(rows) or ():
                places[parameter][part] = Place(tensor, first, count)
    namespaces = [Namespace(base.layout.name if base.layout else None, own)]
    for layout in base.family.layouts if base.family else ():
        if base.layout and layout is not base.layout:
            expanded = layout.expand(blocks).items()
            found = {m: its for m, its in expanded if any(part in places["weight"] for part in its.names)}
            namespaces.append(Namespace(layout.name, found))
    return Atlas(places, tuple(namespaces))


def target_shape(its: Parts, places: Mapping[str, Place]) -> tuple[int, ...] | None:
    """The shape of the weight or bias that a module would have in the base; None where a part is missing there."""
    found = [places.get(part) for part in its.names]
    present = [place for place in found if place is not None]
    if len(present) < len(found) or len({place.weight.shape[1:] for place in present}) != 1:
        return None
    return (sum(place.rows for place in present), *present[0].weight.shape[1:])


def runs_of(its: Parts, rows: int, places: Mapping[str, Place]) -> tuple[Run, ...] | None:
    """Where the `rows` rows of a module's delta go; None where the parts have other sizes in the base."""
    divided = its.rows(rows)
    runs: list[Run] = []
    for part, delta_first, count in divided or ():
        place = places[part]
        if place.rows != count:
            return None
        last = runs[-1] if runs else None
        if last and last.weight is place.weight and last.first + last.rows == place.first:
            runs[-1] = Run(last.weight, last.first, last.delta_first, last.rows + count)
        else:
            runs.append(Run(place.weight, place.first, delta_first, count))
    return tuple(runs) or None
