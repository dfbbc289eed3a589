"""The picture of how a fuse grows: time, processor seconds and memory against size (above) and rank (below)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.canvas import FAINT, GRID, INK, Canvas, Scale
from benchmarks.summary import MOST_RSS_BYTES, Spread, Summary

if TYPE_CHECKING:
    from benchmarks.scaling import Point

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 1380, 860, 70, 170, 80
_PANEL_WIDTH, _PANEL_HEIGHT = 370, 250
_COPY, _FUSE, _STACK, _TARGET = "#7d8894", "#1769aa", "#b8733a", "#c0392b"
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class _Curve:
    """One line: a label, a colour, and its points."""

    label: str
    colour: str
    points: Sequence[tuple[float, Spread]]


_Figure = Callable[[Summary], Spread]
_FIGURES: Sequence[tuple[str, _Figure, float | None]] = (
    ("wall + sync, seconds", lambda summary: summary.synced_seconds, None),
    ("processor seconds", lambda summary: summary.cpu_seconds, None),
    (
        f"peak memory, GiB   (dashes: {MOST_RSS_BYTES / _GIB:.1f})",
        lambda summary: Spread(*[summary.peak_rss_bytes / _GIB] * 3),
        MOST_RSS_BYTES / _GIB,
    ),
)


def draw_scaling(path: Path, subtitle: str, points: Sequence[Point], rank: int) -> None:
    """Draw and write the picture; `rank` is that of the cases that differ in size or number."""
    canvas = Canvas(_WIDTH, _HEIGHT)
    canvas.text((28, 40), "How a fuse grows", 27)
    canvas.text((28, 74), subtitle, 15, FAINT)
    varied = max(points, key=lambda point: sum(point.base_bytes == other.base_bytes for other in points)).base_bytes
    for column, (title, figure, target) in enumerate(_FIGURES):
        left = _LEFT + column * (_PANEL_WIDTH + _GAP)
        _draw_panel(canvas, (left, _TOP), title, "GB of the checkpoint", _by_size(points, rank, figure), target)
        curves = _by_rank([point for point in points if point.base_bytes == varied], rank, figure)
        x_title = f"rank, or sum of ranks, at {varied / 1e9:.1f} GB"
        _draw_panel(canvas, (left, _TOP + _PANEL_HEIGHT + 110), title, x_title, curves, target)
    _draw_legend(canvas, rank)
    canvas.save(path)


def _by_size(points: Sequence[Point], rank: int, figure: _Figure) -> list[_Curve]:
    def curve(label: str, colour: str, of_rank: int) -> _Curve:
        chosen = [point for point in points if point.rank == of_rank and point.loras == min(of_rank, 1)]
        return _Curve(label, colour, [(point.base_bytes / 1e9, figure(point.summary)) for point in chosen])

    return [curve("cp -r", _COPY, 0), curve("one LoRA", _FUSE, rank)]


def _by_rank(points: Sequence[Point], rank: int, figure: _Figure) -> list[_Curve]:
    stacked = sorted((point for point in points if point.rank == rank), key=lambda point: point.loras)
    single = sorted((point for point in points if point.loras == 1), key=lambda point: point.rank)
    copies = [figure(point.summary) for point in points if point.rank == 0]
    widest = max(point.rank * point.loras for point in points)
    return [
        _Curve("cp -r", _COPY, [(at, copy) for copy in copies for at in (0.0, float(widest))]),
        _Curve("several", _STACK, [(point.rank * point.loras, figure(point.summary)) for point in stacked]),
        _Curve("one LoRA", _FUSE, [(point.rank, figure(point.summary)) for point in single]),
    ]


def _draw_legend(canvas: Canvas, rank: int) -> None:
    at = 28.0
    for colour, text in ((_COPY, "cp -r"), (_FUSE, "one LoRA"), (_STACK, f"1, 2, ... LoRAs of rank {rank}")):
        canvas.bar(at, 102, at + 22, 106, colour)
        canvas.text((at + 30, 104), text, 15)
        at += 58 + 8 * len(text)


def _draw_panel(
    canvas: Canvas,
    corner: tuple[float, float],
    title: str,
    x_title: str,
    curves: Sequence[_Curve],
    target: float | None,
) -> None:
    left, top = corner
    right, bottom = left + _PANEL_WIDTH, top + _PANEL_HEIGHT
    points = [point for curve in curves for point in curve.points]
    across = Scale(max(x for x, _ in points) * 1.05, left, right)
    up = Scale(max(*(figures.high for _, figures in points), target or 0) * 1.08, bottom, top)
    canvas.text((left, top - 22), title, 14, FAINT)
    for tick in up.ticks():
        canvas.line((left, up(tick)), (right, up(tick)), GRID)
        canvas.text((left - 8, up(tick)), f"{tick:g}", 13, FAINT, "rm")
    for tick in across.ticks(5):
        canvas.text((across(tick), bottom + 16), f"{tick:g}", 13, FAINT, "mm")
    canvas.text(((left + right) / 2, bottom + 40), x_title, 14, FAINT, "mm")
    if target is not None:
        canvas.dashes((left, up(target)), (right, up(target)), _TARGET)
    canvas.line((left, bottom), (right, bottom), INK, 1.2)
    for curve in curves:
        _draw_curve(canvas, across, up, curve)


def _draw_curve(canvas: Canvas, across: Scale, up: Scale, curve: _Curve) -> None:
    places = [(across(x), up(figures.median)) for x, figures in curve.points]
    for start, stop in itertools.pairwise(places):
        canvas.line(start, stop, curve.colour, 2)
    for x, figures in curve.points:
        canvas.line((across(x), up(figures.low)), (across(x), up(figures.high)), curve.colour, 1.5)
        canvas.dot((across(x), up(figures.median)), 4.5, curve.colour)
