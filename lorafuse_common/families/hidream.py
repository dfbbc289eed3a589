"""HiDream-I1; the original layout has the same names."""

from lorafuse_common.naming import Family, Layout, Size, names

_ATTENTION = ("to_q", "to_k", "to_v", "to_out", "q_rms_norm", "k_rms_norm")
_EXPERTS = ("shared_experts", "experts.0", "experts.1", "experts.2", "experts.3")
_IMAGE_BLOCK = (
    "adaLN_modulation.1",
    *(f"attn1.{name}" for name in _ATTENTION),
    *(f"ff_i.{expert}.{w}" for expert in _EXPERTS for w in ("w1", "w2", "w3")),
    "ff_i.gate",
)
_TEXT_BLOCK = (*(f"attn1.{name}_t" for name in _ATTENTION), "ff_t.w1", "ff_t.w2", "ff_t.w3")

DIFFUSERS = Layout(
    "diffusers",
    names(
        "x_embedder.proj",
        "t_embedder.timestep_embedder.linear_1",
        "t_embedder.timestep_embedder.linear_2",
        "p_embedder.pooled_embedder.linear_1",
        "p_embedder.pooled_embedder.linear_2",
        "caption_projection.{}.linear",
        *(f"double_stream_blocks.{{}}.block.{name}" for name in (*_IMAGE_BLOCK, *_TEXT_BLOCK)),
        *(f"single_stream_blocks.{{}}.block.{name}" for name in _IMAGE_BLOCK),
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ),
)

HIDREAM = Family(
    name="hidream",
    title="HiDream-I1",
    transformer_classes=("HiDreamImageTransformer2DModel",),
    layouts=(DIFFUSERS,),
    sizes=(Size(2560, 32, "17B"),),
)
