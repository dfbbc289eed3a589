"""The ways of training that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


class TrainedOn(StrEnum):
    """The checkpoint that a LoRA is trained on; all are used on the fused one."""

    FUSED = "fused"
    SCAFFOLD = "scaffold"
    """The fused one with a de-distill adapter fused into it."""
    ORIGINAL = "original"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of training."""

    name: str
    title: str
    trained_on: TrainedOn = TrainedOn.FUSED
    options: Mapping[str, str] = field(default_factory=dict)
    """Of `lorafuse-train train`, besides those that all have in common."""


OLD_PROMPTS = str(Path(__file__).parents[1] / "prompts.txt")
"""The old domain's captions."""
PLAIN = {"objective_base": "fused", "preserve_weight": "0"}
PRESERVED = {"objective_base": "fused", "preserve_weight": "1"}
THROUGH = {"objective_base": "original", "preserve_weight": "0"}
NEAR = {"preserve_prompts": OLD_PROMPTS}
VARIANTS = (
    Variant("plain", "plain flow matching", options=PLAIN),
    Variant("few", "only the few-step noise levels", options={**PLAIN, "timestep_sampling": "manifest"}),
    Variant("nearest", "nearest of 64 noises", options={**PLAIN, "noise_coupling": "nearest:64"}),
    Variant("matched", "noises matched in the batch", options={**PLAIN, "noise_coupling": "minibatch_ot"}),
    Variant("preserve", "preservation", options=PRESERVED),
    Variant("few-preserve", "few-step levels, preservation", options={**PRESERVED, "timestep_sampling": "manifest"}),
    Variant("matched-preserve", "matched noises, preservation",
            options={**PRESERVED, "noise_coupling": "minibatch_ot"}),
    Variant("through", "through the original weights", options=THROUGH),
    Variant("default", "through the original weights, preservation (default)"),
    Variant("near", "through the original weights, preserving the old prompts", options=NEAR),
    Variant("near-light", "preserving the old prompts at weight 0.3", options={**NEAR, "preserve_weight": "0.3"}),
    Variant("near-few", "preserving the old prompts, only few-step levels",
            options={**NEAR, "timestep_sampling": "manifest"}),
    Variant("near-fused", "preserving the old prompts, through the fused weights",
            options={**NEAR, "objective_base": "fused"}),
    Variant("scaffold", "with a de-distill scaffold", TrainedOn.SCAFFOLD, PLAIN),
    Variant("unfused", "on the original base, Lightning added afterwards", TrainedOn.ORIGINAL, PLAIN),
)  # fmt: skip


def variant_named(name: str) -> Variant:
    """The variant of that name, which is one."""
    return next(variant for variant in VARIANTS if variant.name == name)
