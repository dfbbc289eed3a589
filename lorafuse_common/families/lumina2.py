"""Lumina 2: grouped-query attention, three query rows for one key and one value row."""

from lorafuse_common.naming import Family, Layout, names, parts

DIFFUSERS = Layout(
    "diffusers",
    names(
        "x_embedder",
        "time_caption_embed.timestep_embedder.linear_1",
        "time_caption_embed.timestep_embedder.linear_2",
        "time_caption_embed.caption_embedder.1",
        "layers.{}.attn.to_q",
        "layers.{}.attn.to_k",
        "layers.{}.attn.to_v",
        "layers.{}.attn.to_out.0",
        "layers.{}.feed_forward.linear_1",
        "layers.{}.feed_forward.linear_2",
        "layers.{}.feed_forward.linear_3",
        "layers.{}.norm1.linear",
        "noise_refiner.{}.attn.to_q",
        "noise_refiner.{}.attn.to_k",
        "noise_refiner.{}.attn.to_v",
        "noise_refiner.{}.attn.to_out.0",
        "noise_refiner.{}.feed_forward.linear_1",
        "noise_refiner.{}.feed_forward.linear_2",
        "noise_refiner.{}.feed_forward.linear_3",
        "noise_refiner.{}.norm1.linear",
        "context_refiner.{}.attn.to_q",
        "context_refiner.{}.attn.to_k",
        "context_refiner.{}.attn.to_v",
        "context_refiner.{}.attn.to_out.0",
        "context_refiner.{}.feed_forward.linear_1",
        "context_refiner.{}.feed_forward.linear_2",
        "context_refiner.{}.feed_forward.linear_3",
        "norm_out.linear_1",
        "norm_out.linear_2",
    ),
)

ORIGINAL = Layout(
    "original",
    {
        "x_embedder": parts("x_embedder"),
        "t_embedder.mlp.0": parts("time_caption_embed.timestep_embedder.linear_1"),
        "t_embedder.mlp.2": parts("time_caption_embed.timestep_embedder.linear_2"),
        "cap_embedder.1": parts("time_caption_embed.caption_embedder.1"),
        "layers.{}.attention.qkv": parts(
            "layers.{}.attn.to_q", "layers.{}.attn.to_k", "layers.{}.attn.to_v", shares=(3, 1, 1)
        ),
        "layers.{}.attention.out": parts("layers.{}.attn.to_out.0"),
        "layers.{}.feed_forward.w1": parts("layers.{}.feed_forward.linear_1"),
        "layers.{}.feed_forward.w2": parts("layers.{}.feed_forward.linear_2"),
        "layers.{}.feed_forward.w3": parts("layers.{}.feed_forward.linear_3"),
        "layers.{}.adaLN_modulation.1": parts("layers.{}.norm1.linear"),
        "noise_refiner.{}.attention.qkv": parts(
            "noise_refiner.{}.attn.to_q", "noise_refiner.{}.attn.to_k", "noise_refiner.{}.attn.to_v", shares=(3, 1, 1)
        ),
        "noise_refiner.{}.attention.out": parts("noise_refiner.{}.attn.to_out.0"),
        "noise_refiner.{}.feed_forward.w1": parts("noise_refiner.{}.feed_forward.linear_1"),
        "noise_refiner.{}.feed_forward.w2": parts("noise_refiner.{}.feed_forward.linear_2"),
        "noise_refiner.{}.feed_forward.w3": parts("noise_refiner.{}.feed_forward.linear_3"),
        "noise_refiner.{}.adaLN_modulation.1": parts("noise_refiner.{}.norm1.linear"),
        "context_refiner.{}.attention.qkv": parts(
            "context_refiner.{}.attn.to_q",
            "context_refiner.{}.attn.to_k",
            "context_refiner.{}.attn.to_v",
            shares=(3, 1, 1),
        ),
        "context_refiner.{}.attention.out": parts("context_refiner.{}.attn.to_out.0"),
        "context_refiner.{}.feed_forward.w1": parts("context_refiner.{}.feed_forward.linear_1"),
        "context_refiner.{}.feed_forward.w2": parts("context_refiner.{}.feed_forward.linear_2"),
        "context_refiner.{}.feed_forward.w3": parts("context_refiner.{}.feed_forward.linear_3"),
        "final_layer.adaLN_modulation.1": parts("norm_out.linear_1"),
        "final_layer.linear": parts("norm_out.linear_2"),
    },
)

LUMINA2 = Family(
    name="lumina2",
    title="Lumina2",
    transformer_classes=("Lumina2Transformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
)
