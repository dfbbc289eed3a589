"""Families, layouts and dialects: data compared with diffusers' own classes and with the shared listings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import ROOT

from lorafuse_common.dialects import DIALECTS, Dialect, split_key
from lorafuse_common.families import FAMILIES, family_of_suffixes
from lorafuse_common.families.wan import WAN
from lorafuse_common.naming import Family, candidates, identify

LISTINGS = ROOT.parent / "shared" / "lora_keys"
OPTIONS: dict[str, dict[str, object]] = {
    "wan": {"image_dim": 1280, "added_kv_proj_dim": 64, "num_layers": 2},
    "sd3": {"dual_attention_layers": (0,), "num_layers": 2},
    "flux": {"guidance_embeds": True, "num_layers": 1, "num_single_layers": 1},
}


def modules_of(family: Family) -> tuple[set[str], set[str]]:
    """The Linear and Conv modules of the family's first class, and all that has a parameter; built without weights."""
    with torch.device("meta"):
        model = getattr(diffusers, family.transformer_classes[0])(**OPTIONS.get(family.name, {}))
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    everything = {name.removesuffix(".weight").removesuffix(".bias") for name, _ in model.named_parameters()}
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}, everything


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_diffusers_layout_is_diffusers(family: Family) -> None:
    linear, everything = modules_of(family)
    blocks = 1 + max(int(n) for name in linear for n in re.findall(r"\.(\d+)\.", name))
    diffusers_layout, *others = family.layouts
    assert linear <= set(diffusers_layout.expand(blocks))
    assert diffusers_layout.explained(everything) == diffusers_layout.explained(diffusers_layout.expand(blocks))
    parts = {part for its in diffusers_layout.modules.values() for part in its.names}
    for layout in others:
        named = {part for its in layout.modules.values() for part in its.names}
        assert named == parts if layout.name == "original" else named < parts


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_are_told_apart_by_all_their_names(family: Family) -> None:
    for layout in family.layouts:
        assert identify(layout.expand(3), FAMILIES) == (family, layout)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.lora_targets], ids=lambda family: family.name)
def test_presets_name_modules(family: Family) -> None:
    names = list(family.layouts[0].expand(2))
    for suffix in family.lora_targets:
        assert any(name.endswith(f".{suffix}") for name in names), suffix
    for template in family.idle_modules:
        assert template.format(last=1) in names


def test_the_origins_example_is_recognised_as_wan() -> None:
    assert family_of_suffixes(["q", "k", "v", "o", "ffn.0", "ffn.2"]) is WAN
    assert family_of_suffixes(["nonsense"]) is None


def test_shared_names_are_not_claimed_for_one_family() -> None:
    found = candidates(["transformer_blocks.0.attn.to_q"], FAMILIES)
    assert {family.name for family, _ in found} >= {"flux", "qwen_image", "sd3"}
    assert identify(["transformer_blocks.0.attn.to_q"], FAMILIES) is None
    assert identify(["blocks.0.self_attn.q"], FAMILIES, "ChromaTransformer2DModel") is None


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_what_a_dialect_writes_is_read_back(dialect: Dialect) -> None:
    module = "transformer_blocks.0.attn.to_out.0"
    for role, suffix in dialect.roles.items():
        assert split_key(dialect.spell(module) + suffix) == (dialect.spell(module), "weight", role)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a.b.lora_A.my_adapter.weight", ("a.b", "weight", "down")),
        ("a.b.lora_B", ("a.b", "weight", "up")),
        ("a.b.lora_B.default.bias", ("a.b", "weight", "up_bias")),
        ("a.b_lora.up.weight", ("a.b", "weight", "up")),
        ("a.b.lora_magnitude_vector.default.weight", ("a.b", "weight", "magnitude")),
        ("a.b.lokr_w2_a", ("a.b", "weight", "lokr_w2_a")),
        ("a.b.hada_t1.default", ("a.b", "weight", "hada_t1")),
        ("a.b.diff_b", ("a.b", "bias", "diff")),
        ("a.0.diff_m", ("a.0.modulation", "weight", "diff")),
        ("a.b.weight", None),
        (".alpha", None),
    ],
)
def test_suffixes(key: str, expected: tuple[str, str, str] | None) -> None:
    assert split_key(key) == expected


@pytest.mark.skipif(not LISTINGS.is_dir(), reason="the shared listings of real LoRA keys are not here")
@pytest.mark.parametrize("path", sorted(LISTINGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_real_key_has_a_role(path: Path) -> None:
    unread = [key for key in json.loads(path.read_text())["keys"] if split_key(key) is None]
    known_gaps = r"norm\.(key|query)_norm\.scale$"  # BFL control
    assert [key for key in unread if not re.search(known_gaps, key)] == []
