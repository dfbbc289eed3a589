"""Chroma: FLUX.1 without modulation layers."""

from lorafuse_common.naming import Family, Layout, names, parts

DIFFUSERS = Layout(
    "diffusers",
    names(
        "x_embedder",
        "context_embedder",
        "distilled_guidance_layer.in_proj",
        "distilled_guidance_layer.out_proj",
        "distilled_guidance_layer.layers.{}.linear_1",
        "distilled_guidance_layer.layers.{}.linear_2",
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
        "single_transformer_blocks.{}.proj_mlp",
        "single_transformer_blocks.{}.proj_out",
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        "proj_out",
    ),
)

ORIGINAL = Layout(
    "original",
    {
        "img_in": parts("x_embedder"),
        "txt_in": parts("context_embedder"),
        "distilled_guidance_layer.in_proj": parts("distilled_guidance_layer.in_proj"),
        "distilled_guidance_layer.out_proj": parts("distilled_guidance_layer.out_proj"),
        "distilled_guidance_layer.layers.{}.in_layer": parts("distilled_guidance_layer.layers.{}.linear_1"),
        "distilled_guidance_layer.layers.{}.out_layer": parts("distilled_guidance_layer.layers.{}.linear_2"),
        "double_blocks.{}.img_attn.qkv": parts(
            "transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.attn.to_k", "transformer_blocks.{}.attn.to_v"
        ),
        "double_blocks.{}.img_attn.proj": parts("transformer_blocks.{}.attn.to_out.0"),
        "double_blocks.{}.img_mlp.0": parts("transformer_blocks.{}.ff.net.0.proj"),
        "double_blocks.{}.img_mlp.2": parts("transformer_blocks.{}.ff.net.2"),
        "double_blocks.{}.txt_attn.qkv": parts(
            "transformer_blocks.{}.attn.add_q_proj",
            "transformer_blocks.{}.attn.add_k_proj",
            "transformer_blocks.{}.attn.add_v_proj",
        ),
        "double_blocks.{}.txt_attn.proj": parts("transformer_blocks.{}.attn.to_add_out"),
        "double_blocks.{}.txt_mlp.0": parts("transformer_blocks.{}.ff_context.net.0.proj"),
        "double_blocks.{}.txt_mlp.2": parts("transformer_blocks.{}.ff_context.net.2"),
        "single_blocks.{}.linear1": parts(
            "single_transformer_blocks.{}.attn.to_q",
            "single_transformer_blocks.{}.attn.to_k",
            "single_transformer_blocks.{}.attn.to_v",
            "single_transformer_blocks.{}.proj_mlp",
            shares=(1, 1, 1, 4),
        ),
        "single_blocks.{}.linear2": parts("single_transformer_blocks.{}.proj_out"),
        "final_layer.linear": parts("proj_out"),
    },
)

CHROMA = Family(
    name="chroma",
    title="Chroma",
    transformer_classes=("ChromaTransformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
)
