"""Noise levels and their weights, against diffusers, and as a picture."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from PIL import Image
from train.runs import save_world

from lorafuse_common.errors import ConfigError
from lorafuse_train import cli
from lorafuse_train.base import Base, open_base
from lorafuse_train.dataset.order import Order
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import resolve_config
from lorafuse_train.steps import histogram
from lorafuse_train.steps.objective import draw
from lorafuse_train.steps.timesteps import NoiseLevels, choose_levels, loss_weights, require_density


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def base(world: Path) -> Base:
    return open_base(config(fused_model=str(world / "fused")))


def config(**given: Any) -> TrainConfig:
    return resolve_config({"fused_model": "fused", "dataset_base_path": "data", "output_path": "out", **given})


def drawn(levels: NoiseLevels, shift: float, count: int = 2000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([levels.draw(shift, generator) for _ in range(count)])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Wasserstein distance of two samples of one size."""
    return float((a.sort().values - b.sort().values).abs().mean())


@pytest.mark.parametrize(("scheme", "mean", "std"), [("none", 0, 1), ("logit_normal", 0, 1), ("logit_normal", 1, 0.5)])
def test_the_density_is_diffusers(scheme: str, mean: float, std: float) -> None:
    theirs = compute_density_for_timestep_sampling(
        scheme, 2000, mean, std, 1.29, generator=torch.Generator().manual_seed(1)
    )
    assert apart(drawn(NoiseLevels(scheme == "none", mean, std), 1.0), theirs) < 0.015


def test_the_shift_is_the_schedulers() -> None:
    u = torch.sigmoid(torch.randn((), generator=torch.Generator().manual_seed(3)))
    sigma = NoiseLevels().draw(3.0, torch.Generator().manual_seed(3))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[float(u)])
    assert torch.allclose(sigma, scheduler.sigmas[0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("levels", [NoiseLevels(True), NoiseLevels(False, 0.5, 1.2)], ids=["uniform", "logit-normal"])
def test_a_range_cuts_the_density_off_as_rejection_would(levels: NoiseLevels, shift: float) -> None:
    whole = drawn(levels, shift, 6000)
    kept = whole[(whole >= 0.4) & (whole <= 0.85)]
    cut = dataclasses.replace(levels, low=0.4, high=0.85)
    ours = drawn(cut, shift, len(kept))
    assert ours.dtype == torch.float32
    assert ours.min() >= 0.4 and ours.max() <= 0.85
    assert apart(ours, kept) < 0.012
    assert cut.share_between(shift) == pytest.approx(len(kept) / len(whole), abs=0.02)
    lower = dataclasses.replace(levels, high=0.3)
    assert drawn(lower, shift, 100).max() <= 0.3


def test_few_step_levels_are_drawn_as_often_as_asked(base: Base) -> None:
    only = drawn(choose_levels(config(timestep_sampling="manifest"), base), 3.0)
    assert {round(value, 6) for value in only.tolist()} == {1.0, 0.6}
    assert 0.45 < (only == 1).float().mean() < 0.55
    mixed = drawn(choose_levels(config(timestep_sampling="mix:.25"), base), 3.0)
    few = (mixed == 1) | (mixed == torch.tensor(0.6))
    assert 0.22 < few.float().mean() < 0.28
    assert apart(mixed[~few], drawn(NoiseLevels(), 3.0, int((~few).sum()))) < 0.015
    assert drawn(choose_levels(config(timestep_sampling="manifest", max_timestep="900"), base), 3.0).max() < 0.7


def test_what_cannot_be_drawn_is_an_error(base: Base) -> None:
    bare = dataclasses.replace(base, manifest=None)
    with pytest.raises(ConfigError, match="records no few-step schedule; fuse with --schedule"):
        choose_levels(config(timestep_sampling="manifest"), bare)
    with pytest.raises(ConfigError, match=r"none of the noise levels \(1\.0, 0\.6\) lies between 0 and 0\.5"):
        choose_levels(config(timestep_sampling="mix:0.1", max_timestep="500"), base)
    narrow = choose_levels(config(logit_mean="-3", logit_std="0.3", min_timestep="990"), base)
    with pytest.raises(ConfigError, match="next to nothing of the density"):
        require_density(narrow, [1.0])
    require_density(choose_levels(config(min_timestep="990"), base), [1.0, 3.0])


def test_contradictions() -> None:
    faults = {
        "logit_mean, timestep_sampling: uniform has no logit-normal density": {
            "timestep_sampling": "uniform", "logit_mean": "1",
        },
        "timestep_shift, timestep_sampling: manifest takes": {"timestep_sampling": "manifest", "timestep_shift": "2"},
        "timestep_shift: expected auto or a number above 0": {"timestep_shift": "0"},
        "timestep_shift: found 'high', expected auto or a number above 0": {"timestep_shift": "high"},
        "min_timestep, max_timestep: nothing lies between": {"min_timestep": "500", "max_timestep": "500"},
        "max_timestep: found 1001.0": {"max_timestep": "1001"},
        "timestep_sampling: found 'mix:2', expected uniform": {"timestep_sampling": "mix:2"},
        "masked_loss_background, masked_loss: without": {"masked_loss_background": "0.5"},
        "masked_loss: expected alpha, or the metadata column": {"masked_loss": "image"},
    }  # fmt: skip
    for message, given in faults.items():
        with pytest.raises(ConfigError) as caught:
            config(**given)
        assert message in str(caught.value)


def test_the_shift_follows_the_picture_unless_it_is_said_otherwise() -> None:
    assert config().fixed_shift is None
    assert config(timestep_sampling="mix:0.5").fixed_shift is None
    assert config(timestep_sampling="uniform").fixed_shift == 1
    assert config(timestep_sampling="uniform", timestep_shift="auto").fixed_shift is None
    assert config(timestep_shift="2.5").fixed_shift == 2.5


def test_a_number_in_yaml_may_be_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("timestep_shift: 3\nmixed_precision: no\nloss_weighting: cosmap\n")
    read = config(config=str(tmp_path / "a.yaml"))
    assert (read.fixed_shift, read.mixed_precision, read.loss_weighting) == (3, "no", "cosmap")


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none"])
def test_the_weights_are_diffusers(scheme: str) -> None:
    sigma = torch.linspace(0.01, 1, 50)
    ours, theirs = loss_weights(scheme, sigma), compute_loss_weighting_for_sd3(scheme, sigma)
    assert torch.allclose(torch.ones(50) if ours is None else ours, theirs)


def test_the_histogram_shows_what_a_run_draws(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--fused_model", world / "fused", "--dataset_base_path", world / "data", "--output_path", tmp_path]
    arguments += ["--train_batch_size", 2, "--max_train_steps", 7, "--timestep_sampling", "mix:0.5", "--seed", 3]
    cli.app(["show-timesteps", *map(str, arguments)], standalone_mode=False)
    assert "noise levels (sigma): 0." in capsys.readouterr().out
    with Image.open(tmp_path / histogram.FILE_NAME) as picture:
        assert picture.width > 900
        colours = {colour for _, colour in picture.getcolors(10000)}  # type: ignore[union-attr]
    assert {(59, 130, 246), (220, 38, 38)} <= colours
    assert not (world / "data" / ".lorafuse_cache").exists()
    shapes = ((1, 32, 32), (1, 24, 32), (1, 32, 32))
    order, levels, shifts = (
        Order(shapes, 3, 1, 2, 1),
        NoiseLevels(few=(1.0,), few_share=0.3),
        {(1, 32, 32): 3.0, (1, 24, 32): 1.0},
    )
    samples: Any = [type("Sample", (), {"shape": shape}) for shape in shapes]
    expected = [
        sigma
        for step in range(4)
        for micro in order.step(step)
        for sigma in draw(
            levels, shifts[shapes[micro.samples[0]]], (1,), 3, step, micro.first, len(micro.samples)
        ).sigma.tolist()
    ]
    assert list(histogram.draws(order, samples, 4, levels, shifts)) == expected
    assert not any(math.isnan(sigma) for sigma in expected)
