"""Wan 2.1 and 2.2 (text-to-video, image-to-video, VACE)."""

from lorafuse_common.naming import Family, Layout, names, parts

DIFFUSERS = Layout(
    "diffusers",
    names(
        "patch_embedding",
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.time_embedder.linear_2",
        "condition_embedder.time_proj",
        "condition_embedder.text_embedder.linear_1",
        "condition_embedder.text_embedder.linear_2",
        "condition_embedder.image_embedder.ff.net.0.proj",
        "condition_embedder.image_embedder.ff.net.2",
        "blocks.{}.attn1.to_q",
        "blocks.{}.attn1.to_k",
        "blocks.{}.attn1.to_v",
        "blocks.{}.attn1.to_out.0",
        "blocks.{}.attn2.to_q",
        "blocks.{}.attn2.to_k",
        "blocks.{}.attn2.to_v",
        "blocks.{}.attn2.to_out.0",
        "blocks.{}.attn2.add_k_proj",
        "blocks.{}.attn2.add_v_proj",
        "blocks.{}.ffn.net.0.proj",
        "blocks.{}.ffn.net.2",
        "proj_out",
    ),
)

ORIGINAL = Layout(
    "original",
    {
        "patch_embedding": parts("patch_embedding"),
        "time_embedding.0": parts("condition_embedder.time_embedder.linear_1"),
        "time_embedding.2": parts("condition_embedder.time_embedder.linear_2"),
        "time_projection.1": parts("condition_embedder.time_proj"),
        "text_embedding.0": parts("condition_embedder.text_embedder.linear_1"),
        "text_embedding.2": parts("condition_embedder.text_embedder.linear_2"),
        "img_emb.proj.1": parts("condition_embedder.image_embedder.ff.net.0.proj"),
        "img_emb.proj.3": parts("condition_embedder.image_embedder.ff.net.2"),
        "head.head": parts("proj_out"),
        "blocks.{}.self_attn.q": parts("blocks.{}.attn1.to_q"),
        "blocks.{}.self_attn.k": parts("blocks.{}.attn1.to_k"),
        "blocks.{}.self_attn.v": parts("blocks.{}.attn1.to_v"),
        "blocks.{}.self_attn.o": parts("blocks.{}.attn1.to_out.0"),
        "blocks.{}.cross_attn.q": parts("blocks.{}.attn2.to_q"),
        "blocks.{}.cross_attn.k": parts("blocks.{}.attn2.to_k"),
        "blocks.{}.cross_attn.v": parts("blocks.{}.attn2.to_v"),
        "blocks.{}.cross_attn.o": parts("blocks.{}.attn2.to_out.0"),
        "blocks.{}.cross_attn.k_img": parts("blocks.{}.attn2.add_k_proj"),
        "blocks.{}.cross_attn.v_img": parts("blocks.{}.attn2.add_v_proj"),
        "blocks.{}.ffn.0": parts("blocks.{}.ffn.net.0.proj"),
        "blocks.{}.ffn.2": parts("blocks.{}.ffn.net.2"),
    },
)

WAN = Family(
    name="wan",
    title="Wan",
    transformer_classes=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
    ),
    layouts=(DIFFUSERS, ORIGINAL),
    widths={1536: "1.3B", 3072: "5B", 5120: "14B"},
)
