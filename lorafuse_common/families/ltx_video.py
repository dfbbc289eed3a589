"""LTX-Video."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

_SAME = (
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
    "transformer_blocks.{}.scale_shift_table",
    "proj_out",
    "scale_shift_table",
)

_RENAMED = {
    "patchify_proj": "proj_in",
    "adaln_single.emb.timestep_embedder.linear_1": "time_embed.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2": "time_embed.emb.timestep_embedder.linear_2",
    "adaln_single.linear": "time_embed.linear",
    "transformer_blocks.{}.attn1.q_norm": "transformer_blocks.{}.attn1.norm_q",
    "transformer_blocks.{}.attn1.k_norm": "transformer_blocks.{}.attn1.norm_k",
    "transformer_blocks.{}.attn2.q_norm": "transformer_blocks.{}.attn2.norm_q",
    "transformer_blocks.{}.attn2.k_norm": "transformer_blocks.{}.attn2.norm_k",
}

DIFFUSERS = Layout("diffusers", names(*_SAME, *_RENAMED.values()))

ORIGINAL = Layout("original", names(*_SAME) | {original: parts(name) for original, name in _RENAMED.items()})

LTX_VIDEO = Family(
    name="ltx_video",
    title="LTX-Video",
    transformer_classes=("LTXVideoTransformer3DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
    sizes=(Size(2048, 28, "2B"), Size(4096, 48, "13B")),
)
