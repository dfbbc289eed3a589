"""Fused values against independent references: diffusers' fuse, PEFT's runtime adapter, a float64 formula."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from builders import MODULES, Factors, make_factors, save_model, tiny_transformer, write_lora
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_common.dialects import DIALECTS, Dialect
from lorafuse_common.dialects.diffsynth import DIFFSYNTH
from lorafuse_common.dialects.diffusers import DIFFUSERS
from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.dialects.peft import PEFT
from lorafuse_common.errors import ConfigError
from lorafuse_common.manifest import read_manifest, verify_manifest
from lorafuse_fuse import blocks
from lorafuse_fuse.choices import LoraRequest
from lorafuse_fuse.fuse import FuseOptions, fuse, require_clean
from lorafuse_fuse.plan import plan_fuse

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run_fuse(base: Path, loras: Mapping[Path, float], out: Path) -> Path:
    plan = plan_fuse(open_checkpoint(base), [LoraRequest(path, strength) for path, strength in loras.items()])
    require_clean(plan, ())
    fuse(plan, FuseOptions(out))
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def expected(base: Path, deltas: list[tuple[Factors, float]]) -> dict[str, torch.Tensor]:
    """`W + sum of factor * B @ A` in float64, rounded once to the weight's dtype."""
    found = weights(base)
    for module in {module for factors, _ in deltas for module in factors}:
        total = found[f"{module}.weight"].double()
        for factors, factor in deltas:
            if module in factors:
                down, up = factors[module]
                total = total + factor * (up.double() @ down.double())
        found[f"{module}.weight"] = total.to(found[f"{module}.weight"].dtype)
    return found


def assert_same(fused: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> None:
    """Equal but for values that lie within fp32 noise of a rounding boundary: one step apart, and few."""
    assert list(fused) == list(reference)
    for name, value in fused.items():
        want = reference[name]
        assert value.dtype == want.dtype
        off = value != want
        if value.dtype == torch.float32:
            torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-7)
        else:
            assert off.float().mean() <= 1e-3, name
            torch.testing.assert_close(value.float(), want.float(), rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_every_dialect_gives_the_formulas_values(tmp_path: Path, dialect: Dialect) -> None:
    base = save_model(tmp_path / "base")
    factors = make_factors()
    alpha = 2.0 if "alpha" in dialect.roles else None
    lora = write_lora(tmp_path / "x.safetensors", factors, dialect, alpha)
    out = run_fuse(base, {lora: 0.8}, tmp_path / "out")
    assert_same(weights(out), expected(base, [(factors, 0.8 * (0.5 if alpha else 1.0))]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sharded", [False, True])
def test_dtypes_and_shards(tmp_path: Path, dtype: torch.dtype, sharded: bool) -> None:
    base = save_model(tmp_path / "base", dtype, sharded=sharded)
    factors = make_factors(dtype=torch.bfloat16)
    lora = write_lora(tmp_path / "x.safetensors", factors, LIGHTNING, 2.0)
    out = run_fuse(base, {lora: 1.0}, tmp_path / "out")
    ours = ["lorafuse", "lorafuse.json"]
    assert sorted(p.name for p in out.iterdir()) == sorted([*(p.name for p in base.iterdir()), *ours])
    assert_same(weights(out), expected(base, [(factors, 0.5)]))
    untouched = set(weights(base)) - {f"{m}.weight" for m in MODULES}
    before, after = weights(base), weights(out)
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    loaded = QwenImageTransformer2DModel.from_pretrained(out, dtype=dtype)
    assert all(torch.equal(value, after[name]) for name, value in loaded.state_dict().items())


def test_blocks_of_any_size_give_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors cut into many pieces, even smaller than a row, by more pieces than there are buffers."""
    base = save_model(tmp_path / "base", sharded=True)
    factors = make_factors()
    lora = write_lora(tmp_path / "x.safetensors", factors, LIGHTNING, 2.0)
    for name, elements, nbytes in (("small", 700, 4096), ("row", 1, 10), ("cut", 700, 512)):
        for constant, value in (("EDIT_BLOCK_ELEMENTS", elements), ("PIECE_BYTES", nbytes), ("WRITE_BYTES", 300)):
            monkeypatch.setattr(blocks, constant, value)
        out = run_fuse(base, {lora: 1.0}, tmp_path / name)
        assert_same(weights(out), expected(base, [(factors, 0.5)]))
        manifest = read_manifest(out)
        assert manifest
        verify_manifest(out, manifest, hashes=True)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "EDIT_BLOCK_ELEMENTS", 700)
    monkeypatch.setattr(blocks, "PIECE_BYTES", 4096)
    base = save_model(tmp_path / "base")
    plan = plan_fuse(
        open_checkpoint(base), [LoraRequest(write_lora(tmp_path / "x.safetensors", make_factors(), LIGHTNING, 2.0))]
    )
    files = []
    for workers in (1, 2, 7):
        fuse(plan, FuseOptions(tmp_path / str(workers), workers=workers))
        files.append([path.read_bytes() for path in sorted((tmp_path / str(workers)).rglob("*")) if path.is_file()])
    assert files[0] == files[1] == files[2]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_gives_the_same_to_one_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_model(tmp_path / "base", dtype, sharded=True)
    loras = [LoraRequest(write_lora(tmp_path / "x.safetensors", make_factors(), LIGHTNING, 2.0))]
    plan = plan_fuse(open_checkpoint(base), loras)
    found = []
    for device in ("cpu", "cuda"):
        fuse(plan, FuseOptions(tmp_path / device, device=device))
        found.append(weights(tmp_path / device))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=torch.finfo(dtype).eps, atol=1e-7)
    first, second = (read_manifest(tmp_path / device) for device in ("cpu", "cuda"))
    assert first
    assert second
    for one, other in zip(first.changes, second.changes, strict=True):
        assert one.gain == pytest.approx(other.gain, abs=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "x.safetensors", make_factors(), LIGHTNING, 2.0)
    plan = plan_fuse(open_checkpoint(save_model(tmp_path / "base")), [LoraRequest(lora)])
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        fuse(plan, FuseOptions(tmp_path / "out", device="cuda"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_edited_tensors_in_another_dtype(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Only they change: in fp32 the whole delta arrives, and what diffusers loads is that."""
    base = save_model(tmp_path / "base", sharded=True)
    factors = make_factors()
    lora = write_lora(tmp_path / "x.safetensors", factors, LIGHTNING, 2.0)
    plan = plan_fuse(open_checkpoint(base), [LoraRequest(lora)], dtype=name)
    require_clean(plan, ())
    fuse(plan, FuseOptions(tmp_path / "out"))
    before, after = weights(base), weights(tmp_path / "out")
    for module in MODULES:
        down, up = factors[module]
        exact = before[f"{module}.weight"].double() + 0.5 * up.double() @ down.double()
        made = after.pop(f"{module}.weight")
        assert made.dtype is dtype
        torch.testing.assert_close(made, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-8)
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert torch.equal(loaded[f"{MODULES[0]}.weight"], weights(tmp_path / "out")[f"{MODULES[0]}.weight"].float())
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights(tmp_path / "out").values())
    manifest = read_manifest(tmp_path / "out")
    assert manifest
    gains = [change.gain for change in manifest.changes]
    assert (min(gains) > 0.99999) == (name == "F32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(tmp_path: Path, dtype: torch.dtype) -> None:
    """A delta far below the dtype's grain is lost to the nearest value, and arrives in the mean of many roundings."""
    weight = torch.full((256, 256), 1.0, dtype=dtype)
    save_file({"a.weight": weight}, tmp_path / "base.safetensors")
    step = float(torch.finfo(dtype).eps)
    factors = {"a": (torch.ones(1, 256), torch.full((256, 1), step / 8))}
    lora = write_lora(tmp_path / "x.safetensors", factors, DIFFUSERS)
    results = {}
    for name, seed in (("near", None), ("one", 1), ("again", 1), ("two", 2)):
        plan = plan_fuse(open_checkpoint(tmp_path / "base.safetensors"), [LoraRequest(lora)], seed=seed)
        fuse(plan, FuseOptions(tmp_path / name))
        results[name] = load_file(tmp_path / name / "base.safetensors")["a.weight"]
    assert torch.equal(results["near"], weight)
    assert torch.equal(results["one"], results["again"])
    assert not torch.equal(results["one"], results["two"])
    assert set(results["one"].flatten().tolist()) == {1.0, 1.0 + step}
    moved = float((results["one"].double() - 1).mean())
    assert moved == pytest.approx(step / 8, rel=0.05)  # 65,536 draws of 1 in 8: four sigmas are 0.04


def test_several_loras_are_summed_and_rounded_once(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    parts = [make_factors(rank=rank, seed=rank) for rank in (2, 4, 8)]
    strengths = (1.0, -0.5, 0.25)
    paths = [
        write_lora(tmp_path / f"{i}.safetensors", part, dialect)
        for i, (part, dialect) in enumerate(zip(parts, (DIFFSYNTH, DIFFUSERS, PEFT), strict=True))
    ]
    out = run_fuse(base, dict(zip(paths, strengths, strict=True)), tmp_path / "out")
    assert_same(weights(out), expected(base, list(zip(parts, strengths, strict=True))))
    turned = run_fuse(base, dict(zip(reversed(paths), reversed(strengths), strict=True)), tmp_path / "turned")
    assert_same(weights(turned), weights(out))


def test_equals_diffusers_own_fuse(tmp_path: Path) -> None:
    """`load_lora_weights` + `fuse_lora` in fp32, with alpha != rank in the metadata."""
    base = save_model(tmp_path / "base", torch.float32)
    meta = {"r": 4, "lora_alpha": 6, "target_modules": list(MODULES), "alpha_pattern": {MODULES[0]: 2}}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in meta.items()})}
    lora = write_lora(tmp_path / "x.safetensors", make_factors(), DIFFUSERS, metadata=metadata)
    out = run_fuse(base, {lora: 0.7}, tmp_path / "out")
    pipeline = QwenImagePipeline(
        transformer=QwenImageTransformer2DModel.from_pretrained(base),
        vae=None, text_encoder=None, tokenizer=None, scheduler=None,
    )  # fmt: skip
    pipeline.load_lora_weights(str(lora))
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    fused = weights(out)
    for name, value in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-6)
    changed = [name for name, value in weights(base).items() if not torch.equal(value, fused[name])]
    assert sorted(changed) == sorted(f"{module}.weight" for module in MODULES)


def test_forward_equals_pefts_runtime_adapter(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", torch.float32)
    model = tiny_transformer()
    model.add_adapter(LoraConfig(r=4, lora_alpha=3, target_modules=list(MODULES), init_lora_weights=False))
    saved = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    factors = {
        m: (saved[f"{m}.lora_A.default.weight"].contiguous(), saved[f"{m}.lora_B.default.weight"].contiguous())
        for m in MODULES
    }
    lora = write_lora(tmp_path / "x.safetensors", factors, LIGHTNING, alpha=3.0)
    fused = QwenImageTransformer2DModel.from_pretrained(run_fuse(base, {lora: 1.0}, tmp_path / "out"))
    torch.manual_seed(5)
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
        "return_dict": False,
    }
    with torch.no_grad():
        torch.testing.assert_close(fused(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)
        model.disable_adapters()
        assert (fused(**inputs)[0] - model(**inputs)[0]).abs().max() > 1e-2


def test_convolutions(tmp_path: Path) -> None:
    """A kernel LoRA, and a linear pair on a 1x1 convolution, by the flattened product."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = {"conv.weight": draw(6, 4, 3, 3), "point.weight": draw(6, 4, 1, 1), "norm.weight": draw(6)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / WEIGHTS)
    down, up = draw(2, 4, 3, 3), draw(6, 2, 1, 1)
    flat_down, flat_up = draw(2, 4), draw(6, 2)
    factors = {"conv": (down, up), "point": (flat_down, flat_up)}
    lora = write_lora(tmp_path / "x.safetensors", factors, LIGHTNING)
    fused = weights(run_fuse(tmp_path / "base", {lora: 1.0}, tmp_path / "out"))
    conv = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)  # kohya's form of the product
    torch.testing.assert_close(fused["conv.weight"], base["conv.weight"] + conv)
    torch.testing.assert_close(fused["point.weight"][..., 0, 0], base["point.weight"][..., 0, 0] + flat_up @ flat_down)
    assert torch.equal(fused["norm.weight"], base["norm.weight"])


def test_survival_figures_follow_their_definition(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    factors = make_factors(size=0.02)
    untrained = {"proj_out": (torch.ones(4, 48), torch.zeros(16, 4))}
    lora = write_lora(tmp_path / "x.safetensors", {**factors, **untrained}, DIFFSYNTH)
    plan = plan_fuse(open_checkpoint(base), [LoraRequest(lora)])
    changes = {change.name: change for change in fuse(plan, FuseOptions(tmp_path / "out")).manifest.changes}
    idle = changes.pop("proj_out.weight")
    assert (idle.delta_rms, idle.loss, idle.gain) == (0.0, 0.0, 1.0)
    before, after = weights(base), weights(tmp_path / "out")
    assert len(changes) == len(MODULES)
    for change in changes.values():
        weight, fused = before[change.name].double(), after[change.name].double()
        down, up = factors[change.name.removesuffix(".weight")]
        delta = up.double() @ down.double()
        assert change.weight_rms == pytest.approx(weight.square().mean().sqrt().item(), rel=1e-3)
        assert change.delta_rms == pytest.approx(delta.square().mean().sqrt().item(), rel=1e-3)
        assert change.loss == pytest.approx(((fused - weight - delta).norm() / delta.norm()).item(), rel=1e-2)
        assert change.gain == pytest.approx((((fused - weight) * delta).sum() / delta.square().sum()).item(), rel=1e-2)


def test_the_share_of_each_lora_follows_its_definition(tmp_path: Path) -> None:
    """`lora_rms` is sqrt(mean (strength * alpha/rank * B A)^2) of each, 0 where a LoRA leaves a tensor alone."""
    base = save_model(tmp_path / "base")
    sets = [make_factors(), make_factors(MODULES[:2], seed=2), make_factors(MODULES[1:], seed=3)]
    strengths = (1.0, -0.5, 0.25)
    loras = {
        write_lora(tmp_path / f"{i}.safetensors", factors, LIGHTNING, 2.0): strength
        for i, (factors, strength) in enumerate(zip(sets, strengths, strict=True))
    }
    manifest = read_manifest(run_fuse(base, loras, tmp_path / "out"))
    assert manifest
    assert {change.name for change in manifest.changes} == {f"{module}.weight" for module in MODULES}
    for change in manifest.changes:
        deltas = [
            strength * 0.5 * (factors[module][1].double() @ factors[module][0].double())
            if (module := change.name.removesuffix(".weight")) in factors
            else torch.zeros(1, dtype=torch.float64)
            for factors, strength in zip(sets, strengths, strict=True)
        ]
        assert change.lora_rms == pytest.approx([float(d.square().mean().sqrt()) for d in deltas], rel=6e-4)
        total = sum(deltas, torch.zeros((), dtype=torch.float64))
        assert change.delta_rms == pytest.approx(float(total.square().mean().sqrt()), rel=6e-4)


def test_one_lora_has_no_shares(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "x.safetensors", make_factors(), LIGHTNING, 2.0)
    manifest = read_manifest(run_fuse(save_model(tmp_path / "base"), {lora: 1.0}, tmp_path / "out"))
    assert manifest
    assert all(change.lora_rms == () for change in manifest.changes)
