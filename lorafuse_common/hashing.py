"""sha256 of files, remembered by stat identity so that an unchanged 40 GB checkpoint is hashed once.

The memory is a convenience in the user's cache folder, never part of a result: it maps (path, size, mtime,
ctime, inode) to the digest, as git's index does. Set `LORAFUSE_HASH_CACHE=off` to do without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

BLOCK_BYTES = 8 << 20
_RACY_NS = 50_000_000
"""A file changed less than this ago may change again within the clock's grain (4 to 10 ms), so it is not remembered."""
_MOST_ENTRIES = 4096


def sha256_of(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hex sha256 of a file's bytes; `progress` is called with the number of bytes of every block read.

    Raises:
        OSError: the file cannot be read.
    """
    known = remembered(path)
    if known is not None:
        if progress:
            progress(path.stat().st_size)
        return known
    identity = stat_identity(path)
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            if progress:
                progress(len(block))
    remember({path: digest.hexdigest()}, {path: identity})
    return digest.hexdigest()


def stat_identity(path: Path) -> str:
    """What changes whenever a file's content may have: size, times and inode."""
    return identity_of(path.stat())


def identity_of(status: os.stat_result) -> str:
    """`stat_identity` of a file that was looked at already."""
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"


def remembered(path: Path) -> str | None:
    """The digest of an unchanged file that was hashed before, else None."""
    identity, digest = _load().get(str(path.resolve()), ("", ""))
    return digest if identity == stat_identity(path) else None


def remember(digests: Mapping[Path, str], identities: Mapping[Path, str] | None = None) -> None:
    """Store digests that were just computed; failing to store is harmless and silent.

    A file whose identity no longer is the one in `identities`, from before it was read, is left out.
    """
    memory = _memory_file()
    if memory is None or not digests:
        return
    entries = _load()
    now = time.time_ns()
    for path, digest in digests.items():
        status = path.stat()
        identity = identity_of(status)
        is_same = not identities or identities.get(path, identity) == identity
        if is_same and now - max(status.st_mtime_ns, status.st_ctime_ns) > _RACY_NS:
            entries.pop(str(path.resolve()), None)  # re-insert at the end: the oldest entries fall out first
            entries[str(path.resolve())] = (identity, digest)
    kept = dict(list(entries.items())[-_MOST_ENTRIES:])
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=memory.parent, prefix=".hashes-")
        with os.fdopen(handle, "w") as file:
            json.dump(kept, file)
        Path(temporary).replace(memory)


def _memory_file() -> Path | None:
    if os.environ.get("LORAFUSE_HASH_CACHE") == "off":
        return None
    root = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(root) / "lorafuse" / "hashes.json"


def _load() -> dict[str, tuple[str, str]]:
    memory = _memory_file()
    try:
        raw = json.loads(memory.read_text()) if memory else {}
        return {path: (identity, digest) for path, (identity, digest) in raw.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
