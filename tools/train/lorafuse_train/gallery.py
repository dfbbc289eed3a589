"""Which pictures a training shows: the bases and the new LoRA, side by side, at every schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapter import without
from .atomic import write_atomically
from .base import Base
from .config import TrainConfig
from .console import say
from .data import Sample
from .encode import Encodings, free
from .grid import LabelledRow, draw_grid
from .pictures import to_picture
from .precision import Precision
from .recipes.recipe import Guidance, Recipe
from .sample import Prompts, Schedule, draw_row, starting_noise

MOST_COLUMNS = 8


def choose_prompts(config: TrainConfig, samples: Sequence[Sample]) -> tuple[str, ...]:
    """`--validation_prompt`, else captions spread evenly over the dataset's different ones."""
    if config.validation_prompt:
        return config.validation_prompt
    captions = list(dict.fromkeys(sample.caption for sample in samples))
    columns = min(MOST_COLUMNS, len(captions))
    return tuple(captions[index * len(captions) // columns] for index in range(columns))


def choose_size(samples: Sequence[Sample]) -> tuple[int, int]:
    """The (height, width) that most pictures train at."""
    return Counter(sample.size for sample in samples).most_common(1)[0][0]


def prepare_prompts(
    config: TrainConfig, encodings: Encodings, texts: tuple[str, ...], latent: tuple[int, int, int]
) -> Prompts:
    """The columns of every grid of this run."""
    return Prompts(
        texts,
        tuple(encodings.caption(text) for text in texts),
        encodings.caption(config.validation_negative_prompt),
        starting_noise(config, len(texts), latent),
    )


def choose_schedules(
    config: TrainConfig, base: Base, recipe: Recipe, latent: tuple[int, int, int]
) -> tuple[Schedule, ...]:
    """The few-step schedule that the manifest records, where there is one, and the long one."""
    kind = recipe.guidance(base.pipeline, base.config)
    embedded = kind is Guidance.EMBEDDED
    scale = 1.0 if kind is Guidance.NONE else config.validation_guidance_scale
    sigmas = recipe.sigmas(base.pipeline, config.validation_inference_steps, latent)
    long = Schedule(sigmas, scale, embedded)
    few = base.manifest.schedule if base.manifest else None
    if few is None:
        return (long,)
    # A manifest's 1 means one prediction a step; that says nothing of what a model is told.
    unsaid = kind is Guidance.NONE or (embedded and few.guidance_scale == 1)
    return Schedule(few.sigmas, scale if unsaid else few.guidance_scale, embedded), long


@dataclass
class Gallery:
    """Draws the grids of one run; what does not change between them is drawn once."""

    recipe: Recipe
    base: Base
    prompts: Prompts
    schedules: tuple[Schedule, ...]
    precision: Precision
    _original: list[tuple[str, list[Tensor]]] = field(default_factory=list)
    _bare: dict[Schedule, list[Tensor]] = field(default_factory=dict)

    def draw_original(self, transformer: Any) -> None:
        """The rows of the unfused base; it need not stay in memory afterwards."""
        for schedule in self.schedules:
            self._original.append((f"original base\n{schedule}", self._row(transformer, schedule)))

    def draw(self, transformer: Any, path: Path) -> None:
        """Write the grid of the trained transformer as it is now."""
        say(f"drawing samples: {path}")
        name = "fused base" if self.base.manifest else "base"
        rows = list(self._original)
        for schedule in self.schedules:
            if schedule not in self._bare:
                with without(transformer):
                    self._bare[schedule] = self._row(transformer, schedule)
            rows.append((f"{name}\n{schedule}", self._bare[schedule]))
            rows.append((f"{name}\n+ new LoRA\n{schedule}", self._row(transformer, schedule)))
        vae = self.recipe.load_vae(self.base.pipeline, self.precision.device)
        labelled = [
            LabelledRow(label, [to_picture(self.recipe.decode(vae, x0)) for x0 in latents]) for label, latents in rows
        ]
        del vae
        free(self.precision.device)
        sheet = draw_grid(self.prompts.texts, labelled)
        write_atomically(path, sheet.save)

    def _row(self, transformer: Any, schedule: Schedule) -> list[Tensor]:
        return draw_row(self.recipe, transformer, self.prompts, schedule, self.precision)
