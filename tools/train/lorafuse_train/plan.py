"""What a training will do, decided and checked before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lorafuse_common.errors import OutputError

from .adapter import FILE_NAME
from .base import Base, check_parts, open_base
from .config import TrainConfig
from .console import say
from .data import Sample, read_dataset
from .masks import Masks, read_masks
from .optimizers import build_optimizer
from .order import Order
from .pictures import geometry
from .recipes import recipe_for
from .recipes.recipe import Recipe
from .state import choose_checkpoint
from .summary import describe_base, describe_dataset, describe_targets
from .targets import Targets, meta_model, resolve_targets
from .timesteps import NoiseLevels, choose_levels, require_density
from .trackers import check_trackers
from .warm_start import Start, read_start


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
    shifts: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """Timestep shift by picture size."""


def plan_training(config: TrainConfig) -> Plan:
    """Check output, optimizer, base, target modules and dataset, in the order of what takes longest to check.

    Raises:
        LorafuseError: whatever is wrong with what the user gave.
    """
    _check_output(config)
    check_trackers(config)
    build_optimizer(config, [nn.Parameter(torch.zeros(1, 1))])
    base = open_base(config)
    recipe = recipe_for(base.family.name)
    check_parts(base, recipe, config.original_model)
    say(describe_base(base))
    model = meta_model(base.config["_class_name"], base.config)
    targets = resolve_targets(model, base.family, config.lora_target_modules)
    say(describe_targets(targets, config))
    start = read_start(config.lora_checkpoint, base, targets, config) if config.lora_checkpoint else None
    if start:
        say(f"starting from {start.path}{start.left_out}")
    samples = read_dataset(config, geometry(config, recipe.pixel_multiple(base.pipeline)))
    say(describe_dataset(samples))
    masks = read_masks(config, samples, lambda size: recipe.latent_shape(base.pipeline, *size)[-2:])
    if masks:
        say(f"masks: for {len(masks.grids)} of {len(samples)} pictures")
    levels, shifts = plan_noise(config, base, recipe, samples)
    return Plan(config, base, recipe, targets, samples, start, masks, levels, shifts)


def make_order(config: TrainConfig, samples: Sequence[Sample], processes: int) -> Order:
    """The order in which a run on so many processes sees the pictures."""
    return Order(
        tuple(sample.size for sample in samples),
        config.seed,
        config.dataset_repeat,
        config.train_batch_size,
        config.gradient_accumulation_steps,
        processes,
    )


def plan_noise(
    config: TrainConfig, base: Base, recipe: Recipe, samples: Sequence[Sample]
) -> tuple[NoiseLevels, dict[tuple[int, int], float]]:
    """The density of the noise levels, and its shift for every picture size.

    Raises:
        ConfigError: there is nothing to draw.
    """
    levels, fixed, pipeline = choose_levels(config, base), config.fixed_shift, base.pipeline
    shifts = {
        size: recipe.shift(pipeline, recipe.latent_shape(pipeline, *size)) if fixed is None else fixed
        for size in dict.fromkeys(sample.size for sample in samples)
    }
    require_density(levels, shifts.values())
    return levels, shifts


def _check_output(config: TrainConfig) -> None:
    out = config.output_path
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
