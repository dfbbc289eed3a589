"""Metrics in files and in trackers; wandb and trackio stand in by accelerate's own classes over a recording module."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]  # no stubs
from train.runs import run, save_world, step_rows

from lorafuse_common.errors import ConfigError
from lorafuse_train.options.options import resolve_config
from lorafuse_train.steps.log import COLUMNS, VALIDATED, open_log
from lorafuse_train.steps.trackers import check_trackers

GIVEN: dict[str, Any] = {"fused_model": "fused", "dataset_base_path": "data", "output_path": "out"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def board(out: Path) -> EventAccumulator:
    found = EventAccumulator(str(out / "logs"))
    found.Reload()
    return found


def test_files_and_tensorboard_tell_the_same(world: Path, tmp_path: Path) -> None:
    out = run(world, tmp_path / "out", max_train_steps=4, validation_steps=2, checkpointing_steps=2)
    rows = step_rows(out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert tuple(rows[0]) == (*lines[0], *VALIDATED) == COLUMNS
    assert [{name: float(value) for name, value in row.items() if value} for row in rows] == lines
    assert [line["epoch"] for line in lines] == [0.3333, 0.6667, 1.0, 1.3333]  # 3 steps, of 2, 2 and 2 pictures
    for line in lines:
        assert line["images_per_second"] == pytest.approx(2 / line["seconds"], rel=0.02, abs=0.01)
        assert line["grad_norm"] > 0 and line["lr"] == 0.01 and line["peak_memory_gib"] > 0.01
    found = board(out)
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx([line["loss"] for line in lines])
    assert [event.step for event in found.Images("samples")] == [0, 2, 4]
    assert "lora_rank: 4" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_line_that_was_cut_short_is_not_kept(tmp_path: Path) -> None:
    config = resolve_config({**GIVEN, "output_path": str(tmp_path), "report_to": ["none"]})
    whole = {"metrics.csv": "step,epoch\n1,0.5\n", "metrics.jsonl": '{"step": 1}\n'}
    for name, text in whole.items():
        (tmp_path / name).write_text(text + {"metrics.csv": "1", "metrics.jsonl": '{"step": 1'}[name])
    with open_log(config, 3, 2, torch.device("cpu")):
        pass
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1:] == ["1,0.5"]
    assert (tmp_path / "metrics.jsonl").read_text() == whole["metrics.jsonl"]


def test_nothing_but_the_files_where_nothing_is_asked_for(world: Path, tmp_path: Path) -> None:
    out = run(world, tmp_path / "out", report_to="none", max_train_steps=1)
    assert not (out / "logs").exists()
    assert len(step_rows(out)) == 1


class Recorder:
    """A module that stands for wandb or trackio, and notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.config = types.SimpleNamespace(update=lambda values, **_: self.calls.append(("config", values)))
        self.api = types.SimpleNamespace(api_key="known")

    def init(self, **given: Any) -> Any:
        self.calls.append(("init", given))
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))

    @staticmethod
    def Image(pixels: Any) -> Any:
        return ("image", pixels.shape)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_hear_the_same_and_go_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recorder = Recorder()
    recorder.__spec__ = object()  # type: ignore[attr-defined]  # what `find_spec` asks for
    monkeypatch.setitem(sys.modules, name, recorder)
    options: dict[str, Any] = {"report_to": name, "tracker_project_name": "shapes", "checkpointing_steps": 2}
    out = run(world, tmp_path / "out", max_train_steps=2, **options)
    kinds = [kind for kind, _ in recorder.calls]
    assert kinds == ["init", "config", *["log"] * 8, "finish"]
    init, config = recorder.calls[0][1], recorder.calls[1][1]
    assert init["project"] == "shapes" and init["resume"] == "allow"
    assert config["lora_rank"] == 4
    steps = [(step, set(values)) for kind, (step, values) in recorder.calls[2:10] if kind == "log"]
    metrics = {f"train/{column}" for column in COLUMNS if column not in ("step", *VALIDATED)}
    health = {"health_agreement", "health_sharpness"}
    looks = [[(step, {"samples"}), (step, health), (step, {"health"})] for step in (0, 2)]
    assert steps == [*looks[0], (1, metrics), (2, metrics), *looks[1]]
    run(world, out, max_train_steps=3, resume_from_checkpoint="latest", **options)
    again = next(given for kind, given in recorder.calls[11:] if kind == "init")
    assert (again.get("id"), again["name"]) == (init.get("id"), init["name"])
    run(world, out, "--overwrite_output_dir", max_train_steps=1, **options)
    fresh = [given for kind, given in recorder.calls if kind == "init"][-1]
    assert (fresh.get("id"), fresh["name"]) != (init.get("id"), init["name"])


def test_what_is_missing_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "trackio"):
        with pytest.raises(ConfigError, match=f"--report_to {name}: the package is not here: pip install {name}"):
            check_trackers(resolve_config({**GIVEN, "report_to": [name]}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    recorder = Recorder()
    recorder.api.api_key = None
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    asked = resolve_config({**GIVEN, "report_to": ["wandb"]})
    with pytest.raises(ConfigError, match="run `wandb login`, or set WANDB_MODE=offline"):
        check_trackers(asked)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(asked)
    with pytest.raises(ConfigError, match="report_to: none leaves no room for others"):
        resolve_config({**GIVEN, "report_to": ["none", "wandb"]})
    with pytest.raises(ConfigError, match="report_to: found 'comet'"):
        resolve_config({**GIVEN, "report_to": ["comet"]})
