"""A folder that appears complete under its final name, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import OutputError


@contextlib.contextmanager
def publish(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty staging folder beside `out`; rename it to `out` on success, delete it on any exception.

    Renaming, not writing in place, also keeps a process that has mapped the old files alive. With `replace`
    an existing `out` is moved aside first and deleted only after the new one is in place.

    Raises:
        OutputError: `out` exists and `replace` is not given, or its parent cannot be written.
    """
    if out.exists() and not replace:
        raise OutputError(f"{out}: exists already")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.staging-", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out}: cannot be created: {error.strerror}") from error
    try:
        staging.chmod(0o777 & ~umask())  # mkdtemp makes it private; the result is an ordinary folder
        yield staging
        _sync_tree(staging)
        _swap(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, out: Path) -> None:
    if not out.exists():
        staging.rename(out)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        out.rename(aside / out.name)
        try:
            staging.rename(out)
        except BaseException:
            (aside / out.name).rename(out)
            aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync(out.parent)


def umask() -> int:
    """The permission bits that this process takes away from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            if not (Path(parent) / name).is_symlink():
                _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
