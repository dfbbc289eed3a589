"""The folder that a benchmark works in, which it leaves as it found it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from benchmarks.machine import free_bytes

_MARK = ".lorafuse-benchmark"
_INPUTS = ("base-", "lora-", "peft-")


class BenchmarkError(Exception):
    """A benchmark cannot be run; the message says why and what to do."""


@contextlib.contextmanager
def workspace(out: Path, *, keep: bool) -> Iterator[Path]:
    """`out`/work, for this benchmark alone; however that ends, it is removed, apart from the inputs with `keep`.

    Raises:
        BenchmarkError: another benchmark is using it, or it is somebody else's.
    """
    folder = out.resolve() / "work"
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).exists():
            raise BenchmarkError(f"{folder}: is no benchmark's folder, and would be emptied; give this one another OUT")
        try:
            folder.mkdir(exist_ok=True)
            (folder / _MARK).touch()
            _remove(folder, inputs_too=False)
            yield folder
        finally:
            _remove(folder, inputs_too=not keep)
    except BlockingIOError:
        raise BenchmarkError(f"{out}: another benchmark is running there; give this one another OUT") from None
    finally:
        os.close(lock)


def _remove(folder: Path, *, inputs_too: bool) -> None:
    for path in folder.glob("*"):
        if inputs_too or not path.name.startswith((_MARK, *_INPUTS)):
            remove(path)
    if inputs_too and folder.exists():
        folder.rmdir()


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise BenchmarkError where the disk has no room for `needed` more bytes."""
    free = free_bytes(folder)
    if needed > free:
        raise BenchmarkError(
            f"{folder}: {what} needs {needed / 1e9:.1f} GB more, its disk has {free / 1e9:.1f} GB free. "
            "Give a smaller SIZE, or an OUT on another disk."
        )


def stop_on_signals() -> None:
    """Let a polite kill end the program as Ctrl-C does: with the workspace cleaned up."""

    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
