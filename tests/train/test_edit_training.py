"""Trainings on pairs of pictures from start to end, for every family that is shown some."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from train import tiny_edit, tiny_flux, tiny_flux2
from train.recipe_checks import check_run
from train.runs import run, save_world

from lorafuse_common.errors import ConfigError, DatasetError
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.samples import gallery
from lorafuse_train.samples.grid import LabelledRow, draw_grid


def lightning(kind: str) -> Any:
    """`tiny_edit` with the LoRA that fits the kind."""
    saved = {"kontext": tiny_flux.save_lightning}.get(kind, tiny_edit.save_lightning)
    return SimpleNamespace(save_pipeline=tiny_edit.save_pipeline, save_lightning=saved)


def train(world: Path, out: Path, *more: str, **options: Any) -> Path:
    """Two steps of at most two pairs, on the captions and controls of the dataset."""
    chosen = {"max_pixels": tiny_edit.AREA, "max_train_steps": 2, "validation_prompt": None, **options}
    return run(world, out, *more, dataset_base_path=world / "pairs", **chosen)


def drawn_rows(patch: pytest.MonkeyPatch) -> list[list[LabelledRow]]:
    """The rows of every grid that is drawn from now on."""
    found: list[list[LabelledRow]] = []

    def keep(captions: Any, rows: list[LabelledRow], *rest: Any) -> Image.Image:
        found.append(rows)
        return draw_grid(captions, rows, *rest)

    patch.setattr(gallery, "draw_grid", keep)
    return found


@pytest.mark.parametrize("kind", ["edit", "2511", "kontext"])
def test_a_training_from_start_to_end(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its grid shows what was edited, its LoRA is the pipeline's, and the code that it prints edits a picture."""
    tiny_edit.shrink_pipelines(monkeypatch)
    tiny_edit.without_videos(monkeypatch)
    grids = drawn_rows(monkeypatch)
    world = save_world(tmp_path, lightning(kind), kind=kind)
    several = [(32, 32), (40, 24)] if kind == "2511" else [(40, 24)]
    tiny_edit.save_pairs(world / "pairs", [(32, 32)] * 3, [several, [(32, 32)], several])
    out = train(world, tmp_path / "out", "--use_gradient_checkpointing", caption_dropout=0.3)
    printed = capsys.readouterr().out
    assert "control pictures: " in printed
    assert "image=" in printed
    first = grids[-1][0]
    assert first.label.startswith("control picture")
    with Image.open(world / "pairs" / "before" / "0-0.png") as before:
        assert np.array_equal(np.asarray(first.pictures[0]), np.asarray(before.convert("RGB")))
    assert {bool(tensor.any()) for tensor in load_file(out / FILE_NAME).values()} == {True}
    check_run(out, printed)
    again = train(world, tmp_path / "again", "--use_gradient_checkpointing", caption_dropout=0.3)
    assert (again / FILE_NAME).read_bytes() == (out / FILE_NAME).read_bytes()
    assert "loading the VAE to encode" not in capsys.readouterr().out


def test_references_of_flux2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows with references, some with several, some with none."""
    grids = drawn_rows(monkeypatch)
    world = save_world(tmp_path, tiny_flux2)
    shown = [[(72, 64)], [], [(64, 64), (72, 64)], []]
    tiny_edit.save_pairs(world / "pairs", [(32, 32)] * 4, shown)
    out = train(world, tmp_path / "out", max_pixels=80 * 80)
    printed = capsys.readouterr().out
    assert "control pictures: 0 for 2, 1 for 1, 2 for 1" in printed
    assert [row.label for row in grids[-1][:2]] == ["control picture 1", "control picture 2"]
    check_run(out, printed)


def test_kontext_learns_from_text_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = save_world(tmp_path, lightning("kontext"), kind="kontext")
    out = run(world, tmp_path / "out", max_train_steps=1)
    printed = capsys.readouterr().out
    assert "no control pictures" in printed
    check_run(out, printed)


def test_another_control_is_another_dataset(tmp_path: Path) -> None:
    """A LoRA says what it was trained on, and a checkpoint is continued only on the same."""
    world = save_world(tmp_path, lightning("plus"), kind="plus")
    tiny_edit.save_pairs(world / "pairs", [(32, 32)] * 2, [[(32, 32)], [(32, 32)]])
    out = train(world, tmp_path / "out", max_train_steps=1, checkpointing_steps=1)
    recorded = _dataset(out)
    tiny_edit.picture(50, 32, 32).save(world / "pairs" / "before" / "0-0.png")
    with pytest.raises(ConfigError, match="the dataset: its files, captions"):
        train(world, tmp_path / "out", max_train_steps=2, resume_from_checkpoint="latest")
    assert _dataset(train(world, tmp_path / "other", max_train_steps=1)) != recorded
    (world / "pairs" / "before" / "1-0.png").unlink()
    with pytest.raises(DatasetError, match=r"1-0\.png: no such file"):
        train(world, tmp_path / "third")


def _dataset(out: Path) -> str:
    from safetensors import safe_open

    with safe_open(out / FILE_NAME, "pt") as file:
        record = json.loads(file.metadata()["lorafuse"])
    return str(record["dataset"]["sha256"])
