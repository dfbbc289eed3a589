"""The few-step health of a run as a small picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from lorafuse_train.samples.health import LEAST_AGREEMENT, LEAST_SHARPNESS, Health

WIDTH, HEIGHT, MARGIN, GAP = 640, 150, 64, 46
"""Of one panel, and what is left around and between the two, in pixels."""
INK, FAINT, GRID, GOOD, BAD, PAPER = "#1f2937", "#6b7280", "#e5e7eb", "#3b82f6", "#dc2626", "white"


def draw_health(points: Sequence[Health]) -> Image.Image:
    """Agreement and sharpness over the steps; the dashed lines are where drift begins."""
    sheet = Image.new("RGB", (WIDTH + 2 * MARGIN, 2 * HEIGHT + GAP + 2 * MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 14), "few-step health (1: as before the training)", INK, ImageFont.load_default(18))
    steps = [point.step for point in points]
    _panel(pen, MARGIN, "agreement", steps, [point.agreement for point in points], LEAST_AGREEMENT)
    _panel(pen, MARGIN + HEIGHT + GAP, "sharpness", steps, [point.sharpness for point in points], LEAST_SHARPNESS)
    font = ImageFont.load_default(14)
    floor = MARGIN + 2 * HEIGHT + GAP
    for step in dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])):
        pen.text((_x(step, steps), floor + 8), str(step), FAINT, font, anchor="ma")
    pen.text((MARGIN + WIDTH / 2, floor + 28), "step", FAINT, font, anchor="ma")
    return sheet


def _x(step: int, steps: Sequence[int]) -> float:
    return MARGIN + WIDTH * (step - steps[0]) / max(steps[-1] - steps[0], 1)


def _panel(
    pen: ImageDraw.ImageDraw, top: int, name: str, steps: Sequence[int], values: Sequence[float], least: float
) -> None:
    """What is no number, or infinite, lies on the floor."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min([0.5, least, *finite]), max([1.1, *finite])
    font = ImageFont.load_default(14)

    def y(value: float) -> float:
        return top + HEIGHT * (high - value) / (high - low)

    pen.rectangle((MARGIN, top, MARGIN + WIDTH, top + HEIGHT), outline=GRID)
    pen.text((MARGIN, top - 5), name, INK, font, anchor="ls")
    for value in (1.0, least):
        pen.text((MARGIN - 6, y(value)), f"{value:g}", FAINT, font, anchor="rm")
    pen.line((MARGIN, y(1), MARGIN + WIDTH, y(1)), GRID)
    for x in range(MARGIN, MARGIN + WIDTH, 12):
        pen.line((x, y(least), x + 6, y(least)), BAD)
    heights = [y(value) if math.isfinite(value) else top + HEIGHT for value in values]
    line = [(_x(step, steps), height) for step, height in zip(steps, heights, strict=True)]
    pen.line(line, GOOD, 2)
    for point, value in zip(line, values, strict=True):
        pen.circle(point, 4, GOOD if value >= least else BAD)
    pen.text((MARGIN + WIDTH + 6, line[-1][1]), f"{values[-1]:.2f}", INK, font, anchor="lm")
