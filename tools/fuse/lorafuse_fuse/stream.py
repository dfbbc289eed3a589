"""Reading one file and writing another in step: pieces are edited by several workers and hashed in order."""

from __future__ import annotations

import ctypes
import hashlib
import os
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from lorafuse_common.tensorfile import fill

from . import blocks

Buffer = bytearray | memoryview
Change = Callable[[memoryview], memoryview]
"""Edits a piece's bytes in place or makes others, and returns those to be written."""


class Stream:
    """The caller reads; workers edit; one thread each hashes the source, writes, hashes the output, drains to the disk.

    Only one writes, for Linux lets no two write to a file at once: the others would wait for it, spinning.

    Every read takes a buffer, which comes back when its piece is hashed and written: memory does not grow with the
    file. A fault in any thread is raised by the caller's next call, or at the end.
    """

    def __init__(
        self,
        source: Path,
        out: Path,
        progress: Callable[[int], object],
        workers: int,
        allocate: Callable[[int], Buffer] = bytearray,
        *,
        hash_source: bool = True,
    ) -> None:
        self._path, self._progress = source, progress
        self._reading = source.open("rb", buffering=0)
        self._writing = out.open("xb", buffering=0)
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        self._allocate = allocate
        for _ in range(workers + blocks.SPARE_PIECES):
            self._free.put(allocate(blocks.PIECE_BYTES))
        self.workers = ThreadPoolExecutor(workers, "edit")
        self._hash_in, self._hash_out = ThreadPoolExecutor(1, "hash-in"), ThreadPoolExecutor(1, "hash-out")
        self._write = ThreadPoolExecutor(1, "write")
        self._drain = _Drain(self._writing.fileno())
        self._under_way: deque[Future[None]] = deque()
        self._hash_source, self._written = hash_source, 0
        self.source_hash, self.output_hash = hashlib.sha256(), hashlib.sha256()

    def copy(self, count: int) -> None:
        """Pass the next `count` bytes of the source on unchanged."""
        while count:
            step = min(count, blocks.PIECE_BYTES)
            self._pass(step, step, None)
            count -= step

    def replace(self, count: int, data: bytes) -> None:
        """Read `count` bytes and write `data` in their place."""
        while count:
            step = min(count, blocks.PIECE_BYTES)
            count -= step
            content = memoryview(b"" if count else data)
            self._pass(step, len(content), lambda _, content=content: content)  # type: ignore[misc]

    def edit(self, count: int, size: int, change: Change) -> None:
        """Pass the next `count` bytes on as the `size` bytes that `change` makes of them, in a worker."""
        self._pass(count, size, change)

    def _pass(self, count: int, size: int, change: Change | None) -> None:
        """Read a piece and send it on its way.

        Raises:
            CheckpointError: the source has ended, or cannot be read.
            OSError: writing an earlier piece failed.
        """
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft().result()
        buffer = self._free.get()
        if len(buffer) < count:
            buffer = self._allocate(count)
        data = memoryview(buffer)[:count]
        fill(data, self._reading, self._path)
        seen = self._hash_in.submit(self.source_hash.update, data) if self._hash_source else None
        made = self.workers.submit(_make, data, seen, change) if change else _done(data)
        wrote = self._write.submit(self._put, made, self._written)
        self._under_way.append(self._hash_out.submit(self._finish, made, wrote, seen, buffer))
        self._written += size
        self._progress(count)

    def _put(self, made: Future[memoryview], offset: int) -> None:
        left = made.result()
        while left:
            wrote = os.pwrite(self._writing.fileno(), left[: blocks.WRITE_BYTES], offset)
            left, offset = left[wrote:], offset + wrote
        self._drain.reach(offset)

    def _finish(self, made: Future[memoryview], wrote: Future[None], seen: Future[None] | None, buffer: Buffer) -> None:
        try:
            self.output_hash.update(made.result())
            wrote.result()
            if seen:
                seen.result()
        finally:
            self._free.put(buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pool in (self._hash_in, self.workers, self._write, self._hash_out):
            pool.shutdown(cancel_futures=error is not None)
        self._drain.close()
        self._reading.close()
        self._writing.close()
        if error is None:
            for future in self._under_way:
                future.result()


def _make(data: memoryview, seen: Future[None] | None, change: Change) -> memoryview:
    if seen:
        seen.result()  # the source's hash has to see the bytes before they change
    return change(data)


def _done(data: memoryview) -> Future[memoryview]:
    done: Future[memoryview] = Future()
    done.set_result(data)
    return done


class _Drain:
    """Sends written bytes to the disk while the rest is computed, so that little is left to wait for at the end."""

    WINDOW_BYTES = 64 << 20

    def __init__(self, handle: int) -> None:
        self._handle, self._sent = handle, 0
        self._thread = ThreadPoolExecutor(1, "drain")
        self._sync = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)  # Linux

    def reach(self, end: int) -> None:
        """All bytes before `end` have been written to the file."""
        if self._sync is not None and end - self._sent >= self.WINDOW_BYTES:
            self._thread.submit(self._start, self._sent, end - self._sent)
            self._sent = end

    def _start(self, first: int, count: int) -> None:
        write = 2  # SYNC_FILE_RANGE_WRITE: begin, do not wait; the final fsync is what tells of failures
        assert self._sync is not None
        self._sync(self._handle, ctypes.c_int64(first), ctypes.c_int64(count), write)

    def close(self) -> None:
        """Wait for what was begun."""
        self._thread.shutdown(cancel_futures=True)
