"""Stable Diffusion 3 and 3.5."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

DIFFUSERS = Layout(
    "diffusers",
    names(
        "pos_embed.proj",
        "context_embedder",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
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
        "transformer_blocks.{}.attn2.to_q",
        "transformer_blocks.{}.attn2.to_k",
        "transformer_blocks.{}.attn2.to_v",
        "transformer_blocks.{}.attn2.to_out.0",
        "transformer_blocks.{}.attn2.norm_q",
        "transformer_blocks.{}.attn2.norm_k",
        "transformer_blocks.{}.ff.net.0.proj",
        "transformer_blocks.{}.ff.net.2",
        "transformer_blocks.{}.ff_context.net.0.proj",
        "transformer_blocks.{}.ff_context.net.2",
        "proj_out",
    )
    | {
        "transformer_blocks.{last}.norm1_context.linear": parts(
            "transformer_blocks.{last}.norm1_context.linear.scale",
            "transformer_blocks.{last}.norm1_context.linear.shift",
        ),
        "norm_out.linear": parts("norm_out.linear.scale", "norm_out.linear.shift"),
    },
)

ORIGINAL = Layout(
    "original",
    {
        "x_embedder.proj": parts("pos_embed.proj"),
        "context_embedder": parts("context_embedder"),
        "t_embedder.mlp.0": parts("time_text_embed.timestep_embedder.linear_1"),
        "t_embedder.mlp.2": parts("time_text_embed.timestep_embedder.linear_2"),
        "y_embedder.mlp.0": parts("time_text_embed.text_embedder.linear_1"),
        "y_embedder.mlp.2": parts("time_text_embed.text_embedder.linear_2"),
        "joint_blocks.{}.x_block.attn.qkv": parts(
            "transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.attn.to_k", "transformer_blocks.{}.attn.to_v"
        ),
        "joint_blocks.{}.x_block.attn.proj": parts("transformer_blocks.{}.attn.to_out.0"),
        "joint_blocks.{}.x_block.attn.ln_q": parts("transformer_blocks.{}.attn.norm_q"),
        "joint_blocks.{}.x_block.attn.ln_k": parts("transformer_blocks.{}.attn.norm_k"),
        "joint_blocks.{}.x_block.attn2.qkv": parts(
            "transformer_blocks.{}.attn2.to_q", "transformer_blocks.{}.attn2.to_k", "transformer_blocks.{}.attn2.to_v"
        ),
        "joint_blocks.{}.x_block.attn2.proj": parts("transformer_blocks.{}.attn2.to_out.0"),
        "joint_blocks.{}.x_block.attn2.ln_q": parts("transformer_blocks.{}.attn2.norm_q"),
        "joint_blocks.{}.x_block.attn2.ln_k": parts("transformer_blocks.{}.attn2.norm_k"),
        "joint_blocks.{}.x_block.mlp.fc1": parts("transformer_blocks.{}.ff.net.0.proj"),
        "joint_blocks.{}.x_block.mlp.fc2": parts("transformer_blocks.{}.ff.net.2"),
        "joint_blocks.{}.x_block.adaLN_modulation.1": parts("transformer_blocks.{}.norm1.linear"),
        "joint_blocks.{}.context_block.attn.qkv": parts(
            "transformer_blocks.{}.attn.add_q_proj",
            "transformer_blocks.{}.attn.add_k_proj",
            "transformer_blocks.{}.attn.add_v_proj",
        ),
        "joint_blocks.{}.context_block.attn.proj": parts("transformer_blocks.{}.attn.to_add_out"),
        "joint_blocks.{}.context_block.attn.ln_q": parts("transformer_blocks.{}.attn.norm_added_q"),
        "joint_blocks.{}.context_block.attn.ln_k": parts("transformer_blocks.{}.attn.norm_added_k"),
        "joint_blocks.{}.context_block.mlp.fc1": parts("transformer_blocks.{}.ff_context.net.0.proj"),
        "joint_blocks.{}.context_block.mlp.fc2": parts("transformer_blocks.{}.ff_context.net.2"),
        "joint_blocks.{}.context_block.adaLN_modulation.1": parts("transformer_blocks.{}.norm1_context.linear"),
        "joint_blocks.{last}.context_block.adaLN_modulation.1": parts(
            "transformer_blocks.{last}.norm1_context.linear.shift",
            "transformer_blocks.{last}.norm1_context.linear.scale",
        ),
        "final_layer.linear": parts("proj_out"),
        "final_layer.adaLN_modulation.1": parts("norm_out.linear.shift", "norm_out.linear.scale"),
    },
)

SD3 = Family(
    name="sd3",
    title="SD3",
    transformer_classes=("SD3Transformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
    sizes=(Size(1536, 24, "medium"), Size(2432, 38, "large")),
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
    ),
    idle_modules=("transformer_blocks.{last}.attn.add_q_proj",),
)
