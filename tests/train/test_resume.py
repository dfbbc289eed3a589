"""Going on later: byte-equal results, honest refusals, and signals that save first."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from train.runs import run, save_world

import lorafuse_fuse.cli
from lorafuse_common.errors import ConfigError, OutputError
from lorafuse_train import train
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.steps import state
from lorafuse_train.steps.objective import add_noise


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_batch_size": 1, "gradient_accumulation_steps": 2, "lr_warmup_steps": 5},
        {"lr_scheduler": "cosine"},
        {"optimizer": "adafactor", "lr_warmup_steps": 3},
        {"optimizer": "torch.optim.NAdam", "optimizer_args": "momentum_decay=0.01", "max_grad_norm": 0},
        {"init_lora_weights": "pissa_niter_4", "lora_dropout": 0.3, "lora_alpha": 3, "use_rslora": True},
        {"timestep_sampling": "mix:0.5", "caption_dropout": 0.5, "min_timestep": 300},
        {"ema_decay": 0.7, "ema_update_after_step": 1, "train_batch_size": 1},
        {"optimizer": "prodigy", "learning_rate": 1},
        {"objective_base": "auto", "preserve_weight": "auto", "preserve_count": 3, "lora_dropout": 0.2},
        {"noise_coupling": "minibatch_ot", "use_dora": True, "objective_base": "original"},
    ],
    ids=lambda options: " ".join(f"{value}" for value in options.values()) or "mid-epoch",
)
def test_a_resumed_run_equals_an_uninterrupted_one(world: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """7 steps at once, and stopped after 4: the same bytes, the same log but for the seconds."""
    whole = run(world, tmp_path / "whole", max_train_steps=7, **options)
    parts = run(world, tmp_path / "parts", max_train_steps=7, checkpointing_steps=2, **options)
    (parts / FILE_NAME).unlink()  # as if it had been killed in step 5 or 6
    for step in (6, 7):
        shutil.rmtree(parts / f"checkpoint-{step}")
    run(world, parts, max_train_steps=7, resume_from_checkpoint="latest", **options)
    assert (parts / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
    logs = [[line.split(",")[:5] for line in (out / "metrics.csv").read_text().splitlines()] for out in (whole, parts)]
    assert logs[0] == logs[1]
    validated = [0, 7]
    assert len(logs[0]) == 1 + 7 + len(validated)
    steps = [json.loads(line)["step"] for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted([*range(1, 8), *validated])


def test_a_finished_run_can_go_on_at_a_constant_rate(world: Path, tmp_path: Path) -> None:
    whole = run(world, tmp_path / "whole", max_train_steps=5)
    parts = run(world, tmp_path / "parts", max_train_steps=3, checkpointing_steps=3)
    run(world, parts, max_train_steps=5, resume_from_checkpoint="latest")
    assert (parts / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()


def test_the_average_is_what_is_used_and_the_weights_are_what_goes_on(world: Path, tmp_path: Path) -> None:
    out = run(world, tmp_path / "out", ema_decay=0.5, checkpointing_steps=3)
    saved, held = load_file(out / FILE_NAME), load_file(out / "checkpoint-3" / state.TENSORS_NAME)
    assert (out / "checkpoint-3" / FILE_NAME).read_bytes() == (out / FILE_NAME).read_bytes()
    for name, tensor in saved.items():
        inside = name.removeprefix("transformer.").replace(".weight", ".default.weight")
        assert held[f"{state.AVERAGE}{inside}"].equal(tensor)
    assert any(not held[f"{state.WEIGHT}{name}"].equal(held[f"{state.AVERAGE}{name}"]) for name in names(held))


def names(held: dict[str, Any]) -> list[str]:
    return [name.removeprefix(state.AVERAGE) for name in held if name.startswith(state.AVERAGE)]


def test_another_training_is_not_continued(world: Path, tmp_path: Path) -> None:
    out = run(world, tmp_path / "out", checkpointing_steps=1)
    with pytest.raises(ConfigError) as error:
        run(world, out, resume_from_checkpoint="latest", learning_rate=0.5, gradient_accumulation_steps=2)
    assert "learning_rate: 0.01 then, 0.5 now" in str(error.value)
    assert "micro-batches in a step (--gradient_accumulation_steps x processes): 1 then, 2 now" in str(error.value)
    data = shutil.copytree(world / "data", tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    first = min(data.glob("*.txt"), default=data / "metadata.csv")
    first.write_text(first.read_text().replace("a ", "one ", 1))
    with pytest.raises(ConfigError, match="the dataset: its files, captions or sizes"):
        run(world, out, resume_from_checkpoint="latest", dataset_base_path=data)
    with pytest.raises(ConfigError, match=r"no checkpoint there; in .*: checkpoint-1, checkpoint-2, checkpoint-3"):
        run(world, out, resume_from_checkpoint="checkpoint-9")
    with pytest.raises(ConfigError, match="has done 3 steps, more than the 2"):
        run(world, out, resume_from_checkpoint="latest", max_train_steps=2)
    moments = out / "checkpoint-2" / state.TENSORS_NAME
    moments.write_bytes(moments.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        run(world, out, resume_from_checkpoint="checkpoint-2")
    place = out / "checkpoint-3" / state.STATE_NAME
    place.write_text(json.dumps(json.loads(place.read_text()))[:-20])
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        run(world, out, resume_from_checkpoint="checkpoint-3")


def test_another_base_is_said_with_both_names(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And with its hash; only --allow_base_mismatch goes on."""
    out = run(world, tmp_path / "out", max_train_steps=1, checkpointing_steps=1)
    base, lora = str(world / "base"), f"{world / 'lightning.safetensors'}:0.5"
    arguments = ["fuse", base, "--lora", lora, "--schedule", "1,0.6", "--out", str(tmp_path / "fused")]
    lorafuse_fuse.cli.app(arguments, standalone_mode=False)
    options: dict[str, Any] = {"fused_model": tmp_path / "fused", "max_train_steps": 2}
    with pytest.raises(ConfigError) as error:
        run(world, out, resume_from_checkpoint="latest", **options)
    for part in (
        "what was fused into --fused_model: ['lightning.safetensors x 1'] then, ['lightning.safetensors x 0.5'] now",
        "the weights of --fused_model (sha256): '",
    ):
        assert part in str(error.value)
    run(world, out, "--allow_base_mismatch", resume_from_checkpoint="latest", **options)
    assert "going on from" in capsys.readouterr().out


def test_what_a_killed_run_had_begun_is_removed(world: Path, tmp_path: Path) -> None:
    out = run(world, tmp_path / "out", max_train_steps=1, checkpointing_steps=1)
    (out / FILE_NAME).unlink()
    left = [out / ".checkpoint-7.lorafuse-new-0a1b2c3d", out / f"{state.UNCHECKED}abc"]
    for folder in left:
        folder.mkdir()
        (folder / "file").write_text("half")
    (out / "checkpoint-1").rename(out / ".checkpoint-1.lorafuse-old-0a1b2c3d")  # it was just being replaced
    state.clear_leftovers(out)
    assert [path.name for path in state.checkpoints(out)] == ["checkpoint-1"]
    assert not any(folder.exists() for folder in left)
    run(world, out, max_train_steps=1, resume_from_checkpoint="latest")
    assert (out / FILE_NAME).is_file()


def test_latest_without_a_checkpoint_starts_afresh(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(world, tmp_path / "out", resume_from_checkpoint="latest")
    assert (out / FILE_NAME).is_file()
    assert "a fresh start" in capsys.readouterr().out


def test_only_the_newest_checkpoints_are_kept(world: Path, tmp_path: Path) -> None:
    out = run(world, tmp_path / "out", max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
    assert [path.name for path in state.checkpoints(out)] == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_from_there(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole = run(world, tmp_path / "whole", max_train_steps=4)
    calls = iter(range(100))

    def interrupted(*args: Any) -> Any:
        if next(calls) == 1:  # in the second step
            os.kill(os.getpid(), number)
        return add_noise(*args)

    monkeypatch.setattr("lorafuse_train.steps.loop.add_noise", interrupted)
    said: list[str] = []
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("lorafuse_train.cli._complain", said.append)
    run(world, tmp_path / "parts", max_train_steps=4)
    assert said == [f"lorafuse-train: {train.Stopped(number, 2)}"]
    assert train.Stopped(number, 2).status == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    out = tmp_path / "parts"
    assert [path.name for path in state.checkpoints(out)] == ["checkpoint-2"]
    assert not (out / FILE_NAME).exists()
    run(world, out, max_train_steps=4, resume_from_checkpoint="latest")
    assert (out / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()


def test_a_checkpoint_that_fails_half_way_leaves_the_one_before(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))

    def failing(*args: Any) -> None:
        save_file(*args)
        if next(calls) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorafuse_train.steps.state.save_file", failing)
    with pytest.raises(OutputError, match=r"checkpoint-2: cannot be written .No space left on device"):
        run(world, tmp_path / "out", checkpointing_steps=1)
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-1"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_cancelled_accelerate_launch_saves_and_ends(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    launch = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    command = [*launch, "--dynamo_backend", "no", "-m", "lorafuse_train", "train", "--max_train_steps", "1000000"]
    for name, value in (("fused_model", world / "fused"), ("dataset_base_path", world / "data"), ("output_path", out)):
        command += [f"--{name}", str(value)]
    path = ":".join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: (out / "metrics.csv").is_file() and len((out / "metrics.csv").read_text().splitlines()) > 3)
        running.send_signal(signal.SIGTERM)
        running.wait(30)
        wait_for(lambda: bool(state.checkpoints(out)))
    finally:
        running.kill()
    steps = (out / "metrics.csv").read_text().splitlines()
    time.sleep(0.5)
    assert (out / "metrics.csv").read_text().splitlines() == steps


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Until it is true, or long enough to be sure that it never will be."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)
