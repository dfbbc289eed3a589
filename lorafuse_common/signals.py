"""Signals that end a process, held back where the exception they raise would come at the wrong moment.

Python raises it between any two steps of the main thread: between two renames that belong together, or where a lock
of a thread pool has just been taken that nobody will then release, and the process waits for it for ever.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class HeldSignals:
    """What was held back so far."""

    def __init__(self) -> None:
        self._before: dict[int, signal._HANDLER] = {}
        self._caught: list[int] = []

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._caught.append(number)

    def hold(self) -> None:
        """Only note signals from here on; those that the process ignores stay ignored."""
        for number in ENDING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._note)

    def heed(self) -> None:
        """Let a signal that was held back raise its exception here."""
        if self._caught:
            number = self._caught.pop(0)
            handler = self._before[number]
            if callable(handler):
                handler(number, None)
            else:  # the system's own way
                signal.signal(number, handler)
                signal.raise_signal(number)

    def release(self) -> None:
        """Let signals through again, and have one that was held back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for number in self._caught[:1]:
            signal.raise_signal(number)


@contextlib.contextmanager
def held_signals() -> Iterator[HeldSignals]:
    """Within it, signals that end a process are noted, and have their effect where they are heeded, or at its end."""
    held = HeldSignals()
    if threading.current_thread() is threading.main_thread():  # their exceptions arrive nowhere else
        held.hold()
    try:
        yield held
    finally:
        held.release()
