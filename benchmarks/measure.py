"""One command as a fresh process: its time, its processor seconds and its memory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ProcessorTicks, load_average, processor_ticks

_SECONDS_BETWEEN_SAMPLES = 0.05
_TAIL_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its children used."""

    status: int
    """0, the exit status, or minus the signal that ended it."""
    tail: str
    """The end of what it printed, where it failed."""
    wall_seconds: float
    synced_seconds: float
    """Until the process had ended and `sync` had returned."""
    user_seconds: float
    system_seconds: float
    peak_rss_bytes: int
    """The kernel's `ru_maxrss`: of the largest process, file pages counted. Not below this program's own (20 MB)."""
    peak_anon_bytes: int
    peak_file_bytes: int
    """Of the process itself, sampled."""
    minor_faults: int
    major_faults: int
    load_average: tuple[float, float, float]
    """At its start."""
    other_cpu_seconds: float
    """Processor seconds that everything else on the machine used meanwhile, the kernel's writing included."""
    stolen_seconds: float
    """Processor seconds that a hypervisor gave to others meanwhile."""

    @property
    def cpu_seconds(self) -> float:
        """User and system."""
        return self.user_seconds + self.system_seconds


def run_measured(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Usage:
    """Run a command, its output in `log`, and wait for it and for the disk.

    The caller must be a small process: Linux counts what a process held before `exec` into its peak.
    """
    load, before, started = load_average(), processor_ticks(), time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(environment))
    try:
        with _MemorySampler(process.pid) as memory:
            _, status, used = os.wait4(process.pid, 0)
            ended = time.perf_counter()
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        process.kill()
        process.wait()
        raise
    os.sync()
    synced, after = time.perf_counter(), processor_ticks()
    other = _others(before, after, used.ru_utime + used.ru_stime)
    return Usage(
        status=process.returncode,
        tail=log.read_text(errors="replace")[-_TAIL_CHARACTERS:] if process.returncode else "",
        wall_seconds=ended - started,
        synced_seconds=synced - started,
        user_seconds=used.ru_utime,
        system_seconds=used.ru_stime,
        peak_rss_bytes=used.ru_maxrss * 1024,
        peak_anon_bytes=memory.anon,
        peak_file_bytes=memory.file,
        minor_faults=used.ru_minflt,
        major_faults=used.ru_majflt,
        load_average=load,
        other_cpu_seconds=other,
        stolen_seconds=after.stolen - before.stolen,
    )


def _others(before: ProcessorTicks, after: ProcessorTicks, own: float) -> float:
    return max(0.0, after.busy - before.busy - own)


class _MemorySampler:
    """Looks at a process's memory from a thread, until the block ends."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.anon = self.file = 0

    def _watch(self) -> None:
        while not self._done.wait(_SECONDS_BETWEEN_SAMPLES):
            try:
                fields = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
            except OSError:  # it has ended
                return
            self.anon = max(self.anon, _kilobytes(fields.get("RssAnon")))
            self.file = max(self.file, _kilobytes(fields.get("RssFile")))

    def __enter__(self) -> _MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _kilobytes(field: str | None) -> int:
    return int(field.split()[0]) * 1024 if field else 0
