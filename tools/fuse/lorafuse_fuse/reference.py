"""What a fused tensor should be: base and deltas in float64, a whole module at a time, by formulas of its own.

`verify` measures a fused checkpoint against this, so nothing here is shared with what wrote it (`edit`, `codec`):
no blocks of rows, no fp32, no scratch memory. Only the plan, which says what goes where, is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from lorafuse_common.algebras import Block, Shape
from lorafuse_common.quantised import FP8_DTYPES, Fp8Scale
from lorafuse_common.tensorfile import FLOAT_DTYPES, TensorRef, read_rows, read_tensor

from .plan import ComponentPlan, Patch

Factors = Mapping[str, torch.Tensor]


class Delta(NamedTuple):
    """What is added to one tensor, `(rows, columns)`."""

    values: torch.Tensor
    reach: torch.Tensor
    """For each row, `(rows, 1)`, the size of the numbers that went into it: what fp32 errors are relative to."""


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for the safetensors spelling of one that can be edited."""
    found: torch.dtype = getattr(torch, (FLOAT_DTYPES | FP8_DTYPES)[name])  # type: ignore[operator]
    return found


def matrix(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a tensor, its kernel flattened."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


def scale_index(scale: Fp8Scale, start: int, stop: int, columns: int) -> torch.Tensor:
    """Which element of a flattened scale each element of rows `start` to `stop` is multiplied with."""
    across = scale.ref.shape[1] if len(scale.ref.shape) > 1 else 1
    rows = torch.arange(start, stop) // scale.block_rows
    return rows[:, None] * across + torch.arange(columns) // scale.block_columns


def stored_rows(ref: TensorRef, start: int, stop: int, scale: Fp8Scale | None) -> torch.Tensor:
    """Rows of a tensor as the numbers that they stand for."""
    columns = matrix(ref.shape)[1]
    raw = torch.frombuffer(read_rows(ref, start, stop), dtype=torch_dtype(ref.dtype))
    numbers = raw.double().view(-1, columns)
    if scale:
        numbers *= read_tensor(scale.ref).double().flatten()[scale_index(scale, start, stop, columns)]
    return numbers


def delta_of(plan: ComponentPlan, ref: TensorRef) -> Delta:
    """The sum of what all LoRAs add to one tensor, of the shape that it has in the fused checkpoint."""
    rows, columns = matrix(plan.stored_as(ref).shape)
    patches = plan.patches[ref.name]
    if len(patches) == 1 and matrix(patches[0].shape) == (rows, columns) and patches[0].runs[0].rows == rows:
        return _module_delta(patches[0], plan.scales)  # the commonest case, in half the memory
    total = Delta(torch.zeros(rows, columns, dtype=torch.float64), torch.zeros(rows, 1, dtype=torch.float64))
    for patch in patches:
        whole = _module_delta(patch, plan.scales)
        for run in patch.runs:
            here, there = slice(run.first, run.first + run.rows), slice(run.delta_first, run.delta_first + run.rows)
            total.values[here, : whole.values.shape[1]] += whole.values[there]
            total.reach[here] += whole.reach[there]
    return total


def _module_delta(patch: Patch, scales: Mapping[str, Fp8Scale]) -> Delta:
    """The delta of a module's whole weight, which the base may keep in several tensors."""
    factors = {role: read_tensor(ref).double() for role, ref in patch.module.factors.items()}
    formula = _FORMULAS.get(frozenset(factors))
    if formula is not None:
        values = formula(factors).reshape(matrix(patch.shape)).mul_(patch.strength * patch.scale)
        return Delta(values, _row_peaks(values))
    weight = _Whole(_gathered(patch, scales), patch.shape)
    prepared = patch.algebra.prepare(factors, weight, patch.scale, patch.module.alpha)
    values = torch.zeros_like(weight.values)
    block = Block(0, len(values), weight.values, values)
    patch.algebra.add_delta(prepared, block, patch.scale, patch.strength)
    return Delta(values, _row_peaks(values) + _row_peaks(weight.values))


def _row_peaks(values: torch.Tensor) -> torch.Tensor:
    peaks: torch.Tensor = torch.linalg.vector_norm(values, math.inf, dim=1, keepdim=True)
    return peaks


def _lora(factors: Factors) -> torch.Tensor:
    return factors["up"].flatten(1) @ factors["down"].flatten(1)


def _loha(factors: Factors) -> torch.Tensor:
    first, second = (factors[f"hada_w{side}_a"] @ factors[f"hada_w{side}_b"] for side in "12")
    return first * second


def _lokr(factors: Factors) -> torch.Tensor:
    left = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
    right = factors["lokr_w2"] if "lokr_w2" in factors else factors["lokr_w2_a"] @ factors["lokr_w2_b"].flatten(1)
    product: torch.Tensor = torch.kron(left, right.flatten(1))  # a kernel's elements stay beside each other
    return product


_FORMULAS: Mapping[frozenset[str], Callable[[Factors], torch.Tensor]] = {
    frozenset({"down", "up"}): _lora,
    frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}): _loha,
    **{
        frozenset({*left, *right}): _lokr
        for left in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for right in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    },
    frozenset({"diff"}): lambda factors: factors["diff"],
    frozenset({"up_bias", "down"}): lambda factors: factors["up_bias"],
}
"""Roles -> the delta before it is scaled. Rarer rules, and those that read the weight, are carried out by their own
`prepare` and `add_delta`, in float64 and in one block."""


class _Whole(NamedTuple):
    """A weight in memory, as `prepare` sees it."""

    values: torch.Tensor
    shape: Shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """A copy, which rules may change."""
        return self.values[start:stop].clone()


def _gathered(patch: Patch, scales: Mapping[str, Fp8Scale]) -> torch.Tensor:
    """The base's weight in the order of the module's rows; columns that the base lacks are zero."""
    values = torch.zeros(matrix(patch.shape), dtype=torch.float64)
    for run in patch.everywhere:
        its = stored_rows(run.weight, run.first, run.first + run.rows, scales.get(run.weight.name))
        values[run.delta_first : run.delta_first + run.rows, : its.shape[1]] = its
    return values
