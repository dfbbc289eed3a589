"""VideoX-Fun: kohya's spelling with two underscores after `lora_unet`."""

from .dialect import DOWN_UP_ROLES, Dialect, flat

VIDEOX = Dialect("videox", flat("lora_unet__"), DOWN_UP_ROLES)
