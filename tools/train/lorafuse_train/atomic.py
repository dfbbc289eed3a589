"""A file that appears complete under its final name, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lorafuse_common.publish import umask


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary sibling and rename it to `path`; any exception, Ctrl-C too, removes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, because PIL chooses the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~umask())  # safetensors makes its files readable by their owner only
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
