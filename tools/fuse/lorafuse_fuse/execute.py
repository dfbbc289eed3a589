"""Carrying out a plan on weight files: one sequential pass that copies untouched bytes and edits the rest."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from lorafuse_common.errors import CheckpointError
from lorafuse_common.manifest import TensorChange
from lorafuse_common.tensorfile import FLOAT_DTYPES, TensorFile, TensorRef, encode_header, read_tensor

from .blocks import COPY_BLOCK_BYTES, EDIT_BLOCK_ELEMENTS
from .plan import FusePlan, Patch, Problem, ProblemKind

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Written:
    """What one pass over a weight file found and made."""

    source_sha256: str
    output_sha256: str
    output_size: int
    changes: tuple[TensorChange, ...]


def check_factors(plan: FusePlan) -> tuple[Problem, ...]:
    """Read every factor once, before anything is written: NaN, Inf, and LoRAs that were never trained."""
    problems = []
    trained = dict.fromkeys((lora.request.path.name for lora in plan.loras if lora.applied), False)
    for patch in (patch for patches in plan.patches.values() for patch in patches):
        factors = [read_tensor(ref) for ref in patch.module.factors.values()]
        if not all(bool(torch.isfinite(factor).all()) for factor in factors):
            problems.append(
                Problem(ProblemKind.NOT_FINITE, patch.lora, patch.module.stem, "holds NaN or Inf; the file is damaged")
            )
        trained[patch.lora] |= all(bool(factor.count_nonzero()) for factor in factors)
    for name, is_trained in trained.items():
        if not is_trained:
            detail = "all its deltas are zero: it was never trained"
            problems.append(Problem(ProblemKind.NO_EFFECT, name, name, detail))
    return tuple(problems)


def write_fused(
    source: TensorFile,
    patches: Mapping[str, Sequence[Patch]],
    metadata: Mapping[str, str],
    out: Path,
    progress: Progress,
) -> Written:
    """Write a copy of `source` to `out` with `patches` added; both sides are hashed on the way.

    Raises:
        CheckpointError: the source ended early, or a fused value is not finite.
    """
    sums = {"source": hashlib.sha256(), "output": hashlib.sha256()}
    changes = []
    with source.path.open("rb", buffering=0) as reading, out.open("xb", buffering=0) as writing:
        sums["source"].update(_read(reading, source.path, source.data_start))
        header = encode_header(source, metadata)
        sums["output"].update(header)
        _write(writing, memoryview(header))

        def emit(data: memoryview) -> None:
            sums["output"].update(data)
            _write(writing, data)
            progress(len(data))

        for ref in source.tensors.values():
            if ref.name in patches:
                changes.append(_edit(reading, ref, patches[ref.name], sums["source"].update, emit))
            else:
                _copy(reading, ref, sums["source"].update, emit)
        size = writing.tell()
    return Written(sums["source"].hexdigest(), sums["output"].hexdigest(), size, tuple(changes))


def _read(file: BinaryIO, path: Path, count: int) -> bytearray:
    data = bytearray(count)
    view, at = memoryview(data), 0
    while at < count:
        got = file.readinto(view[at:])  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(f"{path}: ended early; did it change while it was read?")
        at += got
    return data


def _write(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


Sink = Callable[[memoryview], object]


def _copy(reading: BinaryIO, ref: TensorRef, hash_source: Sink, emit: Sink) -> None:
    left = ref.nbytes
    while left:
        block = memoryview(_read(reading, ref.file, min(left, COPY_BLOCK_BYTES)))
        hash_source(block)
        emit(block)
        left -= len(block)


def _edit(reading: BinaryIO, ref: TensorRef, patches: Sequence[Patch], hash_source: Sink, emit: Sink) -> TensorChange:
    """`W' = round(W + sum_i factor_i * D_i)`, deltas summed in fp32 (fp64 for fp64 weights), by blocks of rows."""
    dtype: torch.dtype = getattr(torch, FLOAT_DTYPES[ref.dtype])
    work = torch.float64 if dtype is torch.float64 else torch.float32
    factors = [{role: read_tensor(f).to(work) for role, f in patch.module.factors.items()} for patch in patches]
    rows, columns = ref.shape[0], ref.numel // ref.shape[0]
    row_bytes = ref.nbytes // rows
    step = max(1, EDIT_BLOCK_ELEMENTS // columns)
    totals = _Totals()
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        data = _read(reading, ref.file, (stop - start) * row_bytes)
        hash_source(memoryview(data))
        block = torch.frombuffer(data, dtype=dtype).view(stop - start, columns)
        delta = torch.zeros(stop - start, columns, dtype=work)
        for patch, tensors in zip(patches, factors, strict=True):
            patch.algebra.delta_rows(tensors, start, stop, delta, patch.factor)
        totals.add(block, delta)
        emit(memoryview(data))
    return totals.change(ref)


class _Totals:
    """Adds deltas to blocks in place and sums what that did to them."""

    def __init__(self) -> None:
        self.weight = self.delta = self.error = self.kept = 0.0

    def add(self, block: torch.Tensor, delta: torch.Tensor) -> None:
        """`block += delta`, rounded once to the block's dtype."""
        before = block.to(delta.dtype, copy=True)
        exact = before + delta
        block.copy_(exact)
        after = block.to(delta.dtype, copy=True)
        self.weight += _dot(before, before)
        self.delta += _dot(delta, delta)
        exact.sub_(after)
        self.error += _dot(exact, exact)
        self.kept += _dot(after.sub_(before), delta)

    def change(self, ref: TensorRef) -> TensorChange:
        """The figures of the whole tensor, to 4 digits; a value that is not finite is an error."""
        if not all(map(math.isfinite, (self.weight, self.delta, self.error, self.kept))):
            raise CheckpointError(
                f"{ref.file}: {ref.name}: the fused values are not finite: the base holds NaN or Inf, "
                f"or the sum exceeds what {ref.dtype} can hold. Check the base, or lower the strengths."
            )
        norm = max(self.delta, 1e-300)
        figures = (
            (self.weight / ref.numel) ** 0.5, (self.delta / ref.numel) ** 0.5,
            (self.error / norm) ** 0.5, self.kept / norm,
        )  # fmt: skip
        return TensorChange(ref.name, *(float(f"{figure:.4g}") for figure in figures))


def _dot(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))


def free_bytes(folder: Path) -> int:
    """Free space where `folder` lies or will lie."""
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
