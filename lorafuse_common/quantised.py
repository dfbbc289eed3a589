"""Checkpoints in fp8, and those in packed formats that cannot be edited.

Scaled fp8 (ComfyUI's `scale_weight` and `weight_scale`, DeepSeek's `weight_scale_inv`): W = scale * W8 in all of them,
one scale for the whole weight, for each row, or for each block of rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tensorfile import TensorRef

if TYPE_CHECKING:
    import torch

FP8_DTYPES: Mapping[str, str] = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""The 8-bit dtypes that can be edited, with torch's names for them."""
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
_SCALE_DTYPES = ("F32", "BF16", "F16")
_PACKED = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "bitsandbytes__nf4": "bitsandbytes",
    "bitsandbytes__fp4": "bitsandbytes",
    ".qweight": "GPTQ, AWQ or Nunchaku",
    ".wscales": "Nunchaku",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_2": "NVFP4",
    "._data": "quanto",
}
"""How a tensor's name ends that only a packed format has, and what to call that."""


@dataclass(frozen=True, slots=True)
class Fp8Scale:
    """The scale of one fp8 weight of `rows` x `columns`."""

    ref: TensorRef
    block_rows: int
    """Rows that share a scale."""
    block_columns: int
    """Columns that share a scale."""

    def spread(self, scale: torch.Tensor, start: int, stop: int, columns: int) -> torch.Tensor:
        """The scale of every element of rows `start` to `stop`, broadcast: one or as many rows, one or all columns."""
        import torch

        grid = scale.reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1)  # (row blocks, column blocks)
        if len(grid) > 1:
            grid = grid[torch.arange(start, stop, device=grid.device) // self.block_rows]
        return grid if grid.shape[1] == 1 else grid.repeat_interleave(self.block_columns, 1)[:, :columns]


def scale_of(weight: TensorRef, name: str, tensors: Mapping[str, TensorRef]) -> Fp8Scale | None:
    """The scale that lies beside an fp8 weight called `name`; None where there is none that fits its shape."""
    stem = name.removesuffix(".weight")
    ref = next((tensors[f"{stem}.{suffix}"] for suffix in _SCALES if f"{stem}.{suffix}" in tensors), None)
    if ref is None or ref.dtype not in _SCALE_DTYPES or len(weight.shape) < 2 or 0 in (*weight.shape, *ref.shape):
        return None
    rows, columns = weight.shape[0], weight.numel // weight.shape[0]
    if ref.numel == 1:
        return Fp8Scale(ref, rows, columns)
    if ref.shape in ((rows,), (rows, 1)):
        return Fp8Scale(ref, 1, columns)
    if len(ref.shape) == 2 and len(weight.shape) == 2:
        height, width = -(-rows // ref.shape[0]), -(-columns // ref.shape[1])
        return Fp8Scale(ref, height, width) if _fills(rows, height, ref.shape[0]) else None
    return None


def _fills(rows: int, height: int, blocks: int) -> bool:
    """Whether blocks of this height, of which the last may be shorter, are as many as there are scales."""
    return -(-rows // height) == blocks


def packed_format(tensors: Mapping[str, TensorRef]) -> str | None:
    """What to call the packed format of a checkpoint; None where its weights are ordinary numbers."""
    for name, ref in tensors.items():
        for ending, title in _PACKED.items():
            if name.endswith(ending):
                return title
        if name.endswith(".weight") and len(ref.shape) >= 2 and ref.dtype in ("U8", "I8", "I32", "F4", "F8_E8M0"):
            return f"weights of dtype {ref.dtype}"
    return None
