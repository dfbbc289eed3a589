"""kohya and musubi: `lora_unet_` and the name with underscores for dots, down/up and alpha."""

from .dialect import DOWN_UP_ROLES, Dialect, flat

KOHYA = Dialect("kohya", flat("lora_unet_"), DOWN_UP_ROLES)
