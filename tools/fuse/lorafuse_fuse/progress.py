"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Self

SECONDS_BETWEEN_LINES = 5.0


class ByteProgress:
    """Counts bytes towards a total; call it with the number of bytes just done."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, max(total, 1), 0
        self._start = self._told = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=label, total=total, unit="B", unit_scale=True, leave=False)

    def __call__(self, count: int) -> None:
        """Count `count` more bytes."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._told > SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            share, speed = self._done / self._total, self._done / 1e9 / (self._told - self._start)
            print(f"{self._label}: {share:.0%} ({speed:.2f} GB/s)", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def size_text(nbytes: int) -> str:
    """`41.2 GB`, `5.0 MB`: decimal units, as disks and model hubs count."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
