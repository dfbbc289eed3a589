"""Ideogram 4."""

from lorafuse_common.naming import Family, Layout, names, parts

_SAME = (
    "input_proj",
    "llm_cond_norm",
    "llm_cond_proj",
    "t_embedding.mlp_in",
    "t_embedding.mlp_out",
    "adaln_proj",
    "embed_image_indicator",
    "layers.{}.attention.norm_q",
    "layers.{}.attention.norm_k",
    "layers.{}.attention_norm1",
    "layers.{}.attention_norm2",
    "layers.{}.feed_forward.w1",
    "layers.{}.feed_forward.w2",
    "layers.{}.feed_forward.w3",
    "layers.{}.ffn_norm1",
    "layers.{}.ffn_norm2",
    "layers.{}.adaln_modulation",
    "final_layer.linear",
    "final_layer.adaln_modulation",
)
_SPLIT = ("layers.{}.attention.to_q", "layers.{}.attention.to_k", "layers.{}.attention.to_v")

DIFFUSERS = Layout("diffusers", names(*_SAME, *_SPLIT, "layers.{}.attention.to_out.0"))

ORIGINAL = Layout(
    "original",
    names(*_SAME)
    | {
        "layers.{}.attention.qkv": parts(*_SPLIT),
        "layers.{}.attention.o": parts("layers.{}.attention.to_out.0"),
    },
)

IDEOGRAM4 = Family(
    name="ideogram4",
    title="Ideogram 4",
    transformer_classes=("Ideogram4Transformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
)
