"""Wan 2.1 and 2.2 (text-to-video, image-to-video, VACE, Animate) and the models built on it."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
}
"""Within a block: original name -> diffusers' name."""

_RENAMED = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    **{
        f"{stack}.{{}}.{original}": f"{stack}.{{}}.{name}"
        for stack in ("blocks", "vace_blocks")
        for original, name in _BLOCK.items()
    },
    "vace_patch_embedding": "vace_patch_embedding",
    "vace_blocks.{}.before_proj": "vace_blocks.{}.proj_in",
    "vace_blocks.{}.after_proj": "vace_blocks.{}.proj_out",
    "pose_patch_embedding": "pose_patch_embedding",
    "face_encoder.conv1_local.conv": "face_encoder.conv1_local",
    "face_encoder.conv2.conv": "face_encoder.conv2",
    "face_encoder.conv3.conv": "face_encoder.conv3",
    "face_encoder.out_proj": "face_encoder.out_proj",
    "face_encoder.padding_tokens": "face_encoder.padding_tokens",
    "face_adapter.fuser_blocks.{}.linear1_q": "face_adapter.{}.to_q",
    "face_adapter.fuser_blocks.{}.linear2": "face_adapter.{}.to_out",
    "face_adapter.fuser_blocks.{}.q_norm": "face_adapter.{}.norm_q",
    "face_adapter.fuser_blocks.{}.k_norm": "face_adapter.{}.norm_k",
}

DIFFUSERS = Layout("diffusers", names(*_RENAMED.values(), "face_adapter.{}.to_k", "face_adapter.{}.to_v"))

ORIGINAL = Layout(
    "original",
    {original: parts(name) for original, name in _RENAMED.items()}
    | {"face_adapter.fuser_blocks.{}.linear1_kv": parts("face_adapter.{}.to_k", "face_adapter.{}.to_v")},
)

_IMAGE_MODULES = (
    "condition_embedder.image_embedder.ff.net.0.proj",
    "condition_embedder.image_embedder.ff.net.2",
    "condition_embedder.image_embedder.norm1",
    "condition_embedder.image_embedder.norm2",
    "blocks.{}.attn2.add_k_proj",
    "blocks.{}.attn2.add_v_proj",
    "blocks.{}.attn2.norm_added_k",
)
"""What only Wan 2.1's image-to-video models have."""

WAN = Family(
    name="wan",
    title="Wan",
    transformer_classes=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    layouts=(DIFFUSERS, ORIGINAL),
    sizes=(Size(1536, 30, "1.3B"), Size(3072, 30, "5B"), Size(5120, 40, "14B")),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
    optional=dict.fromkeys(_IMAGE_MODULES, "modules for Wan 2.1's image embedder, which this Wan has not"),
)
