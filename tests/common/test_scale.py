"""Scales: every source, every conflict, and PEFT's own pattern rule as the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key

from lorafuse_common.errors import LoraFileError
from lorafuse_common.scale import ScaleConflictError, pattern_key, read_adapter_config, resolve_scale

NAMES = ["blocks.0.attn.to_q", "blocks.10.attn.to_q", "to_q", "a.b"]
PATTERNS = ["to_q", "attn.to_q", r"blocks\.0\..*", "^to_q", "q", "blocks.1"]


@given(st.lists(st.sampled_from(PATTERNS), unique=True), st.sampled_from(NAMES))
def test_patterns_match_as_in_peft(patterns: list[str], name: str) -> None:
    assert pattern_key(patterns, name) == get_pattern_key(patterns, name)


@pytest.mark.parametrize("rslora", [False, True])
def test_scale_is_the_one_peft_runs_with(tmp_path: Path, rslora: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=rslora, target_modules=["0", "1"], rank_pattern={"1": 2}, alpha_pattern={"0": 3}
    )
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(tmp_path)
    ours = read_adapter_config(tmp_path / "adapter_model.safetensors", {})
    for name in ("0", "1"):
        layer = tuned.base_model.model.get_submodule(name)
        scale, source = resolve_scale(name, layer.r["default"], None, ours)
        assert scale == pytest.approx(layer.scaling["default"])
        assert source == "adapter_config.json"


def test_alpha_over_rank_else_one() -> None:
    assert resolve_scale("m", 64, 8.0, None) == (0.125, "alpha/rank")
    assert resolve_scale("m", 64, None, None)[0] == 1.0


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ScaleConflictError, match="positive"):
        resolve_scale("m", 4, alpha, None)


def _metadata(**fields: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in fields.items()})}


def test_sources_that_disagree_are_conflicts(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    config = read_adapter_config(path, _metadata(r=4, lora_alpha=8))
    assert resolve_scale("m", 4, 8.0, config)[0] == 2.0
    with pytest.raises(ScaleConflictError, match=r"\.alpha 4 / rank 4 gives 1, .* gives 2"):
        resolve_scale("m", 4, 4.0, config)
    with pytest.raises(ScaleConflictError, match="rank 16"):
        resolve_scale("m", 16, None, config)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    with pytest.raises(LoraFileError, match="disagree"):
        read_adapter_config(path, _metadata(r=4, lora_alpha=8))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"r": "many"}', '{"r": 4, "rank_pattern": 3}'])
def test_broken_configurations_name_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(LoraFileError, match=r"adapter_config\.json"):
        read_adapter_config(tmp_path / "x.safetensors", {})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_inits_that_change_the_base_are_refused(tmp_path: Path, init: str) -> None:
    config = read_adapter_config(tmp_path / "x.safetensors", _metadata(r=4, lora_alpha=8, init_lora_weights=init))
    assert config and config.unfusable and init in config.unfusable
