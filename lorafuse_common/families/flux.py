"""FLUX.1 (dev, schnell, Kontext)."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

DIFFUSERS = Layout(
    "diffusers",
    names(
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
        "transformer_blocks.{}.attn.norm_q",
        "transformer_blocks.{}.attn.norm_k",
        "transformer_blocks.{}.attn.norm_added_q",
        "transformer_blocks.{}.attn.norm_added_k",
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
        "time_in.in_layer": parts("time_text_embed.timestep_embedder.linear_1"),
        "time_in.out_layer": parts("time_text_embed.timestep_embedder.linear_2"),
        "vector_in.in_layer": parts("time_text_embed.text_embedder.linear_1"),
        "vector_in.out_layer": parts("time_text_embed.text_embedder.linear_2"),
        "guidance_in.in_layer": parts("time_text_embed.guidance_embedder.linear_1"),
        "guidance_in.out_layer": parts("time_text_embed.guidance_embedder.linear_2"),
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
        "double_blocks.{}.img_mod.lin": parts("transformer_blocks.{}.norm1.linear"),
        "double_blocks.{}.txt_mod.lin": parts("transformer_blocks.{}.norm1_context.linear"),
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
        "single_blocks.{}.modulation.lin": parts("single_transformer_blocks.{}.norm.linear"),
        "final_layer.linear": parts("proj_out"),
        "final_layer.adaLN_modulation.1": parts("norm_out.linear.shift", "norm_out.linear.scale"),
    },
)

XLABS = Layout(
    "xlabs",
    {
        "double_blocks.{}.processor.qkv_lora1": parts(
            "transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.attn.to_k", "transformer_blocks.{}.attn.to_v"
        ),
        "double_blocks.{}.processor.qkv_lora2": parts(
            "transformer_blocks.{}.attn.add_q_proj",
            "transformer_blocks.{}.attn.add_k_proj",
            "transformer_blocks.{}.attn.add_v_proj",
        ),
        "double_blocks.{}.processor.proj_lora1": parts("transformer_blocks.{}.attn.to_out.0"),
        "double_blocks.{}.processor.proj_lora2": parts("transformer_blocks.{}.attn.to_add_out"),
        # Only the first three parts of `linear1`; the MLP's rows have no LoRA.
        "single_blocks.{}.processor.qkv": parts(
            "single_transformer_blocks.{}.attn.to_q",
            "single_transformer_blocks.{}.attn.to_k",
            "single_transformer_blocks.{}.attn.to_v",
        ),
        "single_blocks.{}.processor.proj": parts("single_transformer_blocks.{}.proj_out"),
    },
)
"""XLabs' names, of LoRAs only; `_lora` is taken for a suffix where no number follows it."""

COMFYUI = Layout(
    "comfyui",
    {module.removesuffix(".scale"): its for module, its in ORIGINAL.modules.items() if module.endswith("_norm.scale")},
)
"""What its newer versions call the norms' weights; all other names are the original's."""

FLUX = Family(
    name="flux",
    title="FLUX.1",
    transformer_classes=("FluxTransformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL, XLABS, COMFYUI),
    sizes=(Size(3072, 38, "12B"),),
    optional=dict.fromkeys(
        ("time_text_embed.guidance_embedder.linear_1", "time_text_embed.guidance_embedder.linear_2"),
        "modules for the guidance embedder, which FLUX.1 schnell has not",
    ),
    widenable={"x_embedder": "in_channels"},
    lora_targets=(
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "norm1.linear",
        "norm1_context.linear",
        "proj_mlp",
        "single_transformer_blocks.{}.proj_out",
        "norm.linear",
    ),
)
