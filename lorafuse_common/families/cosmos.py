"""Cosmos-Predict2 and Anima."""

from lorafuse_common.naming import Family, Layout, names, parts

DIFFUSERS = Layout(
    "diffusers",
    names(
        "patch_embed.proj",
        "time_embed.t_embedder.linear_1",
        "time_embed.t_embedder.linear_2",
        "norm_out.linear_1",
        "norm_out.linear_2",
        "proj_out",
        "transformer_blocks.{}.attn1.to_q",
        "transformer_blocks.{}.attn1.to_k",
        "transformer_blocks.{}.attn1.to_v",
        "transformer_blocks.{}.attn1.to_out.0",
        "transformer_blocks.{}.attn2.to_q",
        "transformer_blocks.{}.attn2.to_k",
        "transformer_blocks.{}.attn2.to_v",
        "transformer_blocks.{}.attn2.to_out.0",
        "transformer_blocks.{}.ff.net.0.proj",
        "transformer_blocks.{}.ff.net.2",
        "transformer_blocks.{}.norm1.linear_1",
        "transformer_blocks.{}.norm1.linear_2",
        "transformer_blocks.{}.norm2.linear_1",
        "transformer_blocks.{}.norm2.linear_2",
        "transformer_blocks.{}.norm3.linear_1",
        "transformer_blocks.{}.norm3.linear_2",
    ),
)

ORIGINAL = Layout(
    "original",
    {
        "x_embedder.proj.1": parts("patch_embed.proj"),
        "t_embedder.1.linear_1": parts("time_embed.t_embedder.linear_1"),
        "t_embedder.1.linear_2": parts("time_embed.t_embedder.linear_2"),
        "final_layer.adaln_modulation.1": parts("norm_out.linear_1"),
        "final_layer.adaln_modulation.2": parts("norm_out.linear_2"),
        "final_layer.linear": parts("proj_out"),
        "blocks.{}.self_attn.q_proj": parts("transformer_blocks.{}.attn1.to_q"),
        "blocks.{}.self_attn.k_proj": parts("transformer_blocks.{}.attn1.to_k"),
        "blocks.{}.self_attn.v_proj": parts("transformer_blocks.{}.attn1.to_v"),
        "blocks.{}.self_attn.output_proj": parts("transformer_blocks.{}.attn1.to_out.0"),
        "blocks.{}.cross_attn.q_proj": parts("transformer_blocks.{}.attn2.to_q"),
        "blocks.{}.cross_attn.k_proj": parts("transformer_blocks.{}.attn2.to_k"),
        "blocks.{}.cross_attn.v_proj": parts("transformer_blocks.{}.attn2.to_v"),
        "blocks.{}.cross_attn.output_proj": parts("transformer_blocks.{}.attn2.to_out.0"),
        "blocks.{}.mlp.layer1": parts("transformer_blocks.{}.ff.net.0.proj"),
        "blocks.{}.mlp.layer2": parts("transformer_blocks.{}.ff.net.2"),
        "blocks.{}.adaln_modulation_self_attn.1": parts("transformer_blocks.{}.norm1.linear_1"),
        "blocks.{}.adaln_modulation_self_attn.2": parts("transformer_blocks.{}.norm1.linear_2"),
        "blocks.{}.adaln_modulation_cross_attn.1": parts("transformer_blocks.{}.norm2.linear_1"),
        "blocks.{}.adaln_modulation_cross_attn.2": parts("transformer_blocks.{}.norm2.linear_2"),
        "blocks.{}.adaln_modulation_mlp.1": parts("transformer_blocks.{}.norm3.linear_1"),
        "blocks.{}.adaln_modulation_mlp.2": parts("transformer_blocks.{}.norm3.linear_2"),
    },
)

COSMOS = Family(
    name="cosmos",
    title="Cosmos-Predict2",
    transformer_classes=("CosmosTransformer3DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
    widths={2048: "2B", 5120: "14B"},
)
