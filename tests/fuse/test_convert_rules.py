"""Every update rule in other dialects and layouts: under another name, cut into rows, joined, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from table_models import (
    ROWS,
    assert_close,
    assert_same,
    base_file,
    converted,
    fused,
    module_factors,
    spelled,
)

from lorafuse_common.errors import ConvertError
from lorafuse_common.families.flux import FLUX

RULES = [
    "lora", "lora and bias", "lora and difference of the bias", "core", "dora", "dora by columns", "loha",
    "loha with dora", "loha with cores", "lokr", "glora", "oft", "boft", "diff", "replace",
]  # fmt: skip
WHOLE = ("dora by columns", "lokr", "glora", "oft", "boft")
"""Rules whose rows cannot be told apart."""
COMPLETE = ("dora", "loha with dora", "replace", "core", "loha with cores")
"""Rules of modules that can be cut, but not joined to others that are not in the file (or not at all)."""
ATTENTION = "transformer_blocks.0.attn"


@pytest.mark.parametrize("to", ["comfyui", "lycoris"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_under_other_names(tmp_path: Path, rule: str, to: str) -> None:
    """A module that keeps its rows is passed on whatever its rule."""
    lora = spelled(tmp_path / "lora.safetensors", "kohya", {"single_blocks.1.linear2": module_factors(rule, ROWS, "x")})
    base = base_file(tmp_path, FLUX, "diffusers")
    out, back = tmp_path / "out" / "x.safetensors", tmp_path / "back" / "x.safetensors"
    converted(lora, to, out, family=FLUX)
    assert_close(fused(base, out, tmp_path / "found"), fused(base, lora, tmp_path / "wanted"))
    if rule == "core" and to == "comfyui":  # which looks for a core only beside these
        assert all(key.endswith((".alpha", "_down.weight", "_mid.weight", "_up.weight")) for key in load_file(out))
    converted(out, "kohya", back, family=FLUX)
    if rule == "lora and bias":  # a bias of B becomes a difference, which is what their readers take
        assert_close(fused(base, back, tmp_path / "again"), fused(base, out, tmp_path / "found"))
    else:
        assert_same(load_file(back), load_file(lora))


@pytest.mark.parametrize("rule", RULES)
def test_rules_cut_into_rows(tmp_path: Path, rule: str) -> None:
    factors = module_factors(rule, 3 * ROWS, "qkv")
    lora = spelled(tmp_path / "lora.safetensors", "kohya", {"double_blocks.0.img_attn.qkv": factors})
    out = tmp_path / "out" / "x.safetensors"
    if rule in WHOLE:
        with pytest.raises(ConvertError, match=r"double_blocks_0_img_attn_qkv.* cannot be cut or joined, and the diff"):
            converted(lora, "lycoris", out, family=FLUX)
        assert not out.exists()
        return
    assert converted(lora, "lycoris", out, family=FLUX).modules == 3
    base = base_file(tmp_path, FLUX, "diffusers")
    assert_close(fused(base, out, tmp_path / "found"), fused(base, lora, tmp_path / "wanted"), 1e-6)


@pytest.mark.parametrize("parts", [("to_q", "to_k", "to_v"), ("to_q", "to_v")], ids=len)
@pytest.mark.parametrize("rule", RULES)
def test_rules_joined(tmp_path: Path, rule: str, parts: tuple[str, ...]) -> None:
    """Ranks add up; of parts that are not there the rows are zero, where the rule has such rows."""
    factors = {f"{ATTENTION}.{part}": module_factors(rule, ROWS, part) for part in parts}
    lora = spelled(tmp_path / "lora.safetensors", "lycoris", factors)
    out, back = tmp_path / "out" / "x.safetensors", tmp_path / "back" / "x.safetensors"
    if rule in WHOLE or "core" in rule or (rule in COMPLETE and len(parts) < 3):
        with pytest.raises(ConvertError, match=r"cannot be cut or joined|would be joined to .*to_k, which is not in"):
            converted(lora, "kohya", out, family=FLUX)
        return
    assert converted(lora, "kohya", out, family=FLUX).modules == 1
    base = base_file(tmp_path, FLUX, "original")
    assert_close(fused(base, out, tmp_path / "found"), fused(base, lora, tmp_path / "wanted"), 1e-6)
    converted(out, "lycoris", back, family=FLUX)
    if rule != "lora and bias":
        assert_same(load_file(back), load_file(lora))


def test_modules_of_different_rules_are_not_joined(tmp_path: Path) -> None:
    factors = {f"{ATTENTION}.to_{x}": module_factors(rule, ROWS, x) for x, rule in (("q", "lora"), ("k", "diff"))}
    lora = spelled(tmp_path / "lora.safetensors", "lycoris", factors)
    with pytest.raises(ConvertError, match=r"2 x .*has another rule than others that double_blocks.0.img_attn.qkv"):
        converted(lora, "kohya", tmp_path / "out.safetensors", family=FLUX)


def test_a_part_with_nothing_but_a_bias(tmp_path: Path) -> None:
    """In PEFT's files a bias is B's, which is kept for it."""
    factors = module_factors("lora and bias", 3 * ROWS, "a")
    factors[".lora_up.weight"][ROWS:] = 0
    factors[".lora_B.bias"][2 * ROWS :] = 0
    lora = spelled(tmp_path / "lora.safetensors", "kohya", {"double_blocks.0.img_attn.qkv": factors})
    assert converted(lora, "diffusers", tmp_path / "x" / "x.safetensors", family=FLUX).modules == 2
    suffixes = ("lora_A.weight", "lora_B.bias", "lora_B.weight")
    assert sorted(load_file(tmp_path / "x" / "x.safetensors")) == [
        f"transformer.{ATTENTION}.to_{part}.{suffix}" for part in "kq" for suffix in suffixes
    ]
