"""Qwen-Image 2.1: one stream of blocks; ComfyUI fuses the gate of a feed-forward layer with its other input."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

_SAME = (
    "img_in",
    "txt_in.in_layer",
    "txt_in.out_layer",
    "txt_in.text_norm",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "modulation.1",
    "transformer_blocks.{}.attn.to_q",
    "transformer_blocks.{}.attn.to_k",
    "transformer_blocks.{}.attn.to_v",
    "transformer_blocks.{}.attn.to_out.0",
    "transformer_blocks.{}.attn.norm_q",
    "transformer_blocks.{}.attn.norm_k",
    "transformer_blocks.{}.img_mlp.out",
    "norm_out.linear",
    "proj_out",
)
_GATE, _PROJ = "transformer_blocks.{}.img_mlp.gate_layer", "transformer_blocks.{}.img_mlp.proj"

DIFFUSERS = Layout("diffusers", names(*_SAME, _GATE, _PROJ))

COMFYUI = Layout("comfyui", names(*_SAME) | {"transformer_blocks.{}.img_mlp.gate_up": parts(_GATE, _PROJ)})

QWEN_IMAGE21 = Family(
    name="qwen_image21",
    title="Qwen-Image 2.1",
    transformer_classes=("QwenImage21Transformer2DModel",),
    layouts=(DIFFUSERS, COMFYUI),
    sizes=(Size(4096, 32, "7B"),),
)
