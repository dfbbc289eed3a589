"""AuraFlow."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_DOUBLE = {
    "modX.1": "norm1.linear",
    "modC.1": "norm1_context.linear",
    "attn.w2q": "attn.to_q",
    "attn.w2k": "attn.to_k",
    "attn.w2v": "attn.to_v",
    "attn.w2o": "attn.to_out.0",
    "attn.w1q": "attn.add_q_proj",
    "attn.w1k": "attn.add_k_proj",
    "attn.w1v": "attn.add_v_proj",
    "attn.w1o": "attn.to_add_out",
    **{f"mlpX.{original}": f"ff.{name}" for original, name in _MLP.items()},
    **{f"mlpC.{original}": f"ff_context.{name}" for original, name in _MLP.items()},
}
_SINGLE = {
    "modCX.1": "norm1.linear",
    "attn.w1q": "attn.to_q",
    "attn.w1k": "attn.to_k",
    "attn.w1v": "attn.to_v",
    "attn.w1o": "attn.to_out.0",
    **{f"mlp.{original}": f"ff.{name}" for original, name in _MLP.items()},
}

_RENAMED = {
    "init_x_linear": "pos_embed.proj",
    "positional_encoding": "pos_embed.pos_embed",
    "register_tokens": "register_tokens",
    "t_embedder.mlp.0": "time_step_proj.linear_1",
    "t_embedder.mlp.2": "time_step_proj.linear_2",
    "cond_seq_linear": "context_embedder",
    "final_linear": "proj_out",
    **{f"double_layers.{{}}.{original}": f"joint_transformer_blocks.{{}}.{name}" for original, name in _DOUBLE.items()},
    **{
        f"single_layers.{{}}.{original}": f"single_transformer_blocks.{{}}.{name}" for original, name in _SINGLE.items()
    },
}

DIFFUSERS = Layout(
    "diffusers",
    names(*_RENAMED.values()) | {"norm_out.linear": parts("norm_out.linear.scale", "norm_out.linear.shift")},
)

ORIGINAL = Layout(
    "original",
    {original: parts(name) for original, name in _RENAMED.items()}
    | {"modF.1": parts("norm_out.linear.shift", "norm_out.linear.scale")},
)

AURAFLOW = Family(
    name="auraflow",
    title="AuraFlow",
    transformer_classes=("AuraFlowTransformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
    sizes=(Size(3072, 32, "6.8B"),),
)
