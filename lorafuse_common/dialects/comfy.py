"""ComfyUI and ai-toolkit: `diffusion_model.` before original names, `lora_A`/`lora_B` (some tools write down/up)."""

from .dialect import AB_ROLES, AlphaStyle, Dialect

COMFY = Dialect(
    "comfyui", ("diffusion_model.", "model.diffusion_model."), AB_ROLES, layout="original", alpha=AlphaStyle.UNLESS_ONE
)
