"""Target modules: counted per pattern, refused where a pattern matches nothing, idle ones left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train import tiny

from lorafuse_common.errors import ConfigError
from lorafuse_common.families.qwen_image import QWEN_IMAGE
from lorafuse_train.lora.adapter import attach
from lorafuse_train.lora.targets import Targets, meta_model, resolve_targets
from lorafuse_train.options.options import resolve_config
from lorafuse_train.recipes.qwen_image import QwenImage


@pytest.fixture(scope="module")
def model() -> nn.Module:
    config = {"in_channels": 16, "out_channels": 4, "num_layers": 3, "num_attention_heads": 2}
    return meta_model("QwenImageTransformer2DModel", {**config, "attention_head_dim": 16, "joint_attention_dim": 16})


def resolve(model: nn.Module, patterns: str) -> Targets:
    return resolve_targets(model, QWEN_IMAGE, patterns)


def test_the_preset_leaves_out_what_cannot_learn(model: nn.Module) -> None:
    assert next(model.parameters()).is_meta
    targets = resolve(model, "preset")
    assert dict(targets.counts) == {
        name: 2 if name in ("add_q_proj", "to_add_out", "txt_mlp.net.2") else 3 for name in QWEN_IMAGE.lora_targets
    }
    assert targets.idle == (
        "transformer_blocks.2.attn.add_q_proj",
        "transformer_blocks.2.attn.to_add_out",
        "transformer_blocks.2.txt_mlp.net.2",
    )
    assert len(targets.modules) == sum(targets.counts.values())


def test_endings_match_whole_parts_of_a_name(model: nn.Module) -> None:
    targets = resolve(model, "to_q, img_mlp.net.2,proj_out")
    assert dict(targets.counts) == {"to_q": 3, "img_mlp.net.2": 3, "proj_out": 1}
    assert targets.parameters["proj_out"] == 32 + 16
    assert sum(targets.parameters.values()) == 3 * 64 + 3 * (128 + 32) + 48
    with pytest.raises(ConfigError, match="o_q: no module"):
        resolve(model, "o_q")


def test_a_regular_expression_matches_the_full_name(model: nn.Module) -> None:
    assert resolve(model, r"regex:transformer_blocks\.0\.attn\.to_[qk]").modules == (
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.attn.to_q",
    )
    with pytest.raises(ConfigError, match="no module"):
        resolve(model, "regex:attn")
    with pytest.raises(ConfigError, match="not a regular expression"):
        resolve(model, "regex:(")


def test_wan_names_on_qwen_image_say_so(model: nn.Module) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(model, "q,k,v,o,ffn.0,ffn.2")
    message = str(caught.value)
    assert "q, k, v, o, ffn.0, ffn.2: no module of this Qwen-Image is so named. These are Wan names." in message
    assert f"--lora_target_modules {','.join(QWEN_IMAGE.lora_targets)}" in message


def test_one_wrong_name_among_right_ones_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="typo: no module"):
        resolve(model, "to_q,to_k,typo")
    with pytest.raises(ConfigError, match="cannot learn"):
        resolve(model, r"regex:transformer_blocks\.2\.attn\.to_add_out")


def test_the_idle_modules_are_exactly_those_without_a_gradient() -> None:
    """Against autograd: train every linear layer, and see which never hears of the loss."""
    pipeline = tiny.pipeline(layers=2)
    transformer = pipeline.transformer.requires_grad_(False)
    names = tuple(name for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    config = resolve_config({"fused_model": "x", "dataset_base_path": "x", "output_path": "x", "lora_rank": 2})
    attach(transformer, Targets(names, {}, (), {}), config)
    recipe = QwenImage()
    caption = recipe.collate([{"embeds": torch.randn(5, 16)}])
    predicted = recipe.predict(transformer, torch.randn(1, 4, 4, 4), torch.tensor([0.5]), caption)
    torch.autograd.backward(predicted.sum())
    silent = {
        name.removesuffix(".lora_B.default.weight")
        for name, parameter in transformer.named_parameters()
        if "lora_B" in name and (parameter.grad is None or not parameter.grad.any())
    }
    assert silent == {template.format(last=1) for template in QWEN_IMAGE.idle_modules}
