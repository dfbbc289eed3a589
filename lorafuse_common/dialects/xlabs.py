"""XLabs: its own names for FLUX.1's attention processors; there `_lora1` ends a name, `_lora` alone is a suffix."""

from .dialect import BARE, Dialect

XLABS = Dialect(
    "xlabs",
    BARE,
    {"down": "_lora.down.weight", "up": "_lora.up.weight"},
    layout="xlabs",
    endings=("_lora1.down.weight", "_lora1.up.weight", "_lora2.down.weight", "_lora2.up.weight"),
)
