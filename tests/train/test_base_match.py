"""A LoRA of ours is refused on another base, by name, and others pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from train import tiny
from train.runs import run, save_world

import lorafuse_fuse.cli
from lorafuse_common.errors import ConfigError, LorafuseError
from lorafuse_train.base import Base
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.lora.base_match import TrainedOn, require_same_base, trained_on


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a second fused base, of another LoRA."""
    root = save_world(tmp_path_factory.mktemp("world"))
    tiny.save_lightning(root / "other.safetensors", seed=2)
    arguments = ["fuse", str(root / "base"), "--lora", f"{root / 'other.safetensors'}:0.5", "--schedule", "1,0.6"]
    lorafuse_fuse.cli.app([*arguments, "--out", str(root / "fused2")], standalone_mode=False)
    return root


@pytest.fixture(scope="module")
def lora(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(world, tmp_path_factory.mktemp("run") / "out", checkpointing_steps=2) / FILE_NAME


def test_a_warm_start_on_another_base_is_refused_with_both_names(world: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(world, tmp_path / "out", fused="fused2", lora_checkpoint=lora)
    message = str(caught.value)
    for part in (
        f"--lora_checkpoint {lora}: was trained on another base",
        "lightning.safetensors x 1 fused",
        f"--fused_model {world / 'fused2'}",
        "other.safetensors x 0.5 fused",
        "--allow_base_mismatch",
    ):
        assert part in message
    assert not (tmp_path / "out").exists()
    run(world, tmp_path / "same", lora_checkpoint=lora, max_train_steps=1)
    run(world, tmp_path / "out", "--allow_base_mismatch", fused="fused2", lora_checkpoint=lora, max_train_steps=1)


def test_so_is_going_on(world: Path, lora: Path, tmp_path: Path) -> None:
    options = {"max_train_steps": 4, "resume_from_checkpoint": lora.parent / "checkpoint-2"}
    with pytest.raises(LorafuseError, match="other\\.safetensors"):
        run(world, tmp_path / "out", fused="fused2", **options)
    run(world, tmp_path / "out", "--allow_base_mismatch", fused="fused2", **options)
    assert (tmp_path / "out" / FILE_NAME).is_file()


def test_others_say_nothing_and_pass(world: Path, tmp_path: Path) -> None:
    assert trained_on(world / "lightning.safetensors") is None
    assert trained_on(tmp_path / "gone.safetensors") is None
    for said in ("[]", "{", '{"fused_sha256": 1}', '{"fused_sha256": "a", "fused_loras": [{}]}'):
        save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"lorafuse": said})
        found = trained_on(tmp_path / "x.safetensors")
        assert found is None or found.fused_sha256 == "1"


def test_a_scaffolds_lora_is_for_the_original(tmp_path: Path) -> None:
    from lorafuse_common.families.qwen_image import QWEN_IMAGE

    found = TrainedOn("fused", ("a x 1",), is_scaffold=True, original_sha256="original")
    assert found.fits("original") and found.fits("fused") and not found.fits("other")
    assert not TrainedOn("fused", (), original_sha256="original").fits("original")
    save_file(
        {"a": torch.zeros(1)},
        tmp_path / "x.safetensors",
        {"lorafuse": '{"fused_sha256": "fused", "role": "scaffold", "base": {"sha256": "original"}}'},
    )

    def base(sha256: str) -> Base:
        return Base(tmp_path, tmp_path, tmp_path, QWEN_IMAGE, {}, torch.float32, None, sha256)

    require_same_base(tmp_path / "x.safetensors", base("original"), option="--lora", allowed=False)
    with pytest.raises(ConfigError, match=r"one with nothing fused \(sha256 original\.\.\.\), through"):
        require_same_base(tmp_path / "x.safetensors", base("else"), option="--lora", allowed=False)
