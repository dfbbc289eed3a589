"""DiffSynth-Studio: bare names, `lora_A.default`/`lora_B.default`, no alpha."""

from .dialect import AB_DEFAULT_ROLES, Dialect, dotted

DIFFSYNTH = Dialect("diffsynth", dotted(""), AB_DEFAULT_ROLES)
