"""Carrying out a plan on weight files: one sequential pass that copies untouched bytes and edits the rest."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafuse_common.algebras import Block
from lorafuse_common.errors import CheckpointError
from lorafuse_common.manifest import TensorChange
from lorafuse_common.tensorfile import FLOAT_DTYPES, TensorFile, TensorRef, encode_header, read_tensor

from .blocks import COPY_BLOCK_BYTES, EDIT_BLOCK_ELEMENTS
from .plan import FusePlan, Patch, Problem, ProblemKind
from .stream import Stream

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
    trained = dict.fromkeys((str(lora.request.path) for lora in plan.loras if lora.applied), False)
    modules = {
        (patch.lora, patch.module.stem, patch.module.parameter): patch
        for patches in plan.patches.values()
        for patch in patches
    }
    for patch in modules.values():
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
    header = encode_header(source, metadata)
    with Stream(source.path, out, progress) as stream, _one_thread():
        stream.replace(source.data_start, header)
        changes = []
        for ref in source.tensors.values():
            if ref.name in patches:
                changes.append(_edit(stream, ref, patches[ref.name]))
            else:
                _copy(stream, ref)
    written = source.size - source.data_start + len(header)
    return Written(stream.source_hash.hexdigest(), stream.output_hash.hexdigest(), written, tuple(changes))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Blocks are too small to share out: on a busy machine waiting threads cost several times the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _copy(stream: Stream, ref: TensorRef) -> None:
    left = ref.nbytes
    while left:
        piece = stream.read(min(left, COPY_BLOCK_BYTES))
        stream.write(piece)
        left -= len(piece.data)


def _edit(stream: Stream, ref: TensorRef, patches: Sequence[Patch]) -> TensorChange:
    """`W' = round(W + sum_i D_i(W))`, deltas summed in fp32 (fp64 for fp64 weights), by blocks of rows."""
    dtype: torch.dtype = getattr(torch, FLOAT_DTYPES[ref.dtype])
    work = torch.float64 if dtype is torch.float64 else torch.float32
    factors = [{role: read_tensor(f).to(work) for role, f in patch.module.factors.items()} for patch in patches]
    rows, columns = ref.shape[0], ref.numel // ref.shape[0]
    step = min(rows, max(1, EDIT_BLOCK_ELEMENTS // columns))
    adder = _Adder(step, columns, work)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        piece = stream.read((stop - start) * ref.nbytes // rows)
        weight = torch.frombuffer(piece.data, dtype=dtype).view(stop - start, columns)
        before, delta = adder.load(weight)
        for patch, tensors in zip(patches, factors, strict=True):
            _add_rows(patch, tensors, start, before, delta)
        piece.hashed.result()
        adder.store(weight)
        stream.write(piece)
    return adder.change(ref)


def _add_rows(
    patch: Patch, factors: Mapping[str, torch.Tensor], start: int, weight: torch.Tensor, delta: torch.Tensor
) -> None:
    """Add to `delta` what a patch has for its rows; `weight` and `delta` begin at row `start` of the tensor."""
    for run in patch.runs:
        first, last = max(start, run.first), min(start + len(delta), run.first + run.rows)
        if first < last:
            here, shift = slice(first - start, last - start), run.delta_first - run.first
            block = Block(first + shift, last + shift, weight[here], delta[here])
            patch.algebra.add_delta(factors, block, patch.scale, patch.strength)


class _Adder:
    """Adds deltas to blocks of a weight in place, and sums what that did to it; its scratch is allocated once."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self._scratch = torch.empty(3, rows, columns, dtype=dtype)
        self._weight = self._delta = self._error = self._kept = 0.0

    def load(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The block as it is, and zeros to sum its deltas in; both valid until the next block."""
        before, delta, _ = self._scratch[:, : len(weight)]
        return before.copy_(weight), delta.zero_()

    def store(self, weight: torch.Tensor) -> None:
        """`weight += delta`, rounded once to the weight's dtype."""
        before, delta, exact = self._scratch[:, : len(weight)]
        torch.add(before, delta, out=exact)
        weight.copy_(exact)
        self._weight += _dot(before, before)
        self._delta += _dot(delta, delta)
        arrived = before.neg_().add_(weight)  # E = after - before
        self._kept += _dot(arrived, delta)
        lost = exact.sub_(weight)
        self._error += _dot(lost, lost)

    def change(self, ref: TensorRef) -> TensorChange:
        """The figures of the whole tensor, to 4 digits; a value that is not finite is an error."""
        if not all(map(math.isfinite, (self._weight, self._delta, self._error, self._kept))):
            raise CheckpointError(
                f"{ref.file}: {ref.name}: the fused values are not finite: the base holds NaN or Inf, "
                f"or the sum exceeds what {ref.dtype} can hold. Check the base, or lower the strengths."
            )
        # A module that was never trained has no delta, and loses nothing of it.
        loss, gain = ((self._error / self._delta) ** 0.5, self._kept / self._delta) if self._delta else (0.0, 1.0)
        figures = ((self._weight / ref.numel) ** 0.5, (self._delta / ref.numel) ** 0.5, loss, gain)
        return TensorChange(ref.name, *(float(f"{figure:.4g}") for figure in figures))


def _dot(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))


def free_bytes(folder: Path) -> int:
    """Free space where `folder` lies or will lie."""
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
