"""The memory estimate, against what autograd really keeps, and its refusal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train.runs import run, save_world

from lorafuse_common.errors import ConfigError
from lorafuse_train import memory, train
from lorafuse_train.memory import Activations, Memory, lora_bytes, require_memory
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import resolve_config
from lorafuse_train.plan import Plan

GIB = 2**30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def config(**given: Any) -> TrainConfig:
    return resolve_config({"fused_model": "fused", "dataset_base_path": "data", "output_path": "out", **given})


class Kept:
    """Bytes of the tensors that a real forward pass keeps, without the model's own."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.own = {parameter.data_ptr() for parameter in parameters}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"mixed_precision": "bf16", "lora_dropout": 0.1}],
    ids=["lora", "dora", "autocast"],
)
def test_the_activations_are_those_that_autograd_keeps(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Predicted without weights, then counted in the first step of the run; only the loss itself comes on top."""
    seen: list[Memory] = []
    real: list[int] = []

    def noted(*given: Any) -> Memory:
        seen.append(estimate(*given))
        return seen[-1]

    def counted(training: Any, *given: Any) -> Tensor:
        kept = Kept(list(training.transformer.parameters()))
        with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
            loss = loss_sum(training, *given)
        x0 = next(training.encodings.latents(sample) for sample in training.plan.samples)
        real.append(kept.bytes - 2 * x0.nbytes * (training.plan.samples[0].size == (32, 32)))
        return loss

    from lorafuse_train.steps import loop

    estimate, loss_sum = memory.estimate_memory, loop._loss_sum
    monkeypatch.setattr(train, "estimate_memory", noted)
    monkeypatch.setattr(loop, "_loss_sum", counted)
    run(world, tmp_path / "out", max_train_steps=3, **options)
    activations = seen[0].activations
    assert activations and activations.checkpointed
    assert activations.whole == pytest.approx(max(real), rel=0.01)
    assert 0.3 * activations.whole < activations.checkpointed < activations.whole


def test_the_parts_are_counted(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def noted(plan: Plan) -> Memory:
        plans.append(plan)
        return least(plan)

    least = memory.least_memory
    monkeypatch.setattr(train, "least_memory", noted)
    run(world, tmp_path / "out", max_train_steps=1)
    found = least(plans[0])
    weights = sum(path.stat().st_size for path in (world / "fused" / "transformer").glob("*.safetensors"))
    assert found.weights == pytest.approx(weights, rel=0.05)
    count = 9088  # of the LoRA's parameters, as the run prints
    assert lora_bytes(plans[0]) == pytest.approx(count * 16, rel=0.01)


def estimated(**given: Any) -> tuple[Memory, TrainConfig]:
    return Memory(20 * GIB, GIB, Activations(10 * GIB, 2 * GIB, GIB, "1 x 1024x1024")), config(**given)


def test_too_much_is_refused_with_what_would_help() -> None:
    require_memory(*estimated())
    require_memory(*estimated(max_memory="33GiB"))
    require_memory(*estimated(max_memory="24GiB", use_gradient_checkpointing="yes"))
    with pytest.raises(ConfigError) as caught:
        require_memory(*estimated(max_memory="24GB", train_batch_size="4"))
    for part in (
        "--max_memory 24GB: the training needs about 31.5 GiB (weights 20.0 GiB, LoRA and adamw 1.0 GiB, activations",
        "Try --use_gradient_checkpointing (about 23.5 GiB then)",
        "--train_batch_size 1 --gradient_accumulation_steps 4",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"The weights of the base alone are too much\. --base_dtype bf16"):
        require_memory(*estimated(max_memory="16"))
    assert [config(max_memory=text).max_memory_bytes for text in ("24GB", "24", "1.5GiB", "512 MiB", "100mb")] == [
        24 * 10**9, 24 * 10**9, 3 * 2**29, 2**29, 10**8,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="max_memory: found 'much', expected a size such as"):
        config(max_memory="much")


def test_a_refused_training_loads_and_encodes_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unneeded(*_: object) -> None:
        raise AssertionError("nothing is loaded for a training that is refused")

    monkeypatch.setattr(train, "load_transformer", unneeded)
    with monkeypatch.context() as patch:
        patch.setattr(train, "fill_cache", unneeded)
        with pytest.raises(ConfigError, match="The weights of the base alone are too much"):
            run(world, tmp_path / "out", max_memory="0.1MB")
    with pytest.raises(ConfigError, match=r"activations .* for 2 x 32x32 with the longest caption"):
        run(world, tmp_path / "out", max_memory="0.9MB")


def test_a_model_that_cannot_be_tried_is_said_to_be_so(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(memory, "_pretend", broken)
    run(world, tmp_path / "out", max_train_steps=1)
    printed = capsys.readouterr().out
    assert "activations unknown), for this model cannot be tried without its weights (RuntimeError: no such" in printed
