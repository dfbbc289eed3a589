"""Reading one file and writing another in step: hashing and writing run beside the caller's arithmetic."""

from __future__ import annotations

import hashlib
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from lorafuse_common.errors import CheckpointError

from .blocks import BUFFERS, COPY_BLOCK_BYTES


class Piece(NamedTuple):
    """Some bytes of the source, on their way to the output."""

    data: memoryview
    hashed: Future[None]
    """Done when the source's hash has seen the bytes; only then may they be changed."""
    buffer: bytearray


class Stream:
    """One thread hashes the source, another hashes and writes the output; both leave the interpreter to the caller."""

    def __init__(self, source: Path, out: Path, progress: Callable[[int], object]) -> None:
        self._path, self._progress = source, progress
        self._reading: BinaryIO = source.open("rb", buffering=0)
        self._writing: BinaryIO = out.open("xb", buffering=0)
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(bytearray(COPY_BLOCK_BYTES))
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._under_way: deque[Future[None]] = deque()
        self.source_hash, self.output_hash = hashlib.sha256(), hashlib.sha256()

    def read(self, count: int) -> Piece:
        """The next `count` bytes of the source.

        Raises:
            CheckpointError: the source has ended.
            OSError: reading failed, or writing an earlier piece did.
        """
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft().result()
        buffer = self._free.get()
        if len(buffer) < count:
            buffer = bytearray(count)
        data, at = memoryview(buffer)[:count], 0
        while at < count:
            got = self._reading.readinto(data[at:])  # type: ignore[attr-defined]
            if not got:
                raise CheckpointError(f"{self._path}: ended early; did it change while it was read?")
            at += got
        return Piece(data, self._hasher.submit(self.source_hash.update, data), buffer)

    def write(self, piece: Piece, data: memoryview) -> None:
        """Send `data` to the output in a piece's place, mostly its own; neither must be touched afterwards."""
        self._under_way.append(self._writer.submit(self._finish, piece, data))
        self._progress(len(piece.data))

    def replace(self, count: int, data: bytes) -> None:
        """Read `count` bytes and write `data` in their place."""
        while count:
            piece = self.read(min(count, COPY_BLOCK_BYTES))
            count -= len(piece.data)
            self.write(piece, memoryview(b"" if count else data))

    def _finish(self, piece: Piece, data: memoryview) -> None:
        try:
            self._emit(data)
            piece.hashed.result()
        finally:
            self._free.put(piece.buffer)

    def _emit(self, data: memoryview) -> None:
        self.output_hash.update(data)
        while data:
            data = data[self._writing.write(data) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hasher.shutdown(cancel_futures=error is not None)
        self._writer.shutdown(cancel_futures=error is not None)
        self._reading.close()
        self._writing.close()
        if error is None:
            for future in self._under_way:
                future.result()
