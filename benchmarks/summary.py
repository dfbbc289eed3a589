"""What the runs come to: medians and ranges, ratios within each round, and how they stand to the targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure import Usage
from benchmarks.rounds import Run

MOST_WALL_TO_COPY = 1.10
LEAST_PEER_TO_LORAFUSE = 4.0
MOST_RSS_BYTES = 0.6 * 2**30
MOST_CPU_TO_FLOOR = 1.5
_BUSY_SHARE = 0.10
"""Of the processors' time, used by others: from here on timings are pointed out as doubtful."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Some figures in short."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Median and range; there must be a value."""
    found = sorted(values)
    return Spread(statistics.median(found), found[0], found[-1])


@dataclass(frozen=True, slots=True)
class Summary:
    """One contender's runs."""

    name: str
    label: str
    rounds: int
    wall_seconds: Spread
    synced_seconds: Spread
    synced_to_copy: Spread
    """Ratios to `cp` in the same round."""
    user_seconds: float
    """Median, as the system's."""
    system_seconds: float
    cpu_seconds: Spread
    peak_rss_bytes: int
    """The largest."""
    peak_anon_bytes: int
    peak_file_bytes: int
    max_ulp: float | None
    """The farthest from lorafuse's result; None for a copy."""


def summarise(runs: Sequence[Run], labels: Mapping[str, str]) -> tuple[Summary, ...]:
    """The contenders' summaries in the order of `labels`, of runs that did what they should."""
    good = [run for run in runs if not run.failure]
    took_part = {run.contender for run in good}
    return tuple(_summary(name, label, good) for name, label in labels.items() if name in took_part)


def synced_ratio(runs: Sequence[Run], name: str, other: str) -> Spread:
    """Wall + sync of one contender over that of another in the same round, of all rounds that both were in."""
    times = {(run.contender, run.round): run.usage.synced_seconds for run in runs if not run.failure}
    rounds = [number for contender, number in times if contender == name and (other, number) in times]
    return spread(times[name, number] / times[other, number] for number in rounds)


def _summary(name: str, label: str, good: Sequence[Run]) -> Summary:
    runs = [run for run in good if run.contender == name]
    usages = [run.usage for run in runs]

    def of(figure: Callable[[Usage], float]) -> Spread:
        return spread(map(figure, usages))

    ulps = [ulp for run in runs if isinstance(ulp := run.check.get("max_ulp"), float)]
    return Summary(
        name=name,
        label=label,
        rounds=len(runs),
        wall_seconds=of(lambda usage: usage.wall_seconds),
        synced_seconds=of(lambda usage: usage.synced_seconds),
        synced_to_copy=synced_ratio(good, name, "cp"),
        user_seconds=of(lambda usage: usage.user_seconds).median,
        system_seconds=of(lambda usage: usage.system_seconds).median,
        cpu_seconds=of(lambda usage: usage.cpu_seconds),
        peak_rss_bytes=max(usage.peak_rss_bytes for usage in usages),
        peak_anon_bytes=max(usage.peak_anon_bytes for usage in usages),
        peak_file_bytes=max(usage.peak_file_bytes for usage in usages),
        max_ulp=max(ulps, default=None),
    )


@dataclass(frozen=True, slots=True)
class Floor:
    """The processor seconds that a fuse cannot do without: those of one copy and of the arithmetic."""

    copy_seconds: float
    hash_seconds: float
    """sha256 of base, LoRAs and output."""
    edit_seconds: float
    """lorafuse's editor on tensors in memory, on one core."""
    parts_seconds: Mapping[str, float]
    """The steps of an edit, each on its own and written as directly as can be."""
    import_seconds: float = 0.0
    """Of Python that imports torch and nothing else: not in the floor, but whoever computes with torch pays it."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.copy_seconds + self.hash_seconds + self.edit_seconds


def floor_of(measured: Mapping[str, object], copy: Summary, hashed_bytes: int, import_seconds: float) -> Floor:
    """The floor for a fuse that hashes so many bytes, from what `benchmarks.floor` measured."""
    per_gb, edit, parts = (measured[key] for key in ("sha256_seconds_per_gb", "edit_seconds", "parts_seconds"))
    assert isinstance(per_gb, float) and isinstance(edit, float) and isinstance(parts, dict)
    return Floor(copy.cpu_seconds.median, per_gb * hashed_bytes / 1e9, edit, parts, import_seconds)


@dataclass(frozen=True, slots=True)
class Target:
    """One promise, and what was measured."""

    text: str
    measured: float
    limit: float
    is_met: bool


def targets(runs: Sequence[Run], summaries: Sequence[Summary], floor: Floor) -> tuple[Target, ...]:
    """What issue 4 asks for, as far as its contenders took part."""
    by_name = {summary.name: summary for summary in summaries}
    ours = by_name.get("lorafuse")
    if ours is None:
        return ()

    def at_most(text: str, measured: float, limit: float) -> Target:
        return Target(f"{text} <= {limit:g}", measured, limit, measured <= limit)

    found = [
        at_most("wall + sync / cp, all hashed", ours.synced_to_copy.median, MOST_WALL_TO_COPY),
        at_most("peak RSS, GiB", ours.peak_rss_bytes / 2**30, MOST_RSS_BYTES / 2**30),
        at_most("CPU seconds / (cp + arithmetic)", ours.cpu_seconds.median / floor.seconds, MOST_CPU_TO_FLOOR),
    ]
    for name in ("diffusers", "peft"):
        if name in by_name:
            ratio = synced_ratio(runs, name, "lorafuse").median
            text = f"{name} / lorafuse, wall + sync >= {LEAST_PEER_TO_LORAFUSE:g}"
            found.append(Target(text, ratio, LEAST_PEER_TO_LORAFUSE, ratio >= LEAST_PEER_TO_LORAFUSE))
    return tuple(found)


def others_share(runs: Sequence[Run], cores: int) -> float:
    """The largest part of the processors' time that others used, or a hypervisor withheld, during a run."""
    return max(
        (run.usage.other_cpu_seconds + run.usage.stolen_seconds) / (run.usage.synced_seconds * cores) for run in runs
    )


def is_doubtful(runs: Sequence[Run], cores: int) -> bool:
    """Whether others used so much of the processors that timings say little."""
    return others_share(runs, cores) > _BUSY_SHARE
