"""Genmo (Mochi): bare names, `lora_A` and `lora_B` without `.weight`."""

from .dialect import BARE, AlphaStyle, Dialect

GENMO = Dialect("genmo", BARE, {"down": ".lora_A", "up": ".lora_B"}, layout="original", alpha=AlphaStyle.NEVER)
