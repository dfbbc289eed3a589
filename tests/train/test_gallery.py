"""The picture grid: which rows, drawn once, laid out so that each picture is where its labels say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from train import tiny

from lorafuse_common.errors import ConfigError
from lorafuse_train.base import Base
from lorafuse_train.lora.targets import resolve_targets
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.precision import Precision
from lorafuse_train.recipes.qwen_image import QwenImage
from lorafuse_train.samples import gallery as module
from lorafuse_train.samples.gallery import Gallery, shown
from lorafuse_train.samples.grid import GAP, LabelledRow, draw_grid
from lorafuse_train.samples.original_rows import original_on_host
from lorafuse_train.samples.sample import Column, Schedule, draw_row, noise_from, starting_noise, steps_of_row

CPU = Precision(torch.device("cpu"), autocast=False, reason="")


def config(**options: Any) -> TrainConfig:
    return TrainConfig(fused_model=Path("x"), dataset_base_path=Path("x"), output_path=Path("x"), **options)


def test_noise_belongs_to_seed_and_column() -> None:
    first, second = (starting_noise(0, column, (4, 2, 2)) for column in (0, 1))
    assert not first.equal(second)
    assert first.equal(starting_noise(0, 0, (4, 2, 2)))
    assert not starting_noise(1, 0, (4, 2, 2)).equal(first)
    assert noise_from(7, (4, 2, 2)).equal(torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(7)))


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


def test_columns_may_have_sizes_of_their_own() -> None:
    sizes = [(128, 256), (256, 128)]
    rows = [LabelledRow("x", [Image.new("RGB", size, colour) for size in sizes]) for colour in ("red", "blue")]
    sheet = draw_grid(["tall", "wide"], rows)
    assert sheet.height > 2 * 256 and sheet.width > 128 + 256
    for colour in ((255, 0, 0), (0, 0, 255)):
        count = sum(number for number, found in sheet.getcolors(1 << 20) or () if found == colour)
        assert count == 2 * 128 * 256


def test_a_film_is_shown_as_a_strip() -> None:
    frames = torch.stack([torch.full((3, 4, 6), value) for value in (-1.0, -0.5, 0.0, 0.5, 1.0)], 1)
    strip = shown(frames)
    assert strip.size == (18, 4)
    assert [strip.getpixel((x, 0)) for x in (0, 6, 12)] == [(0,) * 3, (128,) * 3, (255,) * 3]
    assert shown(frames[:, :1]).size == (6, 4)
    assert shown(frames[:, 0]).size == (6, 4)


@pytest.mark.parametrize("at_once", [1, 10**6])
def test_a_row_does_not_depend_on_how_many_are_drawn_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on which columns there are: of other sizes, schedules and negative prompts."""
    monkeypatch.setattr("lorafuse_train.samples.sample.TOKENS_AT_ONCE", at_once)
    transformer = tiny.pipeline().transformer
    generator = torch.Generator().manual_seed(0)
    encoded = [{"embeds": torch.randn(n, 16, generator=generator)} for n in (3, 7, 5, 4)]
    guided, plain = Schedule((1.0, 0.4), 2.0), Schedule((1.0, 0.5, 0.2), 1.0)
    columns = [
        Column("a", encoded[0], encoded[1], torch.randn(4, 4, 4, generator=generator), (plain, guided)),
        Column("b", encoded[1], encoded[0], torch.randn(4, 4, 4, generator=generator), (plain, guided)),
        Column("c", encoded[2], encoded[0], torch.randn(4, 4, 8, generator=generator), (plain, guided)),
        Column("d", encoded[3], encoded[0], torch.randn(4, 4, 4, generator=generator), (plain, plain)),
    ]
    ticks: list[None] = []
    row = draw_row(QwenImage(), transformer, columns, 1, CPU, lambda: ticks.append(None))
    assert len(ticks) == steps_of_row(columns, 1)
    for index, column in enumerate(columns):
        alone = draw_row(QwenImage(), transformer, [column], 1, CPU)[0]
        assert row[index].shape == column.noise.shape
        assert torch.allclose(row[index], alone, atol=1e-5)


def world(tmp_path: Path) -> tuple[Any, Base, tuple[Column, ...]]:
    from lorafuse_common.families.qwen_image import QWEN_IMAGE
    from lorafuse_train.lora.adapter import attach

    folder = tiny.save_pipeline(tmp_path / "base")
    transformer = tiny.pipeline().transformer.requires_grad_(False)
    attach(transformer, resolve_targets(transformer, QWEN_IMAGE, "to_q"), config(lora_rank=2))
    base = Base(folder, folder / "transformer", folder, QWEN_IMAGE, {}, torch.float32, None, "")
    encoded = {"embeds": torch.randn(3, 16)}
    schedules = (Schedule((1.0,), 1.0), Schedule((1.0, 0.5), 2.0))
    return transformer, base, (Column("a", encoded, encoded, torch.randn(4, 4, 4), schedules),)


def test_rows_that_cannot_change_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, base, columns = world(tmp_path)
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
    gallery = Gallery(QwenImage(), base, columns, CPU)
    before = gallery.draw(transformer, tmp_path / "0.png", trained=False)
    assert drawn == ["bare", "bare"]
    assert len(gallery.newest) == 0
    gallery.draw(transformer, tmp_path / "1.png")
    after = gallery.draw(transformer, tmp_path / "2.png")
    assert drawn == ["bare", "bare", "LoRA", "LoRA", "LoRA", "LoRA"]
    assert [picture.size for picture in gallery.newest] == [(16, 16)]
    assert labels[0] == ["base 1 step, no CFG", "base 2 steps, CFG 2"]
    assert labels[1] == labels[2] == [
        "base 1 step, no CFG",
        "base + new LoRA 1 step, no CFG",
        "base 2 steps, CFG 2",
        "base + new LoRA 2 steps, CFG 2",
    ]  # fmt: skip
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    for row in range(2):  # a LoRA that has not learned yet
        assert before.off[row][0].equal(after.off[row][0])
        assert torch.allclose(after.on[row][0], after.off[row][0], atol=1e-5)


def test_a_scaffolds_lora_is_drawn_on_the_original_base(tmp_path: Path) -> None:
    transformer, base, columns = world(tmp_path)
    original = tiny.pipeline().transformer
    parameter = original.transformer_blocks[0].attn.to_v.weight
    with torch.no_grad():
        parameter.mul_(3)
    original.save_pretrained(tmp_path / "original")
    plain = tiny.pipeline().transformer.requires_grad_(False)
    host = original_on_host(tmp_path / "original", plain)
    assert [value.equal(parameter) for _, value in host.pairs] == [True]
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    with host.swapped_in():
        inside = draw_row(QwenImage(), plain, columns, 1, CPU)[0]
    assert inside.equal(draw_row(QwenImage(), original, columns, 1, CPU)[0])
    assert all(value.equal(before[name]) for name, value in plain.state_dict().items())
    with pytest.raises(ConfigError, match="is not what was fused into"):
        original_on_host(tmp_path / "original", torch.nn.Linear(2, 2))

    class Swapped:
        """Notes when the weights are the original's."""

        inside = False

        @contextmanager
        def swapped_in(self) -> Iterator[None]:
            self.inside = True
            yield
            self.inside = False

    swapped: Any = Swapped()
    seen: list[bool] = []
    gallery = Gallery(QwenImage(), base, columns, CPU, swapped)
    gallery.draw_original(original, tmp_path / "original")

    def note(recipe: Any, model: Any, *rest: Any) -> list[Tensor]:
        seen.append(swapped.inside)
        return draw_row(recipe, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "draw_row", note)
        found = gallery.draw(transformer, tmp_path / "x.png")
    assert seen == [False, False, False, False, True, True]
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.height > 8 * 128  # fused without and with, original without and with, at two schedules
    assert found.off[1][0].equal(draw_row(QwenImage(), original, columns, 1, CPU)[0])
