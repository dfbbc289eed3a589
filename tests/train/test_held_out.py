"""The held-out loss: which pictures, and what number, whatever the run's own seed, batches and order are."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from train.runs import run, save_world

from lorafuse_common.errors import ConfigError, DatasetError
from lorafuse_train.dataset.data import Sample, read_dataset
from lorafuse_train.dataset.pictures import Geometry
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import resolve_config
from lorafuse_train.samples.held_out import LEVELS, fixed_noise, hold_out, split

GIVEN = {"fused_model": "f", "dataset_base_path": "d", "output_path": "o"}


def samples(count: int) -> list[Sample]:
    """Pictures 0 ... count - 1, each with two captions."""
    return [Sample(Path(f"{n}.png"), f"{c}", f"{n:064}", (8, 8)) for n in range(count) for c in "ab"]


def test_content_decides_and_captions_of_a_picture_stay_together() -> None:
    rows = samples(20)
    chosen = split(rows, 0.2)
    assert len(chosen.held_out) == 8 and len(chosen.training) == 32
    assert not {s.sha256 for s in chosen.held_out} & {s.sha256 for s in chosen.training}
    moved = [dataclasses.replace(s, path=Path("else") / s.path, caption=s.caption * 2) for s in reversed(rows)]
    assert {s.sha256 for s in split(moved, 4).held_out} == {s.sha256 for s in chosen.held_out}
    assert {s.sha256 for s in split(rows, 3).held_out} < {s.sha256 for s in chosen.held_out}
    assert split(rows, 0).held_out == []
    assert len(split(rows, 0.001).held_out) == 2
    for amount in (20, 0.99):
        with pytest.raises(ConfigError, match="holds out 20 of 20 different pictures"):
            split(rows, amount)


def test_contradictions() -> None:
    for given, message in (
        ({"validation_split": "1.5"}, "expected a share below 1, or a whole number"),
        ({"validation_split": "-1"}, "expected at least 0"),
        ({"validation_split": "2", "validation_dataset_path": "x"}, "both say what the validation loss is measured on"),
        ({"validation_loss_steps": "2"}, "nothing is held out"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve_config({**GIVEN, **given})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def measured(out: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


def test_the_number_is_that_of_the_formula_computed_with_diffusers(world: Path, tmp_path: Path) -> None:
    out = run(world, tmp_path / "out", validation_split=2, validation_loss_steps=1, max_train_steps=3)
    found = measured(out)
    assert list(found) == [0, 1, 2, 3]
    assert len(set(found.values())) == 4
    config = TrainConfig(fused_model=world, dataset_base_path=world / "data", output_path=out)
    held = split(read_dataset(config, Geometry(8, config.max_pixels, None)), 2).held_out
    pipe = DiffusionPipeline.from_pretrained(world / "fused")

    def loss() -> float:
        total, count = 0.0, 0
        for sample in held:
            embeds, mask = pipe.encode_prompt(sample.caption)
            x0 = latents(pipe, sample.path)
            for level in range(LEVELS):
                sigma, eps = (level + 0.5) / LEVELS, fixed_noise(sample, level, x0.shape)
                x = (1 - sigma) * x0 + sigma * eps
                _, h, w = x.shape
                out = pipe.transformer(
                    hidden_states=pipe._pack_latents(x[None], 1, 4, h, w), encoder_hidden_states=embeds,
                    encoder_hidden_states_mask=mask, timestep=torch.tensor([sigma]),
                    img_shapes=[[(1, h // 2, w // 2)]], return_dict=False,
                )[0]  # fmt: skip
                v = pipe._unpack_latents(out, h, w, 1)[0, :, 0]
                total, count = total + (v - (eps - x0)).square().mean().item(), count + 1
        return total / count

    with torch.no_grad():
        assert loss() == pytest.approx(found[0], rel=1e-4)
        pipe.load_lora_weights(out, weight_name=FILE_NAME)
        assert loss() == pytest.approx(found[3], rel=1e-3)


def latents(pipe: Any, path: Path) -> torch.Tensor:
    """x0 of a picture that needs no scaling, by the pipeline's VAE."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    z = pipe.vae.encode(pixels[None, :, None]).latent_dist.mode()[0, :, 0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
    x0: torch.Tensor = (z - mean) / std
    return x0


def test_it_is_the_same_whatever_else_differs_between_runs(world: Path, tmp_path: Path) -> None:
    first = measured(run(world, tmp_path / "a", validation_split=2, max_train_steps=1))
    other = measured(
        run(world, tmp_path / "b", validation_split=2, max_train_steps=1, seed=7, train_batch_size=1, lora_rank=2,
            timestep_sampling="uniform", validation_seed=5)
    )  # fmt: skip
    assert list(first) == list(other) == [0, 1]
    assert other[0] == pytest.approx(first[0], rel=1e-5)


def test_another_folder_must_not_share_pictures(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data", tmp_path / "own", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "own" / "metadata.csv").write_text("image,prompt\n0.png,a\n1.png,b\n")
    config = resolve_config(
        {**GIVEN, "dataset_base_path": str(world / "data"), "validation_dataset_path": str(tmp_path / "own")}
    )
    geometry = Geometry(8, config.max_pixels, None)
    trained = read_dataset(config, geometry)
    with pytest.raises(DatasetError) as caught:
        hold_out(config, trained, geometry)
    assert "2 of its 2 pictures are trained on, too" in str(caught.value)
    assert f"{tmp_path / 'own' / '0.png'}: is also {world / 'data' / '0.png'}" in str(caught.value)
    for name in ("0.png", "1.png"):
        Image.new("RGB", (32, 32), "white").save(tmp_path / "own" / name)
    assert len(hold_out(config, trained, geometry).held_out) == 2
    missing = dataclasses.replace(config, validation_dataset_path=tmp_path / "gone")
    with pytest.raises(DatasetError, match="no such folder"):
        hold_out(missing, trained, geometry)
