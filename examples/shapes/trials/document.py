"""Tables, a plot and grids of an experiment, written into few-step.md between two marks; text around them stays."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from trials.plot import Point, draw_plot
from trials.trial import COLUMNS
from trials.variants import VARIANTS, Variant
from trials.workspace import PICTURES, Workspace

BEGIN, END = "<!-- experiment: written by `make experiment` -->", "<!-- /experiment -->"
NAME = "few-step.md"
LABEL, CELL, GAP = 300, 96, 2
INK, PAPER = "#1d2733", "white"
BASES = {"drawn": "drawn pictures, through the VAE", "original": "original base, untrained",
         "fused": "fused base, untrained"}  # fmt: skip
KINDS = {"new few": "new style, 2 steps", "new many": "new style, 16 guided", "old few": "old prompts, 2 steps",
         "old many": "old prompts, 16 guided"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """One way of training, or a base, with what was found for each seed."""

    title: str
    found: Sequence[Mapping[str, Any]]
    variant: Variant | None = None

    def values(self, kind: str, figure: str) -> list[float]:
        """One for each seed."""
        return [each["scores"][kind][figure] for each in self.found]

    def mean(self, kind: str, figure: str = "distance") -> float:
        """Over the seeds."""
        return statistics.fmean(self.values(kind, figure))

    def health(self, figure: str) -> str:
        """Mean over the seeds, where the training measured it."""
        values = [each["health"][figure] for each in self.found if each.get("health")]
        return f"{statistics.fmean(values):.2f}" if values else "-"

    def seconds(self) -> str:
        """Mean over the seeds."""
        values = [each["seconds"] for each in self.found if each.get("seconds")]
        return f"{statistics.fmean(values):.0f}" if values else "-"


def lines_of(found: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """The bases, then every variant that was tried."""
    lines = [Line(title, [found[name]]) for name, title in BASES.items() if name in found]
    for variant in VARIANTS:
        tried = [each for name, each in found.items() if name.rpartition("-")[0] == variant.name]
        if tried:
            lines.append(Line(variant.title, tried, variant))
    return lines


def write_document(space: Workspace, found: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    """few-step.md in `folder`, with its pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, path = lines_of(found), folder / NAME
    points = [
        Point(line.title, line.mean("new few"), line.mean("old few"), line.variant is not None, _numbered(lines, line))
        for line in lines
    ]
    draw_plot(points, folder / "few-step-plot.png")
    for domain in ("new", "old"):
        draw_grid(space, lines, found, domain).quantize(192).save(folder / f"few-step-{domain}.png", optimize=True)
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# Training on a few-step base\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{_section(space, lines)}\n\n{END}{after}", encoding="utf-8")
    return path


def _numbered(lines: Sequence[Line], line: Line) -> int:
    return lines.index(line) + 1


def _section(space: Workspace, lines: Sequence[Line]) -> str:
    seeds = max((len(line.found) for line in lines if line.variant), default=0)
    head = ["", "way of training", *KINDS.values(), "right", "edges", "agreement", "sharpness", "s"]
    table = [" | ".join(["", *head, ""]).strip(), "|" + "---|" * len(head)]
    for number, line in enumerate(lines, 1):
        cells = [str(number), line.title, *(spread(line.values(kind, "distance")) for kind in KINDS)]
        cells += [f"{line.mean('new few', 'right'):.0%}", f"{line.mean('new few', 'edges'):.2f}"]
        cells += [line.health("agreement"), line.health("sharpness"), line.seconds()]
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [
            f"{seeds} seeds of {space.steps} steps of 16 pictures on {PICTURES} pictures of the style {space.style!r}; "
            f"{space.samples} samples a score. Frechet distances to drawn pictures (lower is better), mean ± standard "
            "deviation over seeds. right: share with the right shape, colour and style; edges: mean step between "
            "neighbouring pixels as a share of the drawn ones' (both: new style, 2 steps); agreement, sharpness: the "
            "trainer's health figures at its last step (1: as before the training); s: seconds of the whole training.",
            "",
            *table,
            "",
            "![distances in two steps: to the new style's pictures, and to the old domain's](few-step-plot.png)",
            "",
            "The new style in two steps, and then the old prompts in two steps, of one seed:",
            "",
            "![rows of pictures in the new style](few-step-new.png)",
            "",
            "![rows of pictures of old prompts](few-step-old.png)",
        ]
    )


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def draw_grid(
    space: Workspace, lines: Iterable[Line], found: Mapping[str, Mapping[str, Any]], domain: str
) -> Image.Image:
    """A row for each line, of its first seed."""
    rows = []
    for number, line in enumerate(lines, 1):
        name = _first(line, found)
        rows.append((f"{number}  {line.title}", torch.load(space.run_of(name) / f"{domain}-few.pt")))
    sheet = Image.new("RGB", (LABEL + COLUMNS * (CELL + GAP), len(rows) * (CELL + GAP)), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, (label, pictures) in enumerate(rows):
        top = row * (CELL + GAP)
        pen.multiline_text((6, top + CELL / 2), _wrapped(label), INK, font, anchor="lm")
        for column, picture in enumerate(pictures[:COLUMNS]):
            cell = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(cell, (LABEL + column * (CELL + GAP), top))
    return sheet


def _first(line: Line, found: Mapping[str, Mapping[str, Any]]) -> str:
    return next(name for name, each in found.items() if each is line.found[0])


def _wrapped(label: str, width: int = 36) -> str:
    rows = [""]
    for word in label.split(" "):
        if len(rows[-1]) + len(word) > width:
            rows.append("")
        rows[-1] += f"{word} "
    return "\n".join(row.rstrip() for row in rows)
