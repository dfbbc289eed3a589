"""Complete random `Flux2Pipeline`s (dev) and `Flux2KleinPipeline`s small enough to train in a test, made offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from train import tiny, tiny_z_image
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3ForCausalLM

CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)
"""As Mistral's template treats a system and a user message."""
SPECIAL = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")
DYNAMIC_SCHEDULER = {"use_dynamic_shifting": True, "shift": 3.0}
"""The real FLUX.2's scheduler."""


def mistral_tokenizer() -> Any:
    """A tokenizer that pads on the left, with Mistral's kind of chat template."""
    made = tiny.tokenizer()
    made.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": list(SPECIAL)})
    made.chat_template = CHAT
    made.padding_side = "left"
    return made


def mistral(words: Any) -> Any:
    """Of width 16 and one layer more than the pipeline reads."""
    text = {
        "model_type": "mistral",
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_hidden_layers": 31,
        "sliding_window": None,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=1))


def pipeline(*, klein: bool = False, distilled: bool = False, scheduler: dict[str, Any] | None = None) -> Any:
    """A random pipeline of 4x reduction, whose pictures are multiples of 8 pixels; weights fixed by a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = tiny_z_image.tokenizer() if klein else mistral_tokenizer()
        encoder = Qwen3ForCausalLM(tiny_z_image.qwen3_config(words, layers=28)) if klein else mistral(words)
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=not klein,
        )
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(**(scheduler or DYNAMIC_SCHEDULER)),
        "vae": vae.eval(),
        "text_encoder": encoder.eval(),
        "tokenizer": words,
        "transformer": transformer.eval(),
    }
    return Flux2KleinPipeline(**parts, is_distilled=distilled) if klein else Flux2Pipeline(**parts)


def save_pipeline(folder: Path, **options: Any) -> Path:
    """`pipeline(**options)` written to `folder`."""
    return tiny.save(pipeline(**options), folder)


def save_lightning(path: Path) -> Path:
    """A random LoRA for `pipeline`."""
    return tiny.save_lora(
        path, [f"transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in ("to_q", "to_v")]
    )
