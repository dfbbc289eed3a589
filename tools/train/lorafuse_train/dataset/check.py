"""`lorafuse-train check`: every fault of a dataset at once, and what is in it; nothing is changed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorafuse_common.checkpoint import DEFAULT_COMPONENT, read_json
from lorafuse_common.errors import CheckpointError, DatasetError, LorafuseError
from lorafuse_common.families import family_of_class
from lorafuse_train.console import only_errors, say
from lorafuse_train.dataset.captions import measure_captions
from lorafuse_train.dataset.check_text import describe_statistics
from lorafuse_train.dataset.data import FaultyDataset, Survey, survey_dataset
from lorafuse_train.dataset.dataset_statistics import Statistics, gather_statistics
from lorafuse_train.dataset.headers import read_header
from lorafuse_train.dataset.masks import Grid, masked, read_masks
from lorafuse_train.dataset.picture_faults import quiet_pillow
from lorafuse_train.dataset.pictures import SUFFIXES, ControlRule, Geometry, geometry
from lorafuse_train.dataset.rows import VIDEO_SUFFIXES
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import NOWHERE

if TYPE_CHECKING:
    from lorafuse_train.recipes.recipe import Recipe

INDEX = "model_index.json"
USUAL_MULTIPLE, USUAL_REDUCTION, USUAL_FRAME_STEP, MANY = 16, 8, 4, 99
"""What nearly all families have for sizes, latents and numbers of frames; more control pictures than any takes."""
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jfif", ".svg", ".psd", ".dng", ".nef", ".cr2", ".arw")
"""Pictures that people have and that are not read here."""


@dataclass(frozen=True, slots=True)
class Family:
    """What `--fused_model` tells of the family."""

    recipe: Recipe
    pipeline: Path


@dataclass(frozen=True, slots=True)
class Report:
    """All that `check` has found."""

    survey: Survey
    statistics: Statistics
    unread: tuple[tuple[str, int], ...]
    """What lies in the folder and is not in the dataset, with how many files it is."""
    faults: tuple[str, ...]


def run_check(config: TrainConfig) -> None:
    """Print what was found; as JSON where that was asked for.

    Raises:
        LorafuseError: there are faults; all of them are listed.
    """
    aside = contextlib.redirect_stdout(sys.stderr) if config.json else contextlib.nullcontext()
    with aside:
        report = check_dataset(config)
    source = report.survey.source
    if config.json:
        typer.echo(json.dumps(as_json(report), indent=2, ensure_ascii=False))
    else:
        say(describe_statistics(report.statistics, config))
        for what, count in report.unread:
            say(f"not in the dataset: {count} {what}")
    if report.faults:
        listing = "\n".join(f"  {fault}" for fault in report.faults)
        raise DatasetError(f"{source}: {len(report.faults)} fault{'s' * (len(report.faults) != 1)}:\n{listing}")
    say_to = sys.stderr if config.json else sys.stdout
    typer.echo(f"{source}: no faults", file=say_to)


def check_dataset(config: TrainConfig) -> Report:
    """Look at everything that a training reads of a dataset.

    Raises:
        LorafuseError: the dataset as a whole, or the base, cannot be read.
    """
    family = _family(config)
    shapes = geometry(config, family.recipe, family.pipeline) if family else _usual_geometry(config)
    survey = survey_dataset(config, shapes)
    samples = survey.samples
    faults = (*survey.faults, *_further_faults(config, survey, shapes, family))
    pictures = list(dict.fromkeys(sample.path for sample in samples if sample.excerpt is None))
    with quiet_pillow(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        headers = list(pool.map(read_header, pictures))
    lengths = measure_captions([sample.caption for sample in samples], family.pipeline if family else None)
    statistics = gather_statistics(
        samples, headers, lengths, config.dataset_base_path, config.train_batch_size, config.dataset_repeat
    )
    return Report(survey, statistics, _unread(config, survey), faults)


def _further_faults(config: TrainConfig, survey: Survey, shapes: Geometry, family: Family | None) -> Iterator[str]:
    """What a training finds only once every row is good; of it what the good rows can tell."""
    samples, all_good = survey.samples, not survey.faults
    looks: list[Callable[[], object]] = []
    if config.validation_dataset_path or (config.validation_split and all_good):
        from lorafuse_train.samples.held_out import hold_out

        looks.append(lambda: hold_out(config, samples, shapes))
    if family and config.validation_prompts and samples:
        from lorafuse_train.samples.drawn_prompts import plan_prompts

        looks.append(lambda: plan_prompts(config, samples, shapes))
    if config.trigger_phrase and all_good:
        from lorafuse_train.lora.metadata import require_trigger

        looks.append(lambda: require_trigger(config, samples))
    if masked(config, samples) or (config.masked_loss and all_good):
        looks.append(lambda: read_masks(config, samples, _grid(family)))
    for look in looks:
        try:
            look()
        except FaultyDataset as error:
            yield from (f"{error.source}: {fault}" for fault in error.faults)
        except LorafuseError as error:
            yield str(error)


def _family(config: TrainConfig) -> Family | None:
    if config.fused_model == NOWHERE:
        say(
            f"without --fused_model: sizes are multiples of {USUAL_MULTIPLE}, as most families need, and captions are "
            "counted in characters"
        )
        return None
    given = config.fused_model
    pipeline = given if (given / INDEX).is_file() else config.pretrained_model_name_or_path
    index = read_json(pipeline / INDEX) if pipeline else None
    if pipeline is None or index is None:
        raise CheckpointError(
            f"{pipeline or given}: no {INDEX}; expected a pipeline folder, or a transformer with "
            "--pretrained_model_name_or_path PIPELINE_FOLDER"
        )
    class_name = str((index.get(DEFAULT_COMPONENT) or [None, None])[1])
    family = family_of_class(class_name)
    if family is None:
        raise CheckpointError(f"{pipeline}: its transformer is a {class_name}, of no known family")
    with only_errors():
        from lorafuse_train.recipes import recipe_for  # diffusers, for which a check without a base need not wait

    return Family(recipe_for(family.name, pipeline), pipeline)


def _usual_geometry(config: TrainConfig) -> Geometry:
    fixed = (config.height, config.width) if config.height and config.width else None
    rule = ControlRule(most=MANY)
    return Geometry(USUAL_MULTIPLE, config.max_pixels, fixed, USUAL_FRAME_STEP, rule)


def _grid(family: Family | None) -> Grid:
    """(height, width) of a picture -> that of its latents."""
    if family is None:
        return lambda size: (size[0] // USUAL_REDUCTION, size[1] // USUAL_REDUCTION)
    from lorafuse_train.plan import latent_grid

    return latent_grid(family.recipe, family.pipeline)


def _unread(config: TrainConfig, survey: Survey) -> tuple[tuple[str, int], ...]:
    """Pictures, videos and captions below the folder that no row names."""
    root = config.dataset_base_path
    files = ((row.path, *row.controls, *([row.mask] if row.mask else [])) for row in survey.rows)
    named = {path.absolute() for row_files in files for path in row_files}
    stems = {path.with_suffix("") for path in named}
    found: Counter[str] = Counter()
    for path in root.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or not path.is_file() or not named.isdisjoint({path.absolute(), *path.absolute().parents}):
            continue
        suffix = path.suffix.lower()
        if suffix in UNREAD_SUFFIXES:
            found[f"{suffix} files, which are not read: save them as PNG or JPEG"] += 1
        elif suffix in (*SUFFIXES, *VIDEO_SUFFIXES):
            found[f"{suffix} files that are in no row"] += 1
        elif suffix == ".txt" and survey.source == root and path.absolute().with_suffix("") not in stems:
            found[".txt files without a picture"] += 1
    return tuple(found.most_common())


def as_json(report: Report) -> dict[str, Any]:
    """For programs: everything, with all faults."""
    return {
        "dataset": str(report.survey.source),
        "rows": len(report.survey.rows),
        "faults": list(report.faults),
        "unread": dict(report.unread),
        **dataclasses.asdict(report.statistics),
    }
