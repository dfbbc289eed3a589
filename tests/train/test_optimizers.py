"""Optimizers by name and class path, their state, the moving average; each against torch, transformers or diffusers."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from lorafuse_common.errors import ConfigError
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import resolve_config
from lorafuse_train.steps.ema import Ema, averaged
from lorafuse_train.steps.optimizers import NAMED, build_optimizer, check_optimizer
from lorafuse_train.steps.packing import pack, restore_optimizer, unpack

GIVEN: dict[str, Any] = {"fused_model": "fused", "dataset_base_path": "data", "output_path": "out"}
CPU = torch.device("cpu")


def config(**given: Any) -> TrainConfig:
    return resolve_config({**GIVEN, **given})


def weights(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 80), (3, 64), (5,))]


def descend(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_the_default_is_torchs_adamw() -> None:
    ours, theirs = weights(), weights()
    descend(build_optimizer(config(learning_rate="0.01", adam_beta1="0.8"), ours), ours, 3)
    descend(torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.999), weight_decay=0.01, eps=1e-8), theirs, 3)
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def test_adafactor_is_transformers_with_the_rate_we_give() -> None:
    from transformers.optimization import Adafactor

    ours, theirs = weights(), weights()
    asked = config(optimizer="adafactor", learning_rate="0.01", optimizer_args=["clip_threshold=0.5"])
    descend(build_optimizer(asked, ours), ours, 3)
    reference = Adafactor(theirs, lr=0.01, clip_threshold=0.5, scale_parameter=False, relative_step=False)
    descend(reference, theirs, 3)
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def test_arguments_arrive_from_text_and_from_yaml(tmp_path: Path) -> None:
    text = ["betas=[0.5, 9e-1]", "eps=1e-4", "momentum_decay=0.01", "foreach=false"]
    (tmp_path / "a.yaml").write_text(
        "optimizer_args:\n  betas: [0.5, 9e-1]\n  eps: 1e-4\n  momentum_decay: 0.01\n  foreach: no"
    )
    asked = [
        config(optimizer="torch.optim.NAdam", optimizer_args=text),
        config(optimizer="torch.optim.NAdam", config=str(tmp_path / "a.yaml")),
    ]
    for one in asked:
        (group,) = build_optimizer(one, weights()).param_groups
        assert (group["betas"], group["eps"], group["momentum_decay"]) == ([0.5, 0.9], 1e-4, 0.01)
        assert group["foreach"] is False
        assert group["lr"] == 1e-4


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("torch.optim.NAdamm", [], r"torch\.optim has no such class"),
        ("torch.optimm.NAdam", [], r"there is no module torch\.optimm"),
        ("nowhere.to.be.Found", [], "pip install nowhere"),
        ("torch.nn.Linear", [], r"torch\.nn\.Linear is a type, no torch\.optim\.Optimizer"),
        ("torch.optim.NAdam", ["nesterov=true"], "unexpected keyword .*nesterov.*Its --optimizer_args: betas, eps"),
        ("adamw", ["amsgrad=[1"], r"optimizer_args: amsgrad: found '\[1', expected"),
        ("adamw", ["amsgrad"], "found 'amsgrad', expected name=value"),
        ("adamw", ["eps=1e-8", "betas=[0.9,0.9]", "eps=1"], "eps is given twice"),
        ("adamw", ["lr=1"], "lr is --learning_rate"),
        ("torch.optim.LBFGS", [], "cannot train a LoRA here"),
        ("torch.optim.SparseAdam", [], "cannot train a LoRA here"),
        ("adam", [], "found 'adam', expected adamw, adamw8bit, prodigy, adafactor or a class"),
    ],
)
def test_what_cannot_be_used_says_why(name: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optimizer(config(optimizer=name, optimizer_args=arguments), CPU)


def test_contradictions_are_found_with_everything_else() -> None:
    given = {"optimizer": "adafactor", "adam_beta1": "0.5", "lr_power": "2", "ema_update_after_step": "3"}
    with pytest.raises(ConfigError) as caught:
        config(**given, optimizer_args=["lr=1", "params=2"])
    for part in (
        "adam_beta1, optimizer: is not for adafactor",
        "optimizer_args: lr is --learning_rate",
        "optimizer_args: params are the LoRA's weights",
        "lr_power, lr_scheduler: is for --lr_scheduler polynomial",
        "ema_update_after_step, ema_decay: without --ema_decay",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="adam_epsilon, optimizer_args: both say eps"):
        config(adam_epsilon="1e-6", optimizer_args=["eps=1e-7"])
    with pytest.raises(ConfigError, match=r"learning_rate, optimizer: prodigy finds its own rate .*, 0\.0001"):
        config(optimizer="prodigy", learning_rate="1e-4")
    assert config(optimizer="prodigy").peak_learning_rate == 1
    assert config(learning_rate="1e-3").peak_learning_rate == 1e-3
    assert config(optimizer="adafactor", adam_beta1="0.9").peak_learning_rate == 1e-4


@pytest.mark.parametrize("name", ["adamw8bit", "prodigy"])
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    package = NAMED[name].package
    assert package
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder)])
    with pytest.raises(ConfigError, match=f"needs a package that is not here: pip install {package}"):
        build_optimizer(config(optimizer=name), weights())


class Odd(torch.optim.SGD):
    """Keeps what a checkpoint must take care with: bf16 moments, a shared table, tuples, and views."""

    shared = torch.arange(4.0)

    def __init__(self, params: Any, lr: float, forgets: bool = False, keeps: Any = None) -> None:
        super().__init__(params, lr=lr)
        self.forgets, self.keeps = forgets, keeps
        self.hidden = 1.0

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            own = self.state[parameter]
            moment = own.get("moment", torch.zeros_like(parameter, dtype=torch.bfloat16))
            own.update(moment=(moment + parameter.grad).bfloat16(), table=self.shared, view=self.shared[1:])
            own.update(count=own.get("count", 0) + 1, pair=(1, [2.5, None, "x"]), keeps=self.keeps)
            self.hidden *= 1.5
            scale = self.hidden if self.forgets else 1.0
            parameter.data.sub_(0.1 * scale * torch.rand(parameter.shape) * own["moment"].float())
        return None


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("odd_optimizers")
    module.Odd = Odd  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "odd_optimizers", module)
    return "odd_optimizers.Odd"


def test_any_class_with_exact_state_will_do_and_others_are_refused(odd: str) -> None:
    check_optimizer(config(optimizer=odd), CPU)  # it draws random numbers, too
    with pytest.raises(ConfigError, match="does not go on exactly where its state_dict was taken"):
        check_optimizer(config(optimizer=odd, optimizer_args=["forgets=true"]), CPU)
    with pytest.raises(ConfigError, match="no checkpoint can hold its state, a date"):
        check_optimizer(config(optimizer=odd, optimizer_args=["keeps=2020-01-01"]), CPU)


INSTALLED = [name for name, named in NAMED.items() if not named.package or importlib.util.find_spec(named.package)]


@pytest.mark.parametrize("name", [*INSTALLED, "torch.optim.NAdam", "torch.optim.Adamax", "odd"])
def test_state_survives_packing_to_the_last_bit(name: str, odd: str) -> None:
    asked = config(optimizer=odd if name == "odd" else name)
    ours = weights()
    optimizer = build_optimizer(asked, ours)
    descend(optimizer, ours, 2)
    saved = optimizer.state_dict()
    plain, tensors = pack(saved, "optimizer")
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == len(tensors)
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    restored = build_optimizer(asked, copies)
    restore_optimizer(restored, unpack(plain, tensors))
    again, same = pack(restored.state_dict(), "optimizer")
    assert again == plain
    assert all(same[key].dtype == tensor.dtype and same[key].equal(tensor) for key, tensor in tensors.items())
    for one, its in ((optimizer, ours), (restored, copies)):
        torch.manual_seed(0)
        descend(one, its, 2, seed=9)
    assert all(a.equal(b) for a, b in zip(ours, copies, strict=True))


@pytest.mark.parametrize("after", [0, 3])
def test_the_average_is_diffusers(after: int) -> None:
    parameters = weights()
    ours = Ema({str(index): parameter for index, parameter in enumerate(parameters)}, 0.6, after)
    theirs = EMAModel(parameters, decay=0.6, update_after_step=after)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(1, 20):
        descend(optimizer, parameters, 1, seed=step)
        ours.update(step)
        theirs.step(parameters)
    assert all(a.equal(b) for a, b in zip(ours.averages.values(), theirs.shadow_params, strict=True))
    raw = [parameter.detach().clone() for parameter in parameters]
    with averaged(ours):
        assert all(a.equal(b) for a, b in zip(parameters, theirs.shadow_params, strict=True))
    assert all(a.equal(b) for a, b in zip(parameters, raw, strict=True))
    assert not parameters[0].equal(theirs.shadow_params[0])
