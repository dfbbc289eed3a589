"""Every update rule against an independent implementation: PEFT's, and LyCORIS' formulas in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lorafuse_common.algebras import ALGEBRAS, Block, algebra_of
from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_fuse.fuse import FuseOptions, fuse, require_clean
from lorafuse_fuse.plan import LoraRequest, ProblemKind, plan_fuse

Tensors = Mapping[str, torch.Tensor]


def fused(folder: Path, base: Tensors, lora: Tensors) -> dict[str, torch.Tensor]:
    save_file({name: value.detach().clone() for name, value in base.items()}, folder / "base.safetensors")
    save_file({name: value.detach().clone() for name, value in lora.items()}, folder / "lora.safetensors")
    plan = plan_fuse(open_checkpoint(folder / "base.safetensors"), [LoraRequest(folder / "lora.safetensors", 0.5)])
    require_clean(plan, ())
    fuse(plan, FuseOptions(folder / "out"))
    return load_file(folder / "out" / "base.safetensors")


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 20, bias=False), torch.nn.Conv2d(6, 8, 3, bias=False))


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=3, alpha=2, target_modules=["0", "1"], init_weights=False),
        LoHaConfig(r=3, alpha=2, target_modules=["1"], init_weights=False, use_effective_conv2d=True),
        LoKrConfig(r=2, alpha=3, target_modules=["0"], init_weights=False, decompose_factor=2),
        LoKrConfig(r=1, alpha=3, target_modules=["1"], init_weights=False, decompose_factor=2),
        LoKrConfig(r=1, alpha=3, target_modules=["0"], init_weights=False, decompose_both=True, decompose_factor=4),
        LoKrConfig(r=1, alpha=3, target_modules=["1"], init_weights=False, use_effective_conv2d=True),
        LoKrConfig(r=64, alpha=64, target_modules=["0", "1"], init_weights=False),
    ],
    ids=["loha", "loha-tucker", "lokr", "lokr-conv", "lokr-both", "lokr-tucker", "lokr-full"],
)
def test_equals_pefts_delta(tmp_path: Path, config: PeftConfig) -> None:
    """Where both factors of a LoKr are full, PEFT alone scales by alpha / r: alpha = r there."""
    base = {name: value.clone() for name, value in model().state_dict().items()}
    torch.manual_seed(1)
    tuned = get_peft_model(model(), config)
    state = {name: value for name, value in tuned.state_dict().items() if "hada_" in name or "lokr_" in name}
    stems = {name.split(".hada_")[0].split(".lokr_")[0] for name in state}
    alphas = {f"{stem}.alpha": torch.tensor(float(config.alpha)) for stem in stems}
    result = fused(tmp_path, base, state | alphas)
    for stem in stems:
        name = stem.removeprefix("base_model.model.")
        delta = tuned.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(result[f"{name}.weight"], base[f"{name}.weight"] + 0.5 * delta)
        assert delta.abs().max() > 1e-3


@pytest.mark.parametrize(("spelling", "modules"), [("peft", ["0"]), ("kohya", ["0", "1"])])
def test_dora_equals_pefts_merge(tmp_path: Path, spelling: str, modules: list[str]) -> None:
    """A trained magnitude, alpha != rank, in kohya's file and in PEFT's, whose convolutions could mean columns."""
    tuned = get_peft_model(model(), LoraConfig(r=3, lora_alpha=2, target_modules=modules, use_dora=True))
    for name, value in tuned.named_parameters():
        if "lora_" in name:
            torch.manual_seed(len(name))
            value.data += torch.rand_like(value)
    base = {name: value.clone() for name, value in model().state_dict().items()}
    state = get_peft_model_state_dict(tuned)
    lora: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        stem, _, role = name.removeprefix("base_model.model.").rpartition(".lora_")
        if spelling == "peft":
            lora[name] = value
        elif role.startswith("magnitude"):
            lora[f"lora_unet_{stem}.dora_scale"] = value.flatten()[:, None]
        else:
            lora[f"lora_unet_{stem}.lora_{'down' if role[0] == 'A' else 'up'}.weight"] = value
    prefix = "base_model.model." if spelling == "peft" else "lora_unet_"
    lora |= {f"{prefix}{name}.alpha": torch.tensor(2.0) for name in modules}
    merged = tuned.merge_and_unload().state_dict()
    result = fused(tmp_path, base, lora)
    for name, value in result.items():
        torch.testing.assert_close(value, base[name] + 0.5 * (merged[name] - base[name]))
        assert name[0] not in modules or (merged[name] - base[name]).abs().max() > 1e-2


def test_full_lokr_takes_no_alpha(tmp_path: Path) -> None:
    """ai-toolkit writes infinity there."""
    left, right = torch.randn(2, 3), torch.randn(4, 2)
    lora = {"a.lokr_w1": left, "a.lokr_w2": right, "a.alpha": torch.tensor(float("inf"))}
    result = fused(tmp_path, {"a.weight": torch.zeros(8, 6)}, lora)
    torch.testing.assert_close(result["a.weight"], 0.5 * torch.kron(left, right))


def test_blocks_of_rows_make_the_whole_delta() -> None:
    """However a delta is cut into rows, the rows are the same."""
    factors = {
        "lora": {"down": torch.randn(2, 6), "up": torch.randn(8, 2)},
        "diff": {"diff": torch.randn(8, 6)},
        "dora": {"down": torch.randn(2, 6), "up": torch.randn(8, 2), "magnitude": torch.rand(8) + 1},
        "loha": {f"hada_w{n}_{s}": torch.randn((8, 2) if s == "a" else (2, 6)) for n in (1, 2) for s in "ab"},
        "lokr": {"lokr_w1": torch.randn(2, 3), "lokr_w2_a": torch.randn(4, 1), "lokr_w2_b": torch.randn(1, 2)},
    }
    for algebra in ALGEBRAS:
        tensors = factors[algebra.name]
        assert algebra_of(set(tensors)) is algebra
        weight, whole, cut = torch.randn(8, 6), torch.zeros(8, 6), torch.zeros(8, 6)
        algebra.add_delta(tensors, Block(0, 8, weight, whole), 2.0, 0.5)
        for start, stop in ((0, 3), (3, 7), (7, 8)):
            algebra.add_delta(tensors, Block(start, stop, weight[start:stop], cut[start:stop]), 2.0, 0.5)
        torch.testing.assert_close(cut, whole)


@pytest.mark.parametrize(
    "factors",
    [
        {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 5)},
        {"diff": (6, 8)},
        {"lora_A": (2, 6), "lora_B": (8, 2), "dora_scale": (1, 6)},
        {"lora_A": (2, 6), "lora_B": (8, 2), "dora_scale": (6,)},
        {"lokr_w1": (2, 3), "lokr_w2": (4, 3)},
        {"lokr_w1_a": (2, 1), "lokr_w1_b": (2, 3), "lokr_w2": (4, 2)},
    ],
    ids=["loha", "diff", "dora-columns", "dora", "lokr", "lokr-ranks"],
)
def test_factors_that_do_not_fit(tmp_path: Path, factors: Mapping[str, tuple[int, ...]]) -> None:
    save_file({"a.weight": torch.zeros(8, 6)}, tmp_path / "base.safetensors")
    save_file({f"a.{role}": torch.ones(shape) for role, shape in factors.items()}, tmp_path / "lora.safetensors")
    plan = plan_fuse(open_checkpoint(tmp_path / "base.safetensors"), [LoraRequest(tmp_path / "lora.safetensors")])
    assert plan.problems[0].kind is ProblemKind.SHAPE_MISMATCH


def test_differences_of_weights_biases_norms_and_modulations(tmp_path: Path) -> None:
    """A full set as LightX2V writes it, in original names, onto Wan in both layouts (converted by diffusers)."""
    torch.manual_seed(3)
    base = {
        "blocks.0.self_attn.q.weight": torch.randn(6, 6), "blocks.0.self_attn.q.bias": torch.randn(6),
        "blocks.0.norm3.weight": torch.randn(6), "blocks.0.norm3.bias": torch.randn(6),
        "blocks.0.modulation": torch.randn(1, 6, 6), "head.modulation": torch.randn(1, 2, 6),
        "head.head.weight": torch.randn(4, 6),
    }  # fmt: skip
    endings = {".weight": ".diff", ".bias": ".diff_b"}
    lora, expected = {}, {}
    for name, value in base.items():
        stem, dot, kind = name.rpartition(".")
        ending = endings.get(dot + kind, ".diff_m")
        lora[f"diffusion_model.{stem}{ending}"] = delta = torch.randn(value.shape)
        expected[name] = value + 0.5 * delta  # alpha never scales a difference, the strength does
    down, up = torch.randn(2, 6), torch.randn(6, 2)
    del lora["diffusion_model.blocks.0.self_attn.q.diff"]  # a low-rank weight beside a full bias
    lora |= {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": down}
    lora |= {"diffusion_model.blocks.0.self_attn.q.lora_up.weight": up}
    expected["blocks.0.self_attn.q.weight"] = base["blocks.0.self_attn.q.weight"] + 0.5 * up @ down
    (tmp_path / "original").mkdir()
    (tmp_path / "diffusers").mkdir()
    torch.testing.assert_close(fused(tmp_path / "original", base, lora), expected)
    convert = SINGLE_FILE_LOADABLE_CLASSES["WanTransformer3DModel"]["checkpoint_mapping_fn"]
    converted = fused(tmp_path / "diffusers", convert(checkpoint=dict(base)), lora)
    torch.testing.assert_close(converted, convert(checkpoint=expected))


def test_a_difference_of_a_bias_that_is_not_there(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(8, 6)}, tmp_path / "base.safetensors")
    save_file({"a.diff": torch.ones(8, 6), "a.diff_b": torch.ones(8)}, tmp_path / "lora.safetensors")
    plan = plan_fuse(open_checkpoint(tmp_path / "base.safetensors"), [LoraRequest(tmp_path / "lora.safetensors")])
    assert [problem.kind for problem in plan.problems] == [ProblemKind.NO_SUCH_MODULE, ProblemKind.NO_EFFECT]
    assert "lacks a.bias" in plan.problems[0].detail
    assert (plan.loras[0].modules, plan.loras[0].applied) == (1, 0)  # half a module is not applied
