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
from lorafuse_common.scale import ScaleConflictError, ScaleSources, pattern_key, read_scale_sources, resolve_scale

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
    ours = read_scale_sources(tmp_path / "adapter_model.safetensors", {})
    for name in ("0", "1"):
        layer = tuned.base_model.model.get_submodule(name)
        scale, source = resolve_scale(name, layer.r["default"], None, ours)
        assert scale == pytest.approx(layer.scaling["default"])
        assert source == "adapter_config.json"


def test_alpha_over_rank_else_one() -> None:
    assert resolve_scale("m", 64, 8.0, ScaleSources()) == (0.125, "alpha/rank")
    assert resolve_scale("m", 64, None, ScaleSources())[0] == 1.0


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ScaleConflictError, match="positive"):
        resolve_scale("m", 4, alpha, ScaleSources())


def _metadata(**fields: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in fields.items()})}


def test_sources_that_disagree_are_conflicts(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    config = read_scale_sources(path, _metadata(r=4, lora_alpha=8))
    assert resolve_scale("m", 4, 8.0, config)[0] == 2.0
    with pytest.raises(ScaleConflictError, match=r"\.alpha 4 / rank 4 gives 1, .* gives 2"):
        resolve_scale("m", 4, 4.0, config)
    with pytest.raises(ScaleConflictError, match="rank 16"):
        resolve_scale("m", 16, None, config)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    with pytest.raises(LoraFileError, match="disagree"):
        read_scale_sources(path, _metadata(r=4, lora_alpha=8))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"r": "many"}', '{"r": 4, "rank_pattern": 3}'])
def test_broken_configurations_name_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(LoraFileError, match=r"adapter_config\.json"):
        read_scale_sources(tmp_path / "x.safetensors", {})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_inits_that_change_the_base_are_refused(tmp_path: Path, init: str) -> None:
    config = read_scale_sources(tmp_path / "x.safetensors", _metadata(r=4, lora_alpha=8, init_lora_weights=init))
    assert config.config and config.config.unfusable and init in config.config.unfusable


def test_kinds_that_no_algebra_computes_are_refused_by_name(tmp_path: Path) -> None:
    for fields in ({"peft_type": "VERA"}, {"fan_in_fan_out": True}, {"layer_replication": [[0, 2]]}):
        sources = read_scale_sources(tmp_path / "x.safetensors", _metadata(r=4, **fields))
        assert sources.config
        assert sources.config.unfusable
        assert next(iter(fields)) in sources.config.unfusable
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')  # which has no rank
    sources = read_scale_sources(tmp_path / "x.safetensors", {})
    assert sources.config
    assert "IA3" in str(sources.config.unfusable)


def test_pefts_lokr_takes_its_own_alpha(tmp_path: Path) -> None:
    """Where both factors are full, PEFT alone scales by alpha / r; only its own files say that they are PEFT's."""
    sources = read_scale_sources(tmp_path / "x.safetensors", _metadata(r=64, alpha=32, peft_type="LOKR"))
    assert resolve_scale("m", None, None, sources)[0] == 0.5
    assert resolve_scale("m", None, math.inf, ScaleSources()) == (1.0, "1 (full factors)")


@pytest.mark.parametrize(
    ("header", "scale", "source"),
    [
        ({"lora_alpha": "8"}, 2.0, "header key lora_alpha"),
        ({"transformer.lora_alpha": "2", "transformer.r": "4"}, 0.5, "header key transformer.lora_alpha"),
        ({"network_alpha": "1"}, 0.25, "header key network_alpha"),
        ({"ss_network_alpha": "16.0", "ss_network_dim": "4"}, 4.0, "header key ss_network_alpha"),
        ({"ss_network_alpha": "None", "ss_network_dim": "Dynamic"}, 1.0, "1 (no alpha)"),
    ],
)
def test_one_alpha_in_the_header(tmp_path: Path, header: dict[str, str], scale: float, source: str) -> None:
    sources = read_scale_sources(tmp_path / "x.safetensors", header)
    assert resolve_scale("m", 4, None, sources) == (scale, source)


def test_header_alphas_that_disagree(tmp_path: Path) -> None:
    stated = read_scale_sources(tmp_path / "x.safetensors", {"lora_alpha": "8", "r": "4"})
    assert resolve_scale("m", 4, 8.0, stated) == (2.0, "alpha/rank")
    with pytest.raises(ScaleConflictError, match=r"\.alpha is 4, header key lora_alpha says 8"):
        resolve_scale("m", 4, 4.0, stated)
    with pytest.raises(ScaleConflictError, match="rank 16, the header says 4"):
        resolve_scale("m", 16, None, stated)
    assert resolve_scale("m", 4, 4.0, stated, 2.0) == (0.5, "--alpha")
    setting = read_scale_sources(tmp_path / "x.safetensors", {"ss_network_alpha": "8", "ss_network_dim": "4"})
    assert resolve_scale("m", 4, 4.0, setting) == (1.0, "alpha/rank")  # the tensors carry what came of it


def test_each_expert_has_its_own_configuration(tmp_path: Path) -> None:
    fields = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer_2.r": 4, "transformer_2.lora_alpha": 2}
    header = {"lora_adapter_metadata": json.dumps(fields)}
    for component, scale in (("transformer", 2.0), ("transformer_2", 0.5)):
        sources = read_scale_sources(tmp_path / "x.safetensors", header, component)
        assert resolve_scale("m", 4, None, sources)[0] == scale
