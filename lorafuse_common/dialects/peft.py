"""Raw PEFT `save_pretrained`: `base_model.model.` before the names; the scale is in `adapter_config.json`."""

from .dialect import AB_ROLES, Dialect, dotted

PEFT = Dialect("peft", dotted("base_model.model."), AB_ROLES)
