"""A second loss that keeps what the fused base could do: with the LoRA it shall go where it went without.

For some of the pictures of a step, a state of one of the base's own few-step trajectories is drawn, and the LoRA's
velocity there is held to the base's. Neither needs a second model, nor the base's prediction at that time: both are
on disk (`trajectories.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafuse_common.errors import ConfigError
from lorafuse_train.base import Base
from lorafuse_train.dataset.data import Prompt, Sample
from lorafuse_train.dataset.order import seed_for
from lorafuse_train.few_step.objective_base import is_few_step
from lorafuse_train.few_step.trajectories import Trajectories
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.precision import Precision
from lorafuse_train.recipes.recipe import Recipe
from lorafuse_train.samples.prompts import preserved, unrelated_prompts
from lorafuse_train.samples.sample import with_guidance

if TYPE_CHECKING:
    from lorafuse_train.encoding.encode import Encodings  # which reads the plan that this is a part of


@dataclass(frozen=True, slots=True)
class Preserving:
    """What `--preserve_weight` comes to, decided before anything is loaded."""

    weight: float
    share: float
    prompts: tuple[Prompt, ...]
    """One for each trajectory."""
    reason: str


def plan_preserving(config: TrainConfig, base: Base, recipe: Recipe, samples: Sequence[Sample]) -> Preserving | None:
    """Make `--preserve_weight auto` definite; None where nothing is to be preserved.

    Raises:
        ConfigError: there is no few-step schedule to follow, or no prompts.
    """
    asked, manifest = config.preserve_number, base.manifest
    if asked == 0 or (asked is None and not is_few_step(manifest)):
        return None
    if manifest is None or manifest.schedule is None:
        raise ConfigError(
            f"--preserve_weight {config.preserve_weight}: {base.folder} has no few-step schedule whose trajectories "
            "could be kept; fuse with --schedule"
        )
    if base.expert:
        if asked is None:
            return None
        raise ConfigError(
            f"--preserve_weight {config.preserve_weight}: the trajectories of a pipeline of two transformers are not "
            "followed here; leave it out"
        )
    shown = shown_samples(samples)
    edits = bool(shown) and not recipe.frame_step
    texts = preserved(unrelated_prompts(base.family.name, config.preserve_prompts, edits=edits))
    prompts = []
    for number in range(config.preserve_count):
        text = texts[number % len(texts)]
        sample = shown[number % len(shown)] if shown else None
        prompts.append(Prompt(text, sample.controls, sample.shape) if sample else Prompt(text))
    weight, reason = (1.0, "because the base is for few steps") if asked is None else (asked, "as asked")
    return Preserving(weight, config.preserve_share, tuple(prompts), reason)


def usual_samples(samples: Sequence[Sample]) -> list[Sample]:
    """Those of the shape that most have."""
    (most, _), *_ = Counter(sample.bucket for sample in samples).most_common(1)
    return [sample for sample in samples if sample.bucket == most]


def shown_samples(samples: Sequence[Sample]) -> list[Sample]:
    """`usual_samples`, if these have control pictures; none where the model mostly draws from text."""
    return [sample for sample in usual_samples(samples) if sample.controls]


def draw_visits(
    share: float, trajectories: int, steps: int, seed: int, step: int, places: Iterable[int]
) -> list[tuple[int, int]]:
    """(trajectory, step of it) for those of the pictures at `places` of a step that preserve, a `share` of all.

    Each is a function of (seed, step, place), so that batch size and number of processes do not matter.
    """
    found = []
    for place in places:
        generator = torch.Generator().manual_seed(seed_for("preserve", seed, step, place))
        if torch.rand((), generator=generator) < share:
            number, at = (int(torch.randint(most, (), generator=generator)) for most in (trajectories, steps))
            found.append((number, at))
    return found


@dataclass(frozen=True, slots=True)
class Preservation:
    """The second loss, ready to compute."""

    plan: Preserving
    trajectories: Trajectories
    encodings: Encodings
    recipe: Recipe

    @property
    def identity(self) -> dict[str, Any]:
        """What a continued training must have in common."""
        return {"weight": self.plan.weight, "share": self.plan.share, "trajectories_sha256": self.trajectories.sha256}

    def loss_sum(
        self, transformer: Any, precision: Precision, seed: int, step: int, places: Sequence[int]
    ) -> Tensor | None:
        """The sum over the states that are drawn of mean |v_lora - v_base|^2, times weight / share; None without any.

        So that its mean over steps is the weight, whatever the share.
        """
        schedule = self.trajectories.request.schedule
        drawn = draw_visits(self.plan.share, len(self.trajectories.paths), len(schedule.sigmas), seed, step, places)
        if not drawn:
            return None
        visits = [self.trajectories.visit(*each) for each in drawn]
        captions = [self.encodings.condition(self.plan.prompts[number]) for number, _ in drawn]
        condition = with_guidance(self.recipe.collate(captions), schedule, len(drawn))
        x, velocity = (
            torch.stack(tensors).to(precision.device)
            for tensors in ([visit.x for visit in visits], [visit.velocity for visit in visits])
        )
        sigma = torch.tensor([visit.sigma for visit in visits], device=precision.device)
        with precision.compute():
            predicted = self.recipe.predict(transformer, x, sigma, condition)
        each = (predicted.float() - velocity).square().flatten(1).mean(1)
        return self.plan.weight / self.plan.share * each.sum()
