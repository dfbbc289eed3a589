"""Which pictures a training shows: the bases and the new LoRA, side by side, at every schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from lorafuse_train.atomic import write_atomically
from lorafuse_train.base import Base, load_transformer
from lorafuse_train.console import say, ticking
from lorafuse_train.dataset.pictures import to_picture
from lorafuse_train.encoding.encode import Encodings, control_pictures, free
from lorafuse_train.experts import both
from lorafuse_train.lora.adapter import without
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.precision import Precision
from lorafuse_train.recipes.recipe import Guidance, Latent, Recipe, latent_shape
from lorafuse_train.samples.film import USUAL_RATE, film_path, write_film
from lorafuse_train.samples.grid import PAPER, LabelledRow, draw_grid
from lorafuse_train.samples.original_rows import HostWeights
from lorafuse_train.samples.sample import Column, Schedule, draw_row, noise_from, starting_noise, steps_of_row
from lorafuse_train.samples.validation_prompts import ValidationPrompt

if TYPE_CHECKING:
    from lorafuse_train.plan import Plan

NEW = "\n+ new LoRA"
FRAMES_SHOWN = 3
"""Of a video, in one cell."""


def prepare_columns(plan: Plan, encodings: Encodings) -> tuple[Column, ...]:
    """The columns of every grid of this run."""
    config, base, recipe = plan.config, plan.base, plan.recipe
    columns = []
    for index, drawn in enumerate(plan.prompts):
        asked, latent = drawn.asked, latent_shape(recipe, base.pipeline, drawn.prompt.shape)
        column = Column(
            asked.prompt,
            encodings.condition(drawn.prompt),
            encodings.condition(drawn.negative),
            starting_noise(config.validation_seed, index, latent)
            if asked.seed is None
            else noise_from(asked.seed, latent),
            choose_schedules(config, base, recipe, latent, asked),
            tuple(control.size for control in drawn.prompt.controls),
            tuple(seen.picture for seen in control_pictures(drawn.prompt)),
        )
        columns.append(column)
    return tuple(columns)


def choose_schedules(
    config: TrainConfig, base: Base, recipe: Recipe, latent: Latent, asked: ValidationPrompt | None = None
) -> tuple[Schedule, ...]:
    """The few-step schedule that the manifest records, where there is one, and the long one, as `asked` if it is."""
    kind = recipe.guidance(base.pipeline, base.config)
    embedded = kind is Guidance.EMBEDDED
    wished = (asked and asked.guidance_scale) or config.validation_guidance_scale
    scale = 1.0 if kind is Guidance.NONE else wished or recipe.default_guidance(base.pipeline, base.config)
    steps = (asked and asked.steps) or config.validation_inference_steps
    long = Schedule(recipe.sigmas(base.pipeline, steps, latent), scale, embedded)
    few = base.manifest.schedule if base.manifest else None
    if few is None:
        return (long,)
    # A manifest's 1 means one prediction a step; that says nothing of what a model is told.
    unsaid = kind is Guidance.NONE or (embedded and few.guidance_scale == 1)
    return Schedule(few.sigmas, scale if unsaid else few.guidance_scale, embedded), long


@dataclass(frozen=True, slots=True)
class Drawn:
    """x0 of every schedule's pictures, of the base that the new LoRA is for."""

    off: Sequence[Sequence[Tensor]]
    on: Sequence[Sequence[Tensor]]
    """With the new LoRA; the same as `off` where it has not been drawn."""


@dataclass
class Gallery:
    """Draws the grids of one run; what does not change between them is drawn once."""

    recipe: Recipe
    base: Base
    columns: tuple[Column, ...]
    precision: Precision
    original: HostWeights | None = None
    """Where the new LoRA is for the original base (role `scaffold`): its weights, to be swapped in."""
    frame_rate: float = USUAL_RATE
    """Of the films of a family that draws videos."""
    _other: Any = field(default=None, repr=False)
    _original: list[list[Tensor]] = field(default_factory=list)
    """Rows of the original base, one a schedule."""
    _bare: list[list[Tensor]] = field(default_factory=list)
    newest: Sequence[Image.Image] = ()
    """What the new LoRA drew by the first schedule in the last grid, on the base that it is for."""

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """Those of the first column: few-step first, where there is one."""
        return self.columns[0].schedules

    def draw_original(self, transformer: Any, folder: Path) -> None:
        """The rows of the unfused base in `folder`; it need not stay in memory afterwards.

        Of two experts, the other one is what lies beside it, where there is one.
        """
        rows = range(len(self.schedules))
        if self.base.expert and (beside := folder.with_name(self.base.expert.other.name)).is_dir():
            self._other = load_transformer(self.base, beside, torch.device("cpu"))
        with ticking(self._steps(rows), "drawing samples of the original base") as tick:
            self._original = [self._row(transformer, row, tick) for row in rows]
        self._other = None

    def draw(self, transformer: Any, path: Path, *, trained: bool = True) -> Drawn:
        """Write the grid of the transformer as it is now; with rows of the new LoRA where it is `trained`."""
        say(f"drawing samples: {path}")
        rows = range(len(self.schedules))
        with ticking(self._steps(rows, trained), "drawing samples") as tick:
            if not self._bare:
                with without(transformer):
                    self._bare = [self._row(transformer, row, tick) for row in rows]
            on = [self._row(transformer, row, tick) for row in rows] if trained else []
            on_original: list[list[Tensor]] = []
            if trained and self.original:
                with self.original.swapped_in():
                    on_original = [self._row(transformer, row, tick) for row in rows]
        self._write(path, on, on_original)
        if self.original:
            return Drawn(self._original, on_original or self._original)
        return Drawn(self._bare, on or self._bare)

    def _write(self, path: Path, on: list[list[Tensor]], on_original: list[list[Tensor]]) -> None:
        name = "fused base" if self.base.manifest else "base"
        labelled: list[tuple[str, int, list[Tensor]]] = []
        for row, bare in enumerate(self._bare):
            labelled.append((name, row, bare))
            if on:
                labelled.append((f"{name}{NEW}", row, on[row]))
        for row, bare in enumerate(self._original):
            labelled.append(("original base", row, bare))
            if on_original:
                labelled.append((f"original base{NEW}", row, on_original[row]))
        vae = self.recipe.load_vae(self.base.pipeline, self.precision.device)
        cells: list[list[Image.Image]] = [[] for _ in labelled]
        for column in range(len(self.columns)):
            drawn = [self.recipe.decode(vae, latents[column]) for _, _, latents in labelled]
            for cell, pixels in zip(cells, drawn, strict=True):
                cell.append(shown(pixels))
            if self.recipe.frame_step:
                write_film(film_path(path, column), drawn, self.frame_rate)
        rows = [
            LabelledRow(f"{label}\n{self._named(row)}", pictures)
            for (label, row, _), pictures in zip(labelled, cells, strict=True)
        ]
        del vae
        free(self.precision.device)
        trained = [index for index, (label, row, _) in enumerate(labelled) if label.endswith(NEW) and row == 0]
        self.newest = cells[trained[-1]] if trained else ()
        rows = [*self._controls(), *rows]
        sheet = draw_grid([column.text for column in self.columns], rows)
        write_atomically(path, sheet.save)

    def _controls(self) -> list[LabelledRow]:
        """What edit models are shown, a row for the first control picture of each column, and so on."""
        most = max(len(column.controls) for column in self.columns)
        blank = Image.new("RGB", (1, 1), PAPER)
        return [
            LabelledRow(
                "control picture" if most == 1 else f"control picture {number + 1}",
                [column.controls[number] if number < len(column.controls) else blank for column in self.columns],
            )
            for number in range(most)
        ]

    def _named(self, row: int) -> str:
        """The schedule of a row; where its columns differ, only of which kind it is."""
        different = {str(column.schedules[row]) for column in self.columns}
        return different.pop() if len(different) == 1 else f"{'few' if row + 1 < len(self.schedules) else 'many'} steps"

    def _row(self, transformer: Any, row: int, tick: Callable[[], object]) -> list[Tensor]:
        with self.model(transformer) as model:
            return draw_row(self.recipe, model, self.columns, row, self.precision, tick)

    def model(self, transformer: Any) -> AbstractContextManager[Any]:
        """What to draw with: `transformer`, and where it is one of two experts the other one too."""
        return both(self.base.expert, transformer, self.precision.device, self._frozen_expert)

    def _frozen_expert(self) -> Any:
        """The expert that is not trained, as it lies in the pipeline; loaded once, and kept in main memory."""
        if self._other is None and self.base.expert:
            say(f"loading {self.base.expert.other.name}, which is not trained, to draw with both experts")
            self._other = load_transformer(self.base, self.base.expert.other, torch.device("cpu"))
        return self._other

    def _steps(self, rows: range, trained: bool = False) -> int:
        models = int(not self._bare) + trained * (2 if self.original else 1)
        return max(1, models) * sum(steps_of_row(self.columns, row) for row in rows)


def shown(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) as a picture, and of a video (3, F, H, W) a few frames side by side."""
    if pixels.ndim == 3:
        return to_picture(pixels)
    last = pixels.shape[1] - 1
    indices = dict.fromkeys(round(last * k / (FRAMES_SHOWN - 1)) for k in range(FRAMES_SHOWN))
    frames = [to_picture(pixels[:, index]) for index in indices]
    strip = Image.new("RGB", (sum(frame.width for frame in frames), frames[0].height))
    for place, frame in enumerate(frames):
        strip.paste(frame, (place * frame.width, 0))
    return strip
