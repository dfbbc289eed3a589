"""The families that can be trained, one file each."""

from __future__ import annotations

from pathlib import Path

from lorafuse_common.checkpoint import read_json
from lorafuse_common.errors import CheckpointError, ConfigError

from .flux import Flux
from .flux2 import Flux2
from .flux_kontext import FluxKontext
from .qwen_image import QwenImage
from .qwen_image_edit import QwenImageEdit, QwenImageEditPlus
from .recipe import Recipe
from .sd3 import Sd3
from .wan import Wan, WanImage
from .z_image import ZImage

RECIPES: tuple[Recipe, ...] = (
    QwenImage(),
    QwenImageEdit(),
    QwenImageEditPlus(),
    Flux(),
    FluxKontext(),
    Flux2(),
    Sd3(),
    ZImage(),
    Wan(),
    WanImage(),
)


def recipe_for(family: str, pipeline: Path) -> Recipe:
    """The recipe of a family that trains for the class that a pipeline folder's model_index.json names.

    Raises:
        ConfigError: the family has none yet; lists those there are.
        CheckpointError: it has some, but none for that class.
    """
    recipes = [recipe for recipe in RECIPES if recipe.family == family]
    if not recipes:
        trainable = ", ".join(dict.fromkeys(recipe.family for recipe in RECIPES))
        raise ConfigError(
            f"a checkpoint of the family {family!r} can be fused but not trained yet; trainable: {trainable}"
        )
    found = (read_json(pipeline / "model_index.json") or {}).get("_class_name")
    for recipe in recipes:
        if found in recipe.pipelines:
            return recipe
    known = ", ".join(name for recipe in recipes for name in recipe.pipelines)
    raise CheckpointError(f"{pipeline}: model_index.json names a {found}; this family is trained for {known}")
