"""A safetensors file from tensors, the same bytes for the same tensors; files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import json
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping
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
        with contextlib.ExitStack() as opened:
            for path, write in files.items():
                file = opened.enter_context(temporary_beside(path))
                staged[path] = Path(file.name)
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


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[IO[bytes]]:
    """A new file `.NAME.XXXXXXXX.tmp` beside `path`, which is locked while it is open and gone afterwards.

    Those that killed runs left for the same `path` are not locked any more, and are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        file = temporary.open("xb")
        with contextlib.suppress(OSError):  # no locks on this file system: then nobody removes it either
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if temporary.exists():  # else it was taken for a leftover before it was locked
            break
        file.close()
    try:
        with file:
            yield file
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    for left in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]:
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _refuse_others(staged: Mapping[Path, Path]) -> None:
    """Refuse to replace a file that has other content than the staged one."""
    for path, temporary in staged.items():
        if path.exists() and not filecmp.cmp(temporary, path, shallow=False):
            raise OutputError(other_content(path))


def other_content(path: Path) -> str:
    """What is said of a file that would be replaced."""
    return f"{path}: exists with other content. Choose another --out, or replace it with --force."


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
