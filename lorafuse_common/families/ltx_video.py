"""LTX-Video."""

from lorafuse_common.naming import Family, Layout

DIFFUSERS = Layout(
    "diffusers",
    (
        "proj_in",
        "time_embed.emb.timestep_embedder.linear_1",
        "time_embed.emb.timestep_embedder.linear_2",
        "time_embed.linear",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
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
        "proj_out",
    ),
)

ORIGINAL = Layout(
    "original",
    (
        "patchify_proj",
        "adaln_single.emb.timestep_embedder.linear_1",
        "adaln_single.emb.timestep_embedder.linear_2",
        "adaln_single.linear",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
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
        "proj_out",
    ),
)

LTX_VIDEO = Family(
    name="ltx_video",
    title="LTX-Video",
    transformer_classes=("LTXVideoTransformer3DModel",),
    layouts=(
        DIFFUSERS,
        ORIGINAL,
    ),
)
