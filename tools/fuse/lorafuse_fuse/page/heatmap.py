"""The pictures of the report: how large each delta is beside its weight, and how much of it arrived."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from lorafuse_common.manifest import TensorChange
from lorafuse_fuse.findings import ratio_of

from .markup import Markup, element, joined

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")
_SHADES = 7
_GAIN_STEPS = ((0.99, "g0"), (0.97, "g1"), (0.95, "g2"), (0.9, "w0"), (0.8, "w1"), (0.5, "w2"), (-math.inf, "w3"))
"""The least gain of each colour: three shades of good, four of weak."""
_MOST_GAIN = 1.05
"""Beyond it more than the delta arrived, which coarse rounding can do."""


class Position(NamedTuple):
    """Where a tensor is in a model."""

    component: str | None
    group: str
    """The list of blocks, `transformer_blocks`; empty outside of blocks."""
    block: int
    kind: str
    """Which tensor of its block, without `.weight`."""


Group = dict[str, dict[int, TensorChange]]
"""Kind -> block -> what was done to that tensor."""


def position_of(change: TensorChange) -> Position:
    """The block that a tensor is in, by the first number in its name."""
    name = change.name.removesuffix(".weight")
    found = _NUMBER.search(change.name)
    kind = name[found.end() + 1 :] if found else ""
    if not found or not kind:
        return Position(change.component, "", 0, name)
    return Position(change.component, change.name[: found.start()].rstrip("."), int(found[0]), kind)


def grouped(changes: Sequence[TensorChange]) -> dict[tuple[str | None, str], Group]:
    """The changes by component and list of blocks, in the order of the file."""
    found: dict[tuple[str | None, str], Group] = {}
    for change in changes:
        at = position_of(change)
        found.setdefault((at.component, at.group), {}).setdefault(at.kind, {})[at.block] = change
    return found


class Scale(NamedTuple):
    """How a figure becomes a colour."""

    title: str
    of: Callable[[TensorChange], float | None]
    shade: Callable[[float | None], str]
    legend: tuple[tuple[str, str], ...]
    """Colour and what it stands for, in order."""
    summary: Callable[[Sequence[float]], float]
    """The one number shown beside a row."""
    summary_name: str
    text: Callable[[float], str]
    """It in words."""


def gain_scale() -> Scale:
    """Fixed steps, so that reports can be compared."""

    def shade(gain: float | None) -> str:
        if gain is None:
            return "none"
        return "over" if gain > _MOST_GAIN else next(name for least, name in _GAIN_STEPS if gain >= least)

    bounds = [f"{least:g}" for least, _ in _GAIN_STEPS[:-1]]
    texts = [*bounds, f"below {bounds[-1]}"]
    legend = [(name, text) for (_, name), text in zip(_GAIN_STEPS, texts, strict=True)]
    legend.append(("over", f"over {_MOST_GAIN}"))
    return Scale("gain", lambda change: change.gain, shade, tuple(legend), min, "least", "{:.3f}".format)


def ratio_scale(ratios: Sequence[float]) -> Scale:
    """Steps of equal ratios from the smallest delta/weight to the largest."""
    low, high = (min(ratios), max(ratios)) if ratios else (0.01, 0.02)
    step = max(math.log(high / low), math.log(2)) / _SHADES

    def shade(ratio: float | None) -> str:
        if not ratio:
            return "none"
        return f"s{min(_SHADES - 1, int(math.log(ratio / low) / step + 1e-9))}"

    legend = tuple((f"s{i}", f"{100 * low * math.exp(i * step):.2g} %") for i in range(_SHADES))
    return Scale("delta/weight", ratio_of, shade, legend, median, "median", lambda ratio: f"{100 * ratio:.2g} %")


def percent(ratio: float) -> str:
    """`1.35 %`, `0.012 %`: three digits."""
    return f"{100 * ratio:.3g} %"


def exact(change: TensorChange) -> str:
    """All figures of a tensor as the manifest has them."""
    ratio = ratio_of(change)
    return (
        f"{change.name}: delta/weight {percent(ratio) if ratio is not None else '-'}, gain {change.gain:g}, "
        f"loss {change.loss:g}, weight {change.weight_rms:g}, delta {change.delta_rms:g}"
    )


def heat_map(group: Group, scale: Scale) -> Markup:
    """Blocks along x, kinds of tensors along y; each row its own picture, so that it stretches to any width."""
    blocks = sorted({block for row in group.values() for block in row})
    first, count = blocks[0], blocks[-1] - blocks[0] + 1
    rows = [_row(kind, row, scale, first, count) for kind, row in group.items()]
    head = joined([element("span", scale.title, class_="name"), element("span", scale.summary_name, class_="number")])
    ticks = element("div", element("span"), _ticks(first, count), element("span"), class_="row axis")
    return element("figure", element("figcaption", head), *rows, ticks, _legend(group, scale))


def _row(kind: str, row: Mapping[int, TensorChange], scale: Scale, first: int, count: int) -> Markup:
    cells = [
        element(
            "rect", element("title", exact(change)), class_=scale.shade(scale.of(change)),
            x=f"{block - first + 0.04:g}", width="0.92", height="1",
        )
        for block, change in sorted(row.items())
    ]  # fmt: skip
    values = [value for change in row.values() if (value := scale.of(change)) is not None]
    label = f"{scale.title} of {kind} in {len(row)} blocks"
    strip = element(
        "svg", *cells, viewBox=f"0 0 {count} 1", preserveAspectRatio="none", role="img", aria_label=label
    )  # fmt: skip
    summary = scale.summary(values) if values else None
    text = "-" if summary is None else scale.text(summary)
    return element(
        "div", element("span", kind, class_="kind", title=kind), strip, element("span", text, class_="number"),
        class_="row",
    )  # fmt: skip


def _ticks(first: int, count: int) -> Markup:
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if count / step <= 8 or step == 1000)
    numbers = [n for n in range(first, first + count) if n % every == 0]
    marks = [element("span", str(n), style=f"left:{100 * (n - first + 0.5) / count:.2f}%") for n in numbers]
    return element("span", *marks, class_="ticks")


def _legend(group: Group, scale: Scale) -> Markup:
    used = {scale.shade(scale.of(change)) for row in group.values() for change in row.values()}
    entries = [entry for entry in scale.legend if entry[0] != "over" or "over" in used]
    if "none" in used:
        entries.append(("none", "zero"))
    marks = [element("span", element("i", class_=name), text) for name, text in entries]
    return element("div", "from", *marks, class_="legend")
