"""HunyuanVideo and FramePack."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

DIFFUSERS = Layout(
    "diffusers",
    names(
        "x_embedder.proj",
        "context_embedder.proj_in",
        "context_embedder.time_text_embed.timestep_embedder.linear_1",
        "context_embedder.time_text_embed.timestep_embedder.linear_2",
        "context_embedder.time_text_embed.text_embedder.linear_1",
        "context_embedder.time_text_embed.text_embedder.linear_2",
        "context_embedder.token_refiner.refiner_blocks.{}.attn.to_q",
        "context_embedder.token_refiner.refiner_blocks.{}.attn.to_k",
        "context_embedder.token_refiner.refiner_blocks.{}.attn.to_v",
        "context_embedder.token_refiner.refiner_blocks.{}.attn.to_out.0",
        "context_embedder.token_refiner.refiner_blocks.{}.ff.net.0.proj",
        "context_embedder.token_refiner.refiner_blocks.{}.ff.net.2",
        "context_embedder.token_refiner.refiner_blocks.{}.norm_out.linear",
        "context_embedder.token_refiner.refiner_blocks.{}.norm1",
        "context_embedder.token_refiner.refiner_blocks.{}.norm2",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.guidance_embedder.linear_1",
        "time_text_embed.guidance_embedder.linear_2",
        "time_text_embed.text_embedder.linear_1",
        "time_text_embed.text_embedder.linear_2",
        "transformer_blocks.{}.norm1.linear",
        "transformer_blocks.{}.norm1_context.linear",
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
        "transformer_blocks.{}.attn.to_out.0",
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
        "transformer_blocks.{}.attn.to_add_out",
        "transformer_blocks.{}.attn.norm_q",
        "transformer_blocks.{}.attn.norm_k",
        "transformer_blocks.{}.attn.norm_added_q",
        "transformer_blocks.{}.attn.norm_added_k",
        "transformer_blocks.{}.ff.net.0.proj",
        "transformer_blocks.{}.ff.net.2",
        "transformer_blocks.{}.ff_context.net.0.proj",
        "transformer_blocks.{}.ff_context.net.2",
        "single_transformer_blocks.{}.norm.linear",
        "single_transformer_blocks.{}.proj_mlp",
        "single_transformer_blocks.{}.proj_out",
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        "single_transformer_blocks.{}.attn.norm_q",
        "single_transformer_blocks.{}.attn.norm_k",
        "proj_out",
    )
    | {
        "norm_out.linear": parts("norm_out.linear.scale", "norm_out.linear.shift"),
    },
)

ORIGINAL = Layout(
    "original",
    {
        "img_in.proj": parts("x_embedder.proj"),
        "txt_in.input_embedder": parts("context_embedder.proj_in"),
        "txt_in.t_embedder.mlp.0": parts("context_embedder.time_text_embed.timestep_embedder.linear_1"),
        "txt_in.t_embedder.mlp.2": parts("context_embedder.time_text_embed.timestep_embedder.linear_2"),
        "txt_in.c_embedder.linear_1": parts("context_embedder.time_text_embed.text_embedder.linear_1"),
        "txt_in.c_embedder.linear_2": parts("context_embedder.time_text_embed.text_embedder.linear_2"),
        "txt_in.individual_token_refiner.blocks.{}.self_attn_qkv": parts(
            "context_embedder.token_refiner.refiner_blocks.{}.attn.to_q",
            "context_embedder.token_refiner.refiner_blocks.{}.attn.to_k",
            "context_embedder.token_refiner.refiner_blocks.{}.attn.to_v",
        ),
        "txt_in.individual_token_refiner.blocks.{}.self_attn_proj": parts(
            "context_embedder.token_refiner.refiner_blocks.{}.attn.to_out.0"
        ),
        "txt_in.individual_token_refiner.blocks.{}.mlp.fc1": parts(
            "context_embedder.token_refiner.refiner_blocks.{}.ff.net.0.proj"
        ),
        "txt_in.individual_token_refiner.blocks.{}.mlp.fc2": parts(
            "context_embedder.token_refiner.refiner_blocks.{}.ff.net.2"
        ),
        "txt_in.individual_token_refiner.blocks.{}.adaLN_modulation.1": parts(
            "context_embedder.token_refiner.refiner_blocks.{}.norm_out.linear"
        ),
        "txt_in.individual_token_refiner.blocks.{}.norm1": parts(
            "context_embedder.token_refiner.refiner_blocks.{}.norm1"
        ),
        "txt_in.individual_token_refiner.blocks.{}.norm2": parts(
            "context_embedder.token_refiner.refiner_blocks.{}.norm2"
        ),
        "time_in.mlp.0": parts("time_text_embed.timestep_embedder.linear_1"),
        "time_in.mlp.2": parts("time_text_embed.timestep_embedder.linear_2"),
        "vector_in.in_layer": parts("time_text_embed.text_embedder.linear_1"),
        "vector_in.out_layer": parts("time_text_embed.text_embedder.linear_2"),
        "guidance_in.mlp.0": parts("time_text_embed.guidance_embedder.linear_1"),
        "guidance_in.mlp.2": parts("time_text_embed.guidance_embedder.linear_2"),
        "double_blocks.{}.img_attn_qkv": parts(
            "transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.attn.to_k", "transformer_blocks.{}.attn.to_v"
        ),
        "double_blocks.{}.img_attn_proj": parts("transformer_blocks.{}.attn.to_out.0"),
        "double_blocks.{}.img_mlp.fc1": parts("transformer_blocks.{}.ff.net.0.proj"),
        "double_blocks.{}.img_mlp.fc2": parts("transformer_blocks.{}.ff.net.2"),
        "double_blocks.{}.img_mod.linear": parts("transformer_blocks.{}.norm1.linear"),
        "double_blocks.{}.txt_attn_qkv": parts(
            "transformer_blocks.{}.attn.add_q_proj",
            "transformer_blocks.{}.attn.add_k_proj",
            "transformer_blocks.{}.attn.add_v_proj",
        ),
        "double_blocks.{}.txt_attn_proj": parts("transformer_blocks.{}.attn.to_add_out"),
        "double_blocks.{}.img_attn_q_norm": parts("transformer_blocks.{}.attn.norm_q"),
        "double_blocks.{}.img_attn_k_norm": parts("transformer_blocks.{}.attn.norm_k"),
        "double_blocks.{}.txt_attn_q_norm": parts("transformer_blocks.{}.attn.norm_added_q"),
        "double_blocks.{}.txt_attn_k_norm": parts("transformer_blocks.{}.attn.norm_added_k"),
        "double_blocks.{}.txt_mlp.fc1": parts("transformer_blocks.{}.ff_context.net.0.proj"),
        "double_blocks.{}.txt_mlp.fc2": parts("transformer_blocks.{}.ff_context.net.2"),
        "double_blocks.{}.txt_mod.linear": parts("transformer_blocks.{}.norm1_context.linear"),
        "single_blocks.{}.linear1": parts(
            "single_transformer_blocks.{}.attn.to_q",
            "single_transformer_blocks.{}.attn.to_k",
            "single_transformer_blocks.{}.attn.to_v",
            "single_transformer_blocks.{}.proj_mlp",
            shares=(1, 1, 1, 4),
        ),
        "single_blocks.{}.linear2": parts("single_transformer_blocks.{}.proj_out"),
        "single_blocks.{}.q_norm": parts("single_transformer_blocks.{}.attn.norm_q"),
        "single_blocks.{}.k_norm": parts("single_transformer_blocks.{}.attn.norm_k"),
        "single_blocks.{}.modulation.linear": parts("single_transformer_blocks.{}.norm.linear"),
        "final_layer.linear": parts("proj_out"),
        "final_layer.adaLN_modulation.1": parts("norm_out.linear.shift", "norm_out.linear.scale"),
    },
)

_REFINER = "txt_in.individual_token_refiner.blocks.{}"
_IN_COMFYUI = {
    "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.in_layer",
    "txt_in.t_embedder.mlp.2": "txt_in.t_embedder.out_layer",
    "txt_in.c_embedder.linear_1": "txt_in.c_embedder.in_layer",
    "txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer",
    f"{_REFINER}.self_attn_qkv": f"{_REFINER}.self_attn.qkv",
    f"{_REFINER}.self_attn_proj": f"{_REFINER}.self_attn.proj",
    f"{_REFINER}.mlp.fc1": f"{_REFINER}.mlp.0",
    f"{_REFINER}.mlp.fc2": f"{_REFINER}.mlp.2",
    "time_in.mlp.0": "time_in.in_layer",
    "time_in.mlp.2": "time_in.out_layer",
    "guidance_in.mlp.0": "guidance_in.in_layer",
    "guidance_in.mlp.2": "guidance_in.out_layer",
    "double_blocks.{}.img_attn_qkv": "double_blocks.{}.img_attn.qkv",
    "double_blocks.{}.img_attn_proj": "double_blocks.{}.img_attn.proj",
    "double_blocks.{}.img_attn_q_norm": "double_blocks.{}.img_attn.norm.query_norm",
    "double_blocks.{}.img_attn_k_norm": "double_blocks.{}.img_attn.norm.key_norm",
    "double_blocks.{}.img_mlp.fc1": "double_blocks.{}.img_mlp.0",
    "double_blocks.{}.img_mlp.fc2": "double_blocks.{}.img_mlp.2",
    "double_blocks.{}.img_mod.linear": "double_blocks.{}.img_mod.lin",
    "double_blocks.{}.txt_attn_qkv": "double_blocks.{}.txt_attn.qkv",
    "double_blocks.{}.txt_attn_proj": "double_blocks.{}.txt_attn.proj",
    "double_blocks.{}.txt_attn_q_norm": "double_blocks.{}.txt_attn.norm.query_norm",
    "double_blocks.{}.txt_attn_k_norm": "double_blocks.{}.txt_attn.norm.key_norm",
    "double_blocks.{}.txt_mlp.fc1": "double_blocks.{}.txt_mlp.0",
    "double_blocks.{}.txt_mlp.fc2": "double_blocks.{}.txt_mlp.2",
    "double_blocks.{}.txt_mod.linear": "double_blocks.{}.txt_mod.lin",
    "single_blocks.{}.q_norm": "single_blocks.{}.norm.query_norm",
    "single_blocks.{}.k_norm": "single_blocks.{}.norm.key_norm",
    "single_blocks.{}.modulation.linear": "single_blocks.{}.modulation.lin",
}
"""The original's names that ComfyUI changes, as it builds the model from FLUX's layers."""

_OF_COMFYUI = {_IN_COMFYUI.get(module, module): its for module, its in ORIGINAL.modules.items()}

COMFYUI = Layout(
    "comfyui",
    # Its older versions call the norms' weights `scale`.
    _OF_COMFYUI | {f"{module}.scale": its for module, its in _OF_COMFYUI.items() if module.endswith("_norm")},
)

HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    title="HunyuanVideo",
    transformer_classes=("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"),
    layouts=(DIFFUSERS, ORIGINAL, COMFYUI),
    sizes=(Size(3072, 40, "13B"),),
)
