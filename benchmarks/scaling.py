"""python -m benchmarks.scaling --sizes 3 6 12

How a fuse grows: with the checkpoint, with the LoRAs' rank and with their number; and how long it takes to start.
Figures go to stdout, to OUT/scaling-STATE.json and to OUT/scaling-STATE.png; everything else it made is removed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.fuse import run_main
from benchmarks.inputs import make_inputs
from benchmarks.jobs import Job, job_of
from benchmarks.machine import machine_facts
from benchmarks.rounds import Arena, Run, State, orders, tell
from benchmarks.startup import StartUp, measure_startup
from benchmarks.summary import MOST_RSS_BYTES, Spread, Summary, Target, summarise
from benchmarks.table import describe_doubts, describe_summaries, describe_targets, ranged
from benchmarks.workspace import BenchmarkError, remove, workspace


@dataclass(frozen=True, slots=True)
class Case:
    """One fuse of the many."""

    size_gb: float
    rank: int
    loras: int

    @property
    def name(self) -> str:
        """Among those of its size."""
        return f"lorafuse-r{self.rank}-x{self.loras}"


@dataclass(frozen=True, slots=True)
class Point:
    """A case's or a copy's figures."""

    base_bytes: int
    rank: int
    """0 for a copy."""
    loras: int
    summary: Summary


@dataclass(frozen=True, slots=True)
class Line:
    """`seconds = fixed + per_gb * GB`, by least squares."""

    fixed: float
    per_gb: float
    most_off: float
    """The largest distance of a point from the line, as a part of its figure."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", type=float, nargs="+", default=[3, 6, 12], help="GB of the checkpoints (default: %(default)s)")
    add("--size", type=float, default=6, help="GB of the one that ranks are varied on (default: %(default)s)")
    add("--ranks", type=int, nargs="*", default=[16, 64, 256], help="default: %(default)s")
    add("--counts", type=int, nargs="*", default=[1, 2, 4], help="LoRAs fused at once (default: %(default)s)")
    add("--rank", type=int, default=64, help="where sizes and counts vary (default: %(default)s)")
    add("--rounds", type=int, default=5, help="runs of each case (default: %(default)s)")
    add("--state", type=State, default=State.WARM, choices=list(State), help="what is cached (default: %(default)s)")
    add("--dry-run-size", type=float, default=40, help="GB of the sparse checkpoint (default: %(default)s)")
    add("--fuse-args", default="", help="further options for lorafuse fuse, such as '--workers 1'")
    add("--seed", type=int, default=0, help="of the order of runs (default: %(default)s)")
    add("--out", type=Path, default=Path("build/bench"), help="where to work and write (default: %(default)s)")
    add("--keep", action="store_true", help="leave checkpoints and LoRAs in OUT/work for the next time")
    return parser.parse_args(arguments)


def cases_of(args: argparse.Namespace) -> dict[float, list[Case]]:
    """Size -> its cases, each once."""
    cases = [Case(size, args.rank, 1) for size in args.sizes]
    cases += [Case(args.size, rank, 1) for rank in args.ranks]
    cases += [Case(args.size, args.rank, count) for count in args.counts]
    sizes = sorted({case.size_gb for case in cases})
    return {size: list(dict.fromkeys(case for case in cases if case.size_gb == size)) for size in sizes}


def measure_size(
    args: argparse.Namespace, folder: Path, size: float, cases: Sequence[Case]
) -> tuple[list[Point], list[Run]]:
    """All cases of one checkpoint and its copy, interleaved.

    Raises:
        BenchmarkError: there is no room, or `cp` or lorafuse fails.
    """
    counts: dict[int, int] = {}
    for case in cases:
        counts[case.rank] = max(case.loras, counts.get(case.rank, 0))
    shape, options = make_inputs(folder, size, counts), shlex.split(args.fuse_args)
    jobs = {case.name: job_of(folder, shape, case.rank, case.loras, options) for case in cases}
    first = next(iter(jobs.values()))
    contenders = {"cp": CONTENDERS["cp"](first)}
    contenders |= {name: replace(CONTENDERS["lorafuse"](job), name=name) for name, job in jobs.items()}
    runs = _run_rounds(args, folder, {"cp": first, **jobs}, contenders)
    gb = f"{first.base_bytes / 1e9:.1f} GB"
    labels = {case.name: f"{gb}, rank {case.rank}" + f" x {case.loras}" * (case.loras > 1) for case in cases}
    summaries = {summary.name: summary for summary in summarise(runs, {"cp": f"{gb}, cp -r", **labels})}
    points = [Point(first.base_bytes, 0, 0, summaries["cp"])]
    points += [Point(first.base_bytes, case.rank, case.loras, summaries[case.name]) for case in cases]
    return points, runs


def _run_rounds(
    args: argparse.Namespace, folder: Path, jobs: Mapping[str, Job], contenders: Mapping[str, Contender]
) -> list[Run]:
    arena, runs = Arena(folder, args.state), list[Run]()
    for name, contender in contenders.items():
        if not contender.is_copy:
            arena.set_up(jobs[name], contender, folder / f"reference-{name}.npy")
    some = next(name for name, contender in contenders.items() if not contender.is_copy)
    for number, order in enumerate(orders(list(contenders), args.rounds, args.seed)):
        for position, name in enumerate(order):
            reference = folder / f"reference-{some if name == 'cp' else name}.npy"
            run = arena.run(jobs[name], contenders[name], number, position, reference)
            tell(run, name, args.rounds)
            if run.failure:
                raise BenchmarkError(f"{name}: {run.failure}")
            runs.append(run)
    return runs


def fit(points: Sequence[tuple[float, float]]) -> Line | None:
    """A line through (GB, seconds); None where there are too few sizes."""
    if len({gb for gb, _ in points}) < 2:
        return None
    per_gb, fixed = statistics.linear_regression(*zip(*points, strict=True))
    off = max(abs(fixed + per_gb * gb - seconds) / seconds for gb, seconds in points)
    return Line(fixed, per_gb, off)


def by_size(points: Sequence[Point], rank: int) -> list[Point]:
    """The points that differ in size only: copies for rank 0."""
    return [point for point in points if point.rank == rank and point.loras == min(rank, 1)]


def report(args: argparse.Namespace, points: Sequence[Point], runs: Sequence[Run], start: StartUp) -> None:
    """Print the table; write the JSON and the picture."""
    from benchmarks.curves import draw_scaling

    machine = machine_facts(args.out)
    stem = args.out / f"scaling-{args.state}"
    lines = {name: _lines(by_size(points, rank)) for name, rank in (("cp", 0), ("lorafuse", args.rank))}
    peak = max(point.summary.peak_rss_bytes for point in points) / 2**30
    limit = MOST_RSS_BYTES / 2**30
    found = [Target(f"peak RSS of every case, GiB <= {limit:g}", peak, limit, peak <= limit), *start.targets]
    facts = {
        "benchmark": "scaling",
        "parameters": {name: value for name, value in vars(args).items() if name not in ("out", "keep")},
        "machine": machine,
        "points": [asdict(point) for point in points],
        "lines": {name: {key: line and asdict(line) for key, line in two.items()} for name, two in lines.items()},
        "start_up": asdict(start),
        "targets": [asdict(target) for target in found],
        "runs": [asdict(run) for run in runs],
    }
    stem.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['file_system']}, {machine['kernel']}"
    draw_scaling(stem.with_suffix(".png"), f"{args.state} · {args.rounds} rounds · {where}", points, args.rank)
    cores = machine["cores"]
    assert isinstance(cores, int)
    print(f"How a fuse grows, {args.state}, {args.rounds} rounds in random order; {where}\n")
    print(describe_summaries([point.summary for point in points]) + "\n")
    print("\n".join(_describe_line(name, key, line) for name, two in lines.items() for key, line in two.items()))
    print(f"\nlorafuse --help {_seconds(start.help_seconds)}; dry run {_seconds(start.dry_run_seconds)}\n")
    print(describe_targets(found))
    print("\n".join(["", *describe_doubts(runs, cores, {}), f"{stem}.json, {stem}.png"]))


def _lines(points: Sequence[Point]) -> dict[str, Line | None]:
    figures = {
        "wall + sync": [(point.base_bytes / 1e9, point.summary.synced_seconds.median) for point in points],
        "CPU": [(point.base_bytes / 1e9, point.summary.cpu_seconds.median) for point in points],
    }
    return {name: fit(pairs) for name, pairs in figures.items()}


def _describe_line(name: str, figure: str, line: Line | None) -> str:
    if line is None:
        return f"{name}, {figure}: one size only"
    return f"{name}, {figure}: {line.fixed:.2f} s + {line.per_gb:.3f} s/GB, points within {line.most_off:.0%} of it"


def _seconds(figures: Spread) -> str:
    return f"{ranged(figures)} s"


def bench(args: argparse.Namespace) -> int:
    """The whole benchmark.

    Raises:
        BenchmarkError: it cannot be run.
    """
    points, runs = list[Point](), list[Run]()
    with workspace(args.out, keep=args.keep) as folder:
        start = measure_startup(folder, args.dry_run_size, keep=args.keep)
        for size, cases in cases_of(args).items():
            more_points, more_runs = measure_size(args, folder, size, cases)
            points, runs = points + more_points, runs + more_runs
            if not args.keep:
                for path in folder.glob("*-b[0-9]*"):
                    remove(path)
        report(args, points, runs, start)
    return 0


def main() -> None:
    run_main(lambda: bench(parse_arguments()))


if __name__ == "__main__":
    main()
