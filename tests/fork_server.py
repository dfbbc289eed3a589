"""Runs `lorafuse` in forks of a process that has imported everything: a run costs a tenth of a second, not four.

Reads jobs from stdin, answers on stdout, one JSON object a line; `Forks` is the other end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parent.parent
CHANGING = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.symlink", "shutil.rmtree", "fcntl.flock")
"""Audit events before which the disk is about to change; so is it before a file is opened to write, or synced."""


@dataclass(frozen=True)
class Job:
    """One or more runs of the same command at once, and what becomes of them."""

    args: list[str]
    signal: int = 0
    after: float = 0.0
    """Seconds after the start at which `signal` is sent."""
    at_change: int = 0
    """Send SIGKILL at this change of the disk, counted from 1."""
    runs: int = 1
    largest_file: int = 0
    """RLIMIT_FSIZE, which makes writing fail as a full disk does."""
    exchanges: bool = True
    """Whether the file system can exchange two names."""


@dataclass(frozen=True)
class Done:
    """How one run ended."""

    code: int
    """As `subprocess` has it: negative for a signal."""
    err: str
    seconds: float
    changes: int
    """Of the disk."""


class Forks:
    """The server, for as long as the `with` lasts."""

    def __init__(self) -> None:
        path = os.pathsep.join(map(str, (ROOT, ROOT / "tools/fuse")))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LORAFUSE_HASH_CACHE": "off"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def run(self, job: Job) -> list[Done]:
        """Carry a job out."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        return [Done(**found) for found in json.loads(self._process.stdout.readline())]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _child(job: Job, err: int, changes: int, ready: int) -> None:
    """Run the command; never returns."""
    from lorafuse_common import publish
    from lorafuse_fuse import cli

    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(120)  # should it ever hang
    if job.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.largest_file, job.largest_file))
    if not job.exchanges:
        publish._exchange = lambda one, other: False
    _count_changes(job.at_change, changes)
    sys.argv = ["lorafuse", *job.args]
    code: Any = 70
    try:
        os.close(ready)
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _count_changes(fatal: int, file: int) -> None:
    """Note every change of the disk in a file, and kill the process at that of the given number."""
    counted = 0

    def count(*_: object) -> None:
        nonlocal counted
        counted += 1
        os.pwrite(file, counted.to_bytes(4, "little"), 0)
        if counted == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGING or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
            count()

    synced = os.fsync

    def sync(fd: Any) -> None:
        count()
        synced(fd)
        count()

    os.fsync = sync
    sys.addaudithook(watch)


def _serve(job: Job) -> list[Done]:
    begin, end = os.pipe()  # children wait until they can read its end, so that several start at once
    started = []
    for _ in range(job.runs):
        err, changes = os.memfd_create("err"), os.memfd_create("changes")
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(end)
            os.read(begin, 1)
            _child(job, err, changes, write)
        os.close(write)
        started.append((pid, err, changes, read))
    os.close(begin)
    os.close(end)
    for _, _, _, read in started:
        os.read(read, 1)
    start = time.monotonic()
    if job.signal:
        time.sleep(job.after)
        for pid, _, _, _ in started:
            _kill(pid, job.signal)
    done = []
    for pid, err, changes, read in started:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seconds = time.monotonic() - start
        text = os.pread(err, 1 << 20, 0).decode()
        done.append(Done(code, text, seconds, int.from_bytes(os.pread(changes, 4, 0), "little")))
        for handle in (err, changes, read):
            os.close(handle)
    return done


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise


def main() -> None:
    """Answer jobs until there are no more."""
    from lorafuse_fuse import blocks, cli, execute, fuse, report  # noqa: F401  # for the forks

    blocks.PIECE_BYTES = 1 << 14  # many pieces of a small model
    with contextlib.redirect_stderr(None), contextlib.suppress(SystemExit):  # and what a first command imports
        sys.argv = ["lorafuse", "inspect", "absent"]
        cli.main()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps([asdict(done) for done in _serve(Job(**json.loads(line)))]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
