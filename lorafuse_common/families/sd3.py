"""Stable Diffusion 3 and 3.5."""

from lorafuse_common.naming import Family, Layout

DIFFUSERS = Layout(
    "diffusers",
    (
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
        "transformer_blocks.{}.attn2.to_q",
        "transformer_blocks.{}.attn2.to_k",
        "transformer_blocks.{}.attn2.to_v",
        "transformer_blocks.{}.attn2.to_out.0",
        "transformer_blocks.{}.ff.net.0.proj",
        "transformer_blocks.{}.ff.net.2",
        "transformer_blocks.{}.ff_context.net.0.proj",
        "transformer_blocks.{}.ff_context.net.2",
        "norm_out.linear",
        "proj_out",
    ),
)

ORIGINAL = Layout(
    "original",
    (
        "x_embedder.proj",
        "context_embedder",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "y_embedder.mlp.0",
        "y_embedder.mlp.2",
        "joint_blocks.{}.x_block.attn.qkv",
        "joint_blocks.{}.x_block.attn.proj",
        "joint_blocks.{}.x_block.mlp.fc1",
        "joint_blocks.{}.x_block.mlp.fc2",
        "joint_blocks.{}.x_block.adaLN_modulation.1",
        "joint_blocks.{}.context_block.attn.qkv",
        "joint_blocks.{}.context_block.attn.proj",
        "joint_blocks.{}.context_block.mlp.fc1",
        "joint_blocks.{}.context_block.mlp.fc2",
        "joint_blocks.{}.context_block.adaLN_modulation.1",
        "joint_blocks.{}.x_block.attn2.qkv",
        "joint_blocks.{}.x_block.attn2.proj",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ),
)

SD3 = Family(
    name="sd3",
    title="SD3",
    transformer_classes=("SD3Transformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
    widths={1536: "medium (2B)", 2432: "large (8B)"},
)
