"""Several processes filling one cache: every entry once, and what a killed one leaves is taken over."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT

from lorafuse_train.encoding.claims import Claims, shared

PATHS = ":".join(map(str, (ROOT, ROOT / "tools/fuse", ROOT / "tools/train")))
WORKER = """
    import hashlib, sys, time
    from pathlib import Path
    from lorafuse_train.encoding.claims import shared

    root, count, seconds, name = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]
    paths = {root / f"{key}.safetensors": number for number, key in enumerate(keys)}
    for path, number in shared(root, paths, Path.exists, "entries"):
        with (root / f"{name}.log").open("a") as file:
            print(number, file=file, flush=True)
        time.sleep(seconds)
        path.write_text(name)
    print("done", flush=True)
"""


def key(number: int) -> Path:
    return Path(f"{hashlib.sha256(str(number).encode()).hexdigest()}.safetensors")


def worker(root: Path, count: int, seconds: float, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKER), str(root), str(count), str(seconds), name],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PATHS},
    )


def logged(root: Path, name: str) -> list[str]:
    path = root / f"{name}.log"
    return path.read_text().split() if path.exists() else []


def test_work_is_shared_and_nothing_done_twice(tmp_path: Path) -> None:
    workers = [worker(tmp_path, 30, 0.05, name) for name in ("a", "b", "c")]
    for process in workers:
        assert process.communicate(timeout=120)[0].split()[-1] == "done"
    done = [logged(tmp_path, name) for name in ("a", "b", "c")]
    assert sorted(int(number) for numbers in done for number in numbers) == list(range(30))
    # Each returns only when everything is there, whoever made it.
    assert all((tmp_path / key(number)).exists() for number in range(30))


def test_what_a_killed_process_was_at_is_taken_over(tmp_path: Path) -> None:
    first = worker(tmp_path, 3, 60, "slow")
    deadline = time.monotonic() + 60
    while not logged(tmp_path, "slow"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = worker(tmp_path, 3, 0, "quick")
    while len(logged(tmp_path, "quick")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert second.poll() is None  # it waits for what the first one is at
    first.kill()
    first.wait()
    assert second.communicate(timeout=60)[0].split()[-1] == "done"
    assert sorted(logged(tmp_path, "quick")) == ["0", "1", "2"]


def test_an_entry_that_appeared_meanwhile_is_not_made_again(tmp_path: Path) -> None:
    paths = {tmp_path / key(number): number for number in range(3)}
    made = []
    for path, number in shared(tmp_path, paths, Path.exists, "entries"):
        made.append(number)
        path.touch()
        (tmp_path / key(2)).touch()
    assert made == [0, 1]


def test_an_error_lets_go(tmp_path: Path) -> None:
    paths = {tmp_path / key(0): 0}
    with pytest.raises(KeyError):
        for _ in shared(tmp_path, paths, Path.exists, "entries"):
            raise KeyError
    process = worker(tmp_path, 1, 0, "next")
    assert process.communicate(timeout=60)[0].split()[-1] == "done"
    assert logged(tmp_path, "next") == ["0"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refusing)
    with Claims(tmp_path) as taken:
        assert taken.take(tmp_path / key(0))
        taken.release(tmp_path / key(0))
    paths = {tmp_path / key(number): number for number in range(3)}
    assert [number for _, number in shared(tmp_path, paths, Path.exists, "entries")] == [0, 1, 2]


def test_nothing_missing_opens_nothing(tmp_path: Path) -> None:
    assert list(shared(tmp_path / "absent", {}, Path.exists, "entries")) == []
