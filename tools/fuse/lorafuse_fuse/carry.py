"""Carrying a model's other files over to the fused one, without copying gigabytes where that can be avoided."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from .choices import Components

SMALL_BYTES = 16 << 20
"""Files up to this size (configs, tokenizers, demo models) are always copied."""
_FICLONE = 0x40049409
"""Linux's ioctl that lets two files share their blocks until one changes (btrfs, xfs, bcachefs)."""


def carry(source: Path, target: Path, final: Path, how: Components) -> None:
    """Make `target` (which will lie at `final`) hold what `source` holds: reflink, else symlink, or a plain copy.

    A symlink is relative, so that base and fused folder can move together; a link in the source (as in the hub's
    cache) is followed first.
    """
    real = source.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if how is Components.COPY or real.stat().st_size <= SMALL_BYTES:
        shutil.copyfile(real, target)
    elif not reflink(real, target):
        target.symlink_to(os.path.relpath(real, final.resolve().parent))


def reflink(source: Path, target: Path) -> bool:
    """Make `target` share the blocks of `source`; False where the file system cannot."""
    try:
        with source.open("rb") as reading, target.open("xb") as writing:
            fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
    except OSError:  # the file system cannot, or the two lie on different ones
        target.unlink(missing_ok=True)
        return False
    return True
