"""The arithmetic on one tensor: `W' = round(W + sum_i D_i(W))`, by blocks of rows, in any order of blocks."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from lorafuse_common.algebras import Block
from lorafuse_common.errors import CheckpointError
from lorafuse_common.manifest import TensorChange
from lorafuse_common.tensorfile import TensorRef, read_rows, read_tensor

from . import blocks
from .codec import Codec, Gathered, codec_of, largest_magnitudes, noise_for, rescaled, torch_dtype
from .plan import ComponentPlan, Patch

_thread = threading.local()


class Editor:
    """One tensor, what is added to it, and what that did to it; several workers may edit its pieces at once.

    Deltas are summed in fp32 (fp64 for fp64 weights) and rounded once.
    """

    def __init__(self, plan: ComponentPlan, ref: TensorRef, device: torch.device) -> None:
        self.ref, self._seed, self._component, self._device = ref, plan.seed, plan.base.component, device
        self._loras = plan.loras
        self._stored = codec_of(ref, plan.scales).on(device)
        self._rows = ref.shape[0] if ref.shape else 1
        stored = plan.stored_as(ref)
        self._out = replace(self._stored, dtype=torch_dtype(stored.dtype), columns=math.prod(stored.shape[1:]))
        self._step = block_rows(self._rows, self._out.columns)
        if device.type != "cpu":  # a piece at once: many small blocks would wait for their launch
            self._step = max(self._step, blocks.PIECE_BYTES // max(1, ref.nbytes // self._rows))
        self._sums: dict[int, tuple[float, ...]] = {}
        self._left, self._counting = self._rows, threading.Lock()
        work = self._stored.work
        self._patches: dict[int, list[tuple[Patch, Mapping[str, torch.Tensor]]]] = {}
        for patch in plan.patches[ref.name]:
            factors = {role: read_tensor(factor).to(work) for role, factor in patch.module.factors.items()}
            weight = Gathered(patch, plan.scales, work)
            prepared = patch.algebra.prepare(factors, weight, patch.scale, patch.module.alpha)
            ready = {role: factor.to(device) for role, factor in prepared.items()}
            self._patches.setdefault(patch.place, []).append((patch, ready))
        self._changed_by = tuple(self._patches)
        if ref.name in plan.scales:
            self._out = self._requantised()

    @property
    def out(self) -> Codec:
        """How the result is stored."""
        return self._out

    def change(self, data: memoryview, start: int) -> memoryview:
        """Edit rows from row `start` on: in place where they are stored as before, else into new bytes."""
        before = self._stored.view(data)
        grows = (self._out.dtype, self._out.columns) != (self._stored.dtype, self._stored.columns)
        made = memoryview(bytearray(len(before) * self._out.columns * self._out.dtype.itemsize)) if grows else data
        after = self._out.view(made)
        for at in range(0, len(before), self._step):
            here = slice(at, at + self._step)
            self._change_block(before[here], after[here], start + at)
        with self._counting:
            self._left -= len(before)
            if not self._left:
                self._patches = {}  # the figures of all tensors are kept to the end, their factors must not be
        return made

    def _change_block(self, stored: torch.Tensor, after: torch.Tensor, start: int) -> None:
        room, each = self._summed(stored, start)
        exact = room[2]
        rounded = self._out.encode(exact, after, start, noise_for(self._seed, self.ref.name, start))
        exact.sub_(self._out.decode(rounded, start))  # what rounding takes away
        weight, delta, lost = room.flatten(1)
        pairs = (weight, weight), (delta, delta), (lost, lost), (delta, lost)
        self._sums[start] = tuple(torch.stack([*(torch.dot(*pair) for pair in pairs), *each]).tolist())

    def _summed(self, stored: torch.Tensor, start: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Rows as they are, what is added to them, and the sum, (3, rows, columns), valid until the next block; and
        for each of several LoRAs the sum of the squares of what it adds."""
        room = _scratch(len(stored), self._out.columns, self._stored.work, self._device)
        before, delta, exact = room
        numbers = self._stored.decode(stored.to(self._device), start)
        if self._out.columns == self._stored.columns:
            before.copy_(numbers)
        else:
            before[:, : self._stored.columns] = numbers
            before[:, self._stored.columns :] = 0
        delta.zero_()
        each = []
        for patches in self._patches.values():
            alone = delta if len(self._patches) == 1 else exact.zero_()
            for patch, factors in patches:
                columns = math.prod(patch.shape[1:])  # fewer than the tensor's, where another LoRA widens it
                _add_rows(patch, factors, start, before[:, :columns], alone[:, :columns])
            if alone is exact:
                each.append(torch.dot(alone.flatten(), alone.flatten()))
                delta.add_(alone)
        torch.add(before, delta, out=exact)
        return room, each

    def _requantised(self) -> Codec:
        """The codec of an edited fp8 weight; its scales must be known before its first row is written.

        So the arithmetic runs twice, in blocks: once for the largest magnitudes, once for the values.
        """
        assert self._stored.scale is not None
        largest = torch.zeros(self._stored.scale.ref.shape, device=self._device)
        for start in range(0, self._rows, self._step):
            stop = min(self._rows, start + self._step)
            stored = self._stored.view(read_rows(self.ref, start, stop))
            largest_magnitudes(self._stored, self._summed(stored, start)[0][2], start, largest)
        return rescaled(self._stored, largest)

    def figures(self) -> TensorChange:
        """What editing did to the whole tensor, to 4 digits.

        Raises:
            CheckpointError: a value is not finite.
        """
        ordered = [self._sums[start] for start in sorted(self._sums)]
        weight, delta, error, missing, *each = (math.fsum(column) for column in zip(*ordered, strict=True))
        if not all(map(math.isfinite, (weight, delta, error, missing, *each))):
            raise CheckpointError(
                f"{self.ref.file}: {self.ref.name}: the fused values are not finite: the base holds NaN or Inf, "
                f"or the sum exceeds what {self.ref.dtype} can hold. Check the base, or lower the strengths."
            )
        # A module that was never trained has no delta, and loses nothing of it.
        loss, gain = ((error / delta) ** 0.5, 1 - missing / delta) if delta else (0.0, 1.0)
        rms, delta_rms, *deltas = ((square / self.ref.numel) ** 0.5 for square in (weight, delta, *each))
        by_lora = dict(zip(self._changed_by, deltas or [delta_rms], strict=True))
        alone = tuple(_digits(by_lora.get(place, 0.0)) for place in range(self._loras)) if self._loras > 1 else ()
        rms, delta_rms, loss, gain = map(_digits, (rms, delta_rms, loss, gain))
        return TensorChange(self.ref.name, self._component, rms, delta_rms, loss, gain, alone)


def _digits(figure: float) -> float:
    return float(f"{figure:.4g}")


def block_rows(rows: int, columns: int) -> int:
    """How many of a tensor's rows are computed on at a time."""
    return min(rows, max(1, blocks.EDIT_BLOCK_ELEMENTS // columns))


def piece_rows(ref: TensorRef, columns: int) -> Iterator[tuple[int, int]]:
    """The first row of each piece that a tensor is edited in and one past its last: whole blocks of rows."""
    rows = ref.shape[0] if ref.shape else 1
    step = block_rows(rows, columns)
    step *= max(1, blocks.PIECE_BYTES // (step * max(1, ref.nbytes // rows)))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


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


def _scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Three blocks of memory that the thread keeps, (3, rows, columns)."""
    room: torch.Tensor | None = getattr(_thread, "room", None)
    needed = 3 * rows * columns
    if room is None or (room.dtype, room.device) != (dtype, device) or room.numel() < needed:
        torch.set_num_threads(1)  # blocks are too small to share out: waiting threads cost more than the arithmetic
        room = _thread.room = torch.empty(needed, dtype=dtype, device=device)
    return room[:needed].view(3, rows, columns)
