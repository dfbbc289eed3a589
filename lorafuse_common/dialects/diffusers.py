"""diffusers: `transformer.` before diffusers' names, `lora_A`/`lora_B`."""

from .dialect import AB_ROLES, Dialect, dotted

DIFFUSERS = Dialect("diffusers", dotted("transformer."), AB_ROLES)
