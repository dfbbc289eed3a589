"""The loss on pictures that are not trained on, at fixed noise and noise levels: comparable between runs.

For each held-out picture, LEVELS noise levels (k + 1/2) / LEVELS, or as many spread over those of an expert, each
with a noise of its own that depends on the picture's content and k only:

    validation_loss = mean over pictures and k of mean |v - (eps - x0)|^2
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafuse_common.errors import ConfigError, DatasetError
from lorafuse_train.dataset.data import Sample, listed, read_dataset
from lorafuse_train.dataset.order import seed_for
from lorafuse_train.dataset.pictures import Geometry
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.steps.objective import add_noise, loss_sum

if TYPE_CHECKING:
    from lorafuse_train.steps.loop import Training

LEVELS = 8


@dataclass(frozen=True, slots=True)
class Split:
    """A dataset in two parts."""

    training: list[Sample]
    held_out: list[Sample]


def hold_out(config: TrainConfig, samples: Sequence[Sample], geometry: Geometry) -> Split:
    """The pictures that are trained on and those that are not, as `--validation_...` say.

    Raises:
        ConfigError: nothing would be left to train on.
        DatasetError: the other dataset is faulty, or shares pictures with the training's.
    """
    folder = config.validation_dataset_path
    if folder is None:
        return split(samples, config.validation_split)
    if not folder.is_dir():
        raise DatasetError(f"--validation_dataset_path {folder}: no such folder")
    other = dataclasses.replace(
        config, dataset_base_path=folder, dataset_metadata_path=None, dataset_name=None, dataset_control_path=()
    )
    held_out = read_dataset(other, geometry)
    trained = {sample.sha256: sample.path for sample in samples}
    both = [f"{sample.path}: is also {trained[sample.sha256]}" for sample in held_out if sample.sha256 in trained]
    if both:
        raise DatasetError(
            f"--validation_dataset_path {folder}: {len(both)} of its {len(held_out)} pictures are trained on, too:\n"
            + listed(both)
        )
    return Split([*samples], held_out)


def split(samples: Sequence[Sample], amount: float) -> Split:
    """Hold out `amount` pictures, or that share of them where it is below 1; at least one.

    Chosen by the files' content alone: the same pictures whatever the seed, the captions or the order of the rows, and
    all rows of a picture together.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    if not amount:
        return Split([*samples], [])
    pictures = sorted({sample.sha256 for sample in samples}, key=lambda sha256: seed_for("held out", sha256))
    count = max(1, round(amount * len(pictures))) if amount < 1 else int(amount)
    if count >= len(pictures):
        raise ConfigError(
            f"--validation_split {amount:g}: holds out {count} of {len(pictures)} different pictures, which leaves "
            "nothing to train on"
        )
    held = {*pictures[:count]}
    return Split(
        [sample for sample in samples if sample.sha256 not in held],
        [sample for sample in samples if sample.sha256 in held],
    )


@torch.no_grad()
def held_out_loss(training: Training) -> float:
    """The mean over all held-out pictures, through the weights that the training loss runs through, as they are now."""
    plan, precision = training.plan, training.precision
    low, high = plan.base.expert.range if plan.base.expert else (0.0, 1.0)
    total = 0.0
    for batch in _batches(plan.held_out, plan.config.train_batch_size):
        latents = torch.stack([training.encodings.latents(sample) for sample in batch])
        condition = plan.recipe.collate([training.encodings.condition(sample.prompt) for sample in batch])
        mask = plan.held_out_masks.weights(batch).to(precision.device) if plan.held_out_masks else None
        x0 = latents.to(precision.device)
        for level in range(LEVELS):
            noise = torch.stack([fixed_noise(sample, level, latents.shape[1:]) for sample in batch])
            noise = noise.to(precision.device)
            sigma = torch.full((len(batch),), low + (high - low) * (level + 0.5) / LEVELS, device=precision.device)
            with precision.compute(), training.objective_base.in_use():
                v = plan.recipe.predict(training.transformer, add_noise(x0, noise, sigma), sigma, condition)
            total += loss_sum(v, x0, noise, mask=mask).item()
    loss = total / (LEVELS * len(plan.held_out))
    return loss if math.isfinite(loss) else math.nan


def fixed_noise(sample: Sample, level: int, shape: torch.Size) -> Tensor:
    """eps of a picture at one of the noise levels, fp32."""
    generator = torch.Generator().manual_seed(seed_for("held-out noise", sample.sha256, sample.shape, level))
    return torch.randn(shape, generator=generator)


def _batches(samples: Iterable[Sample], size: int) -> Iterable[list[Sample]]:
    """Samples that can go through the model together."""
    groups: dict[object, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.bucket, []).append(sample)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))
