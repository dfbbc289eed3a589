"""Trainings that start from a LoRA: whatever its spelling and scale, the first prediction is the LoRA's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from train.runs import run, save_world
from train.test_adapter import predict

from lorafuse_common.errors import ConfigError
from lorafuse_common.hashing import sha256_of
from lorafuse_train.base import open_base
from lorafuse_train.lora.adapter import FILE_NAME, attach
from lorafuse_train.lora.targets import meta_model, resolve_targets
from lorafuse_train.lora.warm_start import Start, read_start, start_from
from lorafuse_train.options.options import resolve_config

MODULES = tuple(f"transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in ("to_q", "to_v"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def read(world: Path, file: Path, **given: Any) -> tuple[Start, Any]:
    """The start, and a transformer that has it."""
    paths = {"fused_model": str(world / "fused"), "dataset_base_path": "x", "output_path": "x"}
    config = resolve_config(
        {**paths, "lora_checkpoint": str(file), "lora_target_modules": "to_q,to_v", "lora_rank": 4, **given}
    )
    base = open_base(config)
    targets = resolve_targets(
        meta_model(base.config["_class_name"], base.config), base.family, config.lora_target_modules
    )
    start = read_start(file, base, targets, config)
    transformer = QwenImageTransformer2DModel.from_pretrained(world / "fused" / "transformer").requires_grad_(False)
    attach(transformer, targets, config)
    start_from(start, transformer)
    return start, transformer


def factors(rank: int = 4, seed: int = 0, modules: tuple[str, ...] = MODULES) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (torch.randn(rank, 32, generator=generator), torch.randn(32, rank, generator=generator))
        for module in modules
    }


def save_kohya(file: Path, alpha: float, **given: Any) -> Path:
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in factors(**given).items():
        stem = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(alpha)}
    save_file(tensors, file)
    return file


def expected(world: Path, scale: float, rank: int = 4) -> Tensor:
    """With the LoRA merged into the weights by hand."""
    transformer = QwenImageTransformer2DModel.from_pretrained(world / "fused" / "transformer")
    with torch.no_grad():
        for module, (a, b) in factors(rank).items():
            transformer.get_submodule(module).weight += scale * b @ a
        return predict(transformer)


@pytest.mark.parametrize("given", [{}, {"lora_alpha": 1}, {"use_rslora": True, "lora_alpha": 3}], ids=str)
def test_a_file_with_its_own_scale_starts_at_that_scale(world: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    start, transformer = read(world, save_kohya(tmp_path / "kohya.safetensors", alpha=2), **given)
    assert torch.allclose(predict(transformer), expected(world, 0.5), atol=1e-4)
    assert start.record == {"name": "kohya.safetensors", "sha256": sha256_of(tmp_path / "kohya.safetensors")}


def test_ranks_that_differ_within_the_file(world: Path, tmp_path: Path) -> None:
    tensors = {}
    for module, (a, b) in factors().items():
        rank = 2 if module == MODULES[1] else 4
        tensors[f"diffusion_model.{module}.lora_A.weight"] = a[:rank]
        tensors[f"diffusion_model.{module}.lora_B.weight"] = b[:, :rank]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError) as caught:
        read(world, tmp_path / "a.safetensors")
    assert f"has another rank in 1 modules (first: {MODULES[1]}, 2 there, 4 here)" in str(caught.value)
    advice = str(caught.value).partition("give ")[2].split()
    assert advice == ["--lora_rank", "4", "--rank_pattern", f"{MODULES[1]}=2"]
    read(world, tmp_path / "a.safetensors", rank_pattern=[advice[3]])


def test_what_does_not_fit_is_said_at_once_with_what_to_do(world: Path, tmp_path: Path) -> None:
    file = save_kohya(tmp_path / "kohya.safetensors", alpha=2, rank=8)
    with pytest.raises(ConfigError) as caught:
        read(world, file, lora_target_modules="to_q,to_k", use_dora=True)
    for part in (
        f"--lora_checkpoint {file}:\n",
        "it has transformer_blocks.0.attn.to_v, transformer_blocks.1.attn.to_v; it lacks transformer_blocks.0.attn.to_",
        "its own: --lora_target_modules attn.to_q,attn.to_v",
        "is no DoRA; leave --use_dora out",
        "has another rank in 2 modules",
        "give --lora_rank 8",
    ):
        assert part in str(caught.value)
    other = save_kohya(tmp_path / "other.safetensors", alpha=2, modules=("single_blocks.0.linear1",))
    with pytest.raises(ConfigError, match=r"--lora_checkpoint .*other\.safetensors: cannot be a start"):
        read(world, other)
    with pytest.raises(ConfigError, match=r"--lora_checkpoint .*absent\.safetensors: cannot be a start"):
        read(world, tmp_path / "absent.safetensors")
    save_file({f"{MODULES[0]}.lokr_w1": torch.ones(4, 4), f"{MODULES[0]}.lokr_w2": torch.ones(8, 8)}, other)
    with pytest.raises(ConfigError, match=r"is no plain LoRA, which alone is trained here|cannot be a start"):
        read(world, other)


def test_modules_that_cannot_learn_are_left_out(world: Path, tmp_path: Path) -> None:
    """Other tools train them too; nothing reads what they put out."""
    modules = tuple(f"transformer_blocks.{block}.attn.to_add_out" for block in (0, 1))
    start, _ = read(
        world, save_kohya(tmp_path / "a.safetensors", alpha=4, modules=modules), lora_target_modules="to_add_out"
    )
    assert set(start.factors) == {modules[0]}
    assert start.left_out == f"; left out, for nothing reads their output: {modules[1]}"


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"lora_alpha": 8}], ids=["dora", "lora"])
def test_a_training_goes_on_from_what_another_saved(world: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    """The whole way: what was saved is loaded by diffusers alone, and a second training begins with it."""
    first = run(world, tmp_path / "first", max_train_steps=2, lora_target_modules="to_q,to_v", **kind)
    file = first / FILE_NAME
    pipe = DiffusionPipeline.from_pretrained(world / "fused")
    pipe.load_lora_weights(first, weight_name=FILE_NAME)
    _, transformer = read(world, file, **kind)
    assert torch.allclose(predict(transformer), predict(pipe.transformer), atol=1e-4)
    second = run(
        world, tmp_path / "second", max_train_steps=1, lora_target_modules="to_q,to_v", lora_checkpoint=file,
        learning_rate=1e-9, **kind,
    )  # fmt: skip
    before, after = load_file(file), load_file(second / FILE_NAME)
    assert before.keys() == after.keys()
    assert max((after[name] - tensor).abs().max() for name, tensor in before.items()) < 1e-6
    with safe_open(second / FILE_NAME, "pt") as opened:
        ours = json.loads(opened.metadata()["lorafuse"])
    assert ours["started_from"] == {"name": FILE_NAME, "sha256": sha256_of(file)}
    assert str(tmp_path) not in json.dumps(ours)
