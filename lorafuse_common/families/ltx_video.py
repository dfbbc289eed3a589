"""LTX-Video."""

from lorafuse_common.naming import Family, Layout, names, parts

DIFFUSERS = Layout(
    "diffusers",
    names(
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
    {
        "patchify_proj": parts("proj_in"),
        "adaln_single.emb.timestep_embedder.linear_1": parts("time_embed.emb.timestep_embedder.linear_1"),
        "adaln_single.emb.timestep_embedder.linear_2": parts("time_embed.emb.timestep_embedder.linear_2"),
        "adaln_single.linear": parts("time_embed.linear"),
        "caption_projection.linear_1": parts("caption_projection.linear_1"),
        "caption_projection.linear_2": parts("caption_projection.linear_2"),
        "transformer_blocks.{}.attn1.to_q": parts("transformer_blocks.{}.attn1.to_q"),
        "transformer_blocks.{}.attn1.to_k": parts("transformer_blocks.{}.attn1.to_k"),
        "transformer_blocks.{}.attn1.to_v": parts("transformer_blocks.{}.attn1.to_v"),
        "transformer_blocks.{}.attn1.to_out.0": parts("transformer_blocks.{}.attn1.to_out.0"),
        "transformer_blocks.{}.attn2.to_q": parts("transformer_blocks.{}.attn2.to_q"),
        "transformer_blocks.{}.attn2.to_k": parts("transformer_blocks.{}.attn2.to_k"),
        "transformer_blocks.{}.attn2.to_v": parts("transformer_blocks.{}.attn2.to_v"),
        "transformer_blocks.{}.attn2.to_out.0": parts("transformer_blocks.{}.attn2.to_out.0"),
        "transformer_blocks.{}.ff.net.0.proj": parts("transformer_blocks.{}.ff.net.0.proj"),
        "transformer_blocks.{}.ff.net.2": parts("transformer_blocks.{}.ff.net.2"),
        "proj_out": parts("proj_out"),
    },
)

LTX_VIDEO = Family(
    name="ltx_video",
    title="LTX-Video",
    transformer_classes=("LTXVideoTransformer3DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
)
