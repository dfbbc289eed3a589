"""What `lorafuse-train sample` is to draw, with which LoRAs; checked before any weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorafuse_common.errors import ConfigError, LorafuseError, OutputError
from lorafuse_common.tensorfile import read_header
from lorafuse_train.base import Base, check_parts, open_base
from lorafuse_train.console import say
from lorafuse_train.dataset.data import Prompt
from lorafuse_train.dataset.pictures import Geometry, geometry
from lorafuse_train.lora.base_match import KEY, require_same_base
from lorafuse_train.lora.loaded_lora import LoadedLora, read_adapter
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import NOWHERE
from lorafuse_train.recipes import recipe_for
from lorafuse_train.recipes.recipe import Guidance, Latent, Recipe
from lorafuse_train.samples.drawn_prompts import own_controls
from lorafuse_train.samples.sample import Schedule
from lorafuse_train.samples.sample_options import SampleConfig, parse_lora
from lorafuse_train.samples.validation_prompts import ValidationPrompt, read_prompts

LONG_STEPS, USUAL_SIDE = 30, 1024


@dataclass(frozen=True, slots=True)
class Request:
    """All that is to be drawn, checked before any weights are loaded."""

    config: SampleConfig
    base: Base
    recipe: Recipe
    loras: Mapping[str, Sequence[LoadedLora]]
    """Component -> its LoRAs."""
    prompts: Sequence[tuple[ValidationPrompt, Prompt]]

    @property
    def all_loras(self) -> list[LoadedLora]:
        """Of all components."""
        return [lora for loras in self.loras.values() for lora in loras]


def plan_sample(config: SampleConfig) -> Request:
    """Check base, LoRAs and prompts.

    Raises:
        LorafuseError: listing what is wrong with them.
    """
    if config.output_path.exists() and not config.output_path.is_dir():
        raise OutputError(f"--output_path {config.output_path}: is a file; expected a folder, existing or not")
    training = as_training(config)
    base = open_base(training)
    recipe = recipe_for(base.family.name, base.pipeline)
    check_parts(base, recipe, None)
    loras = _read_loras(config, base)
    shaping = geometry(training, recipe, base.pipeline)
    return Request(config, base, recipe, loras, _prompts(config, recipe, shaping, loras))


def as_training(config: SampleConfig) -> TrainConfig:
    """What a training would be told of the same base."""
    return TrainConfig(
        fused_model=config.fused_model,
        allow_unfused_base=config.allow_unfused_base,
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        dataset_base_path=NOWHERE,
        output_path=config.output_path,
        base_dtype=config.base_dtype,
        mixed_precision=config.mixed_precision,
    )


def _read_loras(config: SampleConfig, base: Base) -> dict[str, list[LoadedLora]]:
    folders = {base.component: base.transformer}
    if base.expert:
        folders[base.expert.other.name] = base.expert.other
    found: dict[str, list[LoadedLora]] = {}
    faults = []
    for text in config.lora:
        try:
            wanted = parse_lora(text)
            component = wanted.component or _component_of(wanted.path) or base.component
            if component not in folders:
                raise ConfigError(f"--lora {text}: no {component} in {base.pipeline}; there is {', '.join(folders)}")
            its_base = base if component == base.component else _other_base(config, component)
            require_same_base(wanted.path, its_base, option="--lora", allowed=config.allow_base_mismatch)
            found.setdefault(component, []).append(read_adapter(wanted, folders[component]))
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    for loras in found.values():
        for lora in loras:
            say(f"with {lora}{lora.left_out}")
    return found


def _other_base(config: SampleConfig, component: str) -> Base:
    return open_base(replace(as_training(config), component=component))


def _component_of(path: Path) -> str | None:
    """The transformer that a LoRA of ours was trained for."""
    try:
        return str(json.loads(read_header(path).metadata[KEY])["component"])
    except (LorafuseError, KeyError, TypeError, ValueError):
        return None


def _resolution_of(path: Path) -> tuple[int, int] | None:
    """(height, width) that a LoRA's header says it was trained at."""
    try:
        width, _, height = read_header(path).metadata["modelspec.resolution"].partition("x")
        return int(height), int(width)
    except (LorafuseError, KeyError, ValueError):
        return None


def _prompts(
    config: SampleConfig, recipe: Recipe, shaping: Geometry, loras: Mapping[str, Sequence[LoadedLora]]
) -> list[tuple[ValidationPrompt, Prompt]]:
    in_file = read_prompts(config.prompts_file, "--prompts_file") if config.prompts_file else ()
    asked = [*(ValidationPrompt(text, controls=config.edit_image) for text in config.prompt), *in_file]
    trained = [size for each in loras.values() for lora in each if (size := _resolution_of(lora.wanted.path))]
    side = USUAL_SIDE // shaping.multiple * shaping.multiple
    usual = (config.height, config.width) if config.height and config.width else (*trained, (side, side))[0]
    step = recipe.frame_step
    faults, found = [], []
    if config.num_frames > 1 and (not step or config.num_frames % step != 1):
        expected = f"1 + a multiple of {step}" if step else "1, for this family draws pictures"
        faults.append(f"--num_frames {config.num_frames}: expected {expected}")
    for request in asked:
        size = (request.height or usual[0], request.width or usual[1])
        try:
            controls = own_controls(request, size, shaping)
        except ValueError as error:
            faults.append(f"{request.prompt!r}: {error}")
            continue
        found.append((request, Prompt(request.prompt, controls, (config.num_frames, *size))))
    if faults:
        raise ConfigError("these cannot be drawn:\n" + "\n".join(f"  {fault}" for fault in faults))
    return found


def choose_schedule(request: Request, asked: ValidationPrompt, latent: Latent) -> Schedule:
    """The manifest's few-step schedule, unless steps were asked for."""
    config, base, recipe = request.config, request.base, request.recipe
    kind = recipe.guidance(base.pipeline, base.config)
    embedded = kind is Guidance.EMBEDDED
    few = base.manifest.schedule if base.manifest and not base.is_scaffold else None
    steps = asked.steps or config.steps
    wished = asked.guidance_scale or config.guidance_scale
    usual = recipe.default_guidance(base.pipeline, base.config)
    if kind is Guidance.NONE:
        wished = usual = 1.0
    if few is None or steps not in (None, len(few.sigmas)):
        return Schedule(recipe.sigmas(base.pipeline, steps or LONG_STEPS, latent), wished or usual, embedded)
    # A manifest's 1 means one prediction a step; that says nothing of what a model is told.
    recorded = usual if embedded and few.guidance_scale == 1 else few.guidance_scale
    return Schedule(few.sigmas, wished or recorded, embedded)
