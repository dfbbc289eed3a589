"""Chroma: FLUX.1 without modulation layers."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

DIFFUSERS = Layout(
    "diffusers",
    names(
        "x_embedder",
        "context_embedder",
        "distilled_guidance_layer.in_proj",
        "distilled_guidance_layer.out_proj",
        "distilled_guidance_layer.layers.{}.linear_1",
        "distilled_guidance_layer.layers.{}.linear_2",
        "distilled_guidance_layer.norms.{}",
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
        "transformer_blocks.{}.ff.net.0.proj",
        "transformer_blocks.{}.ff.net.2",
        "transformer_blocks.{}.ff_context.net.0.proj",
        "transformer_blocks.{}.ff_context.net.2",
        "single_transformer_blocks.{}.proj_mlp",
        "single_transformer_blocks.{}.proj_out",
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        "single_transformer_blocks.{}.attn.norm_q",
        "single_transformer_blocks.{}.attn.norm_k",
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
        "distilled_guidance_layer.norms.{}.scale": parts("distilled_guidance_layer.norms.{}"),
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
        "double_blocks.{}.img_attn.norm.query_norm.scale": parts("transformer_blocks.{}.attn.norm_q"),
        "double_blocks.{}.img_attn.norm.key_norm.scale": parts("transformer_blocks.{}.attn.norm_k"),
        "double_blocks.{}.txt_attn.norm.query_norm.scale": parts("transformer_blocks.{}.attn.norm_added_q"),
        "double_blocks.{}.txt_attn.norm.key_norm.scale": parts("transformer_blocks.{}.attn.norm_added_k"),
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
        "single_blocks.{}.norm.query_norm.scale": parts("single_transformer_blocks.{}.attn.norm_q"),
        "single_blocks.{}.norm.key_norm.scale": parts("single_transformer_blocks.{}.attn.norm_k"),
        "final_layer.linear": parts("proj_out"),
    },
)

COMFYUI = Layout(
    "comfyui",
    {module.removesuffix(".scale"): its for module, its in ORIGINAL.modules.items() if module.endswith("_norm.scale")},
)
"""What its newer versions call the norms' weights; all other names are the original's."""

CHROMA = Family(
    name="chroma",
    title="Chroma",
    transformer_classes=("ChromaTransformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL, COMFYUI),
    sizes=(Size(3072, 38, "8.9B"),),
)
