"""What is looked at while a LoRA is trained: grids, the held-out loss and the few-step health."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from lorafuse_common.manifest import Role
from lorafuse_train.atomic import write_atomically
from lorafuse_train.console import say
from lorafuse_train.dataset.data import Prompt
from lorafuse_train.encoding.encode import Encodings
from lorafuse_train.plan import Plan
from lorafuse_train.precision import Precision
from lorafuse_train.recipes.recipe import latent_shape
from lorafuse_train.samples.drawn_prompts import all_prompts, choose_shape
from lorafuse_train.samples.film import USUAL_RATE
from lorafuse_train.samples.gallery import Drawn, Gallery, choose_schedules, prepare_columns
from lorafuse_train.samples.health import (
    AGREEMENT,
    PLOT_NAME,
    SHARPNESS,
    Agreement,
    Health,
    Pictures,
    describe,
    read_health,
    sharpness,
)
from lorafuse_train.samples.health_plot import draw_health
from lorafuse_train.samples.held_out import held_out_loss
from lorafuse_train.steps.log import Log
from lorafuse_train.steps.loop import Training


def prompts_to_draw(plan: Plan) -> list[Prompt]:
    """What the encodings must hold for grids and health."""
    return all_prompts(plan.prompts, (*plan.unrelated, *_negatives(plan)))


def is_due(plan: Plan, step: int) -> bool:
    """Whether `Validation.after_step` has anything to do."""
    due = (plan.config.validation_steps, plan.config.validation_loss_steps if plan.held_out else 0)
    return any(every and step % every == 0 for every in due)


def _negatives(plan: Plan) -> list[Prompt]:
    """The negative prompt of each of the unrelated ones."""
    return [replace(prompt, caption=plan.config.validation_negative_prompt) for prompt in plan.unrelated]


def prepare_gallery(plan: Plan, encodings: Encodings, precision: Precision) -> Gallery:
    """The grids of a run."""
    rate = plan.config.frame_rate or USUAL_RATE
    return Gallery(plan.recipe, plan.base, prepare_columns(plan, encodings), precision, frame_rate=rate)


@dataclass
class Validation:
    """Draws, measures and logs; on the main process only."""

    training: Training
    gallery: Gallery
    log: Log
    agreement: Agreement | None

    @classmethod
    def of(cls, training: Training, gallery: Gallery, log: Log) -> Validation:
        """Says so where the health of a few-step base cannot be measured."""
        plan = training.plan
        manifest = plan.base.manifest
        if manifest and manifest.schedule and manifest.role is Role.SCAFFOLD and gallery.original is None:
            say("few-step health: not measured, for the new LoRA is for the original base; give it as --original_model")
        return cls(training, gallery, log, _agreement(training, gallery))

    def start(self) -> None:
        """Before the first step: the bare base, and where a LoRA is trained further, that LoRA."""
        trained = self.training.plan.start is not None
        self.run(0, self._samples / "step-0.png", trained=trained)

    def after_step(self, step: int) -> None:
        """What is due after a step that is not the last."""
        config = self.training.plan.config
        if config.validation_steps and step % config.validation_steps == 0:
            self.run(step, self._samples / f"step-{step}.png")
        else:
            self.log.validation(step, self._loss())

    def run(self, step: int, picture: Path, *, trained: bool = True) -> None:
        """A grid, the held-out loss and the health, after `step` steps."""
        drawn = self.gallery.draw(self.training.transformer, picture, trained=trained)
        self.log.picture("samples", picture, step)
        values, health = self._loss(), self._health(step, drawn)
        if health:
            values |= {AGREEMENT: health.agreement, SHARPNESS: health.sharpness}
        if values:
            self.log.validation(step, values)
        if health:
            say(describe(health))
            self._plot(step)

    @property
    def _samples(self) -> Path:
        return self.training.plan.config.output_path / "samples"

    def _loss(self) -> dict[str, float]:
        if not self.training.plan.held_out:
            return {}
        loss = held_out_loss(self.training)
        say(f"validation loss: {loss:.4f}, on {len(self.training.plan.held_out)} pictures that are not trained on")
        return {"validation_loss": loss}

    def _health(self, step: int, drawn: Drawn) -> Health | None:
        if self.agreement is None:
            return None
        original = self.gallery.original
        with original.swapped_in() if original else nullcontext():
            agreement = self.agreement.measure(self.training.transformer)
        on, off = (Pictures(few, long) for few, long in (drawn.on, drawn.off))
        return Health(step, agreement, sharpness(on, off))

    def _plot(self, step: int) -> None:
        out = self.training.plan.config.output_path
        write_atomically(out / PLOT_NAME, draw_health(read_health(out)).save)
        self.log.picture("health", out / PLOT_NAME, step)


def _agreement(training: Training, gallery: Gallery) -> Agreement | None:
    """None where the LoRA is not for a few-step base, or that base is not at hand."""
    plan, encodings = training.plan, training.encodings
    manifest = plan.base.manifest
    if not (plan.unrelated and manifest):
        return None
    if manifest.role is Role.SCAFFOLD and gallery.original is None:
        return None
    config, latent = plan.config, latent_shape(plan.recipe, plan.base.pipeline, choose_shape(plan.samples))
    few, *_ = choose_schedules(config, plan.base, plan.recipe, latent)
    return Agreement(
        plan.recipe,
        tuple(encodings.condition(prompt) for prompt in plan.unrelated),
        tuple(encodings.condition(prompt) for prompt in _negatives(plan)),
        few,
        latent,
        config.validation_seed,
        training.precision,
        gallery.model,
        plan.base.expert,
    )
