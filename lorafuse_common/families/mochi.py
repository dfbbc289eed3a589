"""Mochi: the halves of its gated feed-forward layers are swapped between layouts."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

DIFFUSERS = Layout(
    "diffusers",
    names(
        "patch_embed.proj",
        "time_embed.timestep_embedder.linear_1",
        "time_embed.timestep_embedder.linear_2",
        "time_embed.pooler.to_kv",
        "time_embed.pooler.to_q",
        "time_embed.pooler.to_out",
        "time_embed.caption_proj",
        "proj_out",
        "pos_frequencies",
        "transformer_blocks.{}.norm1.linear",
        "transformer_blocks.{}.norm1_context.linear",
        "transformer_blocks.{last}.norm1_context.linear_1",
        "transformer_blocks.{}.attn1.to_q",
        "transformer_blocks.{}.attn1.to_k",
        "transformer_blocks.{}.attn1.to_v",
        "transformer_blocks.{}.attn1.to_out.0",
        "transformer_blocks.{}.attn1.add_q_proj",
        "transformer_blocks.{}.attn1.add_k_proj",
        "transformer_blocks.{}.attn1.add_v_proj",
        "transformer_blocks.{}.attn1.to_add_out",
        "transformer_blocks.{}.attn1.norm_q",
        "transformer_blocks.{}.attn1.norm_k",
        "transformer_blocks.{}.attn1.norm_added_q",
        "transformer_blocks.{}.attn1.norm_added_k",
        "transformer_blocks.{}.ff.net.2",
        "transformer_blocks.{}.ff_context.net.2",
    )
    | {
        "transformer_blocks.{}.ff.net.0.proj": parts(
            "transformer_blocks.{}.ff.net.0.proj.gate", "transformer_blocks.{}.ff.net.0.proj.proj"
        ),
        "transformer_blocks.{}.ff_context.net.0.proj": parts(
            "transformer_blocks.{}.ff_context.net.0.proj.gate", "transformer_blocks.{}.ff_context.net.0.proj.proj"
        ),
        "norm_out.linear": parts("norm_out.linear.scale", "norm_out.linear.shift"),
    },
)

ORIGINAL = Layout(
    "original",
    {
        "x_embedder.proj": parts("patch_embed.proj"),
        "t_embedder.mlp.0": parts("time_embed.timestep_embedder.linear_1"),
        "t_embedder.mlp.2": parts("time_embed.timestep_embedder.linear_2"),
        "t5_y_embedder.to_kv": parts("time_embed.pooler.to_kv"),
        "t5_y_embedder.to_q": parts("time_embed.pooler.to_q"),
        "t5_y_embedder.to_out": parts("time_embed.pooler.to_out"),
        "t5_yproj": parts("time_embed.caption_proj"),
        "final_layer.linear": parts("proj_out"),
        "pos_frequencies": parts("pos_frequencies"),
        "blocks.{}.mod_x": parts("transformer_blocks.{}.norm1.linear"),
        "blocks.{}.mod_y": parts("transformer_blocks.{}.norm1_context.linear"),
        "blocks.{last}.mod_y": parts("transformer_blocks.{last}.norm1_context.linear_1"),
        "blocks.{}.attn.qkv_x": parts(
            "transformer_blocks.{}.attn1.to_q", "transformer_blocks.{}.attn1.to_k", "transformer_blocks.{}.attn1.to_v"
        ),
        "blocks.{}.attn.proj_x": parts("transformer_blocks.{}.attn1.to_out.0"),
        "blocks.{}.attn.qkv_y": parts(
            "transformer_blocks.{}.attn1.add_q_proj",
            "transformer_blocks.{}.attn1.add_k_proj",
            "transformer_blocks.{}.attn1.add_v_proj",
        ),
        "blocks.{}.attn.proj_y": parts("transformer_blocks.{}.attn1.to_add_out"),
        "blocks.{}.attn.q_norm_x": parts("transformer_blocks.{}.attn1.norm_q"),
        "blocks.{}.attn.k_norm_x": parts("transformer_blocks.{}.attn1.norm_k"),
        "blocks.{}.attn.q_norm_y": parts("transformer_blocks.{}.attn1.norm_added_q"),
        "blocks.{}.attn.k_norm_y": parts("transformer_blocks.{}.attn1.norm_added_k"),
        "blocks.{}.mlp_x.w1": parts(
            "transformer_blocks.{}.ff.net.0.proj.proj", "transformer_blocks.{}.ff.net.0.proj.gate"
        ),
        "blocks.{}.mlp_x.w2": parts("transformer_blocks.{}.ff.net.2"),
        "blocks.{}.mlp_y.w1": parts(
            "transformer_blocks.{}.ff_context.net.0.proj.proj", "transformer_blocks.{}.ff_context.net.0.proj.gate"
        ),
        "blocks.{}.mlp_y.w2": parts("transformer_blocks.{}.ff_context.net.2"),
        "final_layer.mod": parts("norm_out.linear.shift", "norm_out.linear.scale"),
    },
)

MOCHI = Family(
    name="mochi",
    title="Mochi",
    transformer_classes=("MochiTransformer3DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
    sizes=(Size(3072, 48, "10B"),),
)
