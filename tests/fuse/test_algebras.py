"""Every update rule against an independent implementation: PEFT's, and formulas; LyCORIS' are in `test_lycoris`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from rules import applied, fused
from safetensors.torch import save_file

from lorafuse_common.algebras import ALGEBRAS, UNSUPPORTED, Shape, algebra, algebra_of, boft
from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_fuse.choices import LoraRequest, ProblemKind
from lorafuse_fuse.plan import plan_fuse


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


@pytest.mark.parametrize("spelling", ["peft", "kohya"])
def test_dora_equals_pefts_merge(tmp_path: Path, spelling: str) -> None:
    """A trained magnitude, alpha != rank, in kohya's file and in PEFT's, whose convolutions have `[1, out, 1, 1]`."""
    modules = ["0", "1"]
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
        assert (merged[name] - base[name]).abs().max() > 1e-2


def test_full_lokr_takes_no_alpha(tmp_path: Path) -> None:
    """ai-toolkit writes infinity there."""
    left, right = torch.randn(2, 3), torch.randn(4, 2)
    lora = {"a.lokr_w1": left, "a.lokr_w2": right, "a.alpha": torch.tensor(float("inf"))}
    result = fused(tmp_path, {"a.weight": torch.zeros(8, 6)}, lora)
    torch.testing.assert_close(result["a.weight"], 0.5 * torch.kron(left, right))


def test_lora_bias_equals_pefts_merge(tmp_path: Path) -> None:
    """The bias of B is scaled like B @ A; alpha stands beside the weight."""
    layer = torch.nn.Sequential(torch.nn.Linear(12, 20))
    base = {name: value.clone() for name, value in layer.state_dict().items()}
    tuned = get_peft_model(layer, LoraConfig(r=3, lora_alpha=2, target_modules=["0"], lora_bias=True))
    for name, value in tuned.named_parameters():
        if "lora_" in name:
            value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
    lora = {name: value.clone() for name, value in get_peft_model_state_dict(tuned).items()}
    merged = tuned.merge_and_unload().state_dict()
    result = fused(tmp_path, base, lora | {"base_model.model.0.alpha": torch.tensor(2.0)})
    for name, value in result.items():
        torch.testing.assert_close(value, base[name] + 0.5 * (merged[name] - base[name]))
    factors = {"down": lora["base_model.model.0.lora_A.weight"], "up_bias": lora["base_model.model.0.lora_B.bias"]}
    torch.testing.assert_close(applied(factors, base["0.bias"], 2.0, 1.0), merged["0.bias"])


def test_glora_in_its_old_form_and_with_a_core() -> None:
    """Told apart by shapes, even on a square weight (ComfyUI `weight_adapter/glora.py`), in float64."""
    torch.manual_seed(8)
    for out in (8, 6):
        base = torch.randn(out, 6, dtype=torch.float64)
        names = ("a1", "a2", "b1", "b2")
        shapes = ((2, 6), (6, 2), (2, 6), (out, 2))
        a1, a2, b1, b2 = its = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        factors = {f"glora_{name}": value for name, value in zip(names, its, strict=True)}
        expected = base + 1.5 * (base @ a2 @ a1 + b2 @ b1)
        torch.testing.assert_close(applied(factors, base, 3.0, 1.0, cuts=(3,)), expected)
    base, core = torch.randn(8, 6, 3, 3), torch.randn(2, 2, 3, 3)
    factors = {"a1": torch.randn(6, 2, 1, 1), "a2": torch.randn(2, 6, 1, 1), "bm": core}
    factors |= {"b1": torch.randn(8, 2, 1, 1), "b2": torch.randn(2, 6, 1, 1)}
    a1, a2, b1, b2 = (factors[name].flatten(1) for name in names)
    expected = base + torch.einsum("oihw,ir,rj->ojhw", base, a1, a2) + torch.einsum("mnhw,om,ni->oihw", core, b1, b2)
    result = applied({f"glora_{name}": value for name, value in factors.items()}, base, None, 1.0)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_a_replacement(tmp_path: Path) -> None:
    """Of a weight and of a norm; the strength is half the way there."""
    base = {"a.weight": torch.randn(8, 6), "n.weight": torch.randn(6)}
    new = {"a.set_weight": torch.randn(8, 6), "n.set_weight": torch.randn(6)}
    for name, value in base.items():
        replacement = new[name.replace(".weight", ".set_weight")]
        torch.testing.assert_close(applied({"set_weight": replacement}, value, None, 1.0), replacement)
    result = fused(tmp_path, base, new)
    for name, value in base.items():
        torch.testing.assert_close(result[name], (value + new[name.replace(".weight", ".set_weight")]) / 2)


def test_dora_of_rows_and_columns_without_a_direction() -> None:
    """A merged row or column of zeros stays one, whatever its magnitude, as LyCORIS' eps makes it; no NaN."""
    base = torch.randn(8, 6)
    base[2], base[:, 4] = 0, 0
    factors = {"down": torch.zeros(2, 6), "up": torch.randn(8, 2)}
    for magnitude in (torch.full((8,), 50.0), torch.full((1, 6), 50.0)):
        dim = 0 if magnitude.dim() == 2 else 1
        expected = 50 * torch.nn.functional.normalize(base, dim=dim)
        torch.testing.assert_close(applied({**factors, "magnitude": magnitude}, base, None, 1.0), expected)


RULES: dict[str, dict[str, Shape]] = {
    "lora": {"down": (2, 6), "up": (8, 2)},
    "lora_bias": {"down": (2, 6), "up_bias": (8,)},
    "lora-tucker": {"down": (2, 3, 1), "up": (8, 2, 1), "mid": (2, 2, 2)},
    "diff": {"diff": (8, 6)},
    "dora": {"down": (2, 6), "up": (8, 2), "magnitude": (8,)},
    "dora-columns": {"down": (2, 6), "up": (8, 2), "magnitude": (1, 6)},
    "loha": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)},
    "doha-columns": {
        "hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6), "magnitude": (6,)
    },
    "lokr": {"lokr_w1": (2, 3), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 2)},
    "glora": {"glora_a1": (6, 2), "glora_a2": (2, 6), "glora_b1": (8, 2), "glora_b2": (2, 6)},
    "oft": {"oft_blocks": (4, 2, 2), "rescale": (8, 1)},
    "boft": {"oft_blocks": (3, 4, 2, 2), "rescale": (8, 1)},
    "replace": {"set_weight": (8, 6)},
}  # fmt: skip
"""Factors of every rule for a weight of 8x6, a bias of 8, or a weight of 8x3x2."""


@pytest.mark.parametrize("name", RULES)
def test_blocks_of_rows_make_the_whole_delta(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """However a delta is cut into rows, the rows are the same; strength 0 changes nothing."""
    torch.manual_seed(9)
    factors = {role: torch.rand(shape) + 0.1 for role, shape in RULES[name].items()}
    shapes = {"lora_bias": (8,), "lora-tucker": (8, 3, 2)}
    base = torch.randn(shapes.get(name, (8, 6)))
    whole = applied(factors, base, 3.0, 0.5)
    assert torch.equal(applied(factors, base, 3.0, 0.0), base)
    for elements in (1, 20):
        monkeypatch.setattr(algebra, "BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(boft, "BLOCK_ELEMENTS", elements)
        torch.testing.assert_close(applied(factors, base, 3.0, 0.5, cuts=(3, 7)), whole)
    double = {role: factor.double() for role, factor in factors.items()}
    torch.testing.assert_close(applied(double, base.double(), 3.0, 0.5), whole.double(), atol=1e-5, rtol=1e-5)


def test_every_rule_is_looked_at() -> None:
    """And what a file may hold is either computed or refused by name."""
    assert {one.name for one in ALGEBRAS} <= set(RULES)
    assert not {role for shapes in RULES.values() for role in shapes} & set(UNSUPPORTED)


CONV = (8, 8, 3, 3)
MISFITS: dict[str, tuple[dict[str, Shape], Shape, str]] = {
    "loha": ({**RULES["loha"], "hada_w2_b": (2, 5)}, (8, 6), "do not make"),
    "loha-vectors": ({**RULES["loha"], "hada_w1_a": (8,)}, (8, 6), "no matrices"),
    "loha-core": (
        {"hada_w1_a": (2, 8), "hada_w1_b": (2, 8), "hada_w2_a": (2, 8), "hada_w2_b": (2, 8), "hada_t1": (2, 2, 3, 3),
         "hada_t2": (2, 1, 3, 3)}, CONV, "with core",
    ),
    "diff": ({"diff": (6, 8)}, (8, 6), "difference is 6x8"),
    "replace": ({"set_weight": (6, 8)}, (8, 6), "new weight is 6x8"),
    "lora-core": ({"down": (2, 8, 1, 1), "up": (8, 2, 1, 1), "mid": (2, 2, 5, 5)}, CONV, "with core"),
    "lora-bias": ({"down": (2, 6), "up_bias": (6,)}, (8,), "bias is 6, the base's 8"),
    "lora-bias-rank": ({"down": (), "up_bias": (8,)}, (8,), "no matrix"),
    "dora": ({**RULES["dora"], "magnitude": (7,)}, (8, 6), "not one for each of the 8 rows or 6 columns"),
    "dora-flat": ({**RULES["dora"], "magnitude": (1, 8)}, (8, 6), "not one for each"),
    "dora-scalar": ({**RULES["dora"], "magnitude": ()}, (8, 6), "not one for each"),
    "dora-either": (
        {"down": (2, 8, 3, 3), "up": (8, 2, 1, 1), "magnitude": (1, 8, 1, 1)}, CONV, "rows .* or its columns"
    ),
    "lokr": ({"lokr_w1": (2, 3), "lokr_w2": (4, 3)}, (8, 6), "Kronecker product"),
    "lokr-ranks": ({"lokr_w1_a": (2, 1), "lokr_w1_b": (2, 3), "lokr_w2": (4, 2)}, (8, 6), "ranks of its factors"),
    "lokr-empty": ({"lokr_w1": (2, 3), "lokr_w2_a": (4, 0), "lokr_w2_b": (0, 2)}, (8, 6), "no matrices"),
    "glora": ({**RULES["glora"], "glora_a2": (3, 6)}, (8, 6), "ranks of its factors"),
    "glora-width": ({**RULES["glora"], "glora_a1": (5, 2), "glora_a2": (2, 5)}, (8, 6), "do not act on"),
    "glora-weight": ({**RULES["glora"], "glora_b1": (7, 2)}, (8, 6), "B @ A is 7 x 6"),
    "oft": ({"oft_blocks": (3, 2, 2)}, (8, 6), "do not turn the 8 rows"),
    "oft-square": ({"oft_blocks": (4, 2, 3)}, (8, 6), "do not turn"),
    "oft-rescale": ({"oft_blocks": (4, 2, 2), "rescale": (6, 1)}, (8, 6), "rescale"),
    "boft": ({"oft_blocks": (4, 4, 2, 2)}, (8, 6), "no butterfly"),
    "boft-odd": ({"oft_blocks": (1, 3, 3, 3)}, (9, 6), "no butterfly"),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "base", "message"), MISFITS.values(), ids=MISFITS)
def test_shapes_that_do_not_fit(shapes: Mapping[str, Shape], base: Shape, message: str) -> None:
    rule = algebra_of(shapes)
    misfit = rule and rule.misfit(shapes, base)
    assert misfit and re.search(message, misfit)


@pytest.mark.parametrize(
    "factors",
    [
        {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 5)},
        {"lora_A": (2, 6), "lora_B": (8, 2), "dora_scale": (1, 8)},
        {"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (7, 2), "b2.weight": (2, 6)},
        {"oft_blocks": (4, 2, 2), "rescale": (6, 1)},
        {"set_weight": (6, 8)},
    ],
    ids=["loha", "dora", "glora", "oft", "replace"],
)
def test_factors_that_do_not_fit(tmp_path: Path, factors: Mapping[str, Shape]) -> None:
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
