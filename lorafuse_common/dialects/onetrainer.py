"""OneTrainer: `lora_transformer_` and the diffusers name with underscores for dots."""

from .dialect import DOWN_UP_ROLES, AlphaStyle, Dialect

ONETRAINER = Dialect("onetrainer", ("lora_transformer_",), DOWN_UP_ROLES, flat=True, alpha=AlphaStyle.ALWAYS)
