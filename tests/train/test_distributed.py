"""Several processes, and processes that die: the same numbers, the same bytes, no hang, nothing lost."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from train import tiny
from train.runs import arguments_of, run, save_world

from lorafuse_common.errors import ConfigError
from lorafuse_train import launch
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.steps import state

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    str(Path(sys.executable).parent / "accelerate"), "launch", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no",
]  # fmt: skip
MODULE = ["-m", "lorafuse_train"]
PATIENCE = 240.0
"""Seconds in which anything here has long ended, unless it hangs."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With masks, and five pictures, so that over two processes one has nothing to do in every third step."""
    root = save_world(tmp_path_factory.mktemp("world"))
    shutil.rmtree(root / "data")
    data = tiny.save_dataset(root / "data", ((32, 32),) * 5)
    rows = (data / "metadata.csv").read_text().splitlines()
    (data / "metadata.csv").write_text("\n".join([f"{rows[0]},mask", *(f"{row},mask.png" for row in rows[1:])]))
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).resize((32, 32), 0).save(data / "mask.png")
    return root


RICH: dict[str, Any] = {
    "train_batch_size": 1, "max_grad_norm": 0.1, "ema_decay": 0.7, "caption_dropout": 0.5, "use_dora": True,
    "masked_loss": "mask", "masked_loss_background": 0.25, "max_train_steps": 4, "lora_dropout": 0.2,
    "objective_base": "original", "preserve_weight": 0.5, "preserve_count": 3,
}  # fmt: skip


def spawn(launcher: list[str], target: list[str], arguments: list[str], **more: str) -> subprocess.Popen[str]:
    path = ":".join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}
    return subprocess.Popen(
        [*launcher, *target, *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(running: subprocess.Popen[str], patience: float = PATIENCE) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; a hang ends the whole process group and is a failure."""
    try:
        stdout, stderr = running.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        raise
    return running.returncode, stdout, stderr


def train(launcher: list[str], world: Path, out: Path, *more: str, **options: Any) -> tuple[int, str, str]:
    return finish(spawn(launcher, MODULE, arguments_of(world, out, *more, **options)))


def losses(out: Path) -> list[float]:
    with (out / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_go_on_byte_for_byte(world: Path, tmp_path: Path) -> None:
    alone = run(world, tmp_path / "alone", gradient_accumulation_steps=2, **RICH)
    both = tmp_path / "both"
    code, stdout, stderr = train(TORCHRUN, world, both, checkpointing_steps=2, **RICH)
    assert code == 0, stderr
    assert stdout.count("LoRA:  ") == 1
    assert losses(both) == pytest.approx(losses(alone), abs=1e-6)
    one, two = load_file(alone / FILE_NAME), load_file(both / FILE_NAME)
    # A step is of 1e-2, and Adam makes much of the rounding where a gradient is next to nothing.
    assert max((two[name] - tensor).abs().max() for name, tensor in one.items()) < 1e-4

    parts = Path(shutil.copytree(both, tmp_path / "parts"))
    (parts / FILE_NAME).unlink()  # as if it had been killed in step 3 or 4
    shutil.rmtree(parts / "checkpoint-4")
    code, stdout, stderr = train(TORCHRUN, world, parts, resume_from_checkpoint="latest", **RICH)
    assert code == 0, stderr
    assert "going on from" in stdout
    assert "processes before" not in stdout
    assert (parts / FILE_NAME).read_bytes() == (both / FILE_NAME).read_bytes()
    assert losses(parts) == losses(both)


def test_another_number_of_processes_is_said(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many micro-batches in a step it may go on; otherwise `micro_batches_per_step` differs."""
    out = run(world, tmp_path / "out", checkpointing_steps=1, max_train_steps=2)
    place = out / "checkpoint-1" / state.STATE_NAME
    place.write_text(place.read_text().replace('"processes": 1', '"processes": 2'))
    (out / FILE_NAME).unlink()
    capsys.readouterr()
    run(world, out, resume_from_checkpoint="checkpoint-1", max_train_steps=2)
    assert "2 processes before, 1 now: the result is the same but for fp32 rounding" in capsys.readouterr().out


FAILING = """
    import os, sys
    from lorafuse_common.errors import LorafuseError
    from lorafuse_train import cli
    from lorafuse_train.steps import loop
    from lorafuse_train import train

    whole, calls = {module}.{name}, []

    def failing(*arguments, **more):
        calls.append(1)
        if os.environ["RANK"] == "{rank}" and len(calls) == 2:
            raise {error}
        return whole(*arguments, **more)

    {module}.{name} = failing
    cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "module", "name", "error"),
    [
        (1, "loop", "add_noise", 'RuntimeError("this rank is broken")'),
        (0, "train", "save", 'LorafuseError("the disk is full")'),
    ],
    ids=["any", "main"],
)
def test_a_rank_that_fails_ends_the_others(
    world: Path, tmp_path: Path, rank: int, module: str, name: str, error: str
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(textwrap.dedent(FAILING.format(rank=rank, module=module, name=name, error=error)))
    arguments = arguments_of(world, tmp_path / "out", checkpointing_steps=1, train_batch_size=1, max_train_steps=500)
    began = time.monotonic()
    code, _, stderr = finish(spawn(TORCHRUN, [str(script)], arguments))
    assert code != 0
    assert error.split('"')[1] in stderr
    assert time.monotonic() - began < PATIENCE / 2
    assert not (tmp_path / "out" / FILE_NAME).exists()
    assert [path.name for path in state.checkpoints(tmp_path / "out")] == ["checkpoint-1"]


@pytest.mark.slow
def test_accelerate_launch_that_starts_one_of_two_is_refused(world: Path, tmp_path: Path) -> None:
    code, _, stderr = train([*ACCELERATE, "--cpu", "--num_processes", "2"], world, tmp_path / "out")
    assert code == 1
    assert "`accelerate launch` was asked for several processes and started this one only" in stderr
    assert "Traceback (most recent call last)" not in stderr.split("lorafuse-train:")[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_accelerate_launch_of_two(world: Path, tmp_path: Path) -> None:
    code, stdout, stderr = train(
        [*ACCELERATE, "--multi_gpu", "--num_processes", "2"], world, tmp_path / "out", max_train_steps=1
    )
    assert code == 0, stderr
    assert "1 x 2 pictures (batch x accumulation x processes)" in stdout


def test_what_runs_is_compared_with_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launch.make_accelerator().num_processes == 1
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="started this one only"):
        launch.make_accelerator()
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"A=1\0MASTER_PORT=29500\0")  # as a cluster's launcher has it
    assert launch.make_accelerator().num_processes == 1
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="set up for FSDP; only plain data parallelism"):
        launch.make_accelerator()


KILLED = """
    import os, signal, sys
    from lorafuse_common import publish
    from lorafuse_train import cli
    from lorafuse_train.steps import state

    whole, calls = {module}.{name}, []

    def killed(*arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            if {after}:
                whole(*arguments, **more)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **more)

    {module}.{name} = killed
    cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "after"),
    [("state", "save_lora", True), ("state", "save_file", True), ("publish", "_put_in_place", False)],
)
def test_a_kill_in_a_save_leaves_the_checkpoint_before(
    world: Path, tmp_path: Path, module: str, name: str, after: bool
) -> None:
    """While the second checkpoint is written; the run that goes on equals one that was never killed."""
    options: dict[str, Any] = {"max_train_steps": 3, "train_batch_size": 1}
    whole = run(world, tmp_path / "whole", **options)
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(textwrap.dedent(KILLED.format(module=module, name=name, after=after)))
    code, _, _ = finish(
        spawn([sys.executable], [str(script)], arguments_of(world, out, checkpointing_steps=1, **options))
    )
    assert code == -signal.SIGKILL
    assert [path.name for path in state.checkpoints(out)] == ["checkpoint-1"]
    assert [*out.glob(".checkpoint-2*")]
    run(world, out, checkpointing_steps=3, resume_from_checkpoint="latest", **options)
    assert (out / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
    assert not [path for path in out.glob(".*") if path.suffix != ".lock"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_within_a_step(world: Path, tmp_path: Path, number: signal.Signals, status: int) -> None:
    out = tmp_path / "out"
    running = spawn([sys.executable], MODULE, arguments_of(world, out, max_train_steps=1_000_000))
    end = time.monotonic() + PATIENCE
    while not (out / "metrics.jsonl").is_file() or len((out / "metrics.jsonl").read_text().splitlines()) < 4:
        assert time.monotonic() < end and running.poll() is None
        time.sleep(0.05)
    before = len(losses(out))
    running.send_signal(number)
    code, _, stderr = finish(running)
    assert code == status
    (saved,) = state.checkpoints(out)
    assert f"stopped by signal {int(number)} after step" in stderr
    steps = len(losses(out))
    assert saved.name == f"checkpoint-{steps}"
    assert steps - before < 50  # a step takes some milliseconds here, and so does the signal
    assert "Traceback" not in stderr
