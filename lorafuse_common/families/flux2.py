"""FLUX.2 (dev, klein)."""

from lorafuse_common.naming import Family, Layout

DIFFUSERS = Layout(
    "diffusers",
    (
        "time_guidance_embed.timestep_embedder.linear_1",
        "time_guidance_embed.timestep_embedder.linear_2",
        "time_guidance_embed.guidance_embedder.linear_1",
        "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.linear",
        "single_stream_modulation.linear",
        "x_embedder",
        "context_embedder",
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
        "transformer_blocks.{}.attn.to_out.0",
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
        "transformer_blocks.{}.attn.to_add_out",
        "transformer_blocks.{}.ff.linear_in",
        "transformer_blocks.{}.ff.linear_out",
        "transformer_blocks.{}.ff_context.linear_in",
        "transformer_blocks.{}.ff_context.linear_out",
        "single_transformer_blocks.{}.attn.to_qkv_mlp_proj",
        "single_transformer_blocks.{}.attn.to_out",
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
        "guidance_in.in_layer",
        "guidance_in.out_layer",
        "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.lin",
        "single_stream_modulation.lin",
        "double_blocks.{}.img_attn.qkv",
        "double_blocks.{}.img_attn.proj",
        "double_blocks.{}.img_mlp.0",
        "double_blocks.{}.img_mlp.2",
        "double_blocks.{}.txt_attn.qkv",
        "double_blocks.{}.txt_attn.proj",
        "double_blocks.{}.txt_mlp.0",
        "double_blocks.{}.txt_mlp.2",
        "single_blocks.{}.linear1",
        "single_blocks.{}.linear2",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ),
)

FLUX2 = Family(
    name="flux2",
    title="FLUX.2",
    transformer_classes=("Flux2Transformer2DModel",),
    layouts=(
        DIFFUSERS,
        ORIGINAL,
    ),
    widths={6144: "dev", 3072: "klein 4B", 4096: "klein 9B"},
)
