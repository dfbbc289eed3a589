"""FLUX.2 (dev, klein)."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

DIFFUSERS = Layout(
    "diffusers",
    names(
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
        "transformer_blocks.{}.attn.norm_q",
        "transformer_blocks.{}.attn.norm_k",
        "transformer_blocks.{}.attn.norm_added_q",
        "transformer_blocks.{}.attn.norm_added_k",
        "transformer_blocks.{}.ff.linear_in",
        "transformer_blocks.{}.ff.linear_out",
        "transformer_blocks.{}.ff_context.linear_in",
        "transformer_blocks.{}.ff_context.linear_out",
        "single_transformer_blocks.{}.attn.to_qkv_mlp_proj",
        "single_transformer_blocks.{}.attn.to_out",
        "single_transformer_blocks.{}.attn.norm_q",
        "single_transformer_blocks.{}.attn.norm_k",
        "proj_out",
    )
    | {
        "norm_out.linear": parts("norm_out.linear.scale", "norm_out.linear.shift"),
    },
)

ORIGINAL = Layout(
    "original",
    {
        "img_in": parts("x_embedder"),
        "txt_in": parts("context_embedder"),
        "time_in.in_layer": parts("time_guidance_embed.timestep_embedder.linear_1"),
        "time_in.out_layer": parts("time_guidance_embed.timestep_embedder.linear_2"),
        "guidance_in.in_layer": parts("time_guidance_embed.guidance_embedder.linear_1"),
        "guidance_in.out_layer": parts("time_guidance_embed.guidance_embedder.linear_2"),
        "double_blocks.{}.img_attn.qkv": parts(
            "transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.attn.to_k", "transformer_blocks.{}.attn.to_v"
        ),
        "double_blocks.{}.img_attn.proj": parts("transformer_blocks.{}.attn.to_out.0"),
        "double_blocks.{}.img_mlp.0": parts("transformer_blocks.{}.ff.linear_in"),
        "double_blocks.{}.img_mlp.2": parts("transformer_blocks.{}.ff.linear_out"),
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
        "double_blocks.{}.txt_mlp.0": parts("transformer_blocks.{}.ff_context.linear_in"),
        "double_blocks.{}.txt_mlp.2": parts("transformer_blocks.{}.ff_context.linear_out"),
        "double_stream_modulation_img.lin": parts("double_stream_modulation_img.linear"),
        "double_stream_modulation_txt.lin": parts("double_stream_modulation_txt.linear"),
        "single_stream_modulation.lin": parts("single_stream_modulation.linear"),
        "single_blocks.{}.linear1": parts("single_transformer_blocks.{}.attn.to_qkv_mlp_proj"),
        "single_blocks.{}.linear2": parts("single_transformer_blocks.{}.attn.to_out"),
        "single_blocks.{}.norm.query_norm.scale": parts("single_transformer_blocks.{}.attn.norm_q"),
        "single_blocks.{}.norm.key_norm.scale": parts("single_transformer_blocks.{}.attn.norm_k"),
        "final_layer.linear": parts("proj_out"),
        "final_layer.adaLN_modulation.1": parts("norm_out.linear.shift", "norm_out.linear.scale"),
    },
)

COMFYUI = Layout(
    "comfyui",
    {module.removesuffix(".scale"): its for module, its in ORIGINAL.modules.items() if module.endswith("_norm.scale")},
)
"""What its newer versions call the norms' weights; all other names are the original's."""

FLUX2 = Family(
    name="flux2",
    title="FLUX.2",
    transformer_classes=("Flux2Transformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL, COMFYUI),
    sizes=(Size(6144, 48, "32B"), Size(4096, 24, "klein 9B"), Size(3072, 20, "klein 4B")),
    optional=dict.fromkeys(
        ("time_guidance_embed.guidance_embedder.linear_1", "time_guidance_embed.guidance_embedder.linear_2"),
        "modules for the guidance embedder, which FLUX.2 klein has not",
    ),
    lora_targets=(
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "linear_in",
        "linear_out",
        "to_qkv_mlp_proj",
        "attn.to_out",
    ),
)
