"""One safetensors file: its validated header, and reads of single tensors.

The format: https://github.com/huggingface/safetensors#format (little-endian u64 header length, JSON
header, then the tensors' bytes without holes). Headers are parsed here rather than by `safetensors`
because a fuse needs byte offsets, and must not map tens of gigabytes to plan.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from .errors import CheckpointError
from .hashing import identity_of
from .header import Entry, HeaderError, parse_header, quoted
from .strangers import SNIFFED_BYTES, identify, refusal_of

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
    identity: str
    """`hashing.identity_of` the file when its header was read."""


def read_header(path: Path) -> TensorFile:
    """Parse and check the header of `path`; no tensor data is read.

    Raises:
        CheckpointError: the file is missing, no safetensors file, truncated or inconsistent.
    """
    if refusal := refusal_of(path.suffix):
        raise CheckpointError(f"{path}: {refusal}")
    with _reading(path), open_file(path) as file:
        status = os.fstat(file.fileno())
        start = file.read(SNIFFED_BYTES)
        length = _header_length(path, start, status.st_size)
        raw = start[8 : 8 + length]
        raw += file.read(length - len(raw))
    try:
        header = parse_header(raw)
    except HeaderError as error:
        raise CheckpointError(f"{path}: {identify(start) or error}") from error
    data_start = 8 + length
    refs = [_tensor_ref(path, name, entry, data_start) for name, entry in header.entries.items()]
    in_data_order = sorted(refs, key=lambda ref: (ref.start, ref.stop))
    _check_coverage(path, in_data_order, data_start, status.st_size)
    return TensorFile(
        path,
        {ref.name: ref for ref in in_data_order},
        header.metadata,
        tuple(header.entries),
        data_start,
        status.st_size,
        identity_of(status),
    )


def open_file(path: Path) -> IO[bytes]:
    """Open an ordinary file to read; a pipe is not waited for, and a device not touched.

    Raises:
        CheckpointError: it is something else.
        OSError: it is not there, or may not be read.
    """

    def open_regular(name: str, flags: int) -> int:
        if stat.S_ISREG(path.stat().st_mode):
            handle = os.open(name, flags | os.O_NONBLOCK)  # should it have become a pipe just now
            if stat.S_ISREG(os.fstat(handle).st_mode):
                return handle
            os.close(handle)
        raise CheckpointError(f"{path}: is {_kind_of(path)}")

    return open(path, "rb", opener=open_regular)  # Path.open knows no opener


def _kind_of(path: Path) -> str:
    if path.is_dir():
        names = ", ".join(sorted(p.name for p in path.glob("*.safetensors"))[:3])
        return f"a folder; give the .safetensors file{' in it: ' if names else ''}{names}"
    kind = "a pipe" if path.is_fifo() else "a socket" if path.is_socket() else "a device"
    return f"{kind}, expected a .safetensors file"


def _header_length(path: Path, start: bytes, size: int) -> int:
    if size < 8:
        raise CheckpointError(f"{path}: not a safetensors file: {size} bytes long, the header needs at least 8")
    (length,) = struct.unpack("<Q", start[:8])
    if length > min(MAX_HEADER_BYTES, size - 8):
        what = identify(start) or (
            f"not a safetensors file, or truncated: its first 8 bytes announce a header of {length} bytes, "
            f"the file has {size}. Download it again."
        )
        raise CheckpointError(f"{path}: {what}")
    return int(length)


def _tensor_ref(path: Path, name: str, entry: Entry, data_start: int) -> TensorRef:
    dtype, shape, begin, end = entry
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"{path}: tensor {quoted(name)}: unknown dtype {quoted(dtype)}")
    if math.prod(size for size in shape if size) * DTYPE_BITS[dtype] >= 1 << 63:
        raise CheckpointError(f"{path}: tensor {quoted(name)}: shape {list(shape)} is beyond what can be counted")
    if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise CheckpointError(
            f"{path}: tensor {quoted(name)}: {end - begin} bytes do not hold shape {list(shape)} of {dtype}"
        )
    return TensorRef(path, name, dtype, shape, data_start + begin, data_start + end)


def _check_coverage(path: Path, refs: list[TensorRef], data_start: int, size: int) -> None:
    at = data_start
    for ref in refs:
        if ref.start != at:
            raise CheckpointError(
                f"{path}: tensor {quoted(ref.name)} starts at byte {ref.start}, expected {at}: "
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
    with _reading(ref.file), ref.file.open("rb") as file:
        file.seek(ref.start)
        raw = file.read(ref.nbytes)
    if len(raw) != ref.nbytes:
        raise CheckpointError(f"{ref.file}: ended early; did it change while it was read?")
    return raw


def read_rows(ref: TensorRef, start: int, stop: int) -> bytearray:
    """The raw bytes of rows `start` to `stop` of one tensor."""
    row = ref.nbytes // ref.shape[0] if ref.shape else ref.nbytes
    raw = bytearray((stop - start) * row)
    with _reading(ref.file), ref.file.open("rb", buffering=0) as file:
        file.seek(ref.start + start * row)
        fill(memoryview(raw), file, ref.file)
    return raw


def fill(room: memoryview, file: io.FileIO, path: Path) -> None:
    """Fill `room` with the next bytes of a file.

    Raises:
        CheckpointError: it ends early, or cannot be read.
    """
    at = 0
    while at < len(room):
        with _reading(path):
            got = file.readinto(room[at:])
        if not got:
            raise CheckpointError(f"{path}: ended early; did it change while it was read?")
        at += got


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Faults of the disk, which do not name the file themselves."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


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
