"""LyCORIS and SimpleTuner: `lycoris_` and the name with underscores for dots."""

from .dialect import DOWN_UP_ROLES, Dialect, flat

LYCORIS = Dialect("lycoris", flat("lycoris_"), DOWN_UP_ROLES)
