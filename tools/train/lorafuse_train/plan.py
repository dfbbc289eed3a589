"""What a training will do, decided and checked before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from lorafuse_common.errors import OutputError

from .adapter import FILE_NAME
from .base import Base, check_parts, open_base
from .config import TrainConfig
from .console import say
from .data import Sample, read_dataset
from .pictures import geometry
from .recipes import recipe_for
from .recipes.recipe import Recipe
from .state import choose_checkpoint
from .summary import describe_base, describe_dataset, describe_targets
from .targets import Targets, meta_model, resolve_targets


@dataclass(frozen=True, slots=True)
class Plan:
    """A training that nothing in its inputs stands against."""

    config: TrainConfig
    base: Base
    recipe: Recipe
    targets: Targets
    samples: Sequence[Sample]


def plan_training(config: TrainConfig) -> Plan:
    """Check output, base, target modules and dataset, in the order of what takes longest to check.

    Raises:
        LorafuseError: whatever is wrong with what the user gave.
    """
    _check_output(config)
    base = open_base(config)
    recipe = recipe_for(base.family.name)
    check_parts(base, recipe, config.original_model)
    say(describe_base(base))
    model = meta_model(base.config["_class_name"], base.config)
    targets = resolve_targets(model, base.family, config.lora_target_modules)
    say(describe_targets(targets, config))
    samples = read_dataset(config, geometry(config, recipe.pixel_multiple(base.pipeline)))
    say(describe_dataset(samples))
    return Plan(config, base, recipe, targets, samples)


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
