"""Between the bytes of a weight and the fp32 numbers that are computed with: bf16, fp16, fp32, fp64 and fp8."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lorafuse_common.algebras import Shape
from lorafuse_common.quantised import FP8_DTYPES, Fp8Scale
from lorafuse_common.tensorfile import FLOAT_DTYPES, TensorRef, read_rows, read_tensor

from .plan import Patch

_LOST_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float8_e4m3fn: 20, torch.float8_e5m2: 21}
"""The bits of an fp32 mantissa that a dtype has no room for."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How the elements of one weight are stored."""

    dtype: torch.dtype
    columns: int
    """Elements of a row."""
    scale: Fp8Scale | None = None
    values: torch.Tensor | None = None
    """The scale's values in fp32, where there is a scale."""

    @property
    def work(self) -> torch.dtype:
        """What to compute in."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    def view(self, raw: memoryview | bytearray) -> torch.Tensor:
        """Rows of the weight as they are stored, `(rows, columns)`, sharing memory with `raw`."""
        return torch.frombuffer(raw, dtype=self.dtype).view(-1, self.columns)

    def decode(self, stored: torch.Tensor, start: int) -> torch.Tensor:
        """Stored rows, of which the first is row `start` of the weight, as numbers; may be `stored` itself."""
        if self.scale is None or self.values is None:
            return stored.float() if stored.element_size() == 1 else stored
        return stored.float().mul_(self.scale.spread(self.values, start, start + len(stored), self.columns))

    def encode(
        self, numbers: torch.Tensor, stored: torch.Tensor, start: int, noise: torch.Generator | None
    ) -> torch.Tensor:
        """Round numbers into `stored`, which holds rows of the weight from row `start` on; returns them as stored.

        To the nearest, or up or down by chance where there is `noise`, so that the mean is exact. Numbers on another
        device are rounded there, and what is returned lies there.
        """
        if self.scale is not None and self.values is not None:
            numbers = numbers / self.scale.spread(self.values, start, start + len(stored), self.columns)
        if stored.element_size() == 1:
            largest = torch.finfo(self.dtype).max  # beyond it, e4m3 has only NaN
            numbers = numbers.clamp(-largest, largest)
        if noise is not None and self.dtype in _LOST_BITS:
            numbers = _dithered(numbers, _LOST_BITS[self.dtype], noise)
        if numbers.device == stored.device:
            return stored.copy_(numbers)
        rounded = numbers.to(self.dtype)
        stored.copy_(rounded)
        return rounded

    def on(self, device: torch.device) -> Codec:
        """The same with its scale's values on a device."""
        return self if self.values is None else replace(self, values=self.values.to(device))


def _dithered(numbers: torch.Tensor, lost: int, noise: torch.Generator) -> torch.Tensor:
    """fp32 numbers whose `lost` last bits were rounded up or down with the chance that they stand for."""
    bits = numbers.float().view(torch.int32)
    chance = torch.randint(0, 1 << lost, bits.shape, dtype=torch.int32, generator=noise)  # on the CPU: reproducible
    return bits.add(chance.to(bits.device)).bitwise_and_(-(1 << lost)).view(torch.float32)


def noise_for(seed: int | None, name: str, start: int) -> torch.Generator | None:
    """The source of chance for the rows of a tensor from row `start` on: the same in every run; None without a seed."""
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed}/{name}/{start}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def codec_of(ref: TensorRef, scales: Mapping[str, Fp8Scale]) -> Codec:
    """How `ref` is stored; reads the scale, where it has one."""
    scale = scales.get(ref.name)
    values = read_tensor(scale.ref).float() if scale else None
    return Codec(torch_dtype(ref.dtype), ref.numel // (ref.shape[0] if ref.shape else 1), scale, values)


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for the safetensors spelling of an editable one."""
    found: torch.dtype = getattr(torch, FLOAT_DTYPES.get(name) or FP8_DTYPES[name])
    return found


class Gathered:
    """The whole weight that a patch's module stands for, read from the tensors that hold its rows."""

    def __init__(self, patch: Patch, scales: Mapping[str, Fp8Scale], work: torch.dtype) -> None:
        self._runs, self._work, self.shape = patch.everywhere, work, patch.shape
        self._codecs = {run.weight.name: codec_of(run.weight, scales) for run in patch.everywhere}

    shape: Shape
    """`(out, in, *kernel)`, or `(n,)`."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` in the order of the module's own rows, flattened to `(stop - start, columns)`."""
        columns = math.prod(self.shape[1:])
        found = torch.zeros(stop - start, columns, dtype=self._work)
        for run in self._runs:
            first, last = max(start, run.delta_first), min(stop, run.delta_first + run.rows)
            if first < last:
                codec, shift = self._codecs[run.weight.name], run.first - run.delta_first
                stored = codec.view(read_rows(run.weight, first + shift, last + shift))
                found[first - start : last - start, : codec.columns] = codec.decode(stored, first + shift)
        return found


def rescaled(before: Codec, largest: torch.Tensor) -> Codec:
    """The codec of an fp8 weight after editing: each scale takes its block's `largest` magnitude to the dtype's end."""
    assert before.scale is not None
    scale = before.scale
    values = largest / torch.finfo(before.dtype).max
    values[values == 0] = 1.0
    stored = values.to(torch_dtype(scale.ref.dtype))  # what a reader will multiply with
    return replace(before, values=stored.float().view(scale.ref.shape))


def largest_magnitudes(codec: Codec, numbers: torch.Tensor, start: int, into: torch.Tensor) -> None:
    """Raise `into`, of the scale's shape, to the largest magnitudes in rows from row `start` on."""
    assert codec.scale is not None
    scale = codec.scale
    grid = into.view(-1, into.shape[-1] if into.dim() > 1 else 1)
    wide = -(-codec.columns // scale.block_columns)
    padded = torch.nn.functional.pad(numbers.abs(), (0, wide * scale.block_columns - codec.columns))
    by_columns = padded.view(len(numbers), wide, scale.block_columns).amax(2)  # (rows, column blocks)
    if len(grid) == 1:
        torch.maximum(grid, by_columns.amax(0, keepdim=True), out=grid)
    else:
        owner = torch.arange(start, start + len(numbers), device=numbers.device) // scale.block_rows
        grid.scatter_reduce_(0, owner[:, None].expand(-1, wide), by_columns, "amax")


def scale_bytes(codec: Codec) -> bytes:
    """The scale tensor's bytes."""
    assert codec.scale is not None
    assert codec.values is not None
    values = codec.values.to(torch_dtype(codec.scale.ref.dtype))
    return bytes(values.contiguous().view(-1).view(torch.uint8).tolist())
