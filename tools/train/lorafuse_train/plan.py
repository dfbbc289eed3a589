"""What a training will do, decided and checked before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lorafuse_common.errors import OutputError
from lorafuse_train.base import Base, check_parts, open_base
from lorafuse_train.console import say
from lorafuse_train.dataset.check_text import describe_in_short
from lorafuse_train.dataset.data import Prompt, Sample, read_dataset
from lorafuse_train.dataset.masks import Grid, Masks, masked, read_masks
from lorafuse_train.dataset.order import Order
from lorafuse_train.dataset.pictures import geometry
from lorafuse_train.few_step.objective_base import Objective, plan_objective
from lorafuse_train.few_step.preserve import Preserving, plan_preserving
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.lora.base_match import require_same_base
from lorafuse_train.lora.export import plan_exports
from lorafuse_train.lora.metadata import require_trigger
from lorafuse_train.lora.push import check_hub
from lorafuse_train.lora.targets import Targets, meta_model, resolve_targets
from lorafuse_train.lora.warm_start import Start, read_start
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import NOWHERE
from lorafuse_train.recipes import recipe_for
from lorafuse_train.recipes.recipe import Recipe, Shape, latent_shape
from lorafuse_train.samples.drawn_prompts import DrawnPrompt, plan_prompts, unrelated
from lorafuse_train.samples.held_out import Split, hold_out
from lorafuse_train.steps.optimizers import build_optimizer
from lorafuse_train.steps.state import choose_checkpoint
from lorafuse_train.steps.timesteps import NoiseLevels, choose_levels, require_density
from lorafuse_train.steps.trackers import check_trackers
from lorafuse_train.summary import describe_base, describe_dataset, describe_targets


@dataclass(frozen=True, slots=True)
class Plan:
    """A training that nothing in its inputs stands against."""

    config: TrainConfig
    base: Base
    recipe: Recipe
    targets: Targets
    samples: Sequence[Sample]
    start: Start | None = None
    """Where `--lora_checkpoint` begins."""
    masks: Masks | None = None
    levels: NoiseLevels = field(default_factory=NoiseLevels)
    shifts: Mapping[Shape, float] = field(default_factory=dict)
    """Timestep shift by what is drawn."""
    objective: Objective = field(default_factory=Objective)
    preserving: Preserving | None = None
    held_out: Sequence[Sample] = ()
    """What the validation loss is measured on."""
    held_out_masks: Masks | None = None
    prompts: tuple[DrawnPrompt, ...] = ()
    """The columns of the grids."""
    unrelated: tuple[Prompt, ...] = ()
    """What the few-step health is measured on; empty where the base has no few-step schedule."""


def plan_training(config: TrainConfig) -> Plan:
    """Check output, optimizer, base, target modules and dataset, in the order of what takes longest to check.

    Raises:
        LorafuseError: whatever is wrong with what the user gave.
    """
    _check_output(config)
    check_trackers(config)
    check_hub(config)
    build_optimizer(config, [nn.Parameter(torch.zeros(1, 1))])
    base = open_base(config)
    recipe = recipe_for(base.family.name, base.pipeline)
    check_parts(base, recipe, config.original_model)
    say(describe_base(base))
    objective = plan_objective(config, base)
    model = meta_model(base.config["_class_name"], base.config)
    targets = resolve_targets(model, base.family, config.lora_target_modules)
    say(describe_targets(targets, config))
    plan_exports(model, base, targets, config)
    start = _start(config, base, targets) if config.lora_checkpoint else None
    if start:
        say(f"starting from {start.path}{start.left_out}")
    shaping = geometry(config, recipe, base.pipeline)
    parts = hold_out(config, read_dataset(config, shaping), shaping)
    samples = parts.training
    require_trigger(config, samples)
    say("\n".join([describe_dataset(samples, recipe), *describe_in_short(samples, config)]))
    if parts.held_out:
        say(f"held out for the validation loss: {len(parts.held_out)} rows")
    masks, held_out_masks = _masks(config, parts, latent_grid(recipe, base.pipeline))
    levels, shifts = plan_noise(config, base, recipe, samples)
    preserving = plan_preserving(config, base, recipe, samples)
    return Plan(
        config, base, recipe, targets, samples, start, masks, levels, shifts, objective, preserving,
        held_out=parts.held_out,
        held_out_masks=held_out_masks,
        prompts=plan_prompts(config, samples, shaping),
        unrelated=unrelated(config, recipe, samples) if base.manifest and base.manifest.schedule else (),
    )  # fmt: skip


def _masks(config: TrainConfig, parts: Split, grid: Grid) -> tuple[Masks | None, Masks | None]:
    """Of what is trained on, and of what is held out."""
    masks = read_masks(config, parts.training, grid)
    if masks is None:
        return None, None
    say(f"masks: for {len(masks.grids)} of {len(parts.training)} pictures")
    having = masked(config, parts.held_out)
    return masks, read_masks(config, having, grid) if having else None


def latent_grid(recipe: Recipe, pipeline: Path) -> Grid:
    """(height, width) of a picture -> that of its latents."""

    def grid(size: tuple[int, int]) -> tuple[int, int]:
        *_, height, width = recipe.latent_shape(pipeline, *size)
        return height, width

    return grid


def _start(config: TrainConfig, base: Base, targets: Targets) -> Start:
    path = config.lora_checkpoint
    assert path
    require_same_base(path, base, option="--lora_checkpoint", allowed=config.allow_base_mismatch)
    return read_start(path, base, targets, config)


def make_order(config: TrainConfig, samples: Sequence[Sample], processes: int) -> Order:
    """The order in which a run on so many processes sees the pictures."""
    return Order(
        tuple(sample.bucket for sample in samples),
        config.seed,
        config.dataset_repeat,
        config.train_batch_size,
        config.gradient_accumulation_steps,
        processes,
    )


def plan_noise(
    config: TrainConfig, base: Base, recipe: Recipe, samples: Sequence[Sample]
) -> tuple[NoiseLevels, dict[Shape, float]]:
    """The density of the noise levels, and its shift for everything of another shape.

    Raises:
        ConfigError: there is nothing to draw.
    """
    levels, fixed, pipeline = choose_levels(config, base), config.fixed_shift, base.pipeline
    shifts = {
        shape: recipe.shift(pipeline, latent_shape(recipe, pipeline, shape)) if fixed is None else fixed
        for shape in dict.fromkeys(sample.shape for sample in samples)
    }
    require_density(levels, shifts.values())
    return levels, shifts


def _check_output(config: TrainConfig) -> None:
    out = config.output_path
    if out == NOWHERE:  # `lorafuse-train cache` writes none
        return
    if out.exists() and not out.is_dir():
        raise OutputError(f"--output_path {out}: is a file; expected a folder, existing or not")
    if out.resolve().is_relative_to(config.fused_model.resolve()):
        raise OutputError(f"--output_path {out}: lies in --fused_model, which is only read; choose another folder")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(nearest, os.W_OK):
        raise OutputError(f"--output_path {out}: {nearest} may not be written")
    choose_checkpoint(config.resume_from_checkpoint, out)
    if (out / FILE_NAME).exists() and not (config.overwrite_output_dir or config.resume_from_checkpoint):
        raise OutputError(f"--output_path {out}: holds a LoRA already; choose another or give --overwrite_output_dir")
