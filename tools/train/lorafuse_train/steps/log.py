"""The record of a run: metrics.csv, metrics.jsonl, the trackers, and what the terminal shows."""

from __future__ import annotations

import collections
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from lorafuse_train.console import SECONDS_BETWEEN_LINES, is_main, say
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.steps.trackers import Trackers, open_trackers

CSV, JSONL = "metrics.csv", "metrics.jsonl"
GIB = 2**30


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step."""

    step: int
    """Counted from 1."""
    epoch: float
    """Passes over the data set that are done."""
    loss: float
    lr: float
    grad_norm: float
    """Before clipping."""
    preserve_loss: float = 0.0
    """What the predictions for other prompts have moved by, times its weight; 0 where nothing is preserved."""


@dataclass(frozen=True, slots=True)
class Row:
    """What the files hold of a step; all but the last three are the same whenever and wherever it is run."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    preserve_loss: float
    images_per_second: float
    seconds: float
    peak_memory_gib: float


VALIDATED = ("validation_loss", "health_agreement", "health_sharpness")
"""What a validation adds, in rows of its own that leave the columns of a step empty; not all are always measured."""
COLUMNS = (*(field.name for field in dataclasses.fields(Row)), *VALIDATED)


@dataclass
class Log:
    """Takes a record after every step."""

    total: int
    device: torch.device
    csv: TextIO
    jsonl: TextIO
    trackers: Trackers
    bar: Any
    _last: float = field(default_factory=time.monotonic)
    _told: float = field(default_factory=time.monotonic)
    _recent: collections.deque[float] = field(default_factory=lambda: collections.deque(maxlen=50))
    _seconds: collections.deque[float] = field(default_factory=lambda: collections.deque(maxlen=50))

    def restart_clock(self) -> None:
        """Do not count what happened between two steps, such as drawing samples."""
        self._last = time.monotonic()

    def add(self, record: StepRecord, pictures: int) -> None:
        """Write a step of so many pictures everywhere."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._recent.append(record.loss)
        self._seconds.append(seconds)
        row = Row(
            **dataclasses.asdict(record),
            images_per_second=round(pictures / max(seconds, 1e-9), 3),
            seconds=round(seconds, 4),
            peak_memory_gib=round(peak_memory(self.device) / GIB, 3),
        )
        values = dataclasses.asdict(row)
        self._write(values)
        self.trackers.log({name: value for name, value in values.items() if name != "step"}, row.step)
        self._show(row)

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Write what was measured after `step`, some of `VALIDATED`, everywhere."""
        self._write({"step": step, **values})
        self.trackers.validation(values, step)

    def _write(self, values: Mapping[str, float]) -> None:
        self.csv.write(",".join(repr(values[name]) if name in values else "" for name in COLUMNS) + "\n")
        self.jsonl.write(json.dumps(values) + "\n")
        for file in (self.csv, self.jsonl):
            file.flush()

    def picture(self, name: str, file: Path, step: int) -> None:
        """Show a picture in the trackers."""
        self.trackers.picture(name, file, step)

    def end_bar(self) -> None:
        """Leave the progress bar as it is; what follows are lines."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _show(self, row: Row) -> None:
        loss, pace = statistics.fmean(self._recent), statistics.fmean(self._seconds)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, lr {row.lr:.2e}", refresh=False)
            self.bar.update()
        elif row.step in (1, self.total) or self._last - self._told > SECONDS_BETWEEN_LINES:
            self._told = self._last
            left = pace * (self.total - row.step)
            say(
                f"step {row.step}/{self.total}  loss {loss:.4f}  lr {row.lr:.2e}  "
                f"{pace:.2f} s/step  {_clock(left)} left"
            )


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use: the tensors' on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    # Linux counts it in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _kept(path: Path, done: int) -> list[str]:
    """The lines that an interrupted run wrote of the steps that are kept."""
    # What stands behind the last line's end is a line that was cut short.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if done and path.is_file() else []
    if path.suffix == ".csv":
        return [line for line in lines[1:] if int(line.split(",")[0]) <= done]
    return [line for line in lines if json.loads(line)["step"] <= done]


@contextmanager
def open_log(config: TrainConfig, total: int, done: int, device: torch.device) -> Iterator[Log | None]:
    """Keep the record from step `done` on; None on processes that keep none."""
    if not is_main():
        yield None
        return
    folder = config.output_path
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = []
        for name, head in ((CSV, [",".join(COLUMNS)]), (JSONL, [])):
            lines = [*head, *_kept(folder / name, done)]
            files.append(stack.enter_context((folder / name).open("w", encoding="utf-8")))
            files[-1].write("".join(f"{line}\n" for line in lines))
        trackers = stack.enter_context(open_trackers(config, done))
        bar = tqdm(total=total, initial=done, desc="training", unit="step") if sys.stderr.isatty() else None
        log = Log(total, device, files[0], files[1], trackers, bar)
        stack.callback(log.end_bar)
        yield log
