"""Lumina 2: grouped-query attention, three query rows for one key and one value row."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

_STACKS = ("layers", "noise_refiner", "context_refiner")
_MODULATED = ("layers", "noise_refiner")

_BLOCK = {
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "attention_norm2": "norm2",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}

_RENAMED = {
    "x_embedder": "x_embedder",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
    **{f"{stack}.{{}}.{original}": f"{stack}.{{}}.{name}" for stack in _STACKS for original, name in _BLOCK.items()},
    **{f"{stack}.{{}}.adaLN_modulation.1": f"{stack}.{{}}.norm1.linear" for stack in _MODULATED},
    **{f"{stack}.{{}}.attention_norm1": f"{stack}.{{}}.norm1.norm" for stack in _MODULATED},
    "context_refiner.{}.attention_norm1": "context_refiner.{}.norm1",
}

_FUSED = {
    f"{stack}.{{}}.attention.qkv": parts(*(f"{stack}.{{}}.attn.to_{x}" for x in "qkv"), shares=(3, 1, 1))
    for stack in _STACKS
}

DIFFUSERS = Layout("diffusers", names(*_RENAMED.values(), *(part for its in _FUSED.values() for part in its.names)))

ORIGINAL = Layout("original", {original: parts(name) for original, name in _RENAMED.items()} | _FUSED)

LUMINA2 = Family(
    name="lumina2",
    title="Lumina2",
    transformer_classes=("Lumina2Transformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
    sizes=(Size(2304, 26, "2.6B"),),
)
