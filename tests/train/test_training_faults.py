"""Trainings that must not succeed, or must not destroy anything."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train import tiny
from train.runs import run, save_world

from lorafuse_common.errors import CheckpointError, ConfigError, LorafuseError, ManifestError, OutputError
from lorafuse_train import cli
from lorafuse_train.dataset.data import Sample
from lorafuse_train.encoding.encode import Encodings
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.lora.metadata import lora_header
from lorafuse_train.steps.objective import loss_sum


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def test_a_base_must_be_fused_and_whole(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="--allow_unfused_base"):
        run(world, tmp_path / "out", fused="base")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        run(world, tmp_path / "out", fused="absent", lora_fused=world / "lightning.safetensors")
    with pytest.raises(CheckpointError, match="is a single file"):
        run(world, tmp_path / "out", fused="lightning.safetensors")
    shutil.copytree(world / "fused", tmp_path / "fused")
    weights = next((tmp_path / "fused" / "transformer").glob("*.safetensors"))
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.unlink()
    weights.write_bytes(changed)
    with pytest.raises(ManifestError, match="another sha256"):
        run(tmp_path, tmp_path / "out", "--verify", dataset_base_path=world / "data")
    weights.write_bytes(changed[:-1])
    with pytest.raises(ManifestError, match="bytes"):
        run(tmp_path, tmp_path / "out", dataset_base_path=world / "data")


def test_a_lora_that_is_not_fused_names_the_command(world: Path, tmp_path: Path) -> None:
    other = tiny.save_lightning(tmp_path / "other.safetensors", seed=9)
    with pytest.raises(ConfigError) as caught:
        run(world, tmp_path / "out", lora_fused=other)
    assert f"lorafuse fuse BASE --lora {other} --out DIR" in str(caught.value)
    assert "fused: lightning.safetensors" in str(caught.value)


def test_nothing_is_overwritten_unless_asked(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run(world, tmp_path / "out", max_train_steps=1, checkpointing_steps=0)
    before = (out / FILE_NAME).read_bytes()
    with pytest.raises(OutputError, match="--overwrite_output_dir"):
        run(world, out)
    with monkeypatch.context() as patch:
        patch.setattr("lorafuse_train.steps.loop.loss_sum", lambda *_: torch.full((), float("nan"), requires_grad=True))
        with pytest.raises(LorafuseError, match="step 1: the loss is nan"):
            run(world, out, "--overwrite_output_dir")
    assert (out / FILE_NAME).read_bytes() == before
    run(world, out, "--overwrite_output_dir", seed=7)
    assert (out / FILE_NAME).read_bytes() != before


def test_a_loss_that_is_no_number_names_the_pictures_and_the_last_good_checkpoint(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of the two passes of the third step; afterwards, a run may go on from what was good."""
    calls = iter(range(100))
    seen: list[list[str]] = []

    def spoilt(*given: Any) -> torch.Tensor:
        return loss_sum(*given) * (float("inf") if next(calls) == 5 else 1)

    def noted(self: Encodings, sample: Sample) -> torch.Tensor:
        seen.append([sample.path.name])
        return latents(self, sample)

    latents = Encodings.latents
    monkeypatch.setattr(Encodings, "latents", noted)
    monkeypatch.setattr("lorafuse_train.steps.loop.loss_sum", spoilt)
    options: dict[str, Any] = {"train_batch_size": 1, "checkpointing_steps": 1, "gradient_accumulation_steps": 2}
    with pytest.raises(LorafuseError) as caught:
        run(world, tmp_path / "out", **options)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    for part in (
        f"step 3: the loss is inf and its gradient's norm nan, with {seen[-1][0]}. ",
        f"The last good checkpoint is {checkpoint}.",
        f"--lora_checkpoint {checkpoint / FILE_NAME} goes on from its LoRA",
    ):
        assert part in str(caught.value)
    run(world, tmp_path / "next", lora_checkpoint=checkpoint / FILE_NAME, learning_rate=1e-3)


def test_a_lora_without_effect_is_an_error(world: Path, tmp_path: Path) -> None:
    with pytest.raises(LorafuseError, match="changes nothing"):
        run(world, tmp_path / "out", learning_rate=0)
    assert not (tmp_path / "out" / FILE_NAME).exists()


def test_a_lora_that_loads_differently_is_an_error(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers applies any alpha without a word."""

    def other(*origin: Any) -> dict[str, str]:
        found = lora_header(*origin)
        return {**found, "lora_adapter_metadata": found["lora_adapter_metadata"].replace('alpha": 4', 'alpha": 2')}

    monkeypatch.setattr("lorafuse_train.steps.resume.lora_header", other)
    with pytest.raises(LorafuseError, match="something else than it did in training"):
        run(world, tmp_path / "out")
    assert not (tmp_path / "out" / FILE_NAME).exists()


def test_ctrl_c_leaves_no_half_written_file(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def interrupt(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss_sum(*tensors)

    monkeypatch.setattr("lorafuse_train.steps.loop.loss_sum", interrupt)
    arguments = ["--max_train_steps", "9", "--checkpointing_steps", "2", "--allow_unfused_base"]
    for name, folder in (("fused_model", world / "base"), ("dataset_base_path", world / "data")):
        arguments += [f"--{name}", str(folder)]
    status = cli.app(["train", *arguments, "--output_path", str(tmp_path / "out")], standalone_mode=False)
    assert status == 130
    assert capsys.readouterr().err.endswith("stopped by Ctrl-C; what was saved before is complete\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-2", "logs", "metrics.csv", "metrics.jsonl", "samples", "train_config.yaml",
    ]  # fmt: skip
    load_file(tmp_path / "out" / "checkpoint-2" / FILE_NAME)


def test_an_output_inside_the_base_and_a_needless_pipeline_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="only read"):
        run(world, world / "fused" / "out")
    with pytest.raises(ConfigError, match="leave it out"):
        run(world, tmp_path / "out", pretrained_model_name_or_path=world / "base")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        run(world, tmp_path / "file")
