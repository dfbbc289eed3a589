"""What the cache holds, to be looked at: decoded latents, each with the caption that it is trained with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from lorafuse_common.errors import OutputError
from lorafuse_train.atomic import write_atomically
from lorafuse_train.console import progress
from lorafuse_train.dataset.data import Sample
from lorafuse_train.dataset.pictures import to_picture
from lorafuse_train.encoding.encode import Encodings, free
from lorafuse_train.plan import Plan
from lorafuse_train.recipes.recipe import Recipe
from lorafuse_train.samples.lettering import drawable, load_font, wrapped

CELL, GAP, LINES = 240, 12, 3
"""Pixels of a cell's longer side and between cells, and lines of a caption."""
FONT_SIZE, LINE_HEIGHT = 14, 18
FRAMES_SHOWN = 3
INK, FAINT, PAPER = "black", "#6b7280", "white"


@dataclass(frozen=True, slots=True)
class Cell:
    """One picture of the sheet."""

    picture: Image.Image
    name: str
    caption: str
    facts: str
    """Its size and what else there is to know."""


def write_contact_sheet(plan: Plan, encodings: Encodings, path: Path, most: int, device: torch.device) -> int:
    """Draw up to `most` samples, spread evenly over the dataset; how many they are.

    The captions in full, in any language, are in a .txt beside the picture.

    Raises:
        OutputError: it cannot be written.
    """
    samples = spread(plan.samples, most)
    recipe = plan.recipe
    vae = recipe.load_vae(plan.base.pipeline, device)
    root = plan.config.dataset_base_path
    cells = []
    for sample in progress(samples, len(samples), "decoding latents"):
        picture = _decoded(recipe, vae, encodings, sample)
        name = sample.path.relative_to(root).as_posix() if sample.path.is_relative_to(root) else str(sample.path)
        cells.append(Cell(picture, name, sample.caption, _facts(sample)))
    del vae
    free(device)
    sheet, legend = draw_sheet(cells), describe_cells(cells)
    try:
        write_atomically(path, lambda file: sheet.save(file, "PNG"))
        write_atomically(path.with_suffix(".txt"), lambda file: file.write_text(legend, encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    return len(cells)


def spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many, evenly spread and in their order."""
    count = min(most, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


@torch.no_grad()
def _decoded(recipe: Recipe, vae: object, encodings: Encodings, sample: Sample) -> Image.Image:
    """One picture; of a video its first, middle and last frame side by side."""
    pixels = recipe.decode(vae, encodings.latents(sample))
    if pixels.dim() == 3:
        return _thumbnail(to_picture(pixels))
    count = min(FRAMES_SHOWN, pixels.shape[1])
    chosen = [index * (pixels.shape[1] - 1) // max(1, count - 1) for index in range(count)]
    frames = [to_picture(pixels[:, index]) for index in chosen]
    strip = Image.new("RGB", (sum(frame.width for frame in frames), frames[0].height), PAPER)
    for index, frame in enumerate(frames):
        strip.paste(frame, (index * frame.width, 0))
    return _thumbnail(strip)


def _thumbnail(picture: Image.Image) -> Image.Image:
    """Scaled so that its longer side fills a cell; small pictures by whole numbers, so that every pixel is a square."""
    longest = max(picture.size)
    if longest <= CELL:
        times = max(1, CELL // longest)
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    size = tuple(max(1, round(side * CELL / longest)) for side in picture.size)
    return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _facts(sample: Sample) -> str:
    frames = f"{sample.frames} frames of " if sample.frames > 1 else ""
    controls = f", {len(sample.controls)} controls" if sample.controls else ""
    return f"{frames}{sample.size[1]}x{sample.size[0]}{controls}"


def draw_sheet(cells: Sequence[Cell]) -> Image.Image:
    """The cells in rows, each with its number, name and caption below; what the font lacks is left to the .txt."""
    columns = max(1, math.ceil(math.sqrt(len(cells))))
    rows = max(1, -(-len(cells) // columns))
    text_height = (LINES + 1) * LINE_HEIGHT
    width, height = CELL + GAP, CELL + text_height + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), load_font(FONT_SIZE)
    for index, cell in enumerate(cells):
        x, y = GAP + index % columns * width, GAP + index // columns * height
        sheet.paste(cell.picture, (x + (CELL - cell.picture.width) // 2, y + (CELL - cell.picture.height) // 2))
        number = index + 1
        head = f"{number}  {drawable(cell.name, font) or ''}"
        caption = drawable(cell.caption, font) or f"(caption {number} of the .txt)"
        pen.text((x, y + CELL + 2), wrapped(head, font, CELL, 1), FAINT, font)
        pen.multiline_text((x, y + CELL + 2 + LINE_HEIGHT), wrapped(caption, font, CELL, LINES), INK, font)
    return sheet


def describe_cells(cells: Sequence[Cell]) -> str:
    """The legend: a line for each cell, line breaks in captions as in JSON."""
    lines = [
        f"{number}\t{cell.name}\t{cell.facts}\t{json.dumps(cell.caption, ensure_ascii=False)}"
        for number, cell in enumerate(cells, 1)
    ]
    return "\n".join(["number\tfile\tsize\tcaption", *lines]) + "\n"
