"""A folder that appears complete under its final name, or not at all.

While `models/fused` is written, `models/` also holds

    .fused.lorafuse.lock            locked (flock) by the run that writes; the lock goes with its process
    .fused.lorafuse-new-XXXXXXXX    staging: what is being written, or what was replaced and is being removed
    .fused.lorafuse-old-XXXXXXXX    what is replaced, where the file system cannot exchange two names in one step

A run that is killed leaves some of them. Whoever has the lock next knows that their owner is gone: it moves an `old`
back where nothing has the final name, and removes the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import OutputError
from .signals import held_signals

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""What file systems say that cannot sync a folder."""


@contextlib.contextmanager
def publish(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty staging folder beside `out`; rename it to `out` on success, delete it on any exception.

    Renaming, not writing in place, also keeps a process that has mapped the old files alive. With `replace`
    an existing `out` gives way to the new one in one step, and is deleted afterwards. Where `out` is a link, what it
    points to is written.

    Raises:
        OutputError: `out` exists and `replace` is not given, another run is writing it, or it cannot be written.
    """
    final = real_path(out)
    with _parent_of(final) as nearest, _lock(final) as is_locked:
        if is_locked:
            _clear(final)
        if final.exists() and not (replace and final.is_dir()):
            raise OutputError(f"{out}: exists already")
        staging: Path | None = None
        try:
            with held_signals():
                staging = _make_beside(final, "new")
            staging.chmod(0o777 & ~umask())  # mkdtemp makes it private; the result is an ordinary folder
            yield staging
            _sync_tree(staging)
            with held_signals():
                _put_in_place(staging, final)
                _confirm(final, nearest)
        finally:
            if staging is not None:
                with held_signals():
                    shutil.rmtree(staging, ignore_errors=True)


def recover(out: Path) -> None:
    """Put right what a killed run left beside `out`: the folder it was replacing is back, its staging is gone.

    Raises:
        OutputError: the run is not dead but writing right now.
    """
    final = real_path(out)
    if _leftovers(final):
        with _lock(final) as is_locked:
            if is_locked:
                _clear(final)


def real_path(path: Path) -> Path:
    """The path without links.

    Raises:
        OutputError: links lead in a circle.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: before Python 3.13
        raise OutputError(f"{path}: links lead in a circle") from error


@contextlib.contextmanager
def _parent_of(final: Path) -> Iterator[Path]:
    """Make the folder that `final` lies in; yields the nearest that was there, and leaves no more on an exception."""
    missing: list[Path] = []
    try:
        with _as_output_errors(final):
            missing += [folder for folder in final.parents if not folder.exists()]
            if not missing and not final.parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{final.parent} is no folder")
            final.parent.mkdir(parents=True, exist_ok=True)
        yield final.parents[len(missing)]
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # another run may have put something into it
                folder.rmdir()
        raise


@contextlib.contextmanager
def _as_output_errors(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{final}: cannot be created: {error.strerror}") from error


def _make_beside(final: Path, what: str) -> Path:
    with _as_output_errors(final):
        return Path(tempfile.mkdtemp(prefix=f".{final.name}.lorafuse-{what}-", dir=final.parent))


def _lock_file(final: Path) -> Path:
    return final.with_name(f".{final.name}.lorafuse.lock")


@contextlib.contextmanager
def _lock(final: Path) -> Iterator[bool]:
    """Keep other runs from writing `final`; yields whether that worked: some file systems know no locks.

    Raises:
        OutputError: another run has the lock.
    """
    path = _lock_file(final)
    file: IO[bytes] | None = None
    try:
        with held_signals():
            file = _locked(path, final)
        yield file is not None
    finally:
        if file is not None:
            with held_signals(), contextlib.suppress(OSError):
                path.unlink()  # still locked: whoever opened it before finds that it is no longer there
            file.close()


def _locked(path: Path, final: Path) -> IO[bytes] | None:
    while True:
        file: IO[bytes] | None = None
        try:
            file = _open_lock(path)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except BlockingIOError:
            raise OutputError(
                f"{final}: another lorafuse run is writing it right now; wait for it, or choose another --out"
            ) from None
        except OSError:  # no locks here, or nothing may be written: making the staging folder will tell
            if file is not None:
                path.unlink(missing_ok=True)
            return None


def _open_lock(path: Path) -> IO[bytes]:
    try:
        return path.open("ab")
    except PermissionError:  # another user's; the lock counts all the same
        return path.open("rb")


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still what `path` names; its last owner may just have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _leftovers(final: Path) -> list[Path]:
    """What runs for `final`, and for no other folder, may have left."""
    pattern = re.compile(rf"\.{re.escape(final.name)}\.lorafuse(\.lock|-(new|old)-[a-z0-9_]{{8}})")
    try:
        return [path for path in final.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return []


def _clear(final: Path) -> None:
    """Put right what dead runs left; only for the owner of the lock."""
    for path in _leftovers(final):
        if path.name.startswith(f".{final.name}.lorafuse-old-") and any(path.iterdir()) and not final.exists():
            path.rename(final)
        elif path != _lock_file(final):
            shutil.rmtree(path, ignore_errors=True)


def _put_in_place(staging: Path, final: Path) -> None:
    """Give `staging` its final name; what had that name before is under staging's name afterwards."""
    if not final.exists():
        staging.rename(final)
    elif not _exchange(staging, final):
        aside = _make_beside(final, "old")
        final.rename(aside)
        try:
            staging.rename(final)
        except BaseException:
            aside.rename(final)
            raise
        aside.rename(staging)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux, glibc 2.28
    return rename is not None and not rename(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )


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


def _confirm(final: Path, nearest: Path) -> None:
    """Sync the folders whose entries are new: from that of `final` up to the one that was there before.

    Raises:
        OutputError: the disk failed; too late to say that nothing was written.
    """
    try:
        for folder in final.parents:
            _sync(folder)
            if folder == nearest:
                return
    except OSError as error:
        raise OutputError(f"{final}: is written, but its disk did not confirm that: {error.strerror}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC or not path.is_dir():
            raise
    finally:
        os.close(handle)
