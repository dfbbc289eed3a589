"""Fusing across layouts, against diffusers' own single-file converters.

For every family with an original layout: a base in original names, a LoRA in either layout, fused in either order with
conversion. Fuse-then-convert must equal convert-then-fuse, which pins names, row ranges, uneven shares and swapped
halves. Weights have one column, so that models have their real numbers of rows (which some converters insist on).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import diffusers
import pytest
import torch
from builders import write_lora
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file, save_file

from lorafuse_common.checkpoint import Checkpoint, open_checkpoint
from lorafuse_common.dialects.comfy import COMFY
from lorafuse_common.dialects.diffusers import DIFFUSERS
from lorafuse_common.dialects.kohya import KOHYA
from lorafuse_common.families import FAMILIES
from lorafuse_common.families.flux import FLUX
from lorafuse_common.naming import Family, Layout
from lorafuse_fuse import execute
from lorafuse_fuse.fuse import FuseOptions, fuse, require_clean
from lorafuse_fuse.plan import LoraRequest, ProblemKind, plan_fuse

CROSSED = [family for family in FAMILIES if len(family.layouts) > 1]
SMALL: Mapping[str, Mapping[str, object]] = {
    "flux": {"guidance_embeds": True, "num_layers": 2, "num_single_layers": 2},
    "flux2": {"num_layers": 2, "num_single_layers": 2},
    "wan": {"image_dim": 1280, "added_kv_proj_dim": 5120, "num_layers": 2},
    "z_image": {"n_layers": 2},
    "sd3": {"num_layers": 2, "dual_attention_layers": (0, 1), "caption_projection_dim": 1152},
    "hunyuan_video": {"num_layers": 2, "num_single_layers": 2},
    "ltx_video": {"num_layers": 2},
    "chroma": {"num_layers": 2, "num_single_layers": 2},
    "lumina2": {"hidden_size": 2304, "num_layers": 2, "num_attention_heads": 24, "num_kv_heads": 8},
    "cosmos": {"num_layers": 2, "text_embed_dim": 1024, "adaln_lora_dim": 256},
    "krea2": {"num_layers": 2},
    "mochi": {},
}
BLOCKS: Mapping[str, int] = {"mochi": 48}
"""The blocks of the model, where they are not two: diffusers' converter for Mochi counts to 48."""


def part_rows(family: Family) -> dict[str, int]:
    """The rows of every part that the family's diffusers model has, at real width."""
    with torch.device("meta"):
        model = getattr(diffusers, family.transformer_classes[0])(**SMALL[family.name])
    shapes = {name.removesuffix(".weight"): tuple(v.shape) for name, v in model.state_dict().items()}
    table = family.layouts[0].expand(blocks(family))
    return {
        part: count
        for module, its in table.items()
        if module in shapes
        for part, _, count in its.rows(shapes[module][0]) or ()
    }


def blocks(family: Family) -> int:
    """How many blocks the family's model has here."""
    return BLOCKS.get(family.name, 2)


def module_rows(family: Family, layout: Layout, rows: Mapping[str, int]) -> dict[str, int]:
    """The rows of every module of a layout whose parts all exist."""
    table = layout.expand(blocks(family))
    return {m: sum(rows[part] for part in its.names) for m, its in table.items() if all(p in rows for p in its.names)}


def column(name: str, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(rows, 1, generator=generator)


class Filler(dict[str, torch.Tensor]):
    """Answers for the tensors that a strict converter asks for besides those that LoRAs change."""

    def pop(self, key: str, *default: object) -> torch.Tensor:
        return super().pop(key) if key in self else torch.full((64, 1), float("nan"))

    def __missing__(self, key: str) -> torch.Tensor:
        return torch.full((64, 1), float("nan"))


def convert(family: Family, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Original names to diffusers' names, by diffusers itself; what came from filler is dropped."""
    function = SINGLE_FILE_LOADABLE_CLASSES[family.transformer_classes[0]]["checkpoint_mapping_fn"]
    copies = {name: value.clone() for name, value in weights.items()}
    # Converters that look keys up before they pop them count blocks by the keys that are there.
    converted = function(checkpoint=Filler(copies))
    return {name: value for name, value in converted.items() if not value.isnan().any()}


def write_base(path: Path, weights: Mapping[str, torch.Tensor]) -> Checkpoint:
    save_file({name: value.clone() for name, value in weights.items()}, path)
    return open_checkpoint(path)


def fused(base: Checkpoint, lora: Path, out: Path) -> dict[str, torch.Tensor]:
    plan = plan_fuse(base, [LoraRequest(lora, 0.5)])
    require_clean(plan, ())
    fuse(plan, FuseOptions(out))
    return load_file(out / base.root.name)


@pytest.mark.parametrize("family", CROSSED, ids=lambda family: family.name)
def test_fusing_commutes_with_diffusers_conversion(tmp_path: Path, family: Family) -> None:
    rows = part_rows(family)
    diffusers_layout, original_layout, *_ = family.layouts
    weights: dict[str, torch.Tensor] = {}
    for module, count in module_rows(family, original_layout, rows).items():
        weights |= {f"{module}.weight": column(module, count), f"{module}.bias": column(f"bias {module}", count)[:, 0]}
    original = write_base(tmp_path / "original.safetensors", weights)
    converted = write_base(tmp_path / "converted.safetensors", convert(family, weights))
    assert (original.layout, converted.layout) == (original_layout, diffusers_layout)
    assert {f"{m}.weight" for m in module_rows(family, diffusers_layout, rows)} <= set(converted.tensors)
    for layout, dialects in [(diffusers_layout, [DIFFUSERS]), (original_layout, [COMFY, KOHYA])]:
        modules = module_rows(family, layout, rows).items()
        factors = {module: (torch.full((1, 1), 2.0), column(f"up {module}", count)) for module, count in modules}
        for dialect in dialects:
            lora = write_lora(tmp_path / f"{layout.name}.{dialect.name}.safetensors", factors, dialect)
            onto_original = fused(original, lora, tmp_path / f"o {layout.name} {dialect.name}")
            onto_converted = fused(converted, lora, tmp_path / f"c {layout.name} {dialect.name}")
            reference = convert(family, onto_original)
            assert set(reference) == set(onto_converted)
            before = load_file(converted.root)
            for name, value in onto_converted.items():
                torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-6, msg=name)
                assert name.endswith(".bias") or not torch.equal(value, before[name]), name


def test_xlabs_names(tmp_path: Path) -> None:
    """XLabs' own vocabulary onto FLUX.1; its single-block LoRAs leave the MLP's rows of linear1 alone."""
    rows = part_rows(FLUX)
    weights = {f"{m}.weight": column(m, count) for m, count in module_rows(FLUX, FLUX.layouts[1], rows).items()}
    stems = {
        "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
        "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv",
        "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj",
        "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj",
        "single_blocks.1.processor.qkv_lora": "single_blocks.1.linear1",
        "single_blocks.1.processor.proj_lora": "single_blocks.1.linear2",
    }
    lora: dict[str, torch.Tensor] = {}
    expected = dict(weights)
    for stem, module in stems.items():
        up = column(f"up {stem}", 9216 if "qkv" in stem else 3072)
        lora |= {f"{stem}.down.weight": torch.ones(1, 1), f"{stem}.up.weight": up}
        changed = weights[f"{module}.weight"].clone()
        changed[: len(up)] += 0.5 * up
        expected[f"{module}.weight"] = changed
    save_file(lora, tmp_path / "xlabs.safetensors")
    result = fused(write_base(tmp_path / "base.safetensors", weights), tmp_path / "xlabs.safetensors", tmp_path / "out")
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("block", [1, 12, 1 << 20])
def test_a_lone_part_changes_its_own_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Whichever way the part's rows fall on blocks."""
    monkeypatch.setattr(execute, "EDIT_BLOCK_ELEMENTS", block)
    qkv = torch.randn(3 * 8, 4)
    names = ("layers.0.attention.qkv.weight", "layers.0.adaLN_modulation.0.weight")
    base = write_base(tmp_path / "base.safetensors", dict.fromkeys(names, qkv))
    up, down = torch.randn(8, 2), torch.randn(2, 4)
    lora = write_lora(tmp_path / "lora.safetensors", {"layers.0.attention.to_k": (down, up)}, DIFFUSERS)
    result = fused(base, lora, tmp_path / "out")["layers.0.attention.qkv.weight"]
    torch.testing.assert_close(result[8:16], qkv[8:16] + 0.5 * up @ down)
    assert torch.equal(result[:8], qkv[:8])
    assert torch.equal(result[16:], qkv[16:])


def test_parts_of_other_sizes_are_a_mismatch(tmp_path: Path) -> None:
    sizes = {"to_q": 8, "to_k": 4, "to_v": 4}
    weights = {f"layers.0.attention.{part}.weight": torch.randn(rows, 4) for part, rows in sizes.items()}
    base = write_base(tmp_path / "base.safetensors", weights)
    assert base.family
    assert base.family.name == "z_image"
    factors = {"layers.0.attention.qkv": (torch.randn(2, 4), torch.randn(18, 2))}
    plan = plan_fuse(base, [LoraRequest(write_lora(tmp_path / "lora.safetensors", factors, COMFY))])
    assert plan.problems[0].kind is ProblemKind.SHAPE_MISMATCH
    del weights["layers.0.attention.to_v.weight"]
    base = write_base(tmp_path / "less.safetensors", weights)
    plan = plan_fuse(base, [LoraRequest(tmp_path / "lora.safetensors")])
    assert plan.problems[0].kind is ProblemKind.NO_SUCH_MODULE
    assert "lacks layers.0.attention.to_v.weight" in plan.problems[0].detail
