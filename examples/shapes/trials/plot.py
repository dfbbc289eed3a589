"""A plot of two distances, both on logarithmic axes: left and low is good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ZOOM = 2
WIDTH, HEIGHT, MARGIN, KEY = 560, 480, 64, 420
INK, FAINT, GRID, PAPER, TRIED, BASE = "#1d2733", "#66717e", "#e4e8ec", "white", "#1769aa", "#b8733a"


@dataclass(frozen=True, slots=True)
class Point:
    """One way of training, or a base as it is."""

    title: str
    new: float
    """Distance to the new style's pictures, in few steps."""
    old: float
    """Distance to the old domain's."""
    is_trained: bool
    number: int


def draw_plot(points: Sequence[Point], path: Path) -> None:
    """Numbered dots, and a key beside them."""
    sheet = Image.new("RGB", ((WIDTH + 2 * MARGIN + KEY) * ZOOM, (HEIGHT + 2 * MARGIN) * ZOOM), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14 * ZOOM)
    across = _Axis([point.new for point in points], MARGIN, MARGIN + WIDTH)
    up = _Axis([point.old for point in points], MARGIN + HEIGHT, MARGIN)
    for tick in across.ticks():
        x = across(tick)
        pen.line([(x, MARGIN * ZOOM), (x, (MARGIN + HEIGHT) * ZOOM)], GRID, ZOOM)
        pen.text((x, (MARGIN + HEIGHT + 8) * ZOOM), f"{tick:g}", FAINT, font, anchor="ma")
    for tick in up.ticks():
        y = up(tick)
        pen.line([(MARGIN * ZOOM, y), ((MARGIN + WIDTH) * ZOOM, y)], GRID, ZOOM)
        pen.text(((MARGIN - 8) * ZOOM, y), f"{tick:g}", FAINT, font, anchor="rm")
    pen.text((MARGIN * ZOOM, 16 * ZOOM), "old prompts in 2 steps: distance to drawn pictures", INK, font)
    middle = (MARGIN + WIDTH / 2) * ZOOM
    pen.text((middle, (MARGIN + HEIGHT + 34) * ZOOM), "new style in 2 steps: distance", INK, font, anchor="ma")
    for row, point in enumerate(points):
        colour, at = TRIED if point.is_trained else BASE, (across(point.new), up(point.old))
        pen.circle(at, 11 * ZOOM, colour, PAPER, ZOOM)
        pen.text(at, str(point.number), PAPER, ImageFont.load_default(12 * ZOOM), anchor="mm")
        left, top = (2 * MARGIN + WIDTH - 24) * ZOOM, (MARGIN + 10 + row * 30) * ZOOM
        pen.circle((left, top), 11 * ZOOM, colour, PAPER, ZOOM)
        pen.text((left, top), str(point.number), PAPER, ImageFont.load_default(12 * ZOOM), anchor="mm")
        pen.text((left + 20 * ZOOM, top), point.title, INK, font, anchor="lm")
    sheet.resize((sheet.width // ZOOM, sheet.height // ZOOM), Image.Resampling.LANCZOS).save(path, optimize=True)


class _Axis:
    """Pixels of positive figures, on a logarithmic scale."""

    def __init__(self, figures: Sequence[float], first: float, last: float) -> None:
        self._low, self._high = math.log(min(figures) / 1.25), math.log(max(figures) * 1.25)
        self._first, self._last = first, last

    def __call__(self, figure: float) -> float:
        share = (math.log(figure) - self._low) / (self._high - self._low)
        return (self._first + share * (self._last - self._first)) * ZOOM

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten within the axis."""
        powers = range(math.floor(self._low / math.log(10)) - 1, math.ceil(self._high / math.log(10)) + 1)
        found = [step * 10.0**power for power in powers for step in (1, 2, 5)]
        return [figure for figure in found if self._low <= math.log(figure) <= self._high]
