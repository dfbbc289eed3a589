"""A complete random `StableDiffusion3Pipeline` small enough to train in a test, made offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from train import tiny, tiny_text
from transformers import CLIPTextModelWithProjection

SCHEDULER = {"shift": 3.0}
"""The real one."""


def pipeline(*, t5: bool = True, medium: bool = True, scheduler: dict[str, Any] | None = None) -> Any:
    """A random pipeline of 4x reduction, as 3.5 medium (second attention, normed queries) or as 3 medium."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip_words, t5_words = tiny_text.clip_tokenizer(), tiny_text.t5_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_projection_dim=32,
            joint_attention_dim=40,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
            qk_norm="rms_norm" if medium else None,
            dual_attention_layers=(0,) if medium else (),
        )
        return StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler or SCHEDULER)),
            vae=tiny_text.vae(),
            text_encoder=tiny_text.clip(CLIPTextModelWithProjection, clip_words, 16),
            tokenizer=clip_words,
            text_encoder_2=tiny_text.clip(CLIPTextModelWithProjection, clip_words, 16),
            tokenizer_2=clip_words,
            text_encoder_3=tiny_text.t5(t5_words, 40) if t5 else None,
            tokenizer_3=t5_words if t5 else None,
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
