"""kohya and musubi: `lora_unet_` and the original name with underscores for dots, down/up and alpha."""

from .dialect import DOWN_UP_ROLES, AlphaStyle, Dialect

KOHYA = Dialect("kohya", ("lora_unet_",), DOWN_UP_ROLES, flat=True, layout="original", alpha=AlphaStyle.ALWAYS)
