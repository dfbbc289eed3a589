"""The record of a run: log.csv, TensorBoard and what the terminal shows."""

from __future__ import annotations

import collections
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from .console import SECONDS_BETWEEN_LINES, is_main, say

COLUMNS = "step,loss,lr,seconds"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimiser step."""

    step: int
    """Counted from 1."""
    loss: float
    lr: float
    grad_norm: float
    """Before clipping."""


@dataclass
class Log:
    """Takes a record after every step; does nothing but on the main process."""

    total: int
    csv: TextIO
    board: Any
    bar: Any
    _last: float = field(default_factory=time.monotonic)
    _told: float = field(default_factory=time.monotonic)
    _recent: collections.deque[float] = field(default_factory=lambda: collections.deque(maxlen=50))
    _seconds: collections.deque[float] = field(default_factory=lambda: collections.deque(maxlen=50))

    def restart_clock(self) -> None:
        """Do not count what happened between two steps, such as drawing samples."""
        self._last = time.monotonic()

    def add(self, record: StepRecord) -> None:
        """Write one step everywhere."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._recent.append(record.loss)
        self._seconds.append(seconds)
        self.csv.write(f"{record.step},{record.loss!r},{record.lr!r},{seconds:.4f}\n")
        self.csv.flush()
        for name in ("loss", "lr", "grad_norm"):
            self.board.add_scalar(f"train/{name}", getattr(record, name), record.step)
        self.board.add_scalar("train/seconds", seconds, record.step)
        self._show(record)

    def _show(self, record: StepRecord) -> None:
        loss, pace = statistics.fmean(self._recent), statistics.fmean(self._seconds)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, lr {record.lr:.2e}", refresh=False)
            self.bar.update()
        elif record.step in (1, self.total) or self._last - self._told > SECONDS_BETWEEN_LINES:
            self._told = self._last
            left = pace * (self.total - record.step)
            say(
                f"step {record.step}/{self.total}  loss {loss:.4f}  lr {record.lr:.2e}  "
                f"{pace:.2f} s/step  {_clock(left)} left"
            )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _rows(path: Path, done: int) -> list[str]:
    """What an interrupted run recorded of the steps that are kept."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if done and path.is_file() else []
    return [line for line in lines if int(line.split(",")[0]) <= done]


@contextmanager
def open_log(folder: Path, total: int, done: int = 0) -> Iterator[Log | None]:
    """Write `folder/log.csv` and `folder/logs/` from step `done` on; None on processes that keep no record."""
    if not is_main():
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        earlier = _rows(folder / "log.csv", done)
        csv = stack.enter_context((folder / "log.csv").open("w", encoding="utf-8"))
        csv.write("\n".join([COLUMNS, *earlier, ""]))
        board = SummaryWriter(str(folder / "logs"), purge_step=done)
        stack.callback(board.close)
        bar = tqdm(total=total, initial=done, desc="training", unit="step") if sys.stderr.isatty() else None
        if bar is not None:
            stack.callback(bar.close)
        yield Log(total, csv, board, bar)
