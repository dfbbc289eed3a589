"""diffusers: `transformer.` before diffusers' names, `lora_A`/`lora_B`."""

from .dialect import AB_ROLES, AlphaStyle, Dialect

DIFFUSERS = Dialect(
    "diffusers",
    ("transformer.", "transformer.transformer."),
    AB_ROLES | {"magnitude": ".lora_magnitude_vector"},
    alpha=AlphaStyle.NEVER,
)
