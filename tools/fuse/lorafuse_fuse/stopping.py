"""Ctrl-C, SIGTERM and a closed terminal end a run by an exception, so that what it staged is removed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal was closed"}
_SECONDS_TO_LEAVE = 0.001


class Stopped(SystemExit):
    """The process was asked to end; no `except Exception` holds it up, and its status is that of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number, self.message = number, _WORDS[signal.Signals(number)]


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within it, signals that end a process raise `Stopped`, but for those that it was started to ignore (nohup).

    Where Python has to swallow the exception (it strikes in a finalizer or in a callback of C code), the signal is
    sent again, after a moment.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    def resend(swallowed: sys.UnraisableHookArgs) -> None:
        if isinstance(swallowed.exc_value, Stopped):
            arguments = os.getpid(), swallowed.exc_value.number
            threading.Timer(_SECONDS_TO_LEAVE, os.kill, arguments).start()
        else:
            unraisable(swallowed)

    unraisable = sys.unraisablehook
    before = {number: signal.getsignal(number) for number in _WORDS}
    heeded = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    try:
        sys.unraisablehook = resend
        for number in heeded:
            signal.signal(number, stop)
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
        sys.unraisablehook = unraisable
