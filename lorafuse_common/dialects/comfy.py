"""ComfyUI and ai-toolkit: `diffusion_model.` before the model's names, `lora_A`/`lora_B` (some tools write down/up)."""

from .dialect import AB_ROLES, Dialect, dotted

COMFY = Dialect("comfy", dotted("diffusion_model."), AB_ROLES)
