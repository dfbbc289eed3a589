"""What a person reads on stdout: a table, the floor, the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.rounds import Run
from benchmarks.summary import Floor, Spread, Summary, Target, is_doubtful, others_share

_HEADINGS = ("", "wall s", "wall + sync s", "x cp", "CPU s", "user + sys", "peak GiB", "anon + file", "max ulp")


def grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def ranged(figures: Spread, digits: int = 2) -> str:
    """`1.08 [0.97-1.20]`."""
    return f"{figures.median:.{digits}f} [{figures.low:.{digits}f}-{figures.high:.{digits}f}]"


def describe_summaries(summaries: Sequence[Summary]) -> str:
    """The table: medians and ranges."""
    return grid(_HEADINGS, [_row(summary) for summary in summaries])


def _row(summary: Summary) -> tuple[str, ...]:
    gib = 2**30
    return (
        summary.label,
        ranged(summary.wall_seconds),
        ranged(summary.synced_seconds),
        ranged(summary.synced_to_copy),
        ranged(summary.cpu_seconds),
        f"{summary.user_seconds:.1f} + {summary.system_seconds:.1f}",
        f"{summary.peak_rss_bytes / gib:.2f}",
        f"{summary.peak_anon_bytes / gib:.2f} + {summary.peak_file_bytes / gib:.2f}",
        "-" if summary.max_ulp is None else f"{summary.max_ulp:g}",
    )


def describe_floor(floor: Floor, ours: Summary | None) -> str:
    """The line that lorafuse's processor seconds are judged by, and what an edit consists of."""
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in floor.parts_seconds.items())
    text = (
        f"arithmetic floor, CPU s: cp {floor.copy_seconds:.2f} + sha256 {floor.hash_seconds:.2f} "
        f"+ edit {floor.edit_seconds:.2f} = {floor.seconds:.2f}"
    )
    if ours is not None:
        text += f"; lorafuse {ours.cpu_seconds.median:.2f} = {ours.cpu_seconds.median / floor.seconds:.2f} x"
    steps = f"steps of an edit, each alone: {parts} = {sum(floor.parts_seconds.values()):.2f}"
    return f"{text}\n  {steps}\n  not in the floor: importing torch {floor.import_seconds:.2f}"


def describe_targets(targets: Sequence[Target]) -> str:
    """A line for each."""
    return "\n".join(
        f"{'met   ' if target.is_met else 'MISSED'}  {target.text}: {target.measured:.2f}" for target in targets
    )


def describe_doubts(runs: Sequence[Run], cores: int, skipped: Mapping[str, str]) -> list[str]:
    """What a reader has to know before believing the figures."""
    found = [f"{name} left out: {reason}" for name, reason in skipped.items()]
    found += [f"{run.contender}, round {run.round + 1}: {run.failure}" for run in runs if run.failure]
    if is_doubtful(runs, cores):
        share = others_share(runs, cores)
        found.append(f"the machine was busy: others took up to {share:.0%} of its processors; timings say little")
    return found
