"""Lightning few-step LoRAs: bare names, down/up and a per-module alpha."""

from .dialect import BARE, DOWN_UP_ROLES, AlphaStyle, Dialect

LIGHTNING = Dialect("lightning", BARE, DOWN_UP_ROLES, alpha=AlphaStyle.ALWAYS)
