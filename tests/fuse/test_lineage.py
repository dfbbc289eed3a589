"""Chains of fuses: which LoRA files are kept, what is said of LoRAs that are fused again, and the tree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import make_factors, save_model, write_lora

from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.dialects.peft import PEFT
from lorafuse_common.manifest import Manifest, find_lora, read_manifest, weights_sha256

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base")


def lora(path: Path, seed: int = 1) -> Path:
    return write_lora(path, make_factors(seed=seed), LIGHTNING, 2.0)


def fused(run: Run, base: Path, out: Path, *args: object) -> tuple[Manifest, str]:
    code, _, err = run("fuse", base, "--out", out, *args)
    assert code == 0, err
    manifest = read_manifest(out)
    assert manifest
    return manifest, err


def chain(run: Run, base: Path, folder: Path, *args: object) -> Manifest:
    """Three fuses; the folders before the last, and the LoRA files, are gone afterwards."""
    names = ["a", "b", "c"]
    paths = [lora(folder / f"{name}.safetensors", seed) for seed, name in enumerate(names)]
    found: Manifest | None = None
    for before, name, path in zip(["base", *names], names, paths, strict=False):
        found, _ = fused(run, folder / before, folder / name, "--lora", f"{path}:0.{5 + len(name)}", *args)
    assert found
    return found


def test_every_lora_of_a_chain_is_kept(run: Run, base: Path, tmp_path: Path) -> None:
    manifest = chain(run, base, tmp_path)
    wanted = {name: (tmp_path / f"{name}.safetensors").read_bytes() for name in "abc"}
    for path in (*tmp_path.glob("*.safetensors"), tmp_path / "a", tmp_path / "b"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "c").rename(tmp_path / "moved")
    names = []
    for _, loras in manifest.lineage:
        for its in loras:
            found = find_lora(its, tmp_path / "moved")
            assert found
            assert found.read_bytes() == wanted[its.name.removesuffix(".safetensors")]
            names.append(its.name)
    assert names == ["c.safetensors", "b.safetensors", "a.safetensors"]
    assert run("verify", tmp_path / "moved")[0] == 0


def test_kept_loras_are_no_part_of_the_model(run: Run, base: Path, tmp_path: Path) -> None:
    """Neither of what is recorded as base or output, nor of the weights' identity."""
    manifest = chain(run, base, tmp_path)
    records = [*manifest.base, *manifest.outputs]
    assert not [record.path for record in records if record.path.startswith("lorafuse")]
    without, _ = fused(
        run, tmp_path / "b", tmp_path / "d", "--lora", tmp_path / "c.safetensors:0.6", "--keep-loras", "none"
    )
    assert without.fused_sha256 == manifest.fused_sha256
    assert not (tmp_path / "d" / "lorafuse").exists()


def test_hints_where_nothing_is_kept(run: Run, base: Path, tmp_path: Path) -> None:
    manifest = chain(run, base, tmp_path, "--keep-loras", "none")
    files = [[its.file for its in loras] for _, loras in manifest.lineage]
    assert files == [["../c.safetensors"], ["../b.safetensors"], ["../a.safetensors"]]
    assert all(find_lora(its, tmp_path / "c") for _, loras in manifest.lineage for its in loras)
    lora(tmp_path / "c.safetensors", 9)
    assert find_lora(manifest.loras[0], tmp_path / "c") is None
    far = tmp_path / "x" / "y" / "z" / "w"
    assert fused(run, base, far, "--lora", tmp_path / "a.safetensors", "--keep-loras", "none")[0].loras[0].file is None


def test_a_configuration_that_holds_the_scale_is_kept_too(run: Run, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    path = write_lora(folder / "adapter_model.safetensors", make_factors(), PEFT)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["x"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    first, _ = fused(run, base, tmp_path / "one", "--lora", path)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2}))
    second, _ = fused(run, tmp_path / "one", tmp_path / "two", "--lora", f"{path}:0.5")
    assert "= 2" in first.loras[0].scale
    kept = [tmp_path / "two" / str(its.file) for _, loras in second.lineage for its in loras]
    alphas = [json.loads((path.parent / "adapter_config.json").read_text())["lora_alpha"] for path in kept]
    assert alphas == [2, 8]


@pytest.mark.parametrize("file", ["/etc/passwd", "", 3])
def test_files_of_loras_are_relative(run: Run, base: Path, tmp_path: Path, file: object) -> None:
    fused(run, base, tmp_path / "out", "--lora", lora(tmp_path / "x.safetensors"))
    raw = json.loads((tmp_path / "out" / "lorafuse.json").read_text())
    raw["loras"][0]["file"] = file
    (tmp_path / "out" / "lorafuse.json").write_text(json.dumps(raw))
    code, _, err = run("verify", tmp_path / "out")
    assert (code, "broken" in err) == (1, True)


def test_the_original_is_known_by_its_hash(run: Run, base: Path, tmp_path: Path) -> None:
    first, _ = fused(run, base, tmp_path / "one", "--lora", lora(tmp_path / "x.safetensors", 5))
    assert first.original_sha256 == weights_sha256(first.base, None)
    assert chain(run, base, tmp_path).original_sha256 == first.original_sha256


def test_a_missing_or_changed_copy_is_a_fault(run: Run, base: Path, tmp_path: Path) -> None:
    manifest, _ = fused(run, base, tmp_path / "out", "--lora", lora(tmp_path / "x.safetensors"))
    kept = tmp_path / "out" / str(manifest.loras[0].file)
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    code, _, err = run("verify", tmp_path / "out")
    assert (code, "SHA256" in err, "x.safetensors" in err) == (1, True, True)
    kept.unlink()
    code, _, err = run("verify", tmp_path / "out")
    assert (code, "MISSING" in err) == (1, True)


def test_the_same_again_is_refused_unless_allowed(run: Run, base: Path, tmp_path: Path) -> None:
    path = lora(tmp_path / "style.safetensors")
    fused(run, base, tmp_path / "one", "--lora", path)
    twin = tmp_path / "twin.safetensors"
    shutil.copy(path, twin)
    code, _, err = run("fuse", tmp_path / "one", "--lora", twin, "--out", tmp_path / "two")
    assert code == 1
    assert "ALREADY_FUSED: is fused already: at 1 by the fuse that made the base. With 1 more it is 2 in all" in err
    assert not (tmp_path / "two").exists()
    manifest, err = fused(run, tmp_path / "one", tmp_path / "two", "--lora", twin, "--allow", "ALREADY_FUSED")
    assert "allowed: " in err
    assert "With 1 more it is 2 in all" in err
    assert manifest.allowed == ("ALREADY_FUSED",)
    assert manifest.loras[0].applied == manifest.loras[0].modules


def test_another_strength_is_pointed_out_and_recorded(run: Run, base: Path, tmp_path: Path) -> None:
    path = lora(tmp_path / "style.safetensors")
    fused(run, base, tmp_path / "one", "--lora", path)
    fused(run, tmp_path / "one", tmp_path / "two", "--lora", lora(tmp_path / "other.safetensors", 2))
    manifest, err = fused(run, tmp_path / "two", tmp_path / "three", "--lora", f"{path}:-0.4")
    text = "is fused already: at 1 by a fuse 1 before the one that made the base. With -0.4 more it is 0.6 in all"
    assert f"note: {text}" in err
    assert manifest.loras[0].notes == (text,)


def test_twice_in_one_command(run: Run, base: Path, tmp_path: Path) -> None:
    path = lora(tmp_path / "style.safetensors")
    code, _, err = run("fuse", base, "--lora", path, "--lora", path, "--out", tmp_path / "out")
    assert (code, err.count("at 1 by this command")) == (1, 1)
    manifest, _ = fused(run, base, tmp_path / "out", "--lora", path, "--lora", f"{path}:0.5")
    assert "it is 1.5 in all" in manifest.loras[1].notes[0]
    for change in manifest.changes:
        assert change.lora_rms == pytest.approx((change.delta_rms / 1.5, change.delta_rms / 3), rel=6e-4)


def test_the_tree(run: Run, base: Path, tmp_path: Path) -> None:
    manifest = chain(run, base, tmp_path)
    fused(run, tmp_path / "c", tmp_path / "d", "--lora", lora(tmp_path / "d.safetensors", 7), "--role", "scaffold")
    code, out, _ = run("inspect", tmp_path / "d")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    at = lines.index("lineage")
    tree = lines[at + 1 : at + 10]
    assert [line.split(":")[0] for line in tree[1::2]] == [
        "+- d.safetensors x 1", "+- c.safetensors x 0.6", "+- b.safetensors x 0.6", "+- a.safetensors x 0.6",
    ]  # fmt: skip
    assert tree[2] == f"`- fused into {manifest.fused_sha256[:12]}  (role scaffold: dropped at inference)"
    assert tree[8] == f"`- fused into the original base {str(manifest.original_sha256)[:12]}"
    facts = json.loads(run("inspect", tmp_path / "d", "--json")[1])
    assert (facts["role"], facts["parent"]["role"]) == ("scaffold", "deploy")
