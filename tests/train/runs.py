"""A fused checkpoint and a dataset to train on, and trainings through the command line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from train import tiny

import lorafuse_fuse.cli
from lorafuse_train import cli


def save_world(root: Path, made: Any = tiny, **options: Any) -> Path:
    """`base`, `lightning.safetensors`, `fused` with a 2-step schedule, and `data` of two sizes.

    `made` is the module that knows the family; `options` go to its `save_pipeline`.
    """
    made.save_pipeline(root / "base", **options)
    made.save_lightning(root / "lightning.safetensors")
    lora = str(root / "lightning.safetensors")
    arguments = ["fuse", str(root / "base"), "--lora", lora, "--schedule", "1,0.6", "--out", str(root / "fused")]
    lorafuse_fuse.cli.app(arguments, standalone_mode=False)
    tiny.save_dataset(root / "data", ((32, 32), (32, 32), (32, 24), (32, 32), (32, 24), (32, 32)))
    return root


def run(world: Path, out: Path, *more: str, fused: str = "fused", **options: Any) -> Path:
    """Train with options that suit a tiny model; `options` replace or extend them."""
    cli.app(arguments_of(world, out, *more, fused=fused, **options), standalone_mode=False)
    return out


def arguments_of(world: Path, out: Path, *more: str, fused: str = "fused", **options: Any) -> list[str]:
    """The arguments of that command."""
    chosen: dict[str, Any] = {
        "fused_model": world / fused,
        "dataset_base_path": world / "data",
        "output_path": out,
        "lora_rank": 4,
        "learning_rate": 0.01,
        "lr_warmup_steps": 0,
        "max_train_steps": 3,
        "train_batch_size": 2,
        "validation_prompt": "a red circle",
        "validation_inference_steps": 2,
        "objective_base": "fused",  # plain training, where a test does not ask for more
        "preserve_weight": 0,
        **options,
    }
    arguments = [
        part
        for name, value in chosen.items()
        if value is not None
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    return ["train", *arguments, *more]


def step_rows(out: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv that are of training steps, not of validations."""
    with (out / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["loss"]]
