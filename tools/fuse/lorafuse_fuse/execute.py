"""Carrying out a plan on weight files: one sequential pass that copies untouched bytes and edits the rest."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorafuse_common.algebras import Block
from lorafuse_common.errors import CheckpointError
from lorafuse_common.lora import is_zero_product
from lorafuse_common.manifest import TensorChange
from lorafuse_common.tensorfile import TensorFile, TensorRef, encode_header, read_rows, read_tensor

from .blocks import COPY_BLOCK_BYTES, EDIT_BLOCK_ELEMENTS
from .codec import Codec, Gathered, codec_of, largest_magnitudes, rescaled, scale_bytes
from .fit import ProblemKind
from .plan import ComponentPlan, FusePlan, Patch, Problem
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
    trained = {lora.request.label: False for lora in plan.loras if lora.applied}
    modules = {(patch.lora, patch.module.stem, patch.module.parameter): patch for patch in plan.patches}
    for patch in modules.values():
        factors = {role: read_tensor(ref) for role, ref in patch.module.factors.items()}
        if not all(bool(torch.isfinite(factor).all()) for factor in factors.values()):
            problems.append(
                Problem(ProblemKind.NOT_FINITE, patch.lora, patch.module.stem, "holds NaN or Inf; the file is damaged")
            )
        trained[patch.lora] |= not is_zero_product({role: not factor.any() for role, factor in factors.items()})
    for name, is_trained in trained.items():
        if not is_trained:
            detail = "all its deltas are zero: it was never trained"
            problems.append(Problem(ProblemKind.NO_EFFECT, name, name, detail))
    return tuple(problems)


def write_fused(
    plan: ComponentPlan, source: TensorFile, metadata: Mapping[str, str], out: Path, progress: Progress
) -> Written:
    """Write a copy of `source`, a file of the plan's base, to `out` with its patches added; both are hashed on the way.

    Raises:
        CheckpointError: the source ended early, or a fused value is not finite.
    """
    header = encode_header(source, metadata, plan.widened)
    owners = {plan.scales[name].ref.name: name for name in plan.patches if name in plan.scales}
    codecs: dict[str, Codec] = {}  # of the fp8 weights among them: the scale and the weight ask for the same one

    def requantised(name: str) -> Codec:
        if name not in codecs:
            codecs[name] = _requantised(plan, plan.base.tensors[name])
        return codecs[name]

    size, changes = len(header), []
    with Stream(source.path, out, progress) as stream, _one_thread():
        stream.replace(source.data_start, header)
        for ref in source.tensors.values():
            size += math.prod(plan.widened.get(ref.name, ref.shape)) * ref.nbytes // max(ref.numel, 1)
            if ref.name in plan.patches:
                codec = requantised(ref.name) if ref.name in plan.scales else None
                changes.append(_edit(stream, plan, ref, codec))
            elif ref.name in owners:
                stream.replace(ref.nbytes, scale_bytes(requantised(owners[ref.name])))
            else:
                _copy(stream, ref)
    return Written(stream.source_hash.hexdigest(), stream.output_hash.hexdigest(), size, tuple(changes))


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
        stream.write(piece, piece.data)
        left -= len(piece.data)


def _edit(stream: Stream, plan: ComponentPlan, ref: TensorRef, codec: Codec | None) -> TensorChange:
    """`W' = round(W + sum_i D_i(W))`, deltas summed in fp32 (fp64 for fp64 weights), by blocks of rows.

    `codec` is how the result is stored, where that is not as the weight was.
    """
    editor = _Editor(plan, ref)
    is_wider = editor.columns != editor.codec.columns
    out = codec or replace(editor.codec, columns=editor.columns)
    figures = _Figures()
    for start in range(0, editor.rows, editor.step):
        stop = min(editor.rows, start + editor.step)
        piece = stream.read((stop - start) * ref.nbytes // editor.rows)
        before, delta, exact = editor.block(editor.codec.view(piece.data), start)
        torch.add(before, delta, out=exact)
        piece.hashed.result()
        data = memoryview(bytearray(exact.numel() * out.dtype.itemsize)) if is_wider else piece.data
        stored = out.view(data)
        out.encode(exact, stored, start)
        figures.add(before, delta, exact, out.decode(stored, start))
        stream.write(piece, data)
    return figures.change(ref, plan.base.component)


def _requantised(plan: ComponentPlan, ref: TensorRef) -> Codec:
    """The codec of an edited fp8 weight; its scales must be known before its first row is written.

    So the arithmetic runs twice, in blocks: once for the largest magnitudes, once for the values.
    """
    editor = _Editor(plan, ref)
    largest = torch.zeros(plan.scales[ref.name].ref.shape)
    for start in range(0, editor.rows, editor.step):
        stop = min(editor.rows, start + editor.step)
        before, delta, exact = editor.block(editor.codec.view(read_rows(ref, start, stop)), start)
        largest_magnitudes(editor.codec, torch.add(before, delta, out=exact), start, largest)
    return rescaled(editor.codec, largest)


class _Editor:
    """One tensor and what is added to it; scratch is allocated once."""

    def __init__(self, plan: ComponentPlan, ref: TensorRef) -> None:
        self.codec = codec_of(ref, plan.scales)
        self.rows = ref.shape[0] if ref.shape else 1
        self.columns = math.prod(plan.widened.get(ref.name, ref.shape)[1:])
        self.step = min(self.rows, max(1, EDIT_BLOCK_ELEMENTS // self.columns))
        work = self.codec.work
        self._scratch = torch.empty(3, self.step, self.columns, dtype=work)
        self._patches = []
        for patch in plan.patches[ref.name]:
            factors = {role: read_tensor(factor).to(work) for role, factor in patch.module.factors.items()}
            weight = Gathered(patch, plan.scales, work)
            self._patches.append((patch, patch.algebra.prepare(factors, weight, patch.scale, patch.module.alpha)))

    def block(self, stored: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows as they are, what is added to them, and room for the sum; all valid until the next block."""
        before, delta, room = self._scratch[:, : len(stored)]
        before[:, self.codec.columns :] = 0
        before[:, : self.codec.columns] = self.codec.decode(stored, start)
        delta.zero_()
        for patch, factors in self._patches:
            columns = math.prod(patch.shape[1:])  # fewer than the tensor's, where another LoRA widens it
            _add_rows(patch, factors, start, before[:, :columns], delta[:, :columns])
        return before, delta, room


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


class _Figures:
    """What editing did to one tensor, summed over its blocks."""

    def __init__(self) -> None:
        self._weight = self._delta = self._error = self._kept = 0.0

    def add(self, before: torch.Tensor, delta: torch.Tensor, exact: torch.Tensor, after: torch.Tensor) -> None:
        """Count a block; `before` and `exact` are used up."""
        self._weight += _dot(before, before)
        self._delta += _dot(delta, delta)
        arrived = before.neg_().add_(after)  # E = after - before
        self._kept += _dot(arrived, delta)
        lost = exact.sub_(after)
        self._error += _dot(lost, lost)

    def change(self, ref: TensorRef, component: str | None) -> TensorChange:
        """The figures of the whole tensor, to 4 digits; a value that is not finite is an error."""
        if not all(map(math.isfinite, (self._weight, self._delta, self._error, self._kept))):
            raise CheckpointError(
                f"{ref.file}: {ref.name}: the fused values are not finite: the base holds NaN or Inf, "
                f"or the sum exceeds what {ref.dtype} can hold. Check the base, or lower the strengths."
            )
        # A module that was never trained has no delta, and loses nothing of it.
        loss, gain = ((self._error / self._delta) ** 0.5, self._kept / self._delta) if self._delta else (0.0, 1.0)
        figures = ((self._weight / ref.numel) ** 0.5, (self._delta / ref.numel) ** 0.5, loss, gain)
        return TensorChange(ref.name, component, *(float(f"{figure:.4g}") for figure in figures))


def _dot(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))


def free_bytes(folder: Path) -> int:
    """Free space where `folder` lies or will lie."""
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
