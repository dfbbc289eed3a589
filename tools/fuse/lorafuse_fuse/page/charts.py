"""The report's small charts: why deltas were weakened, and the few-step schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorafuse_common.manifest import Schedule, TensorChange
from lorafuse_fuse.findings import WEAK_GAIN, ratio_of

from .heatmap import exact, gain_scale, percent
from .markup import Markup, element, joined

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 420, 220, 34, 34, 10
_RIGHT = 22


def _text(x: float, y: float, text: str, anchor: str = "middle") -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def _chart(*content: str, label: str) -> Markup:
    return element("svg", *content, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label, class_="chart")


def survival_chart(changes: Sequence[TensorChange]) -> Markup:
    """Gain against delta/weight, a dot for each tensor."""
    points = [(ratio, change) for change in changes if (ratio := ratio_of(change))]
    low = math.floor(math.log10(min(ratio for ratio, _ in points)))
    high = max(low + 1, math.ceil(math.log10(max(ratio for ratio, _ in points))))
    bottom = min(0.0, min(change.gain for _, change in points))
    top = max(1.0, max(change.gain for _, change in points)) + 0.05

    def x(ratio: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (math.log10(ratio) - low) / (high - low)

    def y(gain: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (top - gain) / (top - bottom)

    shade = gain_scale().shade
    grid = [_line(_LEFT, y(gain), _WIDTH - _RIGHT, y(gain), "grid") for gain in (0, 0.5, 1)]
    axis = [_text(_LEFT - 6, y(gain) + 4, f"{gain:g}", "end") for gain in (0, 0.5, 1)]
    axis += [_text(x(10.0**n), _HEIGHT - _BOTTOM + 16, percent(10.0**n)) for n in range(low, high + 1)]
    axis.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 3, "delta/weight"))
    limit = [
        _line(_LEFT, y(WEAK_GAIN), _WIDTH - _RIGHT, y(WEAK_GAIN), "limit"),
        _text(_WIDTH - _RIGHT, y(WEAK_GAIN) + 14, f"gain {WEAK_GAIN:g}", "end"),
    ]
    dots = [
        element(
            "circle", element("title", exact(change)), cx=f"{x(ratio):.1f}", cy=f"{y(change.gain):.1f}", r="3.5",
            class_=shade(change.gain),
        )
        for ratio, change in points
    ]  # fmt: skip
    return _chart(*grid, *axis, *dots, *limit, label="gain against delta/weight, a dot for each tensor")


def schedule_chart(schedule: Schedule) -> Markup:
    """The noise level of each step, down to 0."""
    levels = [*schedule.sigmas, 0.0]
    steps = len(schedule.sigmas)

    def x(step: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT - 14) * step / steps

    def y(level: float) -> float:
        return _TOP + 14 + (_HEIGHT - _TOP - _BOTTOM - 14) * (1 - level)

    grid = [_line(_LEFT, y(level), _WIDTH - _RIGHT, y(level), "grid") for level in (0, 0.5, 1)]
    axis = [_text(_LEFT - 6, y(level) + 4, f"{level:g}", "end") for level in (0, 0.5, 1)]
    axis.append(
        _text(
            (_LEFT + _WIDTH) / 2, _HEIGHT - 3, f"{steps} step{'s' if steps > 1 else ''} from noise (1) to picture (0)"
        )
    )
    path = element("polyline", points=" ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(levels)), class_="path")
    shown = {i for i, level in enumerate(levels[:-1]) if level < 1 and (steps <= 10 or i == steps - 1)}
    marks = [
        joined(
            [
                element("circle", element("title", f"{level:g}"), cx=f"{x(i):.1f}", cy=f"{y(level):.1f}", r="4"),
                *([_text(x(i) + 6, y(level) - 7, f"{level:.3g}", "start")] if i in shown else []),
            ]
        )
        for i, level in enumerate(levels)
    ]
    return _chart(*grid, *axis, path, *marks, label="noise levels of the few-step schedule")
