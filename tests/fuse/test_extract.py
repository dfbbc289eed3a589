"""`lorafuse extract`: the difference of two checkpoints as a LoRA, and what fusing it again gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import MODULES, make_factors, save_model, tiny_transformer, write_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from table_models import base_file, lora_file

from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.families.flux import FLUX
from lorafuse_common.manifest import read_manifest
from lorafuse_fuse import extract

Run = Callable[..., tuple[int, str, str]]


def succeed(run: Run, *args: object) -> str:
    code, _, err = run(*args)
    assert code == 0, err
    return err


def refused(run: Run, *args: object) -> str:
    code, _, err = run(*args)
    assert code == 1, err
    return err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.fixture
def pair(run: Run, tmp_path: Path) -> tuple[Path, Path]:
    """A bf16 base and the same with a LoRA of rank 4 and scale 0.5 fused at 0.8."""
    base = save_model(tmp_path / "base")
    lora = write_lora(tmp_path / "style.safetensors", make_factors(size=0.3), LIGHTNING, 2.0)
    succeed(run, "fuse", base, "--lora", f"{lora}:0.8", "--out", tmp_path / "fused")
    return tmp_path / "fused", base


def test_what_was_fused_comes_back(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    fused, base = pair
    out = tmp_path / "out.safetensors"
    err = succeed(run, "extract", fused, "--base", base, "--rank", "4", "--out", out)
    before, after, found = weights(base), weights(fused), load_file(out)
    assert {name.partition(".lora_")[0] for name in found} == {f"transformer.{module}" for module in MODULES}
    for module in MODULES:
        down, up = make_factors(size=0.3)[module]
        delta = 0.8 * 0.5 * (up.double() @ down.double())
        near = (
            found[f"transformer.{module}.lora_B.weight"].double()
            @ found[f"transformer.{module}.lora_A.weight"].double()
        )
        difference = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        s = torch.linalg.svdvals(difference)
        error = float((difference - near).norm() / difference.norm())
        assert error == pytest.approx(float(s[4:].norm() / s.norm()), abs=1e-5)
        assert f"{error:9.2%}  {module}" in err
        assert float((delta - near).norm() / delta.norm()) < 0.05  # bf16's rounding, most of which has other directions
    assert f"{len(MODULES)} matrices differ" in err
    succeed(run, "fuse", base, "--lora", out, "--out", tmp_path / "again")
    again = weights(tmp_path / "again")
    for name, value in after.items():
        assert torch.allclose(again[name].float(), value.float(), atol=0.02 * float(value.float().abs().max()))
        assert name.removesuffix(".weight") in MODULES or torch.equal(again[name], value)
    manifest = read_manifest(fused)
    assert manifest
    with safe_open(out, "pt") as file:
        record = json.loads(file.metadata()["lorafuse"])
    assert record["extracted_from"] == manifest.fused_sha256
    assert record["fused_sha256"] == manifest.original_sha256
    assert json.loads(run("inspect", out, "--json")[1])["made_by"].startswith("lorafuse extract")


def test_energy(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    fused, base = pair
    out = tmp_path / "out.safetensors"
    succeed(run, "extract", fused, "--base", base, "--rank", "16", "--energy", "0.9", "--out", out)
    before, after, found = weights(base), weights(fused), load_file(out)
    for module in MODULES:
        s = torch.linalg.svdvals(after[f"{module}.weight"].double() - before[f"{module}.weight"].double()).square()
        wanted = int((s.cumsum(0) < 0.9 * s.sum()).sum()) + 1
        assert len(found[f"transformer.{module}.lora_A.weight"]) == wanted < 16


def test_the_same_bytes_again(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    fused, base = pair
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for out in (one, two):
        succeed(run, "extract", fused, "--base", base, "--rank", "3", "--out", out)
    assert one.read_bytes() == two.read_bytes()


def test_two_checkpoints_that_no_fuse_made(run: Run, tmp_path: Path) -> None:
    """Also across forms, dtypes and prefixes: a folder, and a file with ComfyUI's prefix."""
    base = save_model(tmp_path / "base", torch.float32, sharded=True)
    tuned = {k: v.detach().clone() for k, v in tiny_transformer().state_dict().items()}
    generator = torch.Generator().manual_seed(4)
    name = "transformer_blocks.1.img_mlp.net.2.weight"
    tuned[name] += torch.randn(tuned[name].shape, generator=generator)
    save_file({f"model.diffusion_model.{k}": v for k, v in tuned.items()}, tmp_path / "tuned.safetensors")
    out = tmp_path / "out.safetensors"
    code, text, err = run(
        "extract", tmp_path / "tuned.safetensors", "--base", base, "--rank", "8", "--out", out, "--json"
    )
    assert code == 0, err
    facts = json.loads(text)
    assert [its["name"] for its in facts["found"]] == [name.removesuffix(".weight")]
    s = torch.linalg.svdvals((tuned[name] - tiny_transformer().state_dict()[name]).double())
    assert facts["error"] == pytest.approx(float(s[8:].norm() / s.norm()), rel=1e-4)
    assert facts["found"][0]["norm"] == pytest.approx(float(s.norm()), rel=1e-5)


def test_norms_and_biases(run: Run, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", torch.float32)
    tuned = weights(base)
    for name in ("transformer_blocks.0.attn.to_q.bias", "transformer_blocks.0.attn.norm_q.weight", "proj_out.weight"):
        tuned[name] = tuned[name] + 0.5
    (tmp_path / "tuned").mkdir()
    save_file(tuned, tmp_path / "tuned" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "tuned" / "config.json").write_text((base / "config.json").read_text())
    args = ("extract", tmp_path / "tuned", "--base", base, "--rank", "2", "--out")
    err = refused(run, *args, tmp_path / "o.safetensors")
    assert "2 tensors differ that are no matrices (transformer_blocks.0.attn" in err
    assert not (tmp_path / "o.safetensors").exists()
    err = succeed(run, *args, tmp_path / "skipped.safetensors", "--vectors", "skip")
    assert "left out: 2 tensors that differ and are no matrices" in err
    assert {name.rpartition(".")[2] for name in load_file(tmp_path / "skipped.safetensors")} == {"weight"}
    succeed(run, *args, tmp_path / "comfy.safetensors", "--to", "comfyui")
    found = load_file(tmp_path / "comfy.safetensors")
    assert torch.allclose(found["diffusion_model.transformer_blocks.0.attn.to_q.diff_b"], torch.tensor(0.5))
    succeed(run, "fuse", base, "--lora", tmp_path / "comfy.safetensors", "--out", tmp_path / "again")
    for name, value in weights(tmp_path / "again").items():
        assert torch.allclose(value, tuned[name], atol=1e-5), name


def test_numbers_that_are_only_stored_otherwise_do_not_differ(
    run: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """As of a checkpoint that was loaded in fp32, changed and saved."""
    fused, base = pair
    wide, copy = tmp_path / "wide.safetensors", tmp_path / "copy.safetensors"
    save_file({name: value.float() for name, value in weights(fused).items()}, wide)
    save_file({name: value.float() for name, value in weights(base).items()}, copy)
    succeed(run, "extract", wide, "--base", base, "--rank", "4", "--out", tmp_path / "wide" / "o.safetensors")
    succeed(run, "extract", fused, "--base", base, "--rank", "4", "--out", tmp_path / "o.safetensors")
    one, other = (load_file(folder / "o.safetensors") for folder in (tmp_path / "wide", tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    args = ("--rank", "2", "--out", tmp_path / "x.safetensors")
    assert "do not differ" in refused(run, "extract", copy, "--base", base, *args)


def test_packed_weights_are_no_numbers(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name, value in (("one", 1), ("two", 2)):
        packed = {**weights(pair[1]), "proj_out.weight": torch.full((16, 48), value, dtype=torch.uint8)}
        save_file(packed, tmp_path / f"{name}.safetensors")
    err = refused(
        run, "extract", tmp_path / "one.safetensors", "--base", tmp_path / "two.safetensors", "--rank", "2",
        "--out", tmp_path / "o.safetensors",
    )  # fmt: skip
    assert "1 tensors are of types that cannot be compared (first: proj_out.weight, U8)" in err


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_layouts(run: Run, tmp_path: Path, layout: str, to: str) -> None:
    base = base_file(tmp_path, FLUX, layout)
    lora = lora_file(tmp_path, FLUX, "comfyui", [0.5])
    succeed(run, "fuse", base, "--lora", lora, "--out", tmp_path / "fused")
    out = tmp_path / "out" / "x.safetensors"
    succeed(run, "extract", tmp_path / "fused" / base.name, "--base", base, "--rank", "10", "--out", out, "--to", to)
    succeed(run, "fuse", base, "--lora", out, "--out", tmp_path / "again")
    found = load_file(tmp_path / "again" / base.name)
    for name, value in load_file(tmp_path / "fused" / base.name).items():
        assert torch.allclose(found[name], value, atol=1e-4), name


def test_what_cannot_be_compared(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    fused, base = pair
    args = ("--rank", "2", "--out", tmp_path / "o.safetensors")
    assert "do not differ" in refused(run, "extract", base, "--base", base, *args)
    lacking = weights(base)
    lacking["extra.weight"] = lacking.pop("proj_out.weight")
    lacking["img_in.weight"] = lacking["img_in.weight"][:4].clone()
    save_file(lacking, tmp_path / "other.safetensors")
    err = refused(run, "extract", tmp_path / "other.safetensors", "--base", base, *args)
    assert "1 tensors are only in" in err
    assert "1 tensors have other shapes (first: img_in.weight, [4, 16] and [48, 16])" in err
    broken = weights(fused)
    broken[f"{MODULES[0]}.weight"][0, 0] = float("nan")
    save_file(broken, tmp_path / "nan.safetensors")
    assert "holds NaN or Inf" in refused(run, "extract", tmp_path / "nan.safetensors", "--base", base, *args)
    assert not (tmp_path / "o.safetensors").exists()
    inside = next(base.glob("*.safetensors"))
    assert "is the input" in refused(run, "extract", fused, "--base", base, "--rank", "2", "--out", inside, "--force")


def test_another_lora_is_not_replaced(
    run: Run, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before anything is computed; the same command again finds its own result."""
    fused, base = pair
    out = tmp_path / "o.safetensors"
    args = ("extract", fused, "--base", base, "--out", out, "--to", "comfyui")
    succeed(run, *args, "--rank", "2")
    made = out.read_bytes()
    succeed(run, *args, "--rank", "2")
    monkeypatch.setattr(extract, "_extracted", None)  # a call would fail
    assert "exists with other content" in refused(run, *args, "--rank", "1")
    assert out.read_bytes() == made
    out.write_bytes(b"no LoRA")
    assert "exists with other content" in refused(run, *args, "--rank", "2")
    assert out.read_bytes() == b"no LoRA"
