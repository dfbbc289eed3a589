"""`lorafuse-train make-dedistill`: the base's own pictures, and a LoRA that `lorafuse fuse --role scaffold` takes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from train.runs import run, save_world

import lorafuse_fuse.cli
from lorafuse_common.errors import ConfigError
from lorafuse_common.manifest import Role, read_manifest
from lorafuse_train import cli
from lorafuse_train.few_step.trajectories import starting_noise
from lorafuse_train.lora.adapter import FILE_NAME

PROMPTS = ("a red circle", "a blue square", "a green star")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_world(tmp_path_factory.mktemp("world"))
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def make(world: Path, out: Path, fused: str = "fused", **options: Any) -> Path:
    chosen = {
        "fused_model": world / fused, "output_path": out, "dedistill_prompts": world / "prompts.txt",
        "dedistill_pictures": 4, "height": 32, "width": 32, "lora_rank": 4, "max_train_steps": 2, "train_batch_size": 2,
        "learning_rate": 0.01, "lr_warmup_steps": 0, "validation_inference_steps": 2,
        "validation_prompt": "a red circle", **options,
    }  # fmt: skip
    arguments = [
        part
        for name, value in chosen.items()
        if value is not None
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    cli.app(["make-dedistill", *arguments], standalone_mode=False)
    return out


def test_pictures_adapter_and_scaffold(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = make(world, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "through the fused weights, as asked" in printed
    assert "--role scaffold" in printed.split("use it as a scaffold:")[1]
    with (out / "pictures" / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == [*PROMPTS, PROMPTS[0]]
    pipe = DiffusionPipeline.from_pretrained(world / "fused")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe.set_progress_bar_config(disable=True)
    for number, row in enumerate(rows):
        packed = (
            starting_noise(number, (4, 8, 8)).reshape(1, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 16)
        )
        picture = pipe(
            row["prompt"], height=32, width=32, num_inference_steps=2, sigmas=[1.0, 0.6], true_cfg_scale=1.0,
            latents=packed,
        ).images[0]  # fmt: skip
        with Image.open(out / "pictures" / row["image"]) as ours:
            assert np.abs(np.asarray(ours, int) - np.asarray(picture, int)).max() <= 1
    lora = str(out / FILE_NAME)
    arguments = ["fuse", str(world / "fused"), "--lora", lora, "--role", "scaffold", "--out", str(world / "scaffold")]
    lorafuse_fuse.cli.app(arguments, standalone_mode=False)
    manifest = read_manifest(world / "scaffold")
    assert manifest
    assert manifest.role is Role.SCAFFOLD
    run(world, tmp_path / "new", fused="scaffold", objective_base="auto", preserve_weight="auto", max_train_steps=1)
    assert "because what was fused is a scaffold" in capsys.readouterr().out


def test_pictures_are_drawn_once(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(world, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (out / "pictures").glob("*.png")}
    first = min(before)
    first.unlink()
    make(world, out, overwrite_output_dir=None, max_train_steps=3, resume_from_checkpoint="latest")
    after = {path: path.stat().st_mtime_ns for path in (out / "pictures").glob("*.png")}
    assert after.keys() == before.keys()
    assert {path for path in before if after[path] != before[path]} == {first}


def test_pictures_of_another_schedule_are_not_taken(world: Path, tmp_path: Path) -> None:
    """Whose weights are the same, byte for byte."""
    lora, base = str(world / "lightning.safetensors"), str(world / "base")
    lorafuse_fuse.cli.app(
        ["fuse", base, "--lora", lora, "--schedule", "1,0.8", "--out", str(tmp_path / "other")], standalone_mode=False
    )
    out = make(world, tmp_path / "out", max_train_steps=1)
    before = {path.name for path in (out / "pictures").glob("*.png")}
    make(world, out, fused=str(tmp_path / "other"), overwrite_output_dir=True, max_train_steps=1)
    with (out / "pictures" / "metadata.csv").open() as file:
        assert not {row["image"] for row in csv.DictReader(file)} & before


def test_what_it_is_not_for(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--objective_base is decided by what it does"):
        make(world, tmp_path / "x", objective_base="original")
    with pytest.raises(ConfigError, match=r"--dataset_base_path is decided"):
        make(world, tmp_path / "x", dataset_base_path=world / "data")
    lora = str(world / "lightning.safetensors")
    arguments = ["fuse", str(world / "base"), "--lora", lora, "--schedule", "none", "--out", str(world / "many")]
    lorafuse_fuse.cli.app(arguments, standalone_mode=False)
    with pytest.raises(ConfigError, match="is no few-step base"):
        make(world, tmp_path / "x", fused="many")
    (world / "one.txt").write_text("a red circle\n")
    with pytest.raises(ConfigError, match=r"--dedistill_prompts .*one\.txt: holds 1 prompts"):
        make(world, tmp_path / "x", dedistill_prompts=world / "one.txt")
