"""The families that can be trained, one file each."""

from __future__ import annotations

from lorafuse_common.errors import ConfigError

from .qwen_image import QwenImage
from .recipe import Recipe

RECIPES: tuple[Recipe, ...] = (QwenImage(),)


def recipe_for(family: str) -> Recipe:
    """The recipe of a family.

    Raises:
        ConfigError: there is none yet; lists those there are.
    """
    for recipe in RECIPES:
        if recipe.family == family:
            return recipe
    trainable = ", ".join(recipe.family for recipe in RECIPES)
    raise ConfigError(f"a checkpoint of the family {family!r} can be fused but not trained yet; trainable: {trainable}")
