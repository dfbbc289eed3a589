"""Z-Image (base, Turbo, Omni)."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

_STACKS = ("layers", "noise_refiner", "context_refiner", "siglip_refiner")
_MODULATED = ("layers", "noise_refiner")

_SAME = (
    "cap_embedder.0",
    "cap_embedder.1",
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "siglip_embedder.0",
    "siglip_embedder.1",
    "x_pad_token",
    "cap_pad_token",
    "siglip_pad_token",
    *(f"{stack}.{{}}.feed_forward.{w}" for stack in _STACKS for w in ("w1", "w2", "w3")),
    *(f"{stack}.{{}}.{norm}_norm{n}" for stack in _STACKS for norm in ("attention", "ffn") for n in "12"),
    *(f"{stack}.{{}}.adaLN_modulation.0" for stack in _MODULATED),
)

_RENAMED = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    **{f"{stack}.{{}}.attention.out": f"{stack}.{{}}.attention.to_out.0" for stack in _STACKS},
    **{f"{stack}.{{}}.attention.{x}_norm": f"{stack}.{{}}.attention.norm_{x}" for stack in _STACKS for x in "qk"},
}

_FUSED = {f"{stack}.{{}}.attention.qkv": parts(*(f"{stack}.{{}}.attention.to_{x}" for x in "qkv")) for stack in _STACKS}

DIFFUSERS = Layout(
    "diffusers", names(*_SAME, *_RENAMED.values(), *(part for its in _FUSED.values() for part in its.names))
)

ORIGINAL = Layout("original", names(*_SAME) | {original: parts(name) for original, name in _RENAMED.items()} | _FUSED)

Z_IMAGE = Family(
    name="z_image",
    title="Z-Image",
    transformer_classes=("ZImageTransformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
    sizes=(Size(3840, 30, "6B"),),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"),
)
