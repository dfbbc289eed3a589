"""FLUX.1 (dev, schnell, Kontext)."""

from lorafuse_common.naming import Family, Layout

DIFFUSERS = Layout(
    "diffusers",
    (
        "x_embedder",
        "context_embedder",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.guidance_embedder.linear_1",
        "time_text_embed.guidance_embedder.linear_2",
        "time_text_embed.text_embedder.linear_1",
        "time_text_embed.text_embedder.linear_2",
        "transformer_blocks.{}.norm1.linear",
        "transformer_blocks.{}.norm1_context.linear",
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
        "transformer_blocks.{}.attn.to_out.0",
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
        "transformer_blocks.{}.attn.to_add_out",
        "transformer_blocks.{}.ff.net.0.proj",
        "transformer_blocks.{}.ff.net.2",
        "transformer_blocks.{}.ff_context.net.0.proj",
        "transformer_blocks.{}.ff_context.net.2",
        "single_transformer_blocks.{}.norm.linear",
        "single_transformer_blocks.{}.proj_mlp",
        "single_transformer_blocks.{}.proj_out",
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        "norm_out.linear",
        "proj_out",
    ),
)

ORIGINAL = Layout(
    "original",
    (
        "img_in",
        "txt_in",
        "time_in.in_layer",
        "time_in.out_layer",
        "vector_in.in_layer",
        "vector_in.out_layer",
        "guidance_in.in_layer",
        "guidance_in.out_layer",
        "double_blocks.{}.img_attn.qkv",
        "double_blocks.{}.img_attn.proj",
        "double_blocks.{}.img_mlp.0",
        "double_blocks.{}.img_mlp.2",
        "double_blocks.{}.txt_attn.qkv",
        "double_blocks.{}.txt_attn.proj",
        "double_blocks.{}.txt_mlp.0",
        "double_blocks.{}.txt_mlp.2",
        "double_blocks.{}.img_mod.lin",
        "double_blocks.{}.txt_mod.lin",
        "single_blocks.{}.linear1",
        "single_blocks.{}.linear2",
        "single_blocks.{}.modulation.lin",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ),
)

FLUX = Family(
    name="flux",
    title="FLUX.1",
    transformer_classes=("FluxTransformer2DModel",),
    layouts=(
        DIFFUSERS,
        ORIGINAL,
    ),
)
