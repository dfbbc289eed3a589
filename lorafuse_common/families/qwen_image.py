"""Qwen-Image and its Edit versions; the original layout has the same names."""

from lorafuse_common.naming import Family, Layout, Size, names

DIFFUSERS = Layout(
    "diffusers",
    names(
        "img_in",
        "txt_in",
        "txt_norm",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "transformer_blocks.{}.img_mod.1",
        "transformer_blocks.{}.txt_mod.1",
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
        "transformer_blocks.{}.attn.to_out.0",
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
        "transformer_blocks.{}.attn.to_add_out",
        "transformer_blocks.{}.attn.norm_q",
        "transformer_blocks.{}.attn.norm_k",
        "transformer_blocks.{}.attn.norm_added_q",
        "transformer_blocks.{}.attn.norm_added_k",
        "transformer_blocks.{}.img_mlp.net.0.proj",
        "transformer_blocks.{}.img_mlp.net.2",
        "transformer_blocks.{}.txt_mlp.net.0.proj",
        "transformer_blocks.{}.txt_mlp.net.2",
        "norm_out.linear",
        "proj_out",
    ),
)

QWEN_IMAGE = Family(
    name="qwen_image",
    title="Qwen-Image",
    transformer_classes=("QwenImageTransformer2DModel",),
    layouts=(DIFFUSERS,),
    sizes=(Size(3072, 60, "20B"),),
    lora_targets=(
        "to_q",
        "to_k",
        "to_v",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_out.0",
        "to_add_out",
        "img_mlp.net.2",
        "img_mod.1",
        "txt_mlp.net.2",
        "txt_mod.1",
    ),
    idle_modules=(
        "transformer_blocks.{last}.attn.add_q_proj",
        "transformer_blocks.{last}.attn.to_add_out",
        "transformer_blocks.{last}.txt_mlp.net.0.proj",
        "transformer_blocks.{last}.txt_mlp.net.2",
    ),
)
