"""The picture grid: which rows, drawn once, laid out so that each picture is where its labels say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from train import tiny

from lorafuse_train import gallery as module
from lorafuse_train.base import Base
from lorafuse_train.config import TrainConfig
from lorafuse_train.data import Sample
from lorafuse_train.gallery import Gallery, choose_prompts, choose_size
from lorafuse_train.grid import GAP, LabelledRow, draw_grid
from lorafuse_train.precision import Precision
from lorafuse_train.recipes.qwen_image import QwenImage
from lorafuse_train.sample import Prompts, Schedule, draw_row, starting_noise
from lorafuse_train.targets import resolve_targets

CPU = Precision(torch.device("cpu"), autocast=False, reason="")


def config(**options: Any) -> TrainConfig:
    return TrainConfig(fused_model=Path("x"), dataset_base_path=Path("x"), output_path=Path("x"), **options)


def samples(*captions: str, size: tuple[int, int] = (8, 8)) -> list[Sample]:
    return [Sample(Path("x"), caption, "", size) for caption in captions]


def test_columns_are_spread_over_the_different_captions() -> None:
    captions = [f"caption {number // 2}" for number in range(64)]
    chosen = choose_prompts(config(), samples(*captions))
    assert chosen == tuple(f"caption {number}" for number in range(0, 32, 4))
    assert choose_prompts(config(), samples("a", "a", "b")) == ("a", "b")
    assert choose_prompts(config(validation_prompt=("mine",)), samples("a")) == ("mine",)
    assert choose_size([*samples("a", size=(8, 16)), *samples("b", "c"), *samples("d", size=(16, 8))]) == (8, 8)


def test_noise_belongs_to_seed_and_column() -> None:
    wide, narrow = (starting_noise(config(), columns, (4, 2, 2)) for columns in (3, 1))
    assert wide[0].equal(narrow[0])
    assert not wide[0].equal(wide[1])
    assert not starting_noise(config(validation_seed=1), 1, (4, 2, 2))[0].equal(wide[0])


def test_pictures_lie_under_their_captions_and_beside_their_labels() -> None:
    colours = [["red", "lime"], ["blue", "yellow"]]
    rows = [LabelledRow(f"row\n{n}", [Image.new("RGB", (16, 8), c) for c in row]) for n, row in enumerate(colours)]
    sheet = draw_grid(["a", "a much longer caption that wraps " * 9], rows)
    width, height = 256, 128  # 8 pixels are too few: 16 times as large
    left, top = sheet.width - 2 * (width + GAP), sheet.height - 2 * (height + GAP)
    for y, row in enumerate(colours):
        for x, colour in enumerate(row):
            box = (left + x * (width + GAP), top + y * (height + GAP))
            cell = sheet.crop((*box, box[0] + width, box[1] + height))
            assert cell.getcolors() == [(width * height, Image.new("RGB", (1, 1), colour).getpixel((0, 0)))]
    assert draw_grid(["a"], [LabelledRow("x", [Image.new("RGB", (2048, 1024))])]).width < 700


@pytest.mark.parametrize("at_once", [1, 10**6])
def test_a_row_does_not_depend_on_how_many_are_drawn_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafuse_train.sample.TOKENS_AT_ONCE", at_once)
    transformer = tiny.pipeline().transformer
    generator = torch.Generator().manual_seed(0)
    encoded = tuple({"embeds": torch.randn(n, 16, generator=generator)} for n in (3, 7, 5))
    noise = tuple(torch.randn(4, 4, 4, generator=generator) for _ in encoded)
    prompts = Prompts(("a", "b", "c"), encoded, encoded[0], noise)
    schedule = Schedule((1.0, 0.4), 2.0)
    row = draw_row(QwenImage(), transformer, prompts, schedule, CPU)
    for column in range(3):
        alone = Prompts(("x",), encoded[column : column + 1], encoded[0], noise[column : column + 1])
        assert torch.allclose(row[column], draw_row(QwenImage(), transformer, alone, schedule, CPU)[0], atol=1e-5)


def test_rows_that_cannot_change_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafuse_common.families.qwen_image import QWEN_IMAGE
    from lorafuse_train.adapter import attach

    folder = tiny.save_pipeline(tmp_path / "base")
    transformer = tiny.pipeline().transformer.requires_grad_(False)
    attach(transformer, resolve_targets(transformer, QWEN_IMAGE, "to_q"), config(lora_rank=2))
    base = Base(folder, folder / "transformer", folder, QWEN_IMAGE, {}, torch.float32, None, "")
    encoded = {"embeds": torch.randn(3, 16)}
    prompts = Prompts(("a",), (encoded,), encoded, (torch.randn(4, 4, 4),))
    schedules = (Schedule((1.0,), 1.0), Schedule((1.0, 0.5), 2.0))
    drawn: list[str] = []
    labels: list[list[str]] = []

    def count(recipe: Any, model: Any, *rest: Any) -> list[Tensor]:
        drawn.append("bare" if model.transformer_blocks[0].attn.to_q.disable_adapters else "LoRA")
        return draw_row(recipe, model, *rest)

    def keep(captions: Any, rows: list[LabelledRow]) -> Image.Image:
        labels.append([row.label.replace("\n", " ") for row in rows])
        return draw_grid(captions, rows)

    monkeypatch.setattr(module, "draw_row", count)
    monkeypatch.setattr(module, "draw_grid", keep)
    shown = Gallery(QwenImage(), base, prompts, schedules, CPU)
    shown.draw(transformer, tmp_path / "1.png")
    shown.draw(transformer, tmp_path / "2.png")
    assert drawn == ["bare", "LoRA", "bare", "LoRA", "LoRA", "LoRA"]
    assert (
        labels[0]
        == labels[1]
        == [
            "base 1 step, no CFG",
            "base + new LoRA 1 step, no CFG",
            "base 2 steps, CFG 2",
            "base + new LoRA 2 steps, CFG 2",
        ]
    )
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
