"""Which prompts a training draws, in which size and with which control pictures; decided before anything is loaded."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafuse_common.errors import ConfigError
from lorafuse_train.dataset.data import Control, Prompt, Sample, listed
from lorafuse_train.dataset.pictures import Geometry, open_picture
from lorafuse_train.few_step.preserve import shown_samples
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.recipes.recipe import Recipe, Shape
from lorafuse_train.samples.prompts import measured, unrelated_prompts
from lorafuse_train.samples.validation_prompts import ValidationPrompt, read_prompts

MOST_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class DrawnPrompt:
    """One column of every grid."""

    asked: ValidationPrompt
    prompt: Prompt
    negative: Prompt
    """The same controls; only guidance uses it."""


def choose_shape(samples: Sequence[Sample]) -> Shape:
    """The (frames, height, width) that most of the dataset trains at."""
    return Counter(sample.shape for sample in samples).most_common(1)[0][0]


def choose_size(samples: Sequence[Sample]) -> tuple[int, int]:
    """The (height, width) of that."""
    return choose_shape(samples)[1:]


def plan_prompts(config: TrainConfig, samples: Sequence[Sample], geometry: Geometry) -> tuple[DrawnPrompt, ...]:
    """The columns of `--validation_prompts` and `--validation_prompt`, else captions spread evenly over the dataset.

    What an edit model is to start from is, where a prompt does not say, what the dataset's rows show.

    Raises:
        ConfigError: listing every prompt of the file that cannot be drawn.
    """
    frames, *size = choose_shape(samples)
    shown = _spread(samples)
    in_file = read_prompts(config.validation_prompts) if config.validation_prompts else ()
    asked = [*in_file, *(ValidationPrompt(text) for text in config.validation_prompt)]
    if not asked:
        return tuple(_drawn(ValidationPrompt(sample.caption), sample.prompt, config) for sample in shown)
    faults: list[str] = []
    found = []
    for index, request in enumerate(asked):
        shape = (frames, request.height or size[0], request.width or size[1])
        try:
            controls = _controls(request, shown[index % len(shown)], shape, geometry)
        except ValueError as error:
            faults.append(f"{request.prompt!r}: {error}")
            continue
        found.append(_drawn(request, Prompt(request.prompt, controls, shape), config))
    if faults:
        raise ConfigError(f"--validation_prompts {config.validation_prompts}:\n{listed(faults)}")
    return tuple(found)


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """Up to eight samples, evenly spread over those that tell the model something else."""
    first: dict[object, Sample] = {}
    for sample in samples:
        first.setdefault((sample.caption, sample.controls), sample)
    different = [*first.values()]
    columns = min(MOST_COLUMNS, len(different))
    return [different[index * len(different) // columns] for index in range(columns)]


def _drawn(request: ValidationPrompt, prompt: Prompt, config: TrainConfig) -> DrawnPrompt:
    negative = config.validation_negative_prompt if request.negative_prompt is None else request.negative_prompt
    return DrawnPrompt(request, prompt, Prompt(negative, prompt.controls, prompt.shape))


def _controls(request: ValidationPrompt, sample: Sample, shape: Shape, geometry: Geometry) -> tuple[Control, ...]:
    """Raises ValueError: a size that is no multiple, controls that the family does not take, or unusable ones."""
    size = shape[1:]
    if request.controls or not sample.controls:
        return own_controls(request, size, geometry)
    require_multiples(size, geometry)
    if size == sample.size:
        return sample.controls
    if any(control.is_video for control in sample.controls):
        raise ValueError("has no control picture, and the dataset's are frames of videos of another size")
    return tuple(control_picture(control.path, size, geometry) for control in sample.controls)


def own_controls(request: ValidationPrompt, size: tuple[int, int], geometry: Geometry) -> tuple[Control, ...]:
    """The pictures that a prompt names, beside a target of (height, width).

    Raises:
        ValueError: a size or a number of pictures that the family does not take, or an unusable picture.
    """
    require_multiples(size, geometry)
    rule = geometry.controls
    if not rule.least <= len(request.controls) <= rule.most:
        expected = f"{rule.least}" if rule.least == rule.most else f"{rule.least} to {rule.most}"
        raise ValueError(f"has {len(request.controls)} control pictures; a {rule.pipeline} takes {expected}")
    return tuple(control_picture(path, size, geometry) for path in request.controls)


def require_multiples(size: tuple[int, int], geometry: Geometry) -> None:
    """Raises ValueError: a (height, width) that the family cannot draw."""
    if any(side % geometry.multiple for side in size):
        raise ValueError(f"is {size[1]}x{size[0]}; both sides must be multiples of {geometry.multiple}")


def control_picture(path: Path, target: tuple[int, int], geometry: Geometry) -> Control:
    """A control picture beside a target of (height, width).

    Raises:
        ValueError: it cannot be read, decoded or used.
    """
    try:
        raw = path.read_bytes()
        picture = open_picture(raw)
    except (OSError, ValueError) as error:
        raise ValueError(f"control picture {path}: {error}") from error
    size = geometry.controls.size((picture.height, picture.width), target)
    if 0 in size:
        raise ValueError(f"control picture {path}: is {picture.width}x{picture.height} pixels, which is too small")
    return Control(path, hashlib.sha256(raw).hexdigest(), size)


def unrelated(config: TrainConfig, recipe: Recipe, samples: Sequence[Sample]) -> tuple[Prompt, ...]:
    """What health is measured on: a few prompts that have nothing to do with the dataset.

    A model that is trained with control pictures is shown the dataset's.

    Raises:
        ConfigError: `--preserve_prompts` cannot be read.
    """
    shown = shown_samples(samples)
    edits = bool(shown) and not recipe.frame_step
    texts = measured(unrelated_prompts(recipe.family, config.preserve_prompts, edits=edits))
    if not shown:
        return tuple(Prompt(text) for text in texts)
    return tuple(
        Prompt(text, sample.controls, sample.shape) for text, sample in zip(texts, itertools.cycle(shown), strict=False)
    )


def all_prompts(drawn: Iterable[DrawnPrompt], others: Iterable[Prompt]) -> list[Prompt]:
    """Everything that must be encoded."""
    return [*(prompt for each in drawn for prompt in (each.prompt, each.negative)), *others]
