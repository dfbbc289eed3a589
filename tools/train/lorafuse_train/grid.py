"""A labelled sheet of pictures: one column a prompt, one row a model and schedule."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

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
    """The sheet; all pictures have one size, and every row has as many as there are captions."""
    cells = [[_scaled(picture) for picture in row.pictures] for row in rows]
    width, height = cells[0][0].size
    font = ImageFont.load_default(size=max(14, width // 18))
    heads = [_wrapped(caption, font, width, lines=4) for caption in captions]
    labels = [row.label for row in rows]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = GAP + max(int(pen.multiline_textbbox((0, 0), label, font=font)[2]) for label in labels) + GAP
    top = GAP + max(int(pen.multiline_textbbox((0, 0), head, font=font)[3]) for head in heads) + GAP
    sheet = Image.new("RGB", (left + len(heads) * (width + GAP), top + len(rows) * (height + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        pen.multiline_text((left + column * (width + GAP), GAP), head, INK, font)
    for index, (label, pictures) in enumerate(zip(labels, cells, strict=True)):
        y = top + index * (height + GAP)
        pen.multiline_text((GAP, y), label, INK, font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + column * (width + GAP), y))
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


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> str:
    """`text` in at most `lines` lines of about `width` pixels."""
    letters = max(8, int(width / max(font.getlength("n"), 1)))
    return "\n".join(textwrap.wrap(" ".join(text.split()), letters, max_lines=lines, placeholder="...")) or " "
