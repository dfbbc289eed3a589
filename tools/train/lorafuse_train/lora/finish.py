"""What a training leaves: the LoRA in every dialect asked for, each proven to load; its card; the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafuse_common.scale import ADAPTER_CONFIG
from lorafuse_common.tensorfile import read_header
from lorafuse_train.atomic import write_atomically
from lorafuse_train.console import say
from lorafuse_train.lora.adapter import ADAPTER, FILE_NAME, lora_state, without
from lorafuse_train.lora.base_match import KEY
from lorafuse_train.lora.card import CARD, SHEET, Shown, write_card
from lorafuse_train.lora.export import PLACES, Exporter
from lorafuse_train.lora.lora_file import compare_effects, load_back, save_lora
from lorafuse_train.lora.metadata import resolution_of
from lorafuse_train.lora.pissa import compute_exactly
from lorafuse_train.lora.push import push
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.config_output import PEFT
from lorafuse_train.samples.gallery import Gallery
from lorafuse_train.samples.health import PLOT_NAME
from lorafuse_train.steps.loop import Training
from lorafuse_train.steps.resume import header


def save_result(training: Training, gallery: Gallery) -> None:
    """Save, prove that diffusers loads what was saved, and only then give it its name; then the other dialects.

    The transformer has the LoRA as diffusers loads it afterwards.

    Raises:
        LorafuseError: a file is not what was trained.
    """
    config, transformer = training.plan.config, training.transformer
    final = config.output_path / FILE_NAME
    unchecked = final.with_name(f"unchecked_{FILE_NAME}")
    trained = lora_state(transformer)
    save_lora(unchecked, trained, header(training, training.total_steps))
    wanted = probe(gallery, transformer)
    with without(transformer):
        bare = probe(gallery, transformer)
    _load(training, unchecked)
    compare_effects(unchecked, bare, wanted, probe(gallery, transformer))
    unchecked.replace(final)
    say(f"saved {final}; diffusers loads it, with the effect it had in training")
    remove_stale(config)
    if config.dialects[1:]:
        Exporter(training.plan.base, config, transformer, trained).write(final)
        _load(training, final)


def remove_stale(config: TrainConfig) -> None:
    """Remove what an earlier run exported here and this one does not, which is another LoRA now."""
    for name, place in PLACES.items():
        path = config.output_path / place
        if name not in config.dialects and path.is_file() and KEY in read_header(path).metadata:
            path.unlink()
            if name == PEFT:
                (path.parent / ADAPTER_CONFIG).unlink(missing_ok=True)


def _load(training: Training, file: Path) -> None:
    base = training.plan.base
    load_back(training.transformer, base.pipeline, file, base.component)
    if training.plan.config.starts_from_components:
        compute_exactly(training.transformer, ADAPTER)


@torch.no_grad()
def probe(gallery: Gallery, transformer: Any) -> Tensor:
    """The model's prediction for the first prompt, halfway through the noise."""
    column, precision = gallery.columns[0], gallery.precision
    x = column.noise[None].to(precision.device)
    sigma = torch.full((1,), 0.5, device=precision.device)
    with precision.compute():
        return gallery.recipe.predict(transformer, x, sigma, gallery.recipe.collate([column.encoded]))


def present(training: Training, gallery: Gallery) -> None:
    """Write the model card and its pictures."""
    plan, config = training.plan, training.plan.config
    pictures = _pictures(gallery)
    for file, picture in zip(pictures, gallery.newest, strict=True):
        write_atomically(config.output_path / file, picture.save)
    width, height = resolution_of(plan.samples)
    write_card(plan, Shown(gallery.schedules[0], (height, width), training.total_steps, pictures))


def _pictures(gallery: Gallery) -> dict[str, str]:
    """File within the output folder -> prompt, of the pictures of a card."""
    return {f"images/{number}.png": column.text for number, column in enumerate(gallery.columns)}


def upload(training: Training, gallery: Gallery) -> None:
    """Push everything where that was asked for.

    Raises:
        HubError: it could not be pushed; on the disk all is complete.
    """
    config = training.plan.config
    if config.push_to_hub:
        push(config, [*result_files(config), *_pictures(gallery)])


def result_files(config: TrainConfig) -> list[str]:
    """What belongs to the LoRA, within the output folder, besides the pictures of its prompts."""
    names = [FILE_NAME, *(PLACES[name] for name in config.dialects[1:])]
    names += [f"peft/{ADAPTER_CONFIG}"] if PEFT in config.dialects else []
    return [*names, CARD, SHEET, *([PLOT_NAME] if (config.output_path / PLOT_NAME).is_file() else [])]
