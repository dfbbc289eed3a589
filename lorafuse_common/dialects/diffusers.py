"""diffusers: `transformer.` before diffusers' names, `lora_A`/`lora_B`."""

from .dialect import AB_ROLES, Dialect

DIFFUSERS = Dialect(
    "diffusers", ("transformer.", "transformer.transformer."), AB_ROLES | {"magnitude": ".lora_magnitude_vector"}
)
