"""Raw PEFT `save_pretrained`: `base_model.model.` before the names; the scale is in `adapter_config.json`."""

from .dialect import AB_ROLES, AlphaStyle, Dialect

PEFT = Dialect(
    "peft",
    (
        "base_model.model.",
        "base_model.model.model.",
        "base_model.model.transformer.",
        "base_model.model.diffusion_model.",
        "transformer.base_model.model.",
        "unet.base_model.model.",
    ),
    AB_ROLES | {"magnitude": ".lora_magnitude_vector"},
    alpha=AlphaStyle.CONFIG,
)
