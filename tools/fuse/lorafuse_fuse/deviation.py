"""How far a fused tensor is from what it should be, in units in the last place of what it is stored as."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lorafuse_common.quantised import FP8_DTYPES, Fp8Scale
from lorafuse_common.tensorfile import TensorRef, read_tensor

from .plan import ComponentPlan
from .reference import Delta, delta_of, scale_index, stored_rows, torch_dtype

_COMPARED_AT_ONCE = 1 << 18
"""Elements; a few arrays of so many float64 numbers are in memory beside the tensor's delta."""
_ROUNDINGS = 64
"""A fuse adds up in fp32: so many roundings of the numbers that went into a sum are allowed for. A sum over a rank of
1024 errs by about 16; 64 are a thousandth of a bf16 step."""
_EXPONENT = 0x7FF0_0000_0000_0000
"""The bits of a float64 that hold its exponent."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """One edited tensor, compared with base and LoRAs."""

    name: str
    component: str | None
    dtype: str
    ulps: float
    """The largest deviation beyond fp32's own error, in units in the last place of what was expected."""
    absolute: float
    """The largest deviation."""
    limit: float
    """The units that rounding once may give."""

    @property
    def is_fault(self) -> bool:
        """Whether rounding does not explain it."""
        return not self.ulps <= self.limit


def deviations(plan: ComponentPlan, ref: TensorRef, fused: Mapping[str, TensorRef]) -> tuple[Deviation, ...]:
    """Compare one edited tensor of the base with the fused one, and with it the scale of an fp8 weight."""
    delta, scale = delta_of(plan, ref), plan.scales.get(ref.name)
    limit = 0.5 if plan.seed is None else 1.0  # to the nearest, or to either neighbour
    found = _Comparison(ref, fused[ref.name], scale, replace(scale, ref=fused[scale.ref.name]) if scale else None)
    rows, columns = delta.values.shape
    step = max(1, _COMPARED_AT_ONCE // columns)
    for start in range(0, rows, step):
        found.add_rows(delta, start, min(rows, start + step))
    component = plan.base.component
    own = Deviation(ref.name, component, fused[ref.name].dtype, _short(found.ulps), _short(found.absolute), limit)
    if scale is None:
        return (own,)
    off = found.scale_deviation()
    return own, Deviation(scale.ref.name, component, scale.ref.dtype, _short(off[0]), _short(off[1]), 0.5)


class _Comparison:
    """The largest deviations of a tensor while its rows go by."""

    def __init__(self, base: TensorRef, fused: TensorRef, before: Fp8Scale | None, after: Fp8Scale | None) -> None:
        self.ulps = self.absolute = 0.0
        self._base, self._fused, self._before, self._after = base, fused, before, after
        self._precision = 2.0 ** -(53 if base.dtype == "F64" else 24) * _ROUNDINGS
        self._largest = torch.zeros(after.ref.numel if after else 0, dtype=torch.float64)
        self._reach = 0.0

    def add_rows(self, delta: Delta, start: int, stop: int) -> None:
        exact = delta.values[start:stop].clone()
        weight = stored_rows(self._base, start, stop, self._before)
        exact[:, : weight.shape[1]] += weight
        slack = delta.reach[start:stop].expand_as(exact).clone()
        slack[:, : weight.shape[1]] += weight.abs_()
        self._reach = max(self._reach, float(slack.max()))
        slack *= self._precision
        made = stored_rows(self._fused, start, stop, self._after)
        unit = self._unit(exact, start, stop)
        apart = (made - exact).abs_()
        self.absolute = max(self.absolute, _largest(apart))
        self.ulps = max(self.ulps, _largest(apart.sub_(slack).clamp_min_(0).div_(unit)))

    def _unit(self, exact: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The unit in the last place of every element, after what fp8 cannot hold was clamped in `exact`."""
        dtype = torch_dtype(self._fused.dtype)
        scale: torch.Tensor | float = 1.0
        if self._after:
            index = scale_index(self._after, start, stop, exact.shape[1])
            self._largest.scatter_reduce_(0, index.expand_as(exact).flatten(), exact.abs().flatten(), "amax")
            scale = read_tensor(self._after.ref).double().flatten()[index]
        if self._fused.dtype in FP8_DTYPES:
            most = torch.finfo(dtype).max * scale
            exact.copy_(torch.clamp(exact, -torch.as_tensor(most), torch.as_tensor(most)))
        return ulp(exact / scale, dtype).mul_(scale)

    def scale_deviation(self) -> tuple[float, float]:
        """In units in the last place and absolute: a scale takes the largest magnitude to the end of the dtype."""
        assert self._after
        end = torch.finfo(torch_dtype(self._fused.dtype)).max
        expected = torch.where(self._largest == 0, 1.0, self._largest / end)
        apart = (read_tensor(self._after.ref).double().flatten() - expected).abs()
        beyond = (apart - self._precision * self._reach / end).clamp_min(0)
        return _largest(beyond / ulp(expected, torch_dtype(self._after.ref.dtype))), _largest(apart)


def _largest(numbers: torch.Tensor) -> float:
    """The largest of some numbers; infinite where one is not a number, which no comparison would find."""
    return float(numbers.nan_to_num_(nan=math.inf, posinf=math.inf).max())


def ulp(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of a dtype's numbers at the magnitude of each of some float64 `numbers`."""
    limits = torch.finfo(dtype)
    powers = (numbers.contiguous().view(torch.int64) & _EXPONENT).view(torch.float64)  # the power of two below each
    return powers.clamp_min(limits.smallest_normal) * limits.eps


def _short(number: float) -> float:
    return float(f"{number:.4g}")
