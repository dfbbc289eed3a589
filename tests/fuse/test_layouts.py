"""Fusing across layouts, against diffusers' own single-file converters.

Two tests of every family's tables. Row by row: a converter runs on tensors whose entries number their rows, and the
numbers that come out are read back. As a whole: a base in original names, LoRAs in every layout, fused in either order
with conversion: fuse-then-convert must equal convert-then-fuse. Both pin names, row ranges, uneven shares and swapped
halves, of weights, biases and norms. Tensors have one column, so that models have their real numbers of rows (which
some converters insist on).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from builders import write_lora
from diffusers.loaders import lora_conversion_utils as lora_converters
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from models import CONVERTED, CROSSED, GOLDEN, MODELS, Model, entries, title
from safetensors.torch import load_file, save_file

from lorafuse_common.checkpoint import Checkpoint, open_checkpoint
from lorafuse_common.dialects import Dialect
from lorafuse_common.dialects.comfy import COMFY
from lorafuse_common.dialects.diffusers import DIFFUSERS
from lorafuse_common.dialects.kohya import KOHYA
from lorafuse_common.families.flux import FLUX
from lorafuse_common.families.hunyuan_video import HUNYUAN_VIDEO
from lorafuse_common.naming import Family, Layout
from lorafuse_fuse import blocks
from lorafuse_fuse.choices import LoraRequest, ProblemKind
from lorafuse_fuse.fuse import FuseOptions, fuse, require_clean
from lorafuse_fuse.plan import plan_fuse

Tensors = dict[str, torch.Tensor]


class Filler(dict[str, torch.Tensor]):
    """Answers for the tensors that a strict converter asks for besides those that the model has here."""

    def pop(self, key: str, *default: object) -> torch.Tensor:
        return super().pop(key) if key in self else torch.full((64, 1), float("nan"))

    def __missing__(self, key: str) -> torch.Tensor:
        return torch.full((64, 1), float("nan"))


def convert(model: Model, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Original names to diffusers' names, by diffusers itself; what came from filler is dropped."""
    function = SINGLE_FILE_LOADABLE_CLASSES[model.class_name]["checkpoint_mapping_fn"]
    # Converters that look keys up before they pop them count blocks by the keys that are there.
    converted = function(checkpoint=Filler({name: value.clone() for name, value in tensors.items()}))
    return {name: value for name, value in converted.items() if value.is_meta or not value.isnan().any()}


def numbered(model: Model) -> tuple[Tensors, Tensors]:
    """Tensors in original names whose entries number their rows, and what the tables make of them for diffusers."""
    diffusers_layout, original_layout = model.layouts
    tensors: Tensors = {}
    rows: dict[tuple[str, str], torch.Tensor] = {}
    first = 0
    for entry in entries(model, original_layout):
        numbers = torch.arange(first, first + entry.shape[0], dtype=torch.float64)
        first += len(numbers)
        tensors[entry.name] = numbers.view(-1, *(1 for _ in entry.shape[1:]))
        for part, start, count in entry.parts.rows(len(numbers)) or ():
            rows[part, entry.parameter] = tensors[entry.name][start : start + count]
    expected = {
        entry.name: torch.cat([rows[part, entry.parameter] for part in entry.parts.names])
        for entry in entries(model, diffusers_layout)
    }
    return tensors, expected


def check_rows(converted: Tensors, expected: Tensors) -> None:
    assert set(converted) == set(expected)
    for name, value in converted.items():
        assert torch.equal(value, expected[name]), f"{name}: {row_ranges(value)} is not {row_ranges(expected[name])}"


def row_ranges(numbers: torch.Tensor) -> list[tuple[int, int]]:
    """Row numbers as runs: first, last."""
    flat = [int(number) for number in numbers.flatten()]
    starts = [n for n, number in enumerate(flat) if n == 0 or number != flat[n - 1] + 1]
    return [(flat[a], flat[b - 1]) for a, b in zip(starts, [*starts[1:], len(flat)], strict=True)]


@pytest.mark.parametrize("model", CONVERTED, ids=title)
def test_every_row_goes_where_diffusers_takes_it(model: Model) -> None:
    tensors, expected = numbered(model)
    check_rows(convert(model, tensors), expected)


@pytest.mark.parametrize("model", CONVERTED, ids=title)
def test_columns_stay_where_they_are(model: Model) -> None:
    """What the row numbers do not show: no converter transposes, so that only rows have to be mapped."""
    hollow = {entry.name: torch.empty(entry.shape, device="meta") for entry in entries(model, model.layouts[1])}
    converted = {name: value for name, value in convert(model, hollow).items() if value.is_meta}
    assert {name: tuple(value.shape) for name, value in converted.items()} == {
        entry.name: entry.shape for entry in entries(model, model.layouts[0])
    }
    assert all(value.is_contiguous() for value in converted.values())


LORA_CONVERTERS: Mapping[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "ltx2": (lora_converters._convert_non_diffusers_ltx2_lora_to_diffusers, ""),
    "ideogram4": (lora_converters._convert_non_diffusers_ideogram4_lora_to_diffusers, "layers."),
}
"""diffusers' LoRA converters where its checkpoint converters lack modules, and how the modules begin that they know."""


@pytest.mark.parametrize("model", [m for m in MODELS if m.family.name in LORA_CONVERTERS], ids=title)
def test_every_row_of_a_lora_goes_where_diffusers_takes_it(model: Model) -> None:
    function, known = LORA_CONVERTERS[model.family.name]
    tensors, expected = numbered(model)
    lora: Tensors = {}
    for entry in entries(model, model.layouts[1]):
        if entry.module.startswith(known) and entry.is_matrix:
            stem = f"diffusion_model.{entry.module}"
            lora |= {f"{stem}.lora_A.weight": torch.ones(1, 1), f"{stem}.lora_B.weight": tensors[entry.name]}
    converted = {name: value for name, value in function(lora).items() if "lora_B" in name}
    wanted = {
        f"transformer.{entry.module}.lora_B.weight": expected[entry.name]
        for entry in entries(model, model.layouts[0])
        if entry.module.startswith(known) and entry.is_matrix
    }
    check_rows(converted, wanted)


def column(name: str, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(rows, 1, generator=generator)


def random_tensors(model: Model, layout: Layout) -> Tensors:
    """A checkpoint with one column."""
    found = {entry: column(entry.name, entry.shape[0]) for entry in entries(model, layout)}
    return {entry.name: value if len(entry.shape) > 1 else value[:, 0] for entry, value in found.items()}


def random_lora(path: Path, model: Model, layout: Layout, dialect: Dialect) -> Path:
    """A LoRA of one column for every weight, and full differences for biases, norms and bare parameters."""
    tensors: Tensors = {}
    for entry in entries(model, layout):
        stem, rows = dialect.spell(entry.module), column(f"up {entry.name}", entry.shape[0])
        if entry.is_matrix:
            tensors |= {stem + dialect.roles["down"]: torch.full((1, 1), 2.0), stem + dialect.roles["up"]: rows}
        else:
            suffix = ".diff_b" if entry.parameter == "bias" else ".diff"
            tensors[stem + suffix] = rows if len(entry.shape) > 1 else rows[:, 0].contiguous()
    save_file(tensors, path)
    return path


def write_base(path: Path, weights: Mapping[str, torch.Tensor]) -> Checkpoint:
    save_file({name: value.clone() for name, value in weights.items()}, path)
    return open_checkpoint(path)


def fused(base: Checkpoint, lora: Path, out: Path) -> Tensors:
    plan = plan_fuse(base, [LoraRequest(lora, 0.5)])
    require_clean(plan, ())
    fuse(plan, FuseOptions(out))
    return load_file(out / base.root.name)


@pytest.mark.parametrize("model", CROSSED, ids=title)
def test_fusing_commutes_with_diffusers_conversion(tmp_path: Path, model: Model) -> None:
    diffusers_layout, original_layout = model.layouts
    original = write_base(tmp_path / "original.safetensors", random_tensors(model, original_layout))
    converted = write_base(tmp_path / "converted.safetensors", convert(model, load_file(original.root)))
    assert (original.layout, converted.layout) == (original_layout, diffusers_layout)
    before = load_file(converted.root)
    for layout in model.family.layouts:
        if layout.name == "xlabs":
            continue  # names of LoRAs only
        dialect = DIFFUSERS if layout is diffusers_layout else COMFY
        lora = random_lora(tmp_path / f"lora {layout.name}.safetensors", model, layout, dialect)
        onto_original = fused(original, lora, tmp_path / f"o {layout.name}")
        onto_converted = fused(converted, lora, tmp_path / f"c {layout.name}")
        reference = convert(model, onto_original)
        assert set(reference) == set(onto_converted)
        for name, value in onto_converted.items():
            torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-6, msg=name)
            assert len(layout.modules) < len(original_layout.modules) or not torch.equal(value, before[name]), name
        if layout is original_layout:
            lora = random_lora(tmp_path / "flat.safetensors", model, layout, KOHYA)
            torch.testing.assert_close(fused(original, lora, tmp_path / "flat"), onto_original)


def model_of(family: Family) -> Model:
    return next(model for model in MODELS if model.family is family)


def test_comfyui_names_of_hunyuan_video(tmp_path: Path) -> None:
    """As ComfyUI (commit a125cd84) renames the original's; a base that has them takes LoRAs in either's."""
    golden = json.loads((GOLDEN / "hunyuan_video_comfyui.json").read_text())
    _, original, comfyui = HUNYUAN_VIDEO.layouts
    ours, theirs = original.expand(2), comfyui.expand(2)
    assert {golden[module]: ours[module] for module in golden} == {name: theirs[name] for name in golden.values()}
    model = model_of(HUNYUAN_VIDEO)
    renamed = {e.name: c.name for e, c in zip(entries(model, original), entries(model, comfyui), strict=True)}
    tensors = random_tensors(model, original)
    base = write_base(tmp_path / "original.safetensors", tensors)
    same = write_base(tmp_path / "comfyui.safetensors", {renamed[name]: value for name, value in tensors.items()})
    assert same.layout is comfyui
    lora = random_lora(tmp_path / "lora.safetensors", model, original, COMFY)
    expected = {renamed[name]: value for name, value in fused(base, lora, tmp_path / "o").items()}
    torch.testing.assert_close(fused(same, lora, tmp_path / "c"), expected, rtol=0, atol=0)


def test_xlabs_names(tmp_path: Path) -> None:
    """XLabs' own vocabulary onto FLUX.1; its single-block LoRAs leave the MLP's rows of linear1 alone."""
    weights = random_tensors(model_of(FLUX), FLUX.layouts[1])
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
    monkeypatch.setattr(blocks, "EDIT_BLOCK_ELEMENTS", block)
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
    weights["layers.0.adaLN_modulation.0.weight"] = torch.randn(8, 4)
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
