"""A safetensors file from tensors, the same bytes for the same tensors; files that appear whole or not at all."""

from __future__ import annotations

import filecmp
import json
import os
import secrets
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from lorafuse_common.errors import OutputError
from lorafuse_common.tensorfile import DTYPE_BITS, TensorRef, read_bytes

from .factors import Stored

Write = Callable[[IO[bytes]], None]


def write_tensors(file: IO[bytes], tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: wide dtypes first, which keeps them aligned, then by name, as safetensors does.

    safetensors itself writes metadata in an order that changes from run to run; here they are sorted.
    """
    ordered = sorted(tensors.items(), key=lambda entry: (-DTYPE_BITS[entry[1].dtype], entry[0]))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name, tensor in ordered:
        size = tensor.data.nbytes if isinstance(tensor.data, TensorRef) else len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(struct.pack("<Q", len(raw)) + raw)
    for _, tensor in ordered:
        file.write(read_bytes(tensor.data) if isinstance(tensor.data, TensorRef) else tensor.data)


def publish_files(
    files: Mapping[Path, Write], *, replace: bool = False, check: Callable[[], None] | None = None
) -> bool:
    """Write files beside their places and rename them there, in their order; on any exception none is left.

    False where all of them are there already, byte for byte, and nothing is changed. `check` is called between
    writing and renaming.

    Raises:
        OutputError: one exists with other content and `replace` is not given, or cannot be written.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            staged[path] = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            with staged[path].open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        if check:
            check()
        if all(path.is_file() and filecmp.cmp(staged[path], path, shallow=False) for path in files):
            return False
        if not replace:
            _refuse_others(staged)
        for path, temporary in staged.items():
            temporary.replace(path)
            _sync(path.parent)
        return True
    except OSError as error:
        raise OutputError(f"{[*files][-1]}: cannot be written: {error.strerror or error}") from error
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _refuse_others(staged: Mapping[Path, Path]) -> None:
    """Refuse to replace a file that has other content than the staged one."""
    for path, temporary in staged.items():
        if path.exists() and not filecmp.cmp(temporary, path, shallow=False):
            raise OutputError(f"{path}: exists with other content. Choose another --out, or replace it with --force.")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
