"""The families that can be trained, one file each."""

from __future__ import annotations

from lorafuse_common.errors import ConfigError

from .flux import Flux
from .flux2 import Flux2
from .qwen_image import QwenImage
from .recipe import Recipe
from .sd3 import Sd3
from .z_image import ZImage

RECIPES: tuple[Recipe, ...] = (QwenImage(), Flux(), Sd3(), ZImage(), Flux2())


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
