"""Bare names with `lora_A`/`lora_B`, as BFL and Lightricks write them."""

from .dialect import AB_ROLES, BARE, AlphaStyle, Dialect

ORIGINAL = Dialect("original", BARE, AB_ROLES, layout="original", alpha=AlphaStyle.NEVER)
