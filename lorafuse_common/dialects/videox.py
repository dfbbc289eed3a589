"""VideoX-Fun: kohya's spelling with two underscores after `lora_unet`."""

from .dialect import DOWN_UP_ROLES, AlphaStyle, Dialect

VIDEOX = Dialect("videox", ("lora_unet__",), DOWN_UP_ROLES, flat=True, layout="original", alpha=AlphaStyle.ALWAYS)
