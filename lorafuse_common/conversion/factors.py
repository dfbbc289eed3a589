"""The factors of a module that is written, from rows of the factors of those that were read.

    rows a of B @ A                      = B[a] @ A
    [B1 @ A1; B2 @ A2]                   = [[B1, 0], [0, B2]] @ [A1; A2], and [B1; B2] @ A where A1 = A2 = A
    [(P1 @ Q1) * (R1 @ S1); (P2 ...)]    likewise, each product of LoHa for itself

What is not changed is not read: it stays a reference to the bytes of the file it came from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

from lorafuse_common.algebras import Shape
from lorafuse_common.lora import LoraModule, is_zero_product
from lorafuse_common.tensorfile import FLOAT_DTYPES, TensorRef, read_bytes, read_tensor

from .rows import CORES, PAIRS, ROWS

if TYPE_CHECKING:
    import torch

_SCALED = ("up", "hada_w1_a", "lokr_w1", "up_bias", "diff")
"""The first of these that a module has is multiplied where its delta is."""
_COLUMNS = ("hada_w1_a", "hada_w2_a")
"""With a core, these are `(r, out)`."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that is written."""

    dtype: str
    shape: Shape
    data: TensorRef | bytes | bytearray
    """Its bytes, or where they are."""

    @property
    def is_zero(self) -> bool:
        """Whether every byte of it is zero; reads it."""
        return not (read_bytes(self.data) if isinstance(self.data, TensorRef) else self.data).strip(b"\0")


class Slice(NamedTuple):
    """Rows of a module that is written."""

    module: LoraModule | None
    """Whose rows they are; None for rows that nothing changes."""
    first: int
    """The first of them in `module`."""
    rows: int
    total: int
    """All rows of `module`."""
    factor: float
    """What their delta is multiplied with."""


def renamed(module: LoraModule, factor: float) -> dict[str, Stored]:
    """A module's factors (role -> tensor) as they are, one of them multiplied where `factor` is not 1."""
    found = {role: Stored(ref.dtype, ref.shape, ref) for role, ref in module.factors.items()}
    role = next((role for role in _SCALED if role in found), None)
    if factor != 1 and role:
        found[role] = stored(scaled(read_tensor(module.factors[role]), factor))
    return found


def joined(slices: Sequence[Slice], *, keeps: bool = False) -> dict[str, Stored] | None:
    """The factors (role -> tensor) of a weight's rows, put one below the other.

    Where modules are cut, ranks that the part does not use are left out; None where that is all of them, though the
    modules that were cut have a delta elsewhere, unless `keeps`.
    """
    module = next(s.module for s in slices if s.module)
    is_cut = _is_cut(slices)
    found: dict[str, Stored] = {}
    if module.factors.keys() & set(CORES):
        found = _cut_with_core(slices, module)
    else:
        for first, second in PAIRS:
            if first in module.factors:
                found |= _low_rank(slices, first, second, trims=is_cut)
    found |= {role: _stacked(slices, [role], is_whole=False) for role in ROWS if role in module.factors}
    if is_cut and not keeps and is_zero_product({role: value.is_zero for role, value in found.items()}):
        return found if "set_weight" in found or _is_untrained(slices) else None
    return found


def joined_rows(slices: Sequence[Slice], *, is_whole: bool) -> Stored | None:
    """The rows of a bias, put one below the other; None for those of cut modules that have a delta only elsewhere."""
    found = _stacked(slices, ROWS, is_whole=is_whole)
    if is_whole or not _is_cut(slices) or not found.is_zero or _is_untrained(slices):
        return found
    return found if any(s.module and "set_weight" in s.module.factors for s in slices) else None


def _is_cut(slices: Sequence[Slice]) -> bool:
    """Whether some module is there with a part of its rows."""
    there = Counter[int]()
    for s in slices:
        there[id(s.module)] += s.rows
    return any(s.module and there[id(s.module)] < s.total for s in slices)


def _is_untrained(slices: Sequence[Slice]) -> bool:
    return all(s.module.is_untrained() for s in slices if s.module)


def _stacked(slices: Sequence[Slice], roles: Sequence[str], *, is_whole: bool) -> Stored:
    """Rows of the first factor of `roles` that each module has, one below the other; zero where nothing is changed."""
    import torch

    found: list[torch.Tensor | None] = []
    for s in slices:
        if s.module is None:
            found.append(None)
            continue
        role = next(role for role in roles if role in s.module.factors)
        if is_whole and s.factor == 1:
            ref = s.module.factors[role]
            return Stored(ref.dtype, ref.shape, ref)
        rows = read_tensor(s.module.factors[role])
        rows = rows.flatten() if role == "magnitude" else rows
        rows = rows if is_whole else rows[s.first : s.first + s.rows]
        found.append(scaled(rows, s.factor if role in _SCALED else 1.0))
    like = next(rows for rows in found if rows is not None)
    return stored(
        torch.cat(
            [like.new_zeros(s.rows, *like.shape[1:]) if r is None else r for s, r in zip(slices, found, strict=True)]
        )
    )


def _low_rank(slices: Sequence[Slice], first: str, second: str, *, trims: bool) -> dict[str, Stored]:
    """One product `(rows, r, 1...) @ (r, in, ...)`; with `trims` without the ranks whose columns are all zero."""
    import torch

    keys = [_row_keys(s.module.factors[second]) if s.module else [] for s in slices]
    columns, order = merge_ranks(keys)
    blocks = []
    for s in slices:
        if s.module:
            rows = read_tensor(s.module.factors[first])[s.first : s.first + s.rows]
            blocks.append(scaled(rows, s.factor if first in _SCALED else 1.0))
        else:
            blocks.append(torch.zeros(0))
    live = [block for s, block in zip(slices, blocks, strict=True) if s.module]
    dtype = reduce(torch.promote_types, (block.dtype for block in live))
    whole = torch.zeros(sum(s.rows for s in slices), len(order), dtype=dtype)
    at = 0
    for s, block, its in zip(slices, blocks, columns, strict=True):
        if s.module:
            whole[at : at + s.rows, its] = block.flatten(1).to(dtype)
        at += s.rows
    used = whole.ne(0).any(0)
    if trims and used.any() and not used.all():
        whole, order = whole[:, used], [place for place, keep in zip(order, used.tolist(), strict=True) if keep]
    shape = (*whole.shape, *live[0].shape[2:])
    return {first: stored(whole.reshape(shape)), second: _gathered(slices, second, order)}


def merge_ranks(keys: Sequence[Sequence[Hashable]]) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Where each slice's ranks go among the ranks of the whole, and which slice's rank each of these is.

    `keys` tell the ranks of each slice apart by their rows of A. Slices share a rank whose row they have in common,
    as those do that were cut from one module, where that leaves each slice's ranks in order, so that cutting it
    again gives them back as they were.
    """
    places: dict[Hashable, list[int]] = {}
    columns: list[list[int]] = []
    order: list[tuple[int, int]] = []
    for number, its in enumerate(keys):
        columns.append([])
        last = -1
        for rank, key in enumerate(its):
            at = next((place for place in places.get(key, ()) if place > last), len(order))
            if at == len(order):
                order.append((number, rank))
                places.setdefault(key, []).append(at)
            columns[-1].append(at)
            last = at
    return columns, order


def _row_keys(ref: TensorRef) -> list[Hashable]:
    """What tells the rows of a factor apart: their dtype, shape and bytes."""
    raw = read_bytes(ref)
    size = len(raw) // ref.shape[0]
    return [(ref.dtype, ref.shape[1:], raw[n * size : (n + 1) * size]) for n in range(ref.shape[0])]


def _gathered(slices: Sequence[Slice], role: str, order: Sequence[tuple[int, int]]) -> Stored:
    """The rows of A that `order` names by slice and row; a reference where that is one whole A."""
    import torch

    refs = {number: s.module.factors[role] for number, s in enumerate(slices) if s.module}
    number = order[0][0]
    if [*order] == [(number, rank) for rank in range(refs[number].shape[0])]:
        return Stored(refs[number].dtype, refs[number].shape, refs[number])
    tensors = {number: read_tensor(ref) for number, ref in refs.items()}
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    return stored(torch.stack([tensors[number][rank].to(dtype) for number, rank in order]))


def _cut_with_core(slices: Sequence[Slice], module: LoraModule) -> dict[str, Stored]:
    """Rows of one module that has a core, which all of them need whole."""
    import torch

    found = {role: Stored(ref.dtype, ref.shape, ref) for role, ref in module.factors.items() if role not in ROWS}
    for role in ("up", *_COLUMNS):
        if role in found:
            factor = read_tensor(module.factors[role])
            axis = 1 if role in _COLUMNS else 0
            pieces = [factor.narrow(axis, s.first, s.rows) for s in slices]
            number = slices[0].factor if role in _SCALED else 1.0
            found[role] = stored(scaled(torch.cat(pieces, axis), number))
    return found


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """A factor multiplied in its dtype where that is exact, else in fp32, rounded once."""
    import torch

    if factor == 1:
        return tensor
    product = tensor.double() * factor
    kept = product.to(tensor.dtype)
    if kept.double().equal(product) or tensor.dtype == torch.float64:
        return kept
    return product.float()


def stored(tensor: torch.Tensor) -> Stored:
    """A tensor's bytes and what they are."""
    import torch

    raw = bytearray(tensor.numel() * tensor.element_size())
    if raw:
        torch.frombuffer(raw, dtype=tensor.dtype).copy_(tensor.reshape(-1))
    names = {name: dtype for dtype, name in FLOAT_DTYPES.items()}
    return Stored(names[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), raw)


def reshaped(value: Stored, shape: Shape) -> Stored:
    """The same bytes read as another shape."""
    return replace(value, shape=shape)
