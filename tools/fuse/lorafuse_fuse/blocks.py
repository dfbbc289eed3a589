"""The sizes of the pieces a fuse works in; apart from `execute`, so that planning need not import torch."""

from __future__ import annotations

import os

PIECE_BYTES = 8 << 20
"""A file is read, edited, hashed and written this many bytes at a time."""

WRITE_BYTES = 1 << 20
"""One call writes this many: for larger ones Linux (6.18) looks for larger pages, which can cost ten times the copy."""

EDIT_BLOCK_ELEMENTS = 1 << 18
"""Rows are computed on in blocks of this many elements: three such blocks in fp32 are 3 MB, which stay near a core, and
are few enough for Python not to matter. The size is fixed because it takes part in the last bit of a matrix product:
same inputs, same bytes, for any number of workers."""

SPARE_PIECES = 4
"""Buffers besides those that workers hold: one being read, one waiting, one being written, one being hashed."""

MOST_WORKERS = 8
"""More would wait for the hash, which runs through a file from its first byte to its last."""


def default_workers() -> int:
    """As many as there are cores for this process, up to `MOST_WORKERS`."""
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0))))
