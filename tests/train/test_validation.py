"""What whole trainings show: before the first step, along the way and at the end, in files and trackers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]  # no stubs
from train.runs import run, save_world

import lorafuse_fuse.cli
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.samples.health import read_health
from lorafuse_train.steps.log import VALIDATED


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_everything_is_looked_at_before_between_and_after(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red star", "seed": 4}\n{"prompt": "a sketch", "height": 16, "width": 40}\n')
    out = run(
        world, tmp_path / "out", max_train_steps=4, validation_steps=2, validation_split=1, validation_loss_steps=1,
        validation_prompts=prompts, learning_rate=0.3,
    )  # fmt: skip
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-0.png", "step-2.png"]
    with Image.open(out / "samples" / "step-0.png") as bare, Image.open(out / "samples" / "step-2.png") as trained:
        assert bare.height < trained.height  # without the rows of a LoRA that is none yet
        assert trained.width > 3 * 128  # two columns of the file, one of --validation_prompt
    found = [(line["step"], {name for name in VALIDATED if name in line}) for line in lines(out) if "loss" not in line]
    loss, everything = {"validation_loss"}, set(VALIDATED)
    assert found == [(0, everything), (1, loss), (2, everything), (3, loss), (4, everything)]
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "1", "2", "2", "3", "3", "4", "4"]
    for row, line in zip(rows, lines(out), strict=True):
        assert {name: float(value) for name, value in row.items() if value} == line
    health = read_health(out)
    assert [point.step for point in health] == [0, 2, 4]
    assert (health[0].agreement, health[0].sharpness) == (1, 1)
    assert health[2].agreement < 0.99
    board = EventAccumulator(str(out / "logs"))
    board.Reload()
    assert [event.step for event in board.Images("samples")] == [0, 2, 4]
    assert [event.step for event in board.Images("health")] == [0, 2, 4]
    assert [event.step for event in board.Scalars("validation_loss")] == [0, 1, 2, 3, 4]
    assert [event.value for event in board.Scalars("health_agreement")] == pytest.approx([h.agreement for h in health])
    assert (out / "health.png").is_file()
    printed = capsys.readouterr().out
    assert "few-step health: agreement 1.000, sharpness 1.000" in printed
    assert "held out for the validation loss: 1 rows" in printed


def test_a_lora_that_is_trained_further_is_measured_before_its_first_step(world: Path, tmp_path: Path) -> None:
    first = run(world, tmp_path / "first", max_train_steps=2, learning_rate=0.3)
    again = run(world, tmp_path / "again", max_train_steps=1, lora_checkpoint=first / FILE_NAME)
    then, now = read_health(first)[-1], read_health(again)[0]
    assert (then.step, now.step) == (2, 0)
    assert then.agreement < 0.99
    assert now.agreement == pytest.approx(then.agreement, abs=1e-4)
    assert now.sharpness == pytest.approx(then.sharpness, abs=1e-3)


def test_a_resumed_run_does_not_look_twice(world: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"validation_split": 1, "validation_loss_steps": 1, "checkpointing_steps": 2}
    whole = run(world, tmp_path / "whole", max_train_steps=4, **options)
    parts = run(world, tmp_path / "parts", max_train_steps=2, **options)
    run(world, parts, max_train_steps=4, resume_from_checkpoint="latest", **options)
    validated = [[line for line in lines(out) if "loss" not in line] for out in (whole, parts)]
    seen = [[(line["step"], line["validation_loss"]) for line in each] for each in validated]
    steps = [[step for step, _ in each] for each in seen]
    assert steps == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    for (_, one), (_, other) in zip(*seen, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_a_base_of_many_steps_has_no_few_step_health(world: Path, tmp_path: Path) -> None:
    lora = str(world / "lightning.safetensors")
    arguments = ["fuse", str(world / "base"), "--lora", lora, "--schedule", "none", "--out", str(tmp_path / "plain")]
    lorafuse_fuse.cli.app(arguments, standalone_mode=False)
    out = run(world, tmp_path / "out", fused=str(tmp_path / "plain"), max_train_steps=1)
    assert [line["step"] for line in lines(out)] == [1]
    assert not (out / "health.png").exists()
    assert (out / "samples" / "step-0.png").is_file()


def test_a_scaffold_is_judged_on_the_original_base(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = str(world / "lightning.safetensors")
    arguments = ["fuse", str(world / "base"), "--lora", lora, "--schedule", "1,0.6", "--role", "scaffold"]
    lorafuse_fuse.cli.app([*arguments, "--out", str(tmp_path / "scaffold")], standalone_mode=False)
    fused = str(tmp_path / "scaffold")
    out = run(world, tmp_path / "out", fused=fused, max_train_steps=2, original_model=world / "base", learning_rate=0.3)
    health = read_health(out)
    assert [point.step for point in health] == [0, 2]
    assert health[0].agreement == 1 and health[1].agreement < 1
    with Image.open(out / "samples.png") as sheet:
        assert sheet.height > 8 * 128  # fused and original, with and without, at both schedules
    capsys.readouterr()
    out = run(world, tmp_path / "alone", fused=fused, max_train_steps=1)
    assert read_health(out) == ()
    assert "few-step health: not measured" in capsys.readouterr().out
