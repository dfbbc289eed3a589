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
    optional: Mapping[str, str]
    """Parts that this base lacks and other versions of its family have -> why that is harmless."""


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
    optional = _lacking(base, blocks, places["weight"])
    joined = _joined(places["weight"])
    own_name = base.layout.name if base.layout else None
    missed = {m: its for m, its in table.items() if m not in own and any(part in optional for part in its.names)}
    is_split = own_name in (None, "diffusers")
    namespaces = [Namespace(own_name, (joined if is_split else {}) | missed | own)]
    for layout in base.family.layouts if base.family else ():
        if base.layout and layout is not base.layout:
            expanded = layout.expand(blocks).items()
            known = places["weight"].keys() | optional.keys()
            found = {m: its for m, its in expanded if not known.isdisjoint(its.names)}
            namespaces.append(Namespace(layout.name, (joined if layout.name == "diffusers" else {}) | found))
    return Atlas(places, tuple(namespaces), optional)


def _lacking(base: Checkpoint, blocks: int, places: Mapping[str, Place]) -> dict[str, str]:
    """The optional parts of the base's family that it lacks, with the reason why that is harmless."""
    templates = base.family.optional if base.family else {}
    named = {t.replace("{}", str(n)): reason for t, reason in templates.items() for n in range(blocks)}
    return {part: reason for part, reason in named.items() if part not in places}


_JOINED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""The modules that diffusers' `fuse_projections` joins others to; no checkpoint has them, some LoRAs do."""


def _joined(places: Mapping[str, Place]) -> dict[str, Parts]:
    found = {}
    for joined, names in _JOINED.items():
        for first in places:
            attention, dot, name = first.rpartition(".")
            members = tuple(f"{attention}{dot}{member}" for member in names)
            if name == names[0] and all(member in places for member in members):
                rows = tuple(places[member].rows for member in members)  # fewer key than query heads in some models
                found[f"{attention}{dot}{joined}"] = Parts(members, rows)
    return found


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
