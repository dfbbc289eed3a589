"""SIGINT and SIGTERM ask a training to stop after its step; a second one stops it at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1
"""`prctl(2)`: the signal to get when the parent dies."""


def follow_launcher() -> None:
    """Get SIGTERM when `accelerate launch` dies of it.

    It does not pass signals on: without this, a cancelled job's training would run on, unseen, to its end. Linux only.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


@dataclass
class StopRequest:
    """Whether, and by which signal, the training was asked to stop."""

    number: int = 0

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that any process got, on all of them; 0 for none."""
        if accelerator.num_processes == 1:
            return self.number
        numbers = accelerator.gather(torch.tensor([self.number], device=accelerator.device))
        return int(numbers.max())


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within it, the first signal is noted and the next one has its usual effect."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.number = number
        signal.signal(number, before[number])

    before = {int(number): signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
