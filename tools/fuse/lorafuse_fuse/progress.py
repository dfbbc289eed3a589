"""Progress of long work on stderr: a bar on a terminal, a plain line every tenth elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self


class ByteProgress:
    """Counts bytes towards a total; call it with the number of bytes just done."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done, self._tenth = label, max(total, 1), 0, 0
        self._start = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=label, total=total, unit="B", unit_scale=True, unit_divisor=1000)

    def __call__(self, count: int) -> None:
        """Count `count` more bytes."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._done * 10 // self._total > self._tenth and self._total > 1 << 30:
            self._tenth = self._done * 10 // self._total
            speed = self._done / 1e9 / max(time.monotonic() - self._start, 1e-3)
            print(f"{self._label}: {self._tenth * 10}% ({speed:.2f} GB/s)", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
