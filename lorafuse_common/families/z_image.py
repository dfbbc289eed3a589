"""Z-Image (base, Turbo)."""

from lorafuse_common.naming import Family, Layout, names, parts

DIFFUSERS = Layout(
    "diffusers",
    names(
        "all_x_embedder.2-1",
        "cap_embedder.1",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "layers.{}.attention.to_q",
        "layers.{}.attention.to_k",
        "layers.{}.attention.to_v",
        "layers.{}.attention.to_out.0",
        "layers.{}.feed_forward.w1",
        "layers.{}.feed_forward.w2",
        "layers.{}.feed_forward.w3",
        "layers.{}.adaLN_modulation.0",
        "noise_refiner.{}.attention.to_q",
        "noise_refiner.{}.attention.to_k",
        "noise_refiner.{}.attention.to_v",
        "noise_refiner.{}.attention.to_out.0",
        "noise_refiner.{}.feed_forward.w1",
        "noise_refiner.{}.feed_forward.w2",
        "noise_refiner.{}.feed_forward.w3",
        "noise_refiner.{}.adaLN_modulation.0",
        "context_refiner.{}.attention.to_q",
        "context_refiner.{}.attention.to_k",
        "context_refiner.{}.attention.to_v",
        "context_refiner.{}.attention.to_out.0",
        "context_refiner.{}.feed_forward.w1",
        "context_refiner.{}.feed_forward.w2",
        "context_refiner.{}.feed_forward.w3",
        "all_final_layer.2-1.linear",
        "all_final_layer.2-1.adaLN_modulation.1",
    ),
)

ORIGINAL = Layout(
    "original",
    {
        "x_embedder": parts("all_x_embedder.2-1"),
        "cap_embedder.1": parts("cap_embedder.1"),
        "t_embedder.mlp.0": parts("t_embedder.mlp.0"),
        "t_embedder.mlp.2": parts("t_embedder.mlp.2"),
        "layers.{}.attention.qkv": parts(
            "layers.{}.attention.to_q", "layers.{}.attention.to_k", "layers.{}.attention.to_v"
        ),
        "layers.{}.attention.out": parts("layers.{}.attention.to_out.0"),
        "layers.{}.feed_forward.w1": parts("layers.{}.feed_forward.w1"),
        "layers.{}.feed_forward.w2": parts("layers.{}.feed_forward.w2"),
        "layers.{}.feed_forward.w3": parts("layers.{}.feed_forward.w3"),
        "layers.{}.adaLN_modulation.0": parts("layers.{}.adaLN_modulation.0"),
        "noise_refiner.{}.attention.qkv": parts(
            "noise_refiner.{}.attention.to_q", "noise_refiner.{}.attention.to_k", "noise_refiner.{}.attention.to_v"
        ),
        "noise_refiner.{}.attention.out": parts("noise_refiner.{}.attention.to_out.0"),
        "noise_refiner.{}.feed_forward.w1": parts("noise_refiner.{}.feed_forward.w1"),
        "noise_refiner.{}.feed_forward.w2": parts("noise_refiner.{}.feed_forward.w2"),
        "noise_refiner.{}.feed_forward.w3": parts("noise_refiner.{}.feed_forward.w3"),
        "noise_refiner.{}.adaLN_modulation.0": parts("noise_refiner.{}.adaLN_modulation.0"),
        "context_refiner.{}.attention.qkv": parts(
            "context_refiner.{}.attention.to_q",
            "context_refiner.{}.attention.to_k",
            "context_refiner.{}.attention.to_v",
        ),
        "context_refiner.{}.attention.out": parts("context_refiner.{}.attention.to_out.0"),
        "context_refiner.{}.feed_forward.w1": parts("context_refiner.{}.feed_forward.w1"),
        "context_refiner.{}.feed_forward.w2": parts("context_refiner.{}.feed_forward.w2"),
        "context_refiner.{}.feed_forward.w3": parts("context_refiner.{}.feed_forward.w3"),
        "final_layer.linear": parts("all_final_layer.2-1.linear"),
        "final_layer.adaLN_modulation.1": parts("all_final_layer.2-1.adaLN_modulation.1"),
    },
)

Z_IMAGE = Family(
    name="z_image",
    title="Z-Image",
    transformer_classes=("ZImageTransformer2DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
)
