"""Krea-2; the flattened modulation of an original block has other rows in diffusers and does not cross."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

_BLOCK = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "attn.qknorm.qnorm.scale": "attn.norm_q",
    "attn.qknorm.knorm.scale": "attn.norm_k",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
    "prenorm.scale": "norm1",
    "postnorm.scale": "norm2",
}
_STACKS = {
    "blocks": "transformer_blocks",
    "txtfusion.layerwise_blocks": "text_fusion.layerwise_blocks",
    "txtfusion.refiner_blocks": "text_fusion.refiner_blocks",
}

_RENAMED = {
    "first": "img_in",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.0.scale": "txt_in.norm",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
    "last.linear": "final_layer.linear",
    "last.norm.scale": "final_layer.norm",
    "last.modulation.lin": "final_layer.scale_shift_table",
    **{
        f"{stack}.{{}}.{original}": f"{its_name}.{{}}.{name}"
        for stack, its_name in _STACKS.items()
        for original, name in _BLOCK.items()
    },
}

DIFFUSERS = Layout("diffusers", names(*_RENAMED.values()))

ORIGINAL = Layout("original", {original: parts(name) for original, name in _RENAMED.items()})

KREA2 = Family(
    name="krea2",
    title="Krea-2",
    transformer_classes=("Krea2Transformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
    sizes=(Size(6144, 28, "12B"),),
)
