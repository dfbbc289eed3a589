"""Lightning few-step LoRAs: bare names, down/up and a per-module alpha."""

from .dialect import DOWN_UP_ROLES, Dialect, dotted

LIGHTNING = Dialect("lightning", dotted(""), DOWN_UP_ROLES)
