"""One safetensors file: its validated header, and reads of single tensors.

The format: https://github.com/huggingface/safetensors#format (little-endian u64 header length, JSON
header, then the tensors' bytes without holes). Headers are parsed here rather than by `safetensors`
because a fuse needs byte offsets, and must not map tens of gigabytes to plan.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation; a longer one is not a safetensors file."""

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

FLOAT_DTYPES: Mapping[str, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""The dtypes arithmetic is done on, with torch's names for them."""

_SCALAR_FORMATS = {
    "F64": "<d",
    "F32": "<f",
    "F16": "<e",
    "I64": "<q",
    "I32": "<i",
    "I16": "<h",
    "I8": "<b",
    "U8": "<B",
}
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies."""

    file: Path
    name: str
    dtype: str
    """The safetensors spelling: `BF16`, `F32`, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""
    stop: int
    """One past the last byte."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file whose header has been checked."""

    path: Path
    tensors: Mapping[str, TensorRef]
    """By name, in the order of their bytes."""
    metadata: Mapping[str, str]
    header_order: tuple[str, ...]
    """Names in the order the header spells them; a rewrite keeps it."""
    data_start: int
    size: int
    """Bytes of the whole file."""


def read_header(path: Path) -> TensorFile:
    """Parse and check the header of `path`; no tensor data is read.

    Raises:
        CheckpointError: the file is missing, no safetensors file, truncated or inconsistent.
    """
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"{path}: pickle files ({path.suffix}) can run code when loaded and are not read. "
            "Convert the file to .safetensors with the program that wrote it."
        )
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"{path}: GGUF files hold packed weights, which cannot be edited. "
            "Fuse into the bf16 or fp16 checkpoint (.safetensors) and quantise the result."
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = _header_bytes(path, file.read(8), size, file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is no valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: the header's __metadata__ must map strings to strings")
    data_start = 8 + len(raw)
    refs = [_tensor_ref(path, name, entry, data_start) for name, entry in header.items()]
    in_data_order = sorted(refs, key=lambda ref: (ref.start, ref.stop))
    _check_coverage(path, in_data_order, data_start, size)
    return TensorFile(path, {ref.name: ref for ref in in_data_order}, metadata, tuple(header), data_start, size)


def _header_bytes(path: Path, prefix: bytes, size: int, file: Any) -> bytes:
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: not a safetensors file: {size} bytes long, the header needs at least 8")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{path}: not a safetensors file, or truncated: its first 8 bytes announce a header of {length} bytes, "
            f"the file has {size}. A git-lfs pointer or a web page saved by mistake looks like this; download it again."
        )
    raw: bytes = file.read(length)
    return raw


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def _tensor_ref(path: Path, name: str, entry: Any, data_start: int) -> TensorRef:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name!r}: needs dtype, shape and data_offsets, has {entry!r}") from error
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"{path}: tensor {name!r}: unknown dtype {dtype!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise CheckpointError(f"{path}: tensor {name!r}: shape and offsets must be whole numbers, has {entry!r}")
    if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise CheckpointError(
            f"{path}: tensor {name!r}: {end - begin} bytes do not hold shape {list(shape)} of {dtype}"
        )
    return TensorRef(path, name, dtype, shape, data_start + begin, data_start + end)


def _check_coverage(path: Path, refs: list[TensorRef], data_start: int, size: int) -> None:
    at = data_start
    for ref in refs:
        if ref.start != at:
            raise CheckpointError(
                f"{path}: tensor {ref.name!r} starts at byte {ref.start}, expected {at}: "
                "its tensors overlap or leave holes"
            )
        at = ref.stop
    if at != size:
        raise CheckpointError(
            f"{path}: {'truncated' if at > size else 'has bytes past its last tensor'}: "
            f"the header describes {at} bytes, the file has {size}. Download it again."
        )


def read_bytes(ref: TensorRef) -> bytes:
    """The raw little-endian bytes of one tensor."""
    with ref.file.open("rb") as file:
        file.seek(ref.start)
        raw = file.read(ref.nbytes)
    if len(raw) != ref.nbytes:
        raise CheckpointError(f"{ref.file}: ended inside tensor {ref.name!r}; did the file change while it was read?")
    return raw


def read_rows(ref: TensorRef, start: int, stop: int) -> bytearray:
    """The raw bytes of rows `start` to `stop` of one tensor."""
    row = ref.nbytes // ref.shape[0] if ref.shape else ref.nbytes
    raw = bytearray((stop - start) * row)
    with ref.file.open("rb", buffering=0) as file:
        file.seek(ref.start + start * row)
        at, view = 0, memoryview(raw)
        while at < len(raw):
            got = file.readinto(view[at:])
            if not got:
                raise CheckpointError(
                    f"{ref.file}: ended inside tensor {ref.name!r}; did the file change while it was read?"
                )
            at += got
    return raw


def read_scalar(ref: TensorRef) -> float:
    """The value of a tensor of one element, without importing torch."""
    raw = read_bytes(ref)
    if ref.dtype == "BF16":  # bf16 is the upper half of an fp32
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return float(struct.unpack(_SCALAR_FORMATS[ref.dtype], raw)[0])


def is_scalar(ref: TensorRef) -> bool:
    """Whether `read_scalar` can read it."""
    return ref.numel == 1 and (ref.dtype in _SCALAR_FORMATS or ref.dtype == "BF16")


def is_zero(ref: TensorRef) -> bool:
    """Whether every byte of a tensor is zero, without importing torch."""
    return not read_bytes(ref).strip(b"\0")


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """One tensor on the CPU in its own dtype (one of `FLOAT_DTYPES`); the file is read, not mapped."""
    import torch

    dtype: torch.dtype = getattr(torch, FLOAT_DTYPES[ref.dtype])
    raw = bytearray(read_bytes(ref))
    return torch.frombuffer(raw, dtype=dtype).view(ref.shape) if raw else torch.empty(ref.shape, dtype=dtype)


class Stored(NamedTuple):
    """How a tensor is stored."""

    dtype: str
    """The safetensors spelling."""
    shape: tuple[int, ...]


def encode_header(
    source: TensorFile, metadata: Mapping[str, str], changed: Mapping[str, Stored] | None = None
) -> bytes:
    """The length prefix and header of a copy of `source` with other `metadata`, where some tensors may be `changed`.

    Names and order stay as they are; data offsets too, where no size changes.
    """
    entries, at = {}, 0
    for ref in source.tensors.values():  # in the order of their bytes
        dtype, shape = (changed or {}).get(ref.name, Stored(ref.dtype, ref.shape))
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[ref.name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    header |= {name: entries[name] for name in source.header_order}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the format wants the data aligned to 8 bytes
    return struct.pack("<Q", len(raw)) + raw
