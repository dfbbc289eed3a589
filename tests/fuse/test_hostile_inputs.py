"""Hundreds of mutated LoRAs and checkpoints: planned, inspected, refused by name, or fused whole."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from builders import make_factors, save_model, write_lora
from mutations import mutated
from safetensors.torch import load_file, save_file

from lorafuse_common.dialects.kohya import KOHYA
from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.dialects.peft import PEFT
from lorafuse_common.manifest import read_manifest, verify_manifest
from lorafuse_common.tensorfile import read_header
from lorafuse_fuse.choices import ProblemKind

Run = Callable[..., tuple[int, str, str]]
CONFIG = {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 4}'}


SQUARE = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_k_proj")
"""Modules whose weights are 48 x 48."""
FACTORS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "loha": {"hada_w1_a": (48, 4), "hada_w1_b": (4, 48), "hada_w2_a": (48, 4), "hada_w2_b": (4, 48), "alpha": ()},
    "lokr": {"lokr_w1": (6, 6), "lokr_w2_a": (8, 4), "lokr_w2_b": (4, 8), "alpha": ()},
    "dora": {"lora_A.weight": (4, 48), "lora_B.weight": (48, 4), "lora_magnitude_vector": (48,)},
    "glora": {"a1.weight": (4, 48), "a2.weight": (48, 4), "b1.weight": (4, 48), "b2.weight": (48, 4), "alpha": ()},
    "oft": {"oft_blocks": (12, 4, 4), "alpha": ()},
    "whole": {"diff": (48, 48), "diff_b": (48,)},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Bases in bf16 and scaled fp8, and LoRAs for them of every rule, which say their scale in different places."""
    folder = tmp_path_factory.mktemp("sound")
    loras = [
        write_lora(folder / "lightning.safetensors", make_factors(), LIGHTNING, 2.0),
        write_lora(folder / "kohya.safetensors", make_factors(dtype=torch.bfloat16), KOHYA, 2.0),
        write_lora(folder / "peft.safetensors", make_factors(), PEFT, metadata=CONFIG),
    ]
    for name, shapes in FACTORS.items():
        loras.append(folder / f"{name}.safetensors")
        factors = {f"{module}.{key}": torch.rand(shape) for module in SQUARE for key, shape in shapes.items()}
        save_file(factors, loras[-1], metadata={"format": "pt"})
    base = save_model(folder / "base") / "diffusion_pytorch_model.safetensors"
    weights = load_file(base)
    for name in [f"{module}.weight" for module in SQUARE]:
        weights[name.replace(".weight", ".scale_weight")] = scale = weights[name].float().abs().max() / 400
        weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
    save_file(weights, folder / "fp8.safetensors")
    return (base, folder / "fp8.safetensors"), tuple(loras)


def check(code: int, err: str, path: Path) -> None:
    """One clear message that names the file, and no traceback."""
    assert code in (0, 1)
    assert "Traceback" not in err
    assert "fault in lorafuse" not in err
    assert len(err) < 20000
    if code:
        assert "error: " in err
        assert path.name in err


@pytest.mark.parametrize("first", range(0, 240, 30))
@pytest.mark.parametrize("what", ["lora", "base"])
def test_mutated_files_are_planned_or_refused(
    run: Run, tmp_path: Path, sound: tuple[tuple[Path, ...], tuple[Path, ...]], what: str, first: int
) -> None:
    bases, loras = sound
    path, codes = tmp_path / "mutant.safetensors", set()
    for seed in range(first, first + 30):
        lora, base = loras[seed % len(loras)], bases[seed % len(bases)]
        path.write_bytes(mutated(lora if what == "lora" else base, seed))
        pair = (base, "--lora", path) if what == "lora" else (path, "--lora", lora)
        code, out, err = run("fuse", *pair, "--out", tmp_path / "out", "--dry-run", "--json")
        check(code, err, path)
        assert out.startswith("{")
        codes.add(code)
        code, out, err = run("inspect", path)
        check(code, err, path)
    assert codes >= {1}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", range(1000, 1120, 30))
@pytest.mark.parametrize("what", ["lora", "base"])
def test_what_is_let_pass_is_fused_whole(
    run: Run, tmp_path: Path, sound: tuple[tuple[Path, ...], tuple[Path, ...]], what: str, first: int
) -> None:
    """Whatever a user allows, and however the result is stored: what is published is what its manifest says."""
    bases, loras = sound
    path, fused = tmp_path / "mutant.safetensors", 0
    for seed in range(first, first + 30):
        rng, out = random.Random(seed), tmp_path / f"out{seed}"
        lora, base = loras[seed % len(loras)], bases[seed % len(bases)]
        path.write_bytes(mutated(lora if what == "lora" else base, seed))
        pair = (base, "--lora", path) if what == "lora" else (path, "--lora", lora)
        options = [f"--allow={kind}" for kind in ProblemKind if rng.random() < 0.9]
        options += rng.choice([[], ["--plain-fp8"]]) + rng.choice([[], ["--rounding=stochastic"]])
        options += rng.choice([[], ["--dtype=float32"], ["--dtype=float16"]]) if base == bases[0] else []
        code, _, err = run("fuse", *pair, "--out", out, *options)
        check(code, err, path)
        assert out.exists() == (code == 0)
        if code == 0:
            manifest = read_manifest(out)
            assert manifest
            verify_manifest(out, manifest, hashes=True)
            source = base if what == "lora" else path
            assert set(read_header(out / source.name).tensors) == set(read_header(source).tensors)
            fused += 1
    assert fused > 3
