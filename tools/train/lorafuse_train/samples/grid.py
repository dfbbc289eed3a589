"""A labelled sheet of pictures: one column a prompt, one row a model and schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .lettering import Font, drawable, load_font, wrapped

SMALLEST, LARGEST = 128, 512
"""Cells are scaled into this range: toy pictures become visible, large ones keep the sheet a handy file."""
GAP = 8
INK, PAPER = "black", "white"


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One row of the sheet."""

    label: str
    """May hold line breaks."""
    pictures: Sequence[Image.Image]


def draw_grid(captions: Sequence[str], rows: Sequence[LabelledRow]) -> Image.Image:
    """The sheet; every row has as many pictures as there are captions, and those of a column have one size.

    A caption in a script that the font has no letters of is replaced by its number.
    """
    cells = [[_scaled(picture) for picture in row.pictures] for row in rows]
    widths = [max(row[column].width for row in cells) for column in range(len(captions))]
    heights = [max(picture.height for picture in row) for row in cells]
    font = load_font(max(14, max(widths) // 18))
    heads = [
        _head(number, caption, font, width)
        for number, (caption, width) in enumerate(zip(captions, widths, strict=True), 1)
    ]
    labels = [row.label for row in rows]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = GAP + max(int(pen.multiline_textbbox((0, 0), label, font=font)[2]) for label in labels) + GAP
    top = GAP + max(int(pen.multiline_textbbox((0, 0), head, font=font)[3]) for head in heads) + GAP
    xs = [left + sum(widths[:column]) + column * GAP for column in range(len(widths))]
    ys = [top + sum(heights[:row]) + row * GAP for row in range(len(heights))]
    sheet = Image.new("RGB", (xs[-1] + widths[-1] + GAP, ys[-1] + heights[-1] + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for x, head in zip(xs, heads, strict=True):
        pen.multiline_text((x, GAP), head, INK, font)
    for y, label, pictures in zip(ys, labels, cells, strict=True):
        pen.multiline_text((GAP, y), label, INK, font)
        for x, picture in zip(xs, pictures, strict=True):
            sheet.paste(picture, (x, y))
    return sheet


def _scaled(picture: Image.Image) -> Image.Image:
    long, short = max(picture.size), min(picture.size)
    if short < SMALLEST:
        times = -(-SMALLEST // short)  # whole, so that every pixel stays a square
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    if long > LARGEST:
        size = (round(picture.width * LARGEST / long), round(picture.height * LARGEST / long))
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def _head(number: int, caption: str, font: Font, width: int) -> str:
    shown = drawable(caption, font)
    return wrapped(f"prompt {number}" if shown is None else shown, font, width, lines=4)
