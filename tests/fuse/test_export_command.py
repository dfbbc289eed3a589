"""`lorafuse export`: one LoRA for the original base, loaded by diffusers and compared with fused + new LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MODULES, make_factors, save_model, write_lora
from diffusers import FluxPipeline, FluxTransformer2DModel, QwenImagePipeline, QwenImageTransformer2DModel
from fuse.test_convert_readers import kohya_lora, tiny_flux
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from table_models import base_file, lora_file

from lorafuse_common.dialects.diffusers import DIFFUSERS
from lorafuse_common.dialects.kohya import KOHYA
from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.families.flux import FLUX
from lorafuse_common.manifest import read_manifest

Run = Callable[..., tuple[int, str, str]]
Tensors = dict[str, torch.Tensor]
OTHERS = ("transformer_blocks.1.attn.to_k", "transformer_blocks.0.txt_mlp.net.2", MODULES[0])
"""Modules of a second LoRA, of which the first has one."""


def succeed(run: Run, *args: object) -> str:
    code, _, err = run(*args)
    assert code == 0, err
    return err


def refused(run: Run, *args: object) -> str:
    code, _, err = run(*args)
    assert code == 1, err
    return err


def qwen_velocity(folder: Path, lora: Path | None) -> torch.Tensor:
    """What a Qwen-Image transformer predicts, with a LoRA that its pipeline has loaded."""
    model = QwenImageTransformer2DModel.from_pretrained(folder)
    pipeline = QwenImagePipeline(None, None, None, None, model)
    if lora:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    generator = torch.Generator().manual_seed(7)
    hidden, text = (torch.randn(2, length, 16, generator=generator) for length in (16, 5))
    with torch.no_grad():
        found: torch.Tensor = model(
            hidden_states=hidden,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=torch.ones(2, 5),
            timestep=torch.tensor([0.9, 0.3]),
            img_shapes=[[(1, 4, 4)]] * 2,
            return_dict=False,
        )[0]
    return found


def flux_velocity(folder: Path, lora: Path | None) -> torch.Tensor:
    model = FluxTransformer2DModel.from_pretrained(folder)
    pipeline = FluxPipeline(None, None, None, None, None, None, model)
    if lora:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        found: torch.Tensor = model(
            hidden_states=torch.randn(1, 16, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 6, 12, generator=generator),
            pooled_projections=torch.randn(1, 12, generator=generator),
            timestep=torch.tensor([0.7]),
            img_ids=torch.randint(0, 4, (16, 3), generator=generator).float(),
            txt_ids=torch.zeros(6, 3),
            return_dict=False,
        )[0]
    return found


def assert_near(found: torch.Tensor, wanted: torch.Tensor, far: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal but for rounding, which is nothing beside what the LoRAs do."""
    effect = float((wanted - far).norm())
    assert effect > 0.01 * float(far.norm())
    assert float((found - wanted).norm()) < tolerance * effect


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", torch.float32)


def new_lora(path: Path, fused: Path, modules: tuple[str, ...] = OTHERS, seed: int = 9, **options: Any) -> Path:
    """What the trainer writes: diffusers' names, and in the header the checkpoint it was trained on."""
    manifest = read_manifest(fused)
    assert manifest
    path.parent.mkdir(exist_ok=True)
    record = {"lorafuse": json.dumps({"fused_sha256": manifest.fused_sha256, "fused_loras": []})}
    return write_lora(path, make_factors(modules, 3, seed, 0.2, **options), DIFFUSERS, metadata=record)


def fuse_one(run: Run, base: Path, lora: object, out: Path, *args: object) -> Path:
    succeed(run, "fuse", base, "--lora", lora, "--out", out, *args)
    return out


def some_lora(path: Path, seed: int = 1, modules: tuple[str, ...] = MODULES) -> Path:
    return write_lora(path, make_factors(modules, 4, seed, 0.2), LIGHTNING, 3.0)


def test_velocities_are_those_of_fused_and_new(run: Run, base: Path, tmp_path: Path) -> None:
    fused = fuse_one(run, base, f"{some_lora(tmp_path / 'style.safetensors')}:0.8", tmp_path / "fused")
    new = new_lora(tmp_path / "new" / "pytorch_lora_weights.safetensors", fused)
    out = tmp_path / "out" / "sum.safetensors"
    err = succeed(run, "export", new.parent, "--for", "original", "--fused", fused, "--out", out, "--base", base)
    assert "export style.safetensors x 0.8 + pytorch_lora_weights.safetensors x 1" in err
    assert_near(qwen_velocity(base, out), qwen_velocity(fused, new), qwen_velocity(base, None))
    shapes = {name: tuple(value.shape) for name, value in load_file(out).items()}
    ranks = {name.removesuffix(".lora_A.weight"): shape[0] for name, shape in shapes.items() if "lora_A" in name}
    wanted = {f"transformer.{m}": 4 * (m in MODULES) + 3 * (m in OTHERS) for m in {*MODULES, *OTHERS}}
    assert ranks == wanted
    assert sorted(set(ranks.values())) == [3, 4, 7]
    with safe_open(out, "pt") as file:
        record = json.loads(file.metadata()["lorafuse"])
    manifest = read_manifest(fused)
    assert manifest
    assert record["fused_sha256"] == manifest.original_sha256
    assert [part["name"] for part in record["sum_of"]] == ["style.safetensors", "pytorch_lora_weights.safetensors"]
    facts = json.loads(run("inspect", out, "--json")[1])
    assert facts["made_by"].startswith("lorafuse export")
    assert (facts["for_base"], facts["from_fused"]) == (manifest.original_sha256, manifest.fused_sha256)
    assert facts["sum_of"][0].startswith("style.safetensors x 0.8 (sha256 ")


def test_the_strength_of_the_new_lora(run: Run, base: Path, tmp_path: Path) -> None:
    fused = fuse_one(run, base, some_lora(tmp_path / "style.safetensors"), tmp_path / "fused")
    new = new_lora(tmp_path / "new.safetensors", fused)
    half = {k: v * 0.5 if "lora_B" in k else v for k, v in load_file(new).items()}
    save_file(half, tmp_path / "half.safetensors")
    succeed(run, "export", f"{new}:0.5", "--fused", fused, "--out", tmp_path / "o.safetensors")
    wanted = qwen_velocity(fused, tmp_path / "half.safetensors")
    assert_near(qwen_velocity(base, tmp_path / "o.safetensors"), wanted, qwen_velocity(base, None))


def test_a_chain_of_three(run: Run, base: Path, tmp_path: Path) -> None:
    """The LoRA files come from the last folder; the error against the fused model is printed, and is its rounding."""
    at = base
    for number, modules in enumerate((MODULES, OTHERS, MODULES[:2])):
        path = some_lora(tmp_path / f"l{number}.safetensors", number, modules)
        at = fuse_one(run, at, f"{path}:{0.5 + number / 4}", tmp_path / f"f{number}", "--dtype", "bfloat16")
        path.unlink()
    new = new_lora(tmp_path / "new.safetensors", at)
    out = tmp_path / "sum.safetensors"
    err = succeed(run, "export", new, "--fused", at, "--out", out, "--base", base, "--to", "diffusers")
    assert "export l0.safetensors x 0.5 + l1.safetensors x 0.75 + l2.safetensors x 1 + new.safetensors x 1" in err
    code, text, _ = run("export", new, "--fused", at, "--out", out, "--base", base, "--json")
    assert code == 0
    facts = json.loads(text)
    weights, made = (load_file(next(folder.glob("*.safetensors"))) for folder in (base, at))
    pairs, extra = load_file(out), load_file(new)
    squares = [0.0, 0.0]
    for name, before in weights.items():
        stem = f"transformer.{name.removesuffix('.weight')}"
        total, fresh = (
            its[f"{stem}.lora_B.weight"].double() @ its[f"{stem}.lora_A.weight"].double()
            if f"{stem}.lora_A.weight" in its
            else torch.zeros_like(before).double()
            for its in (pairs, extra)
        )
        whole = made[name].double() + fresh - before.double()
        squares[0] += float((before.double() + total - before.double() - whole).square().sum())
        squares[1] += float(whole.square().sum())
    assert facts["error_against_fused"] == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-6)
    assert 1e-4 < facts["error_against_fused"] < 0.02
    assert_near(qwen_velocity(base, out), qwen_velocity(at, new), qwen_velocity(base, None), 0.05)


def test_flux_with_a_kohya_lora_in_fused_layout(run: Run, tmp_path: Path) -> None:
    tiny_flux().save_pretrained(tmp_path / "base")
    lora = kohya_lora(tmp_path / "style.safetensors")
    fused = fuse_one(run, tmp_path / "base", f"{lora}:0.7", tmp_path / "fused")
    manifest = read_manifest(fused)
    assert manifest
    generator = torch.Generator().manual_seed(3)
    factors = {
        "transformer_blocks.0.attn.to_k": (torch.randn(3, 16, generator=generator) * 0.2,) * 2,
        "single_transformer_blocks.1.proj_mlp": (torch.randn(3, 16, generator=generator) * 0.2, torch.ones(64, 3)),
    }
    factors["transformer_blocks.0.attn.to_k"] = (factors["transformer_blocks.0.attn.to_k"][0], torch.ones(16, 3))
    record = {"lorafuse": json.dumps({"fused_sha256": manifest.fused_sha256})}
    new = write_lora(tmp_path / "new.safetensors", factors, DIFFUSERS, metadata=record)
    out = tmp_path / "sum.safetensors"
    succeed(run, "export", new, "--fused", fused, "--out", out, "--base", tmp_path / "base")
    wanted, far = flux_velocity(fused, new), flux_velocity(tmp_path / "base", None)
    assert_near(flux_velocity(tmp_path / "base", out), wanted, far)
    for to in ("kohya", "comfyui"):
        other = tmp_path / to / "sum.safetensors"
        succeed(run, "export", new, "--fused", fused, "--out", other, "--to", to)
        again = fuse_one(run, tmp_path / "base", other, tmp_path / f"with {to}")  # diffusers splits 12B's widths only
        assert_near(flux_velocity(again, None), wanted, far)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("first", ["diffusers", "kohya"])
@pytest.mark.parametrize("to", ["diffusers", "comfyui"])
def test_layouts_of_base_and_loras(run: Run, tmp_path: Path, layout: str, first: str, to: str) -> None:
    """Every module of FLUX: the sum fused into the base is what fusing one after the other gives."""
    base = base_file(tmp_path, FLUX, layout)
    lora, new = lora_file(tmp_path, FLUX, first, [0.5, 2.0]), lora_file(tmp_path, FLUX, "comfyui")
    one = fuse_one(run, base, f"{lora}:0.7", tmp_path / "one")
    two = fuse_one(run, one / base.name, new, tmp_path / "two")
    out = tmp_path / "out" / "sum.safetensors"
    err = succeed(run, "export", new, "--fused", one, "--out", out, "--to", to, "--base", base)
    assert "does not say what it was trained on" in err
    again = fuse_one(run, base, out, tmp_path / "again")
    wanted, found = load_file(two / base.name), load_file(again / base.name)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=1e-4), name


def test_compression(run: Run, base: Path, tmp_path: Path) -> None:
    fused = fuse_one(run, base, f"{some_lora(tmp_path / 'style.safetensors')}:0.8", tmp_path / "fused")
    new = new_lora(tmp_path / "new.safetensors", fused)
    whole, small = tmp_path / "whole.safetensors", tmp_path / "small.safetensors"
    succeed(run, "export", new, "--fused", fused, "--out", whole)
    code, text, err = run("export", new, "--fused", fused, "--out", small, "--rank", "5", "--json")
    assert code == 0, err
    pairs, kept = load_file(whole), load_file(small)
    for layer in json.loads(text)["layers"]:
        stem = f"transformer.{layer['module']}"
        dense, near = (
            its[f"{stem}.lora_B.weight"].double() @ its[f"{stem}.lora_A.weight"].double() for its in (pairs, kept)
        )
        s = torch.linalg.svdvals(dense)
        assert len(kept[f"{stem}.lora_A.weight"]) == min(5, layer["ranks"]) == layer["rank"]
        error = float((dense - near).norm() / dense.norm())
        assert error == pytest.approx(float(s[5:].norm() / s.norm()), abs=1e-6)
        assert (layer["error"] or 0.0) == pytest.approx(error, abs=1e-6)
        assert f"{layer['error'] or 0:9.2%}  {layer['module']}" in err


def test_loha_and_lokr_need_a_rank(run: Run, base: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    name = "transformer_blocks.0.attn.to_q"
    loha = {f"lycoris_{name.replace('.', '_')}.hada_w{n}_{x}": draw(*shape) for n in "12"
            for x, shape in (("a", (48, 2)), ("b", (2, 48)))}  # fmt: skip
    lokr = {f"lycoris_{MODULES[1].replace('.', '_')}.lokr_w1": draw(4, 4),
            f"lycoris_{MODULES[1].replace('.', '_')}.lokr_w2": draw(12, 12)}  # fmt: skip
    save_file(loha | lokr, tmp_path / "lyco.safetensors")
    fused = fuse_one(run, base, tmp_path / "lyco.safetensors", tmp_path / "fused")
    new = new_lora(tmp_path / "new.safetensors", fused)
    out = tmp_path / "o.safetensors"
    err = refused(run, "export", new, "--fused", fused, "--out", out)
    assert "1 tensors by loha: is no sum of low rank; --rank N takes the best approximation" in err
    assert "by lokr" in err
    assert not out.exists()
    succeed(run, "export", new, "--fused", fused, "--out", out, "--rank", "16")
    assert_near(qwen_velocity(base, out), qwen_velocity(fused, new), qwen_velocity(base, None), 0.4)
    pairs = load_file(out)
    first = loha[f"lycoris_{name.replace('.', '_')}.hada_w1_a"] @ loha[f"lycoris_{name.replace('.', '_')}.hada_w1_b"]
    second = loha[f"lycoris_{name.replace('.', '_')}.hada_w2_a"] @ loha[f"lycoris_{name.replace('.', '_')}.hada_w2_b"]
    extra = load_file(new)
    dense = (first * second).double() + extra[f"transformer.{name}.lora_B.weight"].double() @ extra[
        f"transformer.{name}.lora_A.weight"
    ].double()
    near = pairs[f"transformer.{name}.lora_B.weight"] @ pairs[f"transformer.{name}.lora_A.weight"]
    assert torch.allclose(near.double(), dense, atol=1e-4)  # of rank 2 x 2 + 3


def test_dora_is_refused_with_the_reason(run: Run, tmp_path: Path) -> None:
    tiny_flux().save_pretrained(tmp_path / "base")
    lora = kohya_lora(tmp_path / "dora.safetensors", (".dora_scale",))
    fused = fuse_one(run, tmp_path / "base", lora, tmp_path / "fused")
    new = kohya_lora(tmp_path / "new.safetensors")
    for args in ((), ("--rank", "4")):
        err = refused(run, "export", new, "--fused", fused, "--out", tmp_path / "o.safetensors", *args)
        assert "DoRA scales the merged weight's rows or columns, so what it adds depends on the weights it meets" in err
        assert "lorafuse extract" in err
    assert not (tmp_path / "o.safetensors").exists()


def test_norms_and_biases(run: Run, base: Path, tmp_path: Path) -> None:
    pair = load_file(some_lora(tmp_path / "plain.safetensors"))
    bias = {"transformer_blocks.0.attn.to_q.diff_b": torch.full((48,), 0.25)}
    norm = {"transformer_blocks.0.attn.norm_q.diff": torch.full((16,), 0.5)}
    save_file(pair | bias | norm, tmp_path / "style.safetensors")
    fused = fuse_one(run, base, f"{tmp_path / 'style.safetensors'}:0.5", tmp_path / "fused")
    new = new_lora(tmp_path / "new.safetensors", fused)
    out = tmp_path / "o.safetensors"
    err = refused(run, "export", new, "--fused", fused, "--out", out)
    assert "2 tensors differ that are no matrices" in err
    assert "--to comfyui writes them as .diff and .diff_b; --vectors skip leaves them out" in err
    succeed(run, "export", new, "--fused", fused, "--out", out, "--to", "comfyui", "--base", base)
    found = load_file(out)
    assert torch.equal(found["diffusion_model.transformer_blocks.0.attn.to_q.diff_b"], torch.full((48,), 0.125))
    assert torch.equal(found["diffusion_model.transformer_blocks.0.attn.norm_q.diff"], torch.full((16,), 0.25))
    err = succeed(run, "export", new, "--fused", fused, "--out", tmp_path / "s.safetensors", "--vectors", "skip")
    assert "left out: 2 tensors that differ and are no matrices (transformer_blocks.0.attn." in err
    assert f"{len({*MODULES, *OTHERS})} tensors, ranks 3 to 7" in err
    assert all("lora_" in name for name in load_file(tmp_path / "s.safetensors"))
    succeed(run, "export", new, "--fused", fused, "--out", tmp_path / "d.safetensors", "--vectors", "diff")
    again = fuse_one(run, base, tmp_path / "d.safetensors", tmp_path / "again")
    (weights,) = again.glob("*.safetensors")
    (before,) = base.glob("*.safetensors")
    key = "transformer_blocks.0.attn.norm_q.weight"
    assert torch.allclose(load_file(weights)[key], load_file(before)[key] + 0.25)


def test_where_there_are_no_matrices(run: Run, base: Path, tmp_path: Path) -> None:
    for name, value in (("style", 0.5), ("new", 0.25)):
        norm = {"transformer_blocks.0.attn.norm_q.diff": torch.full((16,), value)}
        save_file(norm, tmp_path / f"{name}.safetensors")
    fused = fuse_one(run, base, tmp_path / "style.safetensors", tmp_path / "fused")
    args = ("export", tmp_path / "new.safetensors", "--fused", fused, "--out", tmp_path / "o.safetensors")
    assert "the LoRAs change no matrices" in refused(run, *args, "--vectors", "skip")
    assert not (tmp_path / "o.safetensors").exists()
    assert "1 tensors, rank 0" in succeed(run, *args, "--to", "comfyui")
    (found,) = load_file(tmp_path / "o.safetensors").values()
    assert torch.equal(found, torch.full((16,), 0.75))


def test_damaged_modules_stay_left_out(run: Run, base: Path, tmp_path: Path) -> None:
    factors = make_factors(MODULES, 4, 1, 0.2)
    factors[MODULES[0]][0][0, 0] = float("nan")
    style = write_lora(tmp_path / "style.safetensors", factors, LIGHTNING, 3.0)
    fused = fuse_one(run, base, style, tmp_path / "fused", "--allow", "NOT_FINITE")
    new, out = new_lora(tmp_path / "new.safetensors", fused), tmp_path / "o.safetensors"
    succeed(run, "export", new, "--fused", fused, "--out", out)
    assert_near(qwen_velocity(base, out), qwen_velocity(fused, new), qwen_velocity(base, None))
    kept = next(fused.glob("lorafuse/loras/*")) / "adapter_config.json"
    kept.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 3, "target_modules": ["x"]}))
    assert "A configuration beside the file may have changed" in refused(
        run, "export", new, "--fused", fused, "--out", tmp_path / "p.safetensors"
    )


def test_what_does_not_fit_cannot_be_allowed(run: Run, base: Path, tmp_path: Path) -> None:
    """A LoRA that was trained on the fused base fits it: export has no `--allow`, and does not advise it."""
    fused = fuse_one(run, base, some_lora(tmp_path / "style.safetensors"), tmp_path / "fused")
    new = new_lora(tmp_path / "new.safetensors", fused)
    tensors = load_file(new) | {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 4)}
    save_file(tensors, new)
    err = refused(run, "export", new, "--fused", fused, "--out", tmp_path / "o.safetensors")
    assert "OTHER_COMPONENT" in err
    assert "--allow " not in err


def test_scaffolds_are_dropped(run: Run, base: Path, tmp_path: Path) -> None:
    """Of a scaffold alone the new LoRA is for the original already; under it, what was deployed stays."""
    adapter = some_lora(tmp_path / "adapter.safetensors")
    alone = fuse_one(run, base, adapter, tmp_path / "alone", "--role", "scaffold")
    new = new_lora(tmp_path / "new.safetensors", alone)
    err = refused(run, "export", new, "--fused", alone, "--out", tmp_path / "o.safetensors")
    assert "adapter.safetensors was there for the training only" in err
    assert f"{new}: is for the original base as it is" in err
    style = some_lora(tmp_path / "style.safetensors", 4, OTHERS)
    deployed = fuse_one(run, base, style, tmp_path / "deployed")
    both = fuse_one(run, deployed, adapter, tmp_path / "both", "--role", "scaffold")
    new = new_lora(tmp_path / "new2.safetensors", both)
    code, text, err = run("export", new, "--fused", both, "--out", tmp_path / "o.safetensors", "--base", base, "--json")
    assert code == 0, err
    assert f"not compared with {both}, which holds the scaffold" in err
    assert "error_against_fused" not in json.loads(text)
    assert_near(
        qwen_velocity(base, tmp_path / "o.safetensors"), qwen_velocity(deployed, new), qwen_velocity(base, None)
    )


def test_files_that_are_not_what_was_fused(run: Run, base: Path, tmp_path: Path) -> None:
    style = some_lora(tmp_path / "style.safetensors")
    fused = fuse_one(run, base, style, tmp_path / "fused", "--keep-loras", "none")
    new = new_lora(tmp_path / "new.safetensors", fused)
    elsewhere = tmp_path / "far" / "renamed.safetensors"
    elsewhere.parent.mkdir()
    style.rename(elsewhere)
    out = tmp_path / "o.safetensors"
    assert "style.safetensors (sha256" in refused(run, "export", new, "--fused", fused, "--out", out)
    err = refused(run, "export", new, "--fused", fused, "--out", out, "--lora", new)
    assert "was not fused into" in err
    succeed(run, "export", new, "--fused", fused, "--out", out, "--lora", elsewhere)


def test_other_bases_are_refused(run: Run, base: Path, tmp_path: Path) -> None:
    style = some_lora(tmp_path / "style.safetensors")
    fused = fuse_one(run, base, style, tmp_path / "fused")
    other = fuse_one(run, base, some_lora(tmp_path / "other.safetensors", 5), tmp_path / "other")
    new, out = new_lora(tmp_path / "new.safetensors", other), tmp_path / "o.safetensors"
    err = refused(run, "export", new, "--fused", fused, "--out", out)
    assert "was trained on another base" in err
    assert "--allow-base-mismatch" in err
    succeed(run, "export", new, "--fused", fused, "--out", out, "--allow-base-mismatch")
    wrong = save_model(tmp_path / "wrong", torch.float32, seed=3)
    new = new_lora(tmp_path / "right.safetensors", fused)
    err = refused(run, "export", new, "--fused", fused, "--out", out, "--base", wrong, "--force")
    assert "is not what the first LoRA was fused into" in err
    assert "is the input" in refused(run, "export", new, "--fused", fused, "--out", new)
    assert "no such file" in refused(run, "export", tmp_path / "no", "--fused", fused, "--out", out)
    assert "is no fused checkpoint" in refused(run, "export", new, "--fused", base, "--out", out)
    assert "exists with other content" in refused(run, "export", f"{new}:2", "--fused", fused, "--out", out)


def test_dtypes(run: Run, base: Path, tmp_path: Path) -> None:
    """16-bit factors stay as they are where every scale is a power of two; else all are fp32."""
    half = make_factors(dtype=torch.bfloat16)
    lora = write_lora(tmp_path / "style.safetensors", half, KOHYA, 2.0)  # of rank 4
    fused = fuse_one(run, base, lora, tmp_path / "fused")
    new = new_lora(tmp_path / "new.safetensors", fused, dtype=torch.bfloat16)
    stored = {}
    for name, args in {"exact": (), "scaled": ("--rank", "3"), "asked": ("--dtype", "float16")}.items():
        out = tmp_path / f"{name}.safetensors"
        succeed(run, "export", new, "--fused", fused, "--out", out, *args)
        stored[name] = {value.dtype for value in load_file(out).values()}
    assert stored == {"exact": {torch.bfloat16}, "scaled": {torch.float32}, "asked": {torch.float16}}
    found = load_file(tmp_path / "exact.safetensors")
    down, up = half[MODULES[1]]
    assert torch.equal(found[f"transformer.{MODULES[1]}.lora_A.weight"], down)
    assert torch.equal(found[f"transformer.{MODULES[1]}.lora_B.weight"], up * 0.5)


def test_one_of_two_experts(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base"
    for name, seed in (("transformer", 0), ("transformer_2", 1)):
        save_model(base / name, torch.float32, seed=seed)
    (base / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    high, low = some_lora(tmp_path / "high.safetensors", 1), some_lora(tmp_path / "low.safetensors", 2)
    both = ("--lora", f"{high}@transformer", "--lora", f"{low}:0.5@transformer_2")
    succeed(run, "fuse", base, *both, "--out", tmp_path / "fused")
    new = new_lora(tmp_path / "new.safetensors", tmp_path / "fused")
    for name, wanted in (("transformer", "export high.safetensors x 1 +"), ("transformer_2", "export low.safetensors")):
        out = tmp_path / f"{name}.safetensors"
        args = ("--fused", tmp_path / "fused", "--out", out, "--base", base, "--component", name)
        err = succeed(run, "export", new, *args)
        assert wanted in err
        far = qwen_velocity(base / name, None)
        assert_near(qwen_velocity(base / name, out), qwen_velocity(tmp_path / "fused" / name, new), far)
