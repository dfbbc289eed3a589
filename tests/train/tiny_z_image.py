"""A complete random `ZImagePipeline` small enough to train in a test, made offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from train import tiny, tiny_text
from transformers import Qwen3Config, Qwen3Model

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen3's template treats a lone user message."""


def tokenizer() -> Any:
    """Qwen3's kind of tokenizer with its chat template."""
    made = tiny.tokenizer()
    made.chat_template = CHAT
    return made


def qwen3_config(words: Any, layers: int) -> Qwen3Config:
    """Of width 16; the last of its layers' outputs is normalised, the others are not."""
    return Qwen3Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=len(words),
        pad_token_id=words.pad_token_id,
    )


def pipeline(*, scheduler: dict[str, Any] | None = None) -> Any:
    """A random pipeline of 4x reduction, whose pictures are multiples of 8 pixels; weights fixed by a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = tokenizer()
        encoder = Qwen3Model(qwen3_config(words, layers=3))
        vae = tiny_text.vae()
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 32, 32],
        )
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(token)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler or {"shift": 3.0})),
        vae=vae,
        text_encoder=encoder.eval(),
        tokenizer=words,
        transformer=transformer.eval(),
    )


def save_pipeline(folder: Path, **options: Any) -> Path:
    """`pipeline(**options)` written to `folder`."""
    return tiny.save(pipeline(**options), folder)


def save_lightning(path: Path) -> Path:
    """A random LoRA for `pipeline`."""
    return tiny.save_lora(path, [f"layers.{block}.attention.{name}" for block in (0, 1) for name in ("to_q", "to_v")])
