"""What several LoRAs add to each tensor of a base together, as one pair of factors: no dense sum where none is needed.

    D = sum_i strength_i scale_i B_i A_i

Only rules whose delta is the same whatever weights they meet can be added up so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lorafuse_common.algebras import Block
from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.conversion.factors import scaled
from lorafuse_common.lowrank import Approximation, LowRank, Rows, approximated, compressed, concatenated
from lorafuse_common.tensorfile import TensorRef, read_tensor

from .entries import Patch
from .plan import ComponentPlan

_LOW_RANK = ("lora",)
_DENSE = ("loha", "lokr", "diff")
"""Rules that add up as well, but not as factors."""
_VECTORS = ("diff", "lora_bias")
_WHY = {
    "dora": "DoRA scales the merged weight's rows or columns",
    "glora": "GLoRA multiplies the weight",
    "oft": "OFT rotates the weight",
    "boft": "BOFT rotates the weight",
    "replace": "a replacement discards the weight",
}


@dataclass(frozen=True, slots=True)
class Module:
    """A tensor of the base, and which parameter of which module it is."""

    name: str
    """Without the checkpoint's prefix."""
    parameter: str
    """`weight` or `bias`."""
    ref: TensorRef

    @property
    def is_matrix(self) -> bool:
        """Whether a LoRA of rank r can be for it: a weight of a linear or convolution."""
        return self.parameter == "weight" and len(self.ref.shape) >= 2 and self.ref.name.endswith(".weight")


@dataclass(frozen=True, slots=True)
class Sum:
    """What is added to one tensor."""

    module: Module
    pair: LowRank | None
    """Of a matrix, with kernels flattened."""
    vector: torch.Tensor | None
    """Of anything else, in its shape."""
    ranks: int
    """All ranks that went into it; 0 where it was dense."""
    error: float | None
    """What compression took away, relative to the whole; None where nothing was compressed."""


def modules_of(base: Checkpoint) -> dict[str, Module]:
    """Tensor -> the module that it belongs to."""
    found = {ref.name: Module(name, "weight", ref) for name, ref in base.modules.items()}
    return found | {ref.name: Module(name, "bias", ref) for name, ref in base.biases.items()}


def obstacles(plan: ComponentPlan, rank: int | None) -> list[str]:
    """Why some LoRAs cannot be added up, one line for each LoRA and rule; empty where all can."""
    counts: Counter[tuple[str, str]] = Counter()
    modules = modules_of(plan.base)
    for name, patches in plan.patches.items():
        for patch in patches:
            rule = patch.algebra.name
            if rule in _LOW_RANK or (rule in _VECTORS and not modules[name].is_matrix):
                continue
            if rule not in _DENSE or not modules[name].is_matrix or rank is None:
                counts[patch.lora, rule] += 1
    return [f"{lora}: {count} tensors by {rule}: {_why(rule)}" for (lora, rule), count in counts.items()]


def _why(rule: str) -> str:
    if rule in _DENSE:
        return "is no sum of low rank; --rank N takes the best approximation of that rank"
    return f"{_WHY.get(rule, 'its delta is no matrix of its own')}, so what it adds depends on the weights it meets"


def merged(module: Module, patches: Sequence[Patch], rank: int | None) -> Sum:
    """The sum for one tensor; a matrix of more than `rank` ranks is compressed to that many."""
    if not module.is_matrix:
        return Sum(module, None, _vector(module, patches), 0, None)
    shape = (module.ref.shape[0], math.prod(module.ref.shape[1:]))
    low = [patch for patch in patches if patch.algebra.name in _LOW_RANK]
    pair = concatenated([_term(patch, shape[1]) for patch in low], shape[0]) if low else None
    if len(low) == len(patches):
        assert pair, "every module in a plan has a patch"
        if rank is None or pair.rank <= rank:
            return Sum(module, pair, None, pair.rank, None)
        found = compressed(pair, rank)
        return Sum(module, found.matrix, None, pair.rank, found.error)
    assert rank, "dense sums were refused without a rank"
    dense = pair.dense().float() if pair else torch.zeros(shape)
    for patch in patches:
        if patch not in low:
            _add_dense(patch, dense)
    approximation: Approximation = approximated(dense, rank)
    return Sum(module, approximation.matrix, None, 0, approximation.error)


def _term(patch: Patch, columns: int) -> tuple[list[Rows], torch.Tensor]:
    """One LoRA's factors: its scale and strength in B, and zero columns in A where the base is wider."""
    factors = {role: read_tensor(ref) for role, ref in patch.module.factors.items()}
    if "mid" in factors:
        wide = {role: factor.float() for role, factor in factors.items()}
        factors = dict(patch.algebra.prepare(wide, _NoWeight(), patch.scale, patch.module.alpha))
    up, down = scaled(factors["up"].flatten(1), patch.strength * patch.scale), factors["down"].flatten(1)
    if down.shape[1] < columns:
        down = torch.nn.functional.pad(down, (0, columns - down.shape[1]))
    return [Rows(run.first, up[run.delta_first : run.delta_first + run.rows]) for run in patch.runs], down


class _NoWeight:
    """Folding a core reads no weight."""

    shape: tuple[int, ...] = ()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Never called."""
        raise NotImplementedError


def _add_dense(patch: Patch, dense: torch.Tensor) -> None:
    factors: Mapping[str, torch.Tensor] = {role: read_tensor(ref).float() for role, ref in patch.module.factors.items()}
    factors = patch.algebra.prepare(factors, _NoWeight(), patch.scale, patch.module.alpha)
    columns = math.prod(patch.shape[1:])
    for run in patch.runs:
        room = dense[run.first : run.first + run.rows, :columns]
        block = Block(run.delta_first, run.delta_first + run.rows, torch.zeros(0), room)
        patch.algebra.add_delta(factors, block, patch.scale, patch.strength)


def _vector(module: Module, patches: Sequence[Patch]) -> torch.Tensor:
    """Norms, biases and bare parameters, in fp32."""
    rows = module.ref.shape[0] if module.ref.shape else 1
    dense = torch.zeros(rows, math.prod(module.ref.shape[1:]))
    for patch in patches:
        _add_dense(patch, dense)
    return dense.reshape(module.ref.shape)
