"""Bare names with `lora_A`/`lora_B`, as BFL and Lightricks write them."""

from .dialect import AB_ROLES, Dialect, dotted

ORIGINAL = Dialect("original", dotted(""), AB_ROLES)
