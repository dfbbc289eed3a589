"""LyCORIS and SimpleTuner: `lycoris_` and the name with underscores for dots."""

from .dialect import DOWN_UP_ROLES, AlphaStyle, Dialect

LYCORIS = Dialect("lycoris", ("lycoris_",), DOWN_UP_ROLES, flat=True, alpha=AlphaStyle.ALWAYS)
