"""Families, layouts and dialects: data compared with diffusers' own classes and with the shared listings."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from lorafuse_common.dialects import DIALECTS, Dialect, split_key
from lorafuse_common.families import FAMILIES, family_of_class, family_of_suffixes
from lorafuse_common.families.ltx2 import LTX2
from lorafuse_common.families.ltx_video import LTX_VIDEO
from lorafuse_common.families.wan import WAN
from lorafuse_common.naming import Family, Layout, candidates, narrowed

ROOT = Path(__file__).parents[2]
LISTINGS = ROOT.parent / "shared" / "lora_keys"
MODELS: dict[str, list[dict[str, Any]]] = json.loads((ROOT / "tests/golden/models.json").read_text())
"""By family: diffusers' models with few blocks of full width, which together have every module of its tables."""
UNMAPPED = {
    "cosmos": r"learnable_pos_embed\.",  # of Cosmos 1
    "krea2": r"^transformer_blocks\.\d+\.scale_shift_table$",  # six times as many rows in the original layout
    "wan": r"^motion_encoder\.",  # frozen, and its blocks are numbered otherwise in the original layout
}
"""Parameters that the tables leave out."""
SHARED_ATTENTION: tuple[set[str], ...] = (
    {"chroma", "flux", "flux2", "hunyuan_video"},
    {"lumina2", "z_image"},
    {"cosmos", "ltx2", "ltx_video", "sana"},
    {"chroma", "flux", "flux2", "hunyuan_video", "qwen_image", "sd3"},
    {"chroma", "flux", "flux2", "hunyuan_video", "krea2", "qwen_image", "qwen_image21", "sd3"},
)
"""Families between which the attention modules alone, in original names, do not tell."""


@cache
def modules_of(family: Family) -> tuple[frozenset[str], frozenset[str]]:
    """The Linear and Conv modules of the family's models, and all that has a parameter; built without weights."""
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    linear, everything = set(), set()
    for spec in MODELS[family.name]:
        with torch.device("meta"):
            model = getattr(diffusers, spec["class"])(**spec["options"])
        linear |= {name for name, module in model.named_modules() if isinstance(module, kinds)}
        everything |= {name.removesuffix(".weight").removesuffix(".bias") for name, _ in model.named_parameters()}
    return frozenset(linear), frozenset(everything)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_diffusers_layout_is_diffusers(family: Family) -> None:
    linear, everything = modules_of(family)
    blocks = 1 + max(int(n) for name in linear for n in re.findall(r"\.(\d+)\.", name))
    diffusers_layout, *others = family.layouts
    left_out = {name for name in everything if re.search(UNMAPPED.get(family.name, "^$"), name)}
    assert everything - left_out <= set(diffusers_layout.expand(blocks))
    assert left_out.isdisjoint(linear)
    assert diffusers_layout.is_whole(everything)
    parts = {part for its in diffusers_layout.modules.values() for part in its.names}
    for layout in others:
        named = {part for its in layout.modules.values() for part in its.names}
        assert named == parts if layout.name == "original" else named <= parts


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_its_classes_are_its_models(family: Family) -> None:
    assert set(family.transformer_classes) == {spec["class"] for spec in MODELS[family.name]}
    for class_name in family.transformer_classes:
        assert family_of_class(class_name) is family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_are_told_apart_by_all_their_names(family: Family) -> None:
    for layout in family.layouts:
        if layout.name == "comfyui" and len(layout.modules) < 10:
            continue  # norms alone, which FLUX.1, FLUX.2 and Chroma call alike
        assert candidates(layout.expand(3), FAMILIES) == ((family, layout),)


def test_a_model_that_has_all_names_of_another_is_itself() -> None:
    ltx = [f"{stack}.attn1.to_q" for stack in ("transformer_blocks.0", "transformer_blocks.1")]
    assert {family for family, _ in candidates(ltx, FAMILIES)} >= {LTX_VIDEO, LTX2}
    for family in (LTX_VIDEO, LTX2):
        assert candidates(family.layouts[0].expand(2), FAMILIES) == ((family, family.layouts[0]),)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_lora_of_attention_only_is_told_apart_where_names_differ(family: Family) -> None:
    modules = family.layouts[1 if len(family.layouts) > 1 else 0].expand(2)
    attention = [m for m in modules if re.search("attn|attention", m) and not re.search("norm|ln|scale|crossattn", m)]
    assert len(attention) >= 4
    found = {its.name for its, _ in candidates(attention, FAMILIES)}
    assert family.name in found
    assert len(found) == 1 or found in SHARED_ATTENTION


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.lora_targets], ids=lambda family: family.name)
def test_presets_name_modules(family: Family) -> None:
    names = list(family.layouts[0].expand(2))
    for suffix in family.lora_targets:
        assert any(f".{name}".endswith(f".{suffix.replace('{}', '1')}") for name in names), suffix
    for template in family.idle_modules:
        assert template.format(last=1) in names


def test_the_origins_example_is_recognised_as_wan() -> None:
    assert family_of_suffixes(["q", "k", "v", "o", "ffn.0", "ffn.2"]) is WAN
    assert family_of_suffixes(["nonsense"]) is None


def test_shared_names_are_not_claimed_for_one_family() -> None:
    found = candidates(["transformer_blocks.0.attn.to_q"], FAMILIES)
    assert {family.name for family, _ in found} >= {"flux", "qwen_image", "sd3"}
    assert candidates(["blocks.0.self_attn.q"], FAMILIES, "ChromaTransformer2DModel") == ()


def test_sizes_tell_families_apart() -> None:
    """Names that FLUX.1, FLUX.2, Chroma and HunyuanVideo share, with the widths and depths of real models."""
    tied = candidates(["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"], FAMILIES)

    def names(found: tuple[tuple[Family, Layout], ...]) -> set[str]:
        return {family.name for family, _ in found}

    assert names(tied) == {"flux", "flux2", "chroma", "hunyuan_video"}
    assert names(narrowed(tied, 6144, 48)) == {"flux2"}
    assert names(narrowed(tied, 3072, 40)) == {"hunyuan_video"}
    assert names(narrowed(tied, 3072, 38)) == {"flux", "chroma"}
    assert names(narrowed(tied, 3072, 39)) == {"hunyuan_video"}
    assert names(narrowed(tied, None, 48)) == {"flux2"}
    assert narrowed(tied, 48, 2) == tied


UNUSUAL_DEFAULTS = ("sd3", "cosmos", "hidream")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in UNUSUAL_DEFAULTS], ids=lambda f: f.name)
def test_sizes_are_those_of_diffusers_defaults(family: Family) -> None:
    """Whose defaults are a published model for most families."""
    if not family.sizes:
        pytest.skip("no published size is known")
    with torch.device("meta"):
        model = getattr(diffusers, family.transformer_classes[0])()
    names = [name for name, _ in model.named_parameters()]
    widths = Counter(value.shape[1] for _, value in model.named_parameters() if value.dim() == 2)
    blocks = 1 + max(int(n) for name in names for n in re.findall(r"\.(\d+)\.", name))
    assert (widths.most_common(1)[0][0], blocks) in {(size.width, size.blocks) for size in family.sizes}


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
        ("a.b.lora_B.default.bias", ("a.b", "bias", "up_bias")),
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
