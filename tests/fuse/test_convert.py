"""A converted LoRA is the same LoRA: fused onto the same base it gives the same weights, and it comes back as is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from table_models import (
    COLUMNS,
    DIALECT,
    RANK,
    ROWS,
    assert_close,
    assert_same,
    base_file,
    converted,
    draw,
    fused,
    lora_file,
    model,
    module_factors,
    spelled,
)

from lorafuse_common.conversion import plan_conversion, writable
from lorafuse_common.conversion.factors import merge_ranks
from lorafuse_common.conversion.spelling import NO_DELTA
from lorafuse_common.errors import ConvertError
from lorafuse_common.families import FAMILIES
from lorafuse_common.families.flux import FLUX
from lorafuse_common.families.lumina2 import LUMINA2
from lorafuse_common.families.sana import SANA
from lorafuse_common.lora import read_lora
from lorafuse_common.naming import Family

ATTENTION = "transformer_blocks.0.attn"
QKV = "layers.1.attention.qkv"
WITH_ALPHA = ("kohya", "comfyui", "onetrainer")
CROSSING = [
    f for f in FAMILIES if f.name in ("flux", "wan", "qwen_image", "z_image", "sd3", "lumina2", "hunyuan_video")
]


def by_name(item: Any) -> str:
    return str(getattr(item, "name", item))


SOURCES = [(family, dialect) for family in CROSSING for dialect in ("diffusers", "kohya")]
SOURCES += [(FLUX, "peft"), (FLUX, "comfyui"), (FLUX, "onetrainer")]


@pytest.mark.parametrize(("family", "source"), SOURCES[:-3], ids=by_name)
def test_every_conversion_fuses_to_the_same_weights(tmp_path: Path, family: Family, source: str) -> None:
    lora = lora_file(tmp_path, family, source, (0.625, 0.5, 1 / 3) if source == "kohya" else ())
    bases = list(dict.fromkeys(base_file(tmp_path, family, dialect) for dialect in ("diffusers", "original")))
    wanted = [fused(base, lora, tmp_path / f"wanted-{base.stem}") for base in bases]
    documented = ("diffusers", "comfyui", "kohya", "peft")
    for to in documented if family is not FLUX else [dialect.name for dialect in writable()]:
        if to == source:
            continue
        out = tmp_path / to / "adapter_model.safetensors"
        converted(lora, to, out, base=bases[0])
        for base, weights in zip(bases, wanted, strict=True):
            assert_close(fused(base, out, tmp_path / f"{to}-{base.stem}"), weights)


@pytest.mark.parametrize(("family", "source"), SOURCES, ids=by_name)
def test_round_trips_give_the_same_factors(tmp_path: Path, family: Family, source: str) -> None:
    """Through every dialect that states scales, and through every other where there are none."""
    lora = lora_file(tmp_path, family, source, (0.625,) if source in WITH_ALPHA else ())
    base = base_file(tmp_path, family, "diffusers")
    for to in (dialect.name for dialect in writable()):
        if source in WITH_ALPHA and to in ("diffusers", "original", "genmo"):
            continue
        there, back = (tmp_path / f"{to}-{way}" / "adapter_model.safetensors" for way in ("there", "back"))
        converted(lora, to, there, base=base)
        converted(there, source, back, base=base)
        assert_same(load_file(back), load_file(lora))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in ("mochi", "sd3")], ids=by_name)
def test_every_family_there_and_back_by_names_alone(tmp_path: Path, family: Family) -> None:
    lora = lora_file(tmp_path, family, "comfyui", (0.625, 0.75))
    there, back = tmp_path / "there" / "a.safetensors", tmp_path / "back" / "b.safetensors"
    converted(lora, "onetrainer", there, family=family)
    converted(there, "comfyui", back, family=family)
    assert_same(load_file(back), load_file(lora))


@pytest.mark.parametrize(
    ("dialect", "modules"),
    [
        (
            "xlabs",
            ["double_blocks.0.processor.qkv_lora1", "single_blocks.1.processor.qkv", "single_blocks.0.processor.proj"],
        ),
        ("diffsynth", ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp"]),
    ],
)
@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_dialects_that_are_only_read(tmp_path: Path, dialect: str, modules: list[str], to: str) -> None:
    rows = {"qkv_lora1": 3 * ROWS, "qkv": 3 * ROWS, "proj_mlp": 4 * ROWS}
    spelling = DIALECT[dialect]
    factors = {
        m: {
            spelling.suffix("down"): draw(f"{m} A", RANK, COLUMNS),
            spelling.suffix("up"): draw(f"{m} B", rows.get(m.rpartition(".")[2], ROWS), RANK),
        }
        for m in modules
    }
    lora, base = spelled(tmp_path / "lora.safetensors", dialect, factors), base_file(tmp_path, FLUX, "diffusers")
    plan = plan_conversion(read_lora(lora), DIALECT[to], family=FLUX)
    assert (plan.read_as, plan.read_layout) == (spelling, spelling.layout)
    done = converted(lora, to, tmp_path / "out" / "x.safetensors", family=FLUX)
    wanted = fused(base, lora, tmp_path / "wanted")
    assert_close(fused(base, tmp_path / "out" / "x.safetensors", tmp_path / "found"), wanted)
    assert wanted.keys() == load_file(base).keys()
    assert done.modules == {("xlabs", "diffusers"): 7}.get((dialect, to), len(modules))


def test_joined_scales(tmp_path: Path) -> None:
    """One scale stays a scale; of several, each is multiplied in."""
    factors = {f"{ATTENTION}.to_{x}": module_factors("lora", ROWS, x) for x in "qkv"}
    lora = spelled(tmp_path / "lora.safetensors", "lycoris", factors)
    converted(lora, "kohya", tmp_path / "one" / "x.safetensors", family=FLUX)
    one = load_file(tmp_path / "one" / "x.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert one[f"{stem}.alpha"] == 0.75 * 3 * RANK
    assert one[f"{stem}.lora_up.weight"][:ROWS, :RANK].equal(factors[f"{ATTENTION}.to_q"][".lora_up.weight"])
    factors[f"{ATTENTION}.to_k"][".alpha"] = torch.tensor(2.0 * RANK)
    lora = spelled(tmp_path / "lora.safetensors", "lycoris", factors)
    converted(lora, "kohya", tmp_path / "several" / "x.safetensors", family=FLUX)
    several = load_file(tmp_path / "several" / "x.safetensors")
    assert several[f"{stem}.alpha"] == 3 * RANK
    up = several[f"{stem}.lora_up.weight"]
    assert up[ROWS : 2 * ROWS, RANK : 2 * RANK].equal(2 * factors[f"{ATTENTION}.to_k"][".lora_up.weight"])
    assert up.count_nonzero() == 3 * ROWS * RANK


def test_uneven_shares(tmp_path: Path) -> None:
    """Lumina 2 has three rows of queries for one of keys; the rows of parts that are not there follow from others."""
    factors = {"layers.1.attn.to_k": module_factors("lora", 7, "k")}
    lora = spelled(tmp_path / "lora.safetensors", "diffusers", factors)
    converted(lora, "comfyui", tmp_path / "out" / "x.safetensors", family=LUMINA2)
    up = load_file(tmp_path / "out" / "x.safetensors")["diffusion_model.layers.1.attention.qkv.lora_B.weight"]
    assert up.shape == (35, RANK)
    assert up[21:28].equal(factors["layers.1.attn.to_k"][".lora_up.weight"])
    assert up.count_nonzero() == 7 * RANK
    lora = spelled(
        tmp_path / "lora.safetensors", "comfyui", {"layers.1.attention.qkv": module_factors("lora", 36, "k")}
    )
    with pytest.raises(ConvertError, match="its rows do not divide into those of layers"):
        converted(lora, "diffusers", tmp_path / "x.safetensors", family=LUMINA2)


def test_the_base_knows_the_sizes(tmp_path: Path) -> None:
    base = base_file(tmp_path, LUMINA2, "diffusers")
    lora = spelled(
        tmp_path / "lora.safetensors", "comfyui", {"layers.1.attention.qkv": module_factors("lora", 35, "k")}
    )
    with pytest.raises(ConvertError, match="B @ A is 35 x 10, the base's weight 30x10"):
        converted(lora, "diffusers", tmp_path / "x.safetensors", base=base)
    factors = {"layers.1.attn.to_qkv": module_factors("lora", 5 * ROWS, "joined as diffusers' fuse_projections does")}
    lora = spelled(tmp_path / "lora.safetensors", "diffusers", factors)
    converted(lora, "diffusers", tmp_path / "out" / "x.safetensors", base=base)
    assert_close(
        fused(base, tmp_path / "out" / "x.safetensors", tmp_path / "found"), fused(base, lora, tmp_path / "wanted")
    )


def test_a_base_with_other_shares(tmp_path: Path) -> None:
    """Two rows of queries for one of keys, where the tables say three: 40 rows are not cut as 24, 8 and 8."""
    rows = {"to_q": 20, "to_k": 10, "to_v": 10, "to_out.0": 10}
    tensors = {f"layers.{n}.attn.{x}.weight": draw(x, rows[x], COLUMNS) for n in range(2) for x in rows}
    tensors |= {f"layers.{n}.feed_forward.linear_{x}.weight": draw("w", 10, COLUMNS) for n in range(2) for x in "123"}
    save_file(tensors, tmp_path / "base.safetensors")
    lora = spelled(tmp_path / "lora.safetensors", "comfyui", {QKV: module_factors("lora", 40, "qkv")})
    with pytest.raises(ConvertError, match="its rows do not divide into those of layers"):
        converted(lora, "diffusers", tmp_path / "x" / "x.safetensors", base=tmp_path / "base.safetensors")


def test_a_base_with_other_names(tmp_path: Path) -> None:
    """Sana Sprint calls its time embedder otherwise than Sana."""
    lora = spelled(tmp_path / "lora.safetensors", "comfyui", {"t_embedder.mlp.0": module_factors("lora", ROWS, "t")})
    out = tmp_path / "out" / "x.safetensors"
    tensors = model(SANA, SANA.layouts[0])
    save_file({k: v for k, v in tensors.items() if not k.startswith("time_embed.emb")}, tmp_path / "base.safetensors")
    for base, name in ((None, "emb.timestep_embedder"), (tmp_path / "base.safetensors", "timestep_embedder")):
        converted(lora, "lightning", out, base=base, family=None if base else SANA)
        assert set(load_file(out)) == {
            f"time_embed.{name}.linear_1{suffix}" for suffix in (".alpha", ".lora_down.weight", ".lora_up.weight")
        }
        out.unlink()


@pytest.mark.parametrize(
    ("keys", "columns", "order"),
    [
        (["ab", "cd"], [[0, 1], [2, 3]], [(0, 0), (0, 1), (1, 0), (1, 1)]),
        (["ab", "ab"], [[0, 1], [0, 1]], [(0, 0), (0, 1)]),  # of one module
        (["ab", "bc"], [[0, 1], [1, 2]], [(0, 0), (0, 1), (1, 1)]),
        (["ab", "ba"], [[0, 1], [1, 2]], [(0, 0), (0, 1), (1, 1)]),  # in another order: not shared
        (["aa", "aaa"], [[0, 1], [0, 1, 2]], [(0, 0), (0, 1), (1, 2)]),  # one rank is never two of a slice
        (["", "a"], [[], [0]], [(1, 0)]),
    ],
)
def test_shared_ranks(keys: list[str], columns: list[list[int]], order: list[tuple[int, int]]) -> None:
    assert merge_ranks(keys) == (columns, order)


def test_untrained_parts(tmp_path: Path) -> None:
    """A part is left out where others of its module have a delta; a module without any stays whole."""
    some, none = module_factors("lora", 3 * ROWS, "a"), module_factors("lora", 3 * ROWS, "b")
    some[".lora_up.weight"][ROWS : 2 * ROWS] = 0
    some[".lora_up.weight"][:ROWS, 1] = 0
    none[".lora_up.weight"][:] = 0
    factors = {"double_blocks.0.img_attn.qkv": some, "double_blocks.1.img_attn.qkv": none}
    lora = spelled(tmp_path / "lora.safetensors", "kohya", factors)
    out, back = tmp_path / "out" / "x.safetensors", tmp_path / "back" / "x.safetensors"
    done = converted(lora, "onetrainer", out, family=FLUX)
    assert (done.modules, done.left_out) == (5, {NO_DELTA: 1})
    tensors = load_file(out)
    stem = "lora_transformer_transformer_blocks_0_attn"
    assert not any(key.startswith(f"{stem}_to_k") for key in tensors)
    assert tensors[f"{stem}_to_q.lora_up.weight"].shape == (ROWS, RANK - 1)
    assert tensors[f"{stem}_to_q.alpha"] == 0.75 * (RANK - 1)
    base = base_file(tmp_path, FLUX, "original")
    assert_close(fused(base, out, tmp_path / "found"), fused(base, lora, tmp_path / "wanted"))
    converted(out, "kohya", back, family=FLUX)
    assert_close(fused(base, back, tmp_path / "again"), fused(base, lora, tmp_path / "wanted"))
