"""Rounds of runs: every contender once in each, in random order, from the same state of the machine."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from benchmarks.contenders import Contender, clean_environment
from benchmarks.inputs import ROOT
from benchmarks.jobs import Job
from benchmarks.machine import cached_share, chill, files_below, warm
from benchmarks.measure import Usage, run_measured
from benchmarks.workspace import BenchmarkError, remove


class State(StrEnum):
    """What the page cache holds when a contender starts."""

    WARM = "warm"
    """Its inputs, as far as they fit."""
    COLD = "cold"
    """Its program, not its inputs."""
    ALL_COLD = "all-cold"
    """Nothing: what it costs to load Python and torch from the disk counts too."""


@dataclass(frozen=True, slots=True)
class Run:
    """One contender in one round."""

    contender: str
    round: int
    position: int
    """In the round's order, from 0."""
    cached_share: float | None
    """The part of its inputs that the page cache held at its start."""
    usage: Usage
    check: Mapping[str, object]
    """What was found in its result; empty where it failed."""

    @property
    def failure(self) -> str | None:
        """What went wrong, or None."""
        if self.usage.status:
            signalled = f"killed by signal {-self.usage.status}" if self.usage.status < 0 else "failed"
            last = self.usage.tail.strip().split("\n")[-1]
            return f"{signalled}: {last}" if last else signalled
        return None if self.check.get("ok") else f"its result is wrong: {json.dumps(self.check)}"


class Arena:
    """The folder in which contenders meet: their cache, their results, and what these are compared with."""

    def __init__(self, folder: Path, state: State) -> None:
        self._folder, self._state = folder, state
        self._known, self._cache = folder / "known-hashes", folder / "cache"

    def set_up(self, job: Job, lorafuse: Contender, reference: Path) -> None:
        """Fuse once, untimed: what lorafuse makes is the reference, and itself compared with fp64 arithmetic.

        Raises:
            BenchmarkError: lorafuse fails, or is wrong.
        """
        self._prepare(lorafuse, job.out)
        if (usage := self._measure(lorafuse)).status:
            raise BenchmarkError(f"{lorafuse.label} fails: {usage.tail.strip()}")
        loras = [text for path in job.loras for text in ("--lora", str(path))]
        check = _check("reference", job.base, job.out, reference, loras)
        if not check.get("ok"):
            raise BenchmarkError(f"{lorafuse.label} does not make what fp64 arithmetic does: {json.dumps(check)}")

    def remember(self, job: Job) -> None:
        """Hash the base once, into the memory that contenders with `knows_base` start with."""
        code = "import sys, pathlib; from lorafuse_common.hashing import sha256_of as h; "
        code += "[h(pathlib.Path(path)) for path in sys.argv[1:]]"
        paths = map(str, files_below([job.base]))
        environment = clean_environment(self._known)
        subprocess.run([sys.executable, "-c", code, *paths], check=True, cwd=ROOT, env=environment)

    def run(self, job: Job, contender: Contender, number: int, position: int, reference: Path) -> Run:
        """One measured run, its check, and the removal of what it made."""
        self._prepare(contender, job.out)
        cached = cached_share(contender.inputs)
        usage = self._measure(contender)
        check: Mapping[str, object] = {}
        if not usage.status:
            check = _check("copy" if contender.is_copy else "compare", job.base, job.out, reference)
        remove(job.out)
        return Run(contender.name, number, position, cached, usage, check)

    def _measure(self, contender: Contender) -> Usage:
        environment = clean_environment(self._cache) | dict(contender.environment)
        return run_measured(contender.command, environment, self._folder / "log.txt")

    def _prepare(self, contender: Contender, out: Path) -> None:
        remove(out)
        remove(self._cache)
        if contender.knows_base:
            shutil.copytree(self._known, self._cache)
        os.sync()
        if self._state is State.WARM:
            warm(contender.inputs)
            return
        chill(contender.inputs)
        if self._state is State.COLD:
            load = [sys.executable, "-c", contender.loads] if contender.loads else [contender.command[0], "--version"]
            subprocess.run(load, check=True, stdout=subprocess.DEVNULL)


def _check(command: str, base: Path, out: Path, reference: Path, options: Sequence[str] = ()) -> dict[str, object]:
    """What `benchmarks.check` finds; a result that it cannot read is a wrong one."""
    arguments = ["--base", str(base), "--out", str(out), "--reference", str(reference), *options]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.check", command, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    if run.returncode:
        return {"ok": False, "error": run.stderr.strip().split("\n")[-1]}
    found: dict[str, object] = json.loads(run.stdout)
    return found


def orders(names: Sequence[str], rounds: int, seed: int) -> list[list[str]]:
    """The order of each round: random, and the same for the same seed."""
    generator = random.Random(seed)
    return [generator.sample(list(names), len(names)) for _ in range(rounds)]


def tell(run: Run, label: str, rounds: int) -> None:
    """One line about a run that has ended."""
    usage = run.usage
    figures = f"{usage.wall_seconds:7.2f} s, synced {usage.synced_seconds:7.2f}, CPU {usage.cpu_seconds:7.2f} s, "
    figures += f"peak {usage.peak_rss_bytes / 2**30:5.2f} GiB, others' CPU {usage.other_cpu_seconds:.1f} s"
    print(f"round {run.round + 1}/{rounds}  {label:26} {run.failure or figures}", file=sys.stderr, flush=True)
