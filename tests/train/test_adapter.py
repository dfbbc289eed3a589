"""Every kind of LoRA: how it starts, what it computes and what its file says, against PEFT and diffusers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train import tiny

from lorafuse_common.errors import ConfigError
from lorafuse_common.families.qwen_image import QWEN_IMAGE
from lorafuse_train.base import open_base
from lorafuse_train.dataset.data import Sample
from lorafuse_train.lora.adapter import FILE_NAME, attach, dropout, lora_state, spare_casts, without
from lorafuse_train.lora.lora_file import load_back, save_lora
from lorafuse_train.lora.metadata import lora_header
from lorafuse_train.lora.pissa import INITIAL
from lorafuse_train.lora.ranks import adapter_arguments, module_strengths, trainable
from lorafuse_train.lora.targets import Targets, resolve_targets
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import resolve_config
from lorafuse_train.plan import Plan
from lorafuse_train.recipes.qwen_image import QwenImage

TARGETS = "to_q,img_mod.1,img_mlp.net.2"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian", "lora_alpha": 16},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rslora": {"use_rslora": "yes", "lora_alpha": 3},
    "dora": {"use_dora": "yes", "lora_alpha": 2},
    "pissa": {"init_lora_weights": "pissa", "lora_alpha": 2},
    "pissa, fast": {"init_lora_weights": "pissa_niter_8", "use_rslora": "yes", "lora_dropout": 0.1},
    "patterns": {"rank_pattern": {"img_mod.1": 2, r"regex:.*\.1\.attn\.to_q": 6}, "alpha_pattern": {"to_q": 3}},
}


def config(**given: Any) -> TrainConfig:
    options = {
        "fused_model": "x",
        "dataset_base_path": "x",
        "output_path": "x",
        "lora_rank": 4,
        "allow_unfused_base": "yes",
    }
    return resolve_config({**options, "lora_target_modules": TARGETS, **given})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "base")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", dtype=dtype)
    return model.requires_grad_(False).eval()


def targets(transformer: nn.Module, asked: TrainConfig) -> Targets:
    return resolve_targets(transformer, QWEN_IMAGE, asked.lora_target_modules)


def predict(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, caption = torch.randn(1, 4, 8, 8, generator=generator), {"embeds": torch.randn(3, 16, generator=generator)}
    recipe = QwenImage()
    return recipe.predict(transformer, x, torch.tensor([0.5]), recipe.collate([caption]))


def train(transformer: Any, parameters: list[nn.Parameter], steps: int = 3) -> None:
    optimizer = torch.optim.SGD(parameters, lr=5)
    for _ in range(steps):
        torch.autograd.backward(predict(transformer).square().mean())
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_starts_as_the_base_and_only_the_lora_learns(folder: Path, kind: str, dtype: torch.dtype) -> None:
    transformer, asked = load(folder, dtype), config(**KINDS[kind])
    weights = {name: value.clone() for name, value in transformer.state_dict().items()}
    its = targets(transformer, asked)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        bare = predict(transformer)
        parameters = attach(transformer, its, asked)
        assert gap(predict(transformer), bare) < (1e-5 if dtype is torch.float32 else 0.01)
        with without(transformer):
            assert predict(transformer).equal(bare)
        assert {name for name, p in transformer.named_parameters() if p.requires_grad} == set(parameters)
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    assert sum(parameter.numel() for parameter in parameters.values()) == trainable(its, asked)
    left = {name.replace(".base_layer.", "."): value for name, value in transformer.state_dict().items()}
    assert all(left[name].equal(value) for name, value in weights.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_spared_casts_change_no_bit(folder: Path, kind: str, dtype: torch.dtype) -> None:
    """Of predictions under autocast, and with one adapter of what is learnt: two add their gradients in bf16 then."""
    found = []
    for spares in (False, True):
        transformer, asked = load(folder, dtype), config(**KINDS[kind])
        parameters = attach(transformer, targets(transformer, asked), asked)
        if spares:
            spare_casts(transformer)
        for factor in parameters.values():
            factor.data += 0.01
        with torch.autocast("cpu", torch.bfloat16):
            found.append([predict(transformer).detach()])
            train(transformer, list(parameters.values()))
        if "pissa" not in kind:
            found[-1] += [factor.detach() for factor in parameters.values()]
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_what_was_trained_even_without_its_header(folder: Path, tmp_path: Path, kind: str) -> None:
    """Loaded by diffusers into the unmodified base, twice: as it is, and as readers see it who know no metadata."""
    transformer, asked = load(folder), config(fused_model=folder, **KINDS[kind])
    its = targets(transformer, asked)
    train(transformer, list(attach(transformer, its, asked).values()))
    trained = predict(transformer).detach()
    base, file = open_base(asked), tmp_path / FILE_NAME
    plan = Plan(asked, base, QwenImage(), its, [Sample(Path("x"), "a", "", (8, 8))])
    save_lora(file, lora_state(transformer), lora_header(plan, 2))
    load_back(transformer, folder, file)
    loaded = predict(transformer).detach()
    fresh = load(folder)
    bare = predict(fresh).detach()
    assert gap(trained, bare) > 1e-3
    assert gap(loaded - bare, trained - bare) < 2e-3
    (tmp_path / "bare").mkdir()
    save_file(load_file(file), tmp_path / "bare" / FILE_NAME)
    load_back(fresh, folder, tmp_path / "bare" / FILE_NAME)
    assert gap(predict(fresh) - bare, trained - bare) < 2e-3
    with safe_open(file, "pt") as opened:
        adapter = json.loads(opened.metadata()["lora_adapter_metadata"])
    ranks = {name: tensor.shape[0] for name, tensor in load_file(file).items() if "lora_A" in name}
    assert adapter["transformer.r"] == (8 if "pissa" in kind else 4)
    assert adapter["transformer.lora_alpha"] == adapter["transformer.r"]
    assert adapter.get("transformer.use_dora", False) == (kind == "dora")
    assert adapter.get("transformer.rank_pattern") == adapter.get("transformer.alpha_pattern")
    if kind == "patterns":
        assert ranks["transformer.transformer_blocks.1.attn.to_q.lora_A.weight"] == 6
        assert ranks["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] == 4
        assert ranks["transformer.transformer_blocks.0.img_mod.1.lora_A.weight"] == 2


@pytest.mark.parametrize("kind", ["plain", "gaussian", "orthogonal", "rslora", "dora"])
def test_it_is_pefts_own_lora(folder: Path, kind: str) -> None:
    ours, theirs, asked = load(folder), load(folder), config(**KINDS[kind], seed=3)
    its = targets(ours, asked)
    train(ours, list(attach(ours, its, asked).values()))
    torch.manual_seed(3)
    init = {"gaussian": "gaussian", "orthogonal": "orthogonal"}.get(kind, True)
    theirs.add_adapter(
        LoraConfig(
            r=4, lora_alpha=asked.alpha, target_modules=list(its.modules), init_lora_weights=init,
            use_dora=asked.use_dora, use_rslora=asked.use_rslora,
        )
    )  # fmt: skip
    train(theirs, [parameter for parameter in theirs.parameters() if parameter.requires_grad])
    assert gap(predict(ours), predict(theirs)) < 1e-5
    state = lora_state(ours)
    for name, module in theirs.named_modules():
        if isinstance(module, LoraLayer):
            prefix = f"transformer.{name}.lora_"
            delta = state[f"{prefix}B.weight"] @ state[f"{prefix}A.weight"]
            assert torch.allclose(delta, module.get_delta_weight("default"), atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_components_are_pefts_and_train_alike(folder: Path, init: str) -> None:
    """PEFT takes them off the weights; the same function, and the same difference of weights."""
    ours, theirs, asked = load(folder), load(folder), config(init_lora_weights=init, lora_alpha=2)
    its = targets(ours, asked)
    parameters = attach(ours, its, asked)
    torch.manual_seed(0)
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=list(its.modules), init_lora_weights=init))
    layers = {name: module for name, module in theirs.named_modules() if isinstance(module, LoraLayer)}
    for name, module in ours.named_modules():
        if isinstance(module, LoraLayer):
            if init == "pissa":
                assert torch.allclose(module.lora_A["default"].weight, layers[name].lora_A["default"].weight, atol=1e-6)
            for factor in ("lora_A", "lora_B"):  # an estimate draws random numbers; go on from the same
                here, there = getattr(module, factor), getattr(layers[name], factor)["default"].weight
                here[INITIAL].weight.data = (-1 if factor == "lora_B" else 1) * there.data.clone()
                here["default"].weight.data = there.data.clone()
    before = {name: layer.get_base_layer().weight + layer.get_delta_weight("default") for name, layer in layers.items()}
    train(ours, list(parameters.values()))
    train(theirs, [parameter for parameter in theirs.parameters() if parameter.requires_grad])
    assert gap(predict(ours), predict(theirs)) < 1e-5
    state = lora_state(ours)
    for name, layer in layers.items():
        prefix = f"transformer.{name}.lora_"
        delta = layer.get_base_layer().weight + layer.get_delta_weight("default") - before[name]
        assert torch.allclose(state[f"{prefix}B.weight"] @ state[f"{prefix}A.weight"], delta, atol=1e-5)


def test_the_file_of_components_bears_a_readers_bf16(folder: Path) -> None:
    """PEFT's own conversion puts A, A0, B and B0 side by side, which differ by less than bf16 tells apart."""
    transformer, asked = load(folder), config(init_lora_weights="pissa", lora_rank=20)  # twice 20 is more than 32
    train(transformer, list(attach(transformer, targets(transformer, asked), asked).values()), steps=1)
    state, checked = lora_state(transformer), 0
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            a, b = (state[f"transformer.{name}.lora_{factor}.weight"] for factor in "AB")
            assert a.shape == (40, module.in_features) and b.shape == (module.out_features, 40)
            delta = module.get_delta_weight("default") + module.get_delta_weight(INITIAL)
            assert gap(b @ a, delta) < 1e-3
            assert gap(b.bfloat16().float() @ a.bfloat16().float(), delta) < 0.01
            checked += 1
    assert checked == 6


def test_dropout_is_drawn_from_its_seed_and_off_in_samples(folder: Path) -> None:
    transformer, asked = load(folder), config(lora_dropout=0.5)
    train(transformer, list(attach(transformer, targets(transformer, asked), asked).values()))
    seen = []
    for share, seed in ((0.0, 1), (0.5, 1), (0.5, 1), (0.5, 2)):
        with dropout(transformer, share, seed), torch.no_grad():
            seen.append(predict(transformer))
    assert seen[1].equal(seen[2])
    assert not seen[1].equal(seen[3])
    assert not seen[1].equal(seen[0])
    assert seen[0].equal(predict(transformer))


def test_patterns_give_every_module_its_own(folder: Path) -> None:
    transformer, asked = load(folder), config(**KINDS["patterns"])
    found = module_strengths(targets(transformer, asked), asked)
    assert {name: (s.rank, s.alpha) for name, s in found.items()} == {
        f"transformer_blocks.{block}.{ending}": strength
        for block in (0, 1)
        for ending, strength in (
            ("attn.to_q", (4 + 2 * block, 3.0)), ("img_mod.1", (2, 2.0)), ("img_mlp.net.2", (4, 4.0)),
        )
    }  # fmt: skip
    kept = module_strengths(targets(transformer, asked), config(**KINDS["patterns"], lora_alpha=5))
    assert kept["transformer_blocks.0.img_mod.1"].alpha == 5


def test_faulty_patterns_are_all_named(folder: Path) -> None:
    transformer = load(folder)
    asked = config(
        rank_pattern={"to_k": 3, "regex:(": 2, "to_q": 5, "attn.to_q": 6, "{}.img_mod.1": 100},
        alpha_pattern={"img_mod": 1}, init_lora_weights="pissa",
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        module_strengths(targets(transformer, asked), asked)
    for part in (
        "--rank_pattern to_k=3: none of the 6 target modules is so named",
        "--rank_pattern regex:(: not a regular expression",
        "--rank_pattern: transformer_blocks.0.attn.to_q has 5 by to_q and 6 by attn.to_q",
        "--alpha_pattern img_mod=1: none of the 6",
        "--init_lora_weights pissa: transformer_blocks.0.img_mod.1 is 192x32, too small for rank 100",
    ):
        assert part in str(caught.value)


def test_contradictions() -> None:
    faults: dict[str, dict[str, Any]] = {
        "use_dora, init_lora_weights": {"use_dora": "yes", "init_lora_weights": "pissa"},
        "lora_checkpoint, init_lora_weights: both say": {"lora_checkpoint": "a", "init_lora_weights": "gaussian"},
        "lora_rank, init_lora_weights: orthogonal needs even": {"lora_rank": 3, "init_lora_weights": "orthogonal"},
        "rank_pattern: to_q: found 0, expected at least 1": {"rank_pattern": ["to_q=0"]},
        "rank_pattern: to_q: found 'x', expected a whole number": {"rank_pattern": ["to_q=x"]},
        "init_lora_weights: found 'pissa_niter_0', expected true, gaussian": {"init_lora_weights": "pissa_niter_0"},
    }
    for message, given in faults.items():
        with pytest.raises(ConfigError) as caught:
            config(**given)
        assert message in str(caught.value)
    assert config(rank_pattern=[r"regex:.*(?=a)=4"]).rank_pattern == ((r"regex:.*(?=a)", 4),)


def test_a_name_that_others_end_in_means_itself_alone() -> None:
    """PEFT takes `proj_out` for every module whose name ends so."""
    model = nn.ModuleDict({"proj_out": nn.Linear(4, 4), "block": nn.ModuleDict({"proj_out": nn.Linear(4, 4)})})
    its = resolve_targets(model, QWEN_IMAGE, "regex:proj_out")
    assert its.namesakes == ("proj_out",)
    from peft import inject_adapter_in_model

    arguments: dict[str, Any] = adapter_arguments(its, {"proj_out": 2}, {"proj_out": 2.0})
    wanted = LoraConfig(**arguments)
    injected = inject_adapter_in_model(wanted, copy.deepcopy(model))
    assert [name for name, module in injected.named_modules() if isinstance(module, LoraLayer)] == ["proj_out"]
