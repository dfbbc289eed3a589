"""Sana, Sana 1.5 and Sana Sprint: original blocks fuse q, k and v of self-attention, k and v of cross-attention."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

_RENAMED = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
    "blocks.{}.attn.proj": "transformer_blocks.{}.attn1.to_out.0",
    "blocks.{}.attn.q_norm": "transformer_blocks.{}.attn1.norm_q",
    "blocks.{}.attn.k_norm": "transformer_blocks.{}.attn1.norm_k",
    "blocks.{}.cross_attn.q_linear": "transformer_blocks.{}.attn2.to_q",
    "blocks.{}.cross_attn.proj": "transformer_blocks.{}.attn2.to_out.0",
    "blocks.{}.cross_attn.q_norm": "transformer_blocks.{}.attn2.norm_q",
    "blocks.{}.cross_attn.k_norm": "transformer_blocks.{}.attn2.norm_k",
    "blocks.{}.mlp.inverted_conv.conv": "transformer_blocks.{}.ff.conv_inverted",
    "blocks.{}.mlp.depth_conv.conv": "transformer_blocks.{}.ff.conv_depth",
    "blocks.{}.mlp.point_conv.conv": "transformer_blocks.{}.ff.conv_point",
    "blocks.{}.scale_shift_table": "transformer_blocks.{}.scale_shift_table",
}

_FUSED = {
    "blocks.{}.attn.qkv": parts(
        "transformer_blocks.{}.attn1.to_q", "transformer_blocks.{}.attn1.to_k", "transformer_blocks.{}.attn1.to_v"
    ),
    "blocks.{}.cross_attn.kv_linear": parts("transformer_blocks.{}.attn2.to_k", "transformer_blocks.{}.attn2.to_v"),
}

DIFFUSERS = Layout(
    "diffusers",
    names(*_RENAMED.values(), *(part for its in _FUSED.values() for part in its.names))
    # Sprint's name for the same two, as it adds a guidance embedder beside them.
    | {
        f"time_embed.timestep_embedder.{n}": parts(f"time_embed.emb.timestep_embedder.{n}")
        for n in ("linear_1", "linear_2")
    },
)

ORIGINAL = Layout("original", {original: parts(name) for original, name in _RENAMED.items()} | _FUSED)

SANA = Family(
    name="sana",
    title="Sana",
    transformer_classes=("SanaTransformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
    sizes=(Size(1152, 28, "0.6B"), Size(2240, 20, "1.6B"), Size(2240, 60, "4.8B")),
)
