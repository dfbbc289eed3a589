"""Attaches, saves, reads or fuses the demo's LoRAs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maker.dit import LAYERS

IMAGE_SIDE = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "attn.add_k_proj",
    "attn.add_v_proj",
)
# Without the last block's: nothing reads the text stream after it, so they would never get a gradient.
TEXT_SIDE = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")


def module_names(image: Iterable[str] = IMAGE_SIDE, text: Iterable[str] = ()) -> list[str]:
    everywhere = [f"transformer_blocks.{block}.{name}" for block in range(LAYERS) for name in image]
    return everywhere + [f"transformer_blocks.{block}.{name}" for block in range(LAYERS - 1) for name in text]


def attach(model: QwenImageTransformer2DModel, names: list[str], rank: int, alpha: float) -> list[nn.Parameter]:
    torch.manual_seed(0)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def factors(model: QwenImageTransformer2DModel) -> dict[str, Tensor]:
    """The trained factors in bfloat16 by PEFT's names without the adapter's."""
    state = get_peft_model_state_dict(model)
    return {name: value.detach().to(torch.bfloat16).contiguous() for name, value in state.items()}


def save_peft_layout(state: Mapping[str, Tensor], path: Path) -> None:
    """`lora_A.default.weight`, no alpha: PEFT's own layout with alpha equal to the rank."""
    renamed = {name.removesuffix("weight") + "default.weight": value for name, value in state.items()}
    save_file(renamed, path, metadata={"format": "pt"})


def save_lightning_layout(
    state: Mapping[str, Tensor], alpha: float, path: Path, schedule: Mapping[str, object]
) -> None:
    """`lora_down` / `lora_up` / `alpha`, as the published Lightning LoRAs have it."""
    words = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    renamed = {}
    for name, value in state.items():
        module, _, factor = name.rpartition(".lora_")
        renamed[f"{module}.{words['lora_' + factor]}"] = value
        renamed[f"{module}.alpha"] = torch.tensor(float(alpha))
    save_file(renamed, path, metadata={"format": "pt", "few_step_schedule": json.dumps(schedule)})


def _deltas(path: Path) -> dict[str, Tensor]:
    state = {name: value.float() for name, value in load_file(path).items()}
    result = {}
    for name, down in state.items():
        module, _, factor = name.rpartition(".lora_")
        if factor == "down.weight":
            # W' = W + alpha / r * B @ A
            scale = float(state[f"{module}.alpha"]) / len(down)
            result[module] = scale * state[f"{module}.lora_up.weight"] @ down
        elif factor == "A.default.weight":
            result[module] = state[f"{module}.lora_B.default.weight"] @ down
    return result


@torch.no_grad()
def fuse(model: QwenImageTransformer2DModel, loras: Mapping[Path, float]) -> QwenImageTransformer2DModel:
    """Adds strength * delta of every file in float32, then rounds once to bfloat16, as the product does."""
    for path, strength in loras.items():
        for module, delta in _deltas(path).items():
            model.get_submodule(module).weight += strength * delta
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    return model.requires_grad_(False).eval()
