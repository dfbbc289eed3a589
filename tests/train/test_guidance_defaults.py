"""Without --validation_guidance_scale, each family is guided as its pipeline is by default."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

from lorafuse_train.recipes import recipe_for
from lorafuse_train.recipes.recipe import Recipe

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "QwenImagePipeline": ("true_cfg_scale", {}, {}, 0),
    "QwenImageEditPlusPipeline": ("true_cfg_scale", {}, {}, 0),
    "FluxPipeline": ("guidance_scale", {"guidance_embeds": True}, {}, 0),
    "FluxKontextPipeline": ("guidance_scale", {"guidance_embeds": True}, {}, 0),
    "Flux2Pipeline": ("guidance_scale", {"guidance_embeds": True}, {}, 0),
    "Flux2KleinPipeline": ("guidance_scale", {"guidance_embeds": False}, {}, 0),
    "StableDiffusion3Pipeline": ("guidance_scale", {}, {}, 0),
    "ZImagePipeline": ("guidance_scale", {}, {"shift": 6.0}, 1),  # ours is one more
    "WanPipeline": ("guidance_scale", {}, {}, 0),
}
"""Pipeline -> the argument of its call, the transformer's and the scheduler's config, and our scale minus its."""
FAMILIES = {
    "Qwen": "qwen_image", "FluxP": "flux", "FluxK": "flux", "Flux2": "flux2", "Stable": "sd3", "ZImage": "z_image",
    "Wan": "wan",
}  # fmt: skip


def recipe(folder: Path, pipeline: str, scheduler: dict[str, Any], **index: Any) -> Recipe:
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **index}))
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    family = next(name for start, name in FAMILIES.items() if pipeline.startswith(start))
    return recipe_for(family, folder)


@pytest.mark.parametrize("pipeline", CASES)
def test_it_is_what_the_pipelines_call_has(tmp_path: Path, pipeline: str) -> None:
    argument, transformer, scheduler, more = CASES[pipeline]
    default = inspect.signature(getattr(diffusers, pipeline).__call__).parameters[argument].default
    assert recipe(tmp_path, pipeline, scheduler).default_guidance(tmp_path, transformer) == default + more


def test_what_was_distilled_does_without(tmp_path: Path) -> None:
    assert recipe(tmp_path, "FluxPipeline", {}).default_guidance(tmp_path, {"guidance_embeds": False}) == 1
    distilled = recipe(tmp_path / "klein", "Flux2KleinPipeline", {}, is_distilled=True)
    assert distilled.default_guidance(tmp_path / "klein", {"guidance_embeds": False}) == 1
    assert recipe(tmp_path / "turbo", "ZImagePipeline", {"shift": 3.0}).default_guidance(tmp_path / "turbo", {}) == 1
    assert recipe(tmp_path / "35", "StableDiffusion3Pipeline", {}).default_guidance(tmp_path, {"qk_norm": "x"}) == 4.5
