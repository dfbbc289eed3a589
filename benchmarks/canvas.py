"""Drawing with Pillow: shapes at three times the size for smooth edges, text in Pillow's own font."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, GRID, PAPER = "#1d2733", "#66717e", "#e4e8ec", "#ffffff"
_ZOOM = 3


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class Canvas:
    """A white page; lengths are pixels of the finished picture."""

    def __init__(self, width: int, height: int) -> None:
        self._image = Image.new("RGB", (width * _ZOOM, height * _ZOOM), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def text(self, at: tuple[float, float], text: str, size: int = 15, fill: str = INK, anchor: str = "lm") -> None:
        """Text at a point: anchor `lm` is left and middle, as Pillow has it."""
        self._draw.text((at[0] * _ZOOM, at[1] * _ZOOM), text, fill=fill, font=_font(size * _ZOOM), anchor=anchor)

    def bar(self, left: float, top: float, right: float, bottom: float, fill: str) -> None:
        """A filled rectangle; one without width is not drawn."""
        if right > left:
            self._draw.rectangle([v * _ZOOM for v in (left, top, right, bottom)], fill=fill)

    def dot(self, at: tuple[float, float], radius: float, fill: str, outline: str = PAPER) -> None:
        """A filled circle with an edge."""
        box = [(at[i % 2] + sign * radius) * _ZOOM for i, sign in ((0, -1), (1, -1), (0, 1), (1, 1))]
        self._draw.ellipse(box, fill=fill, outline=outline, width=_ZOOM)

    def line(self, start: tuple[float, float], stop: tuple[float, float], fill: str = GRID, width: float = 1) -> None:
        """A straight line."""
        ends = [v * _ZOOM for v in (*start, *stop)]
        self._draw.line(ends, fill=fill, width=max(1, round(width * _ZOOM)))

    def dashes(self, start: tuple[float, float], stop: tuple[float, float], fill: str, width: float = 1.5) -> None:
        """A dashed line."""
        length = math.dist(start, stop)
        count = max(1, round(length / 9))
        for index in range(count):
            ends = [
                (start[0] + (stop[0] - start[0]) * share, start[1] + (stop[1] - start[1]) * share)
                for share in (index / count, (index + 0.55) / count)
            ]
            self.line(ends[0], ends[1], fill, width)

    def save(self, path: Path) -> None:
        """Write the finished picture."""
        size = (self._image.width // _ZOOM, self._image.height // _ZOOM)
        self._image.resize(size, Image.Resampling.LANCZOS).save(path, optimize=True)


@dataclass(frozen=True, slots=True)
class Scale:
    """Where figures from 0 to `most` lie on a line from pixel `first` to pixel `last`."""

    most: float
    first: float
    last: float

    def __call__(self, figure: float) -> float:
        """The pixel of a figure."""
        return self.first + (self.last - self.first) * min(1.0, figure / self.most)

    def ticks(self, about: int = 4) -> list[float]:
        """Round figures, from 0 to at most `most`."""
        rough = self.most / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * round_step for round_step in (1, 2, 2.5, 5, 10) if power * round_step >= rough)
        return [step * index for index in range(int(self.most / step + 1e-9) + 1)]
