"""`lorafuse-train show-timesteps`: the noise levels that a run would draw, as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from lorafuse_common.errors import OutputError
from lorafuse_train.atomic import write_atomically
from lorafuse_train.base import open_base
from lorafuse_train.console import say
from lorafuse_train.dataset.data import Sample, read_dataset
from lorafuse_train.dataset.order import Order, seed_for
from lorafuse_train.dataset.pictures import geometry
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.plan import make_order, plan_noise
from lorafuse_train.recipes import recipe_for
from lorafuse_train.recipes.recipe import Shape
from lorafuse_train.samples.held_out import hold_out
from lorafuse_train.steps.timesteps import NoiseLevels

FILE_NAME = "timesteps.png"
MOST_DRAWS = 50_000
BINS, BAR, HEIGHT, MARGIN = 100, 9, 420, 90
"""How many bars, how wide and how high in pixels, and what is left around them."""
INK, FAINT, GRID, PAPER = "#1f2937", "#6b7280", "#e5e7eb", "white"
MANY, FEW = "#3b82f6", "#dc2626"


@dataclass(frozen=True, slots=True)
class Drawn:
    """The noise levels of a run, in the order in which they are drawn."""

    sigmas: tuple[float, ...]
    marks: tuple[float, ...]
    """The few-step schedule of the base."""
    title: str


def show_timesteps(config: TrainConfig) -> Path:
    """Write the histogram to --output_path; no weights are loaded.

    Raises:
        LorafuseError: whatever is wrong with base, data set or options.
    """
    base = open_base(config)
    recipe = recipe_for(base.family.name, base.pipeline)
    shaping = geometry(config, recipe, base.pipeline)
    samples = hold_out(config, read_dataset(config, shaping), shaping).training
    levels, shifts = plan_noise(config, base, recipe, samples)
    order = make_order(config, samples, 1)
    steps = config.max_train_steps or config.num_epochs * order.steps_per_epoch
    sigmas = tuple(itertools.islice(draws(order, samples, steps, levels, shifts), MOST_DRAWS))
    schedule = base.manifest.schedule if base.manifest else None
    shown = ", ".join(sorted({f"{shift:.4g}" for shift in shifts.values()}))
    title = f"--timestep_sampling {config.timestep_sampling}, shift {shown}"
    path = config.output_path / FILE_NAME
    picture = draw_histogram(Drawn(sigmas, schedule.sigmas if schedule else (), title))
    try:
        write_atomically(path, picture.save)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    say(describe(sigmas))
    say(f"drawn: {path}")
    return path


def draws(
    order: Order, samples: Sequence[Sample], steps: int, levels: NoiseLevels, shifts: dict[Shape, float]
) -> Iterator[float]:
    """The very numbers that `objective.draw` will give to the run."""
    for step in range(steps):
        for micro in order.step(step):
            for place in range(micro.first, micro.first + len(micro.samples)):
                generator = torch.Generator().manual_seed(seed_for("noise", order.seed, step, place))
                yield levels.draw(shifts[samples[micro.samples[0]].shape], generator).item()


def describe(sigmas: Iterable[float]) -> str:
    """Where the draws lie, in words."""
    drawn = torch.tensor(list(sigmas))
    lowest, low, middle, high, highest = torch.quantile(drawn, torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])).tolist()
    return (
        f"noise levels (sigma): {lowest:.3f} to {highest:.3f}, half of them below {middle:.3f}, "
        f"eight of ten between {low:.3f} and {high:.3f}"
    )


def draw_histogram(drawn: Drawn) -> Image.Image:
    """Bars of the draws, and a line at each noise level of the few-step schedule."""
    counts = torch.histc(torch.tensor(drawn.sigmas), BINS, 0, 1)
    width = BINS * BAR
    sheet = Image.new("RGB", (width + 2 * MARGIN, HEIGHT + 2 * MARGIN), PAPER)
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(20), ImageFont.load_default(15)
    floor = MARGIN + HEIGHT
    highest = f"{counts.max().item() / counts.sum().item():.1%} of {len(drawn.sigmas):,} draws in the highest bar"
    key = f"{highest}; dashed: the few-step schedule of the base" if drawn.marks else highest
    pen.text((MARGIN, 14), drawn.title, INK, font)
    pen.text((MARGIN, 42), key, FAINT, small)
    for tenth in range(11):
        x = MARGIN + tenth * width // 10
        pen.line((x, MARGIN, x, floor), GRID)
        pen.text((x, floor + 10), f"{tenth / 10:g}", FAINT, small, anchor="ma")
    pen.text((MARGIN + width / 2, floor + 34), "sigma: 0 is a clean picture, 1 is noise", FAINT, small, anchor="ma")
    for index, count in enumerate(counts.tolist()):
        x, height = MARGIN + index * BAR, round(HEIGHT * count / counts.max().item())
        if height:
            pen.rectangle((x + 1, floor - height, x + BAR - 1, floor), MANY)
    for sigma in drawn.marks:
        _mark(pen, MARGIN + sigma * width, floor, f"{sigma:.3g}", small)
    pen.line((MARGIN, floor, MARGIN + width, floor), INK)
    return sheet


def _mark(
    pen: ImageDraw.ImageDraw, x: float, floor: int, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> None:
    for y in range(MARGIN, floor, 12):
        pen.line((x, y, x, y + 7), FEW, 2)
    pen.text((x, MARGIN - 3), text, FEW, font, anchor="md")
