"""A complete random `FluxPipeline` small enough to train in a test, made offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from train import tiny, tiny_text
from transformers import CLIPTextModel

DEV = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096, "shift": 3.0}
SCHNELL = {"use_dynamic_shifting": False, "shift": 1.0}
"""The real schedulers."""


def pipeline(*, dev: bool = True) -> Any:
    """A random pipeline of 4x reduction, whose pictures are multiples of 8 pixels; weights fixed by a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip_words, t5_words = tiny_text.clip_tokenizer(), tiny_text.t5_tokenizer()
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=dev,
        )
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**(DEV if dev else SCHNELL)),
            vae=tiny_text.vae(),
            text_encoder=tiny_text.clip(CLIPTextModel, clip_words, 16),
            tokenizer=clip_words,
            text_encoder_2=tiny_text.t5(t5_words, 24),
            tokenizer_2=t5_words,
            transformer=transformer.eval(),
        )


def save_pipeline(folder: Path, **options: Any) -> Path:
    """`pipeline(**options)` written to `folder`."""
    return tiny.save(pipeline(**options), folder)


def save_lightning(path: Path) -> Path:
    """A random LoRA for `pipeline`."""
    return tiny.save_lora(
        path, [f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in ("attn.to_q", "attn.add_v_proj")]
    )
