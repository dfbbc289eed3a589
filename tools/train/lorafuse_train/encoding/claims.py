"""Who makes which entry, where several processes fill one cache: a lock on one byte of a file for each entry."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from lorafuse_train.console import say

Item = TypeVar("Item")
FILE_NAME = ".claims"
OFFSET_DIGITS = 15
"""Hexadecimal digits of an entry's key that choose its byte: 60 bits, which a file offset holds."""


class Claims:
    """The entries that this process has taken on.

    The locks are POSIX record locks: the kernel drops them when a process ends, however it ends, so that nothing has to
    be cleaned up. They do not work between threads. On a file system without locks every claim succeeds: two processes
    may then make the same entry, and one of two equal files stays.
    """

    def __init__(self, root: Path) -> None:
        # Closing any descriptor of this file drops all its locks, so the process must hold just this one.
        self._file = os.open(root / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)

    def take(self, path: Path, *, wait: bool = False) -> bool:
        """Claim the entry at `path`; False where another process holds it and this one is not to wait."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, _offset(path))
        except (BlockingIOError, PermissionError):  # POSIX allows either for a lock that is held
            return False
        except OSError:  # no locks here
            return True
        return True

    def release(self, path: Path) -> None:
        """Let others have it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _offset(path))
        except OSError:
            return


def _offset(path: Path) -> int:
    return int(path.stem[:OFFSET_DIGITS], 16)


def shared(
    root: Path, missing: Mapping[Path, Item], is_there: Callable[[Path], bool], what: str
) -> Iterator[tuple[Path, Item]]:
    """Those of the `missing` entries that this process is to make, each held until the next one is asked for.

    Ends when every entry is there, made here or by another process; what a process that was killed has left undone is
    taken over. Paths end in `KEY.safetensors` with a hexadecimal key.
    """
    if not missing:
        return
    with Claims(root) as claims:
        held = yield from _round(claims, missing, is_there, wait=False)
        if held:
            say(f"other processes are at {len(held)} {what}; waiting for them")
            yield from _round(claims, held, is_there, wait=True)


def _round(
    claims: Claims, missing: Mapping[Path, Item], is_there: Callable[[Path], bool], *, wait: bool
) -> Generator[tuple[Path, Item], None, dict[Path, Item]]:
    """Go through the entries once; returns those that others held."""
    held: dict[Path, Item] = {}
    for path, item in missing.items():
        if not claims.take(path, wait=wait):
            held[path] = item
            continue
        try:
            if not is_there(path):
                yield path, item
        finally:
            claims.release(path)
    return held
