"""The picture of a comparison: a row for each contender; bars for medians, dots for runs, dashes for targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.canvas import FAINT, GRID, INK, Canvas, Scale
from benchmarks.measure import Usage
from benchmarks.rounds import Run
from benchmarks.summary import MOST_RSS_BYTES, MOST_WALL_TO_COPY, Summary

_WIDTH, _LEFT, _GAP, _TOP, _ROW, _BAR = 1560, 232, 44, 150, 54, 26
_GIB = 2**30
_TARGET = "#c0392b"
_COLOURS = {"cp": ("#7d8894", "#b9c1c9"), "lorafuse": ("#1769aa", "#86b6dc"), "": ("#b8733a", "#e2bd98")}
"""Name -> the strong colour, and the light one for the second part of a bar; the last is for others."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """One figure of all contenders."""

    title: str
    parts: Callable[[Summary], tuple[float, ...]]
    """The lengths of a bar's one or two parts."""
    run: Callable[[Usage], float]
    """A run's dot."""
    text: Callable[[Summary], str]
    target: float | None = None


def _panels(summaries: Sequence[Summary]) -> tuple[_Panel, ...]:
    copy = next(summary for summary in summaries if summary.name == "cp")
    return (
        _Panel(
            f"wall + sync, seconds   (dashes: {MOST_WALL_TO_COPY:.2f} x cp)",
            lambda summary: (summary.synced_seconds.median,),
            lambda usage: usage.synced_seconds,
            lambda summary: f"{summary.synced_seconds.median:.1f} s   {summary.synced_to_copy.median:.2f} x",
            copy.synced_seconds.median * MOST_WALL_TO_COPY,
        ),
        _Panel(
            "processor seconds   (dark: user, light: system)",
            lambda summary: (summary.user_seconds, summary.system_seconds),
            lambda usage: usage.cpu_seconds,
            lambda summary: f"{summary.cpu_seconds.median:.1f} s",
        ),
        _Panel(
            f"peak memory, GiB   (dark: own, light: file pages; dashes: {MOST_RSS_BYTES / _GIB:.1f})",
            _memory_parts,
            lambda usage: usage.peak_rss_bytes / _GIB,
            lambda summary: f"{summary.peak_rss_bytes / _GIB:.2f}",
            MOST_RSS_BYTES / _GIB,
        ),
    )


def _memory_parts(summary: Summary) -> tuple[float, float]:
    own = min(summary.peak_anon_bytes, summary.peak_rss_bytes)
    return own / _GIB, (summary.peak_rss_bytes - own) / _GIB


def colours_of(name: str) -> tuple[str, str]:
    """A contender's strong and light colour."""
    return _COLOURS.get(name.split("-")[0], _COLOURS[""])


def draw_summaries(path: Path, title: str, subtitle: str, summaries: Sequence[Summary], runs: Sequence[Run]) -> None:
    """Draw and write the picture."""
    bottom = _TOP + _ROW * len(summaries)
    canvas = Canvas(_WIDTH, bottom + 62)
    canvas.text((28, 40), title, 27)
    canvas.text((28, 74), subtitle, 15, FAINT)
    for row, summary in enumerate(summaries):
        canvas.text((_LEFT - 16, _TOP + _ROW * (row + 0.5)), summary.label, 16, anchor="rm")
    panels = _panels(summaries)
    width = (_WIDTH - _LEFT - 28 - _GAP * (len(panels) - 1)) / len(panels)
    for number, panel in enumerate(panels):
        left = _LEFT + number * (width + _GAP)
        _draw_panel(canvas, panel, (left, left + width, bottom), summaries, runs)
    canvas.save(path)


def _draw_panel(
    canvas: Canvas, panel: _Panel, box: tuple[float, float, float], summaries: Sequence[Summary], runs: Sequence[Run]
) -> None:
    left, right, bottom = box
    dots = [
        [panel.run(run.usage) for run in runs if run.contender == summary.name and not run.failure]
        for summary in summaries
    ]
    most = max(max(map(max, dots)), (panel.target or 0) * 1.1)
    scale = Scale(most * 1.04, left, right - 104)  # the rest is for text
    canvas.text((left, _TOP - 26), panel.title, 14, FAINT)
    for tick in scale.ticks():
        canvas.line((scale(tick), _TOP - 8), (scale(tick), bottom + 6), GRID)
        canvas.text((scale(tick), bottom + 20), f"{tick:g}", 13, FAINT, "mm")
    for row, (summary, figures) in enumerate(zip(summaries, dots, strict=True)):
        _draw_row(canvas, panel, scale, _TOP + _ROW * (row + 0.5), summary, figures)
    if panel.target is not None:
        canvas.dashes((scale(panel.target), _TOP - 8), (scale(panel.target), bottom + 6), _TARGET)
    canvas.line((left, _TOP - 8), (left, bottom + 6), INK, 1.2)


def _draw_row(
    canvas: Canvas, panel: _Panel, scale: Scale, middle: float, summary: Summary, figures: Sequence[float]
) -> None:
    at, length = scale.first, 0.0
    for part, colour in zip(panel.parts(summary), colours_of(summary.name), strict=False):
        length += part
        canvas.bar(at, middle - _BAR / 2, scale(length), middle + _BAR / 2, colour)
        at = scale(length)
    for figure in figures:
        canvas.dot((scale(figure), middle), 3.6, INK)
    canvas.text((scale(max(length, *figures)) + 10, middle), panel.text(summary), 14)
