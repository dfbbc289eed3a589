"""On the demo, the health figures tell a ruined run from a preserved and from a mild one, without seeing pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import lorafuse_fuse.cli
from lorafuse_train import cli
from lorafuse_train.samples.health import LEAST_AGREEMENT, Health, read_health

DEMO = ROOT / "examples" / "shapes"
COMMON = {
    "lora_rank": 16,
    "train_batch_size": 16,
    "base_dtype": "fp32",
    "validation_inference_steps": 16,
    "validation_guidance_scale": 2,
    "preserve_prompts": DEMO / "prompts.txt",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fused`, and `data` in the style that the base has never seen."""
    root = tmp_path_factory.mktemp("demo")
    arguments = [
        "fuse",
        str(DEMO / "base"),
        "--lora",
        str(DEMO / "lightning.safetensors"),
        "--out",
        str(root / "fused"),
    ]
    lorafuse_fuse.cli.app(arguments, standalone_mode=False)
    make = [sys.executable, str(DEMO / "make_dataset.py"), "--out", str(root / "data"), "--count", "64"]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    return root


def train(demo: Path, name: str, **options: Any) -> Health:
    """The figures at the end of a training."""
    chosen = {"fused_model": demo / "fused", "dataset_base_path": demo / "data", "output_path": demo / name}
    given = [part for key, value in {**COMMON, **chosen, **options}.items() for part in (f"--{key}", str(value))]
    cli.app(["train", *given], standalone_mode=False)
    points = read_health(demo / name)
    assert (points[0].step, points[0].agreement, points[0].sharpness) == (0, 1, 1)
    return points[-1]


@pytest.mark.slow
def test_the_figures_separate_ruined_from_preserved(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = {"objective_base": "fused", "preserve_weight": 0}
    ruined = train(demo, "ruined", **plain, max_train_steps=80, learning_rate=5e-3)
    assert "no longer draw" in capsys.readouterr().out
    mild = train(demo, "mild", **plain, max_train_steps=30, learning_rate=2e-4)
    kept = train(demo, "kept", max_train_steps=80, learning_rate=5e-3)
    assert "no longer draw" not in capsys.readouterr().out
    assert ruined.agreement < LEAST_AGREEMENT < min(mild.agreement, kept.agreement)
    assert ruined.agreement < min(mild.agreement, kept.agreement) - 0.1
