"""DiffSynth-Studio: bare names, `lora_A.default`/`lora_B.default`, no alpha."""

from .dialect import AB_DEFAULT_ROLES, BARE, Dialect

DIFFSYNTH = Dialect("diffsynth", BARE, AB_DEFAULT_ROLES)
