"""A training that can go on later: LoRA, optimizer and place, in a folder that appears whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafuse_common.errors import ConfigError
from lorafuse_common.publish import publish, recover
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.lora.lora_file import save_lora
from lorafuse_train.steps.ema import Ema
from lorafuse_train.steps.packing import pack, restore_optimizer, unpack

TENSORS_NAME, STATE_NAME = "training_state.safetensors", "training_state.json"
LATEST = "latest"
UNCHECKED = ".unchecked-"
"""How folders begin in which a file lies until it has been checked."""
WEIGHT, AVERAGE = "weight.", "average."
"""How names begin of what is trained and of its moving average, in `TENSORS_NAME`."""


@dataclass
class LoopState:
    """All that a training changes from step to step, besides the LoRA's weights."""

    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    """One of diffusers' schedules (a `LambdaLR`)."""
    ema: Ema | None = None
    step: int = 0
    """Steps done."""


def save_checkpoint(
    folder: Path,
    state: LoopState,
    parameters: Mapping[str, nn.Parameter],
    lora: tuple[Mapping[str, Tensor], Mapping[str, str]],
    identity: Mapping[str, Any],
    processes: int,
) -> None:
    """Write a checkpoint; until it is complete, nothing has its name.

    `parameters` are those of the adapters, `lora` the tensors and the header of a LoRA file made of them, `identity`
    what a continuation must have in common; `processes` is how many there were.
    """
    optimizer, tensors = pack(state.optimizer.state_dict(), "optimizer")
    tensors |= _on_cpu(WEIGHT, parameters) | (_on_cpu(AVERAGE, state.ema.averages) if state.ema else {})
    place = {
        "step": state.step,
        "lr_scheduler": state.lr_scheduler.state_dict(),
        "optimizer": optimizer,
        "identity": dict(identity),
        "processes": processes,
    }
    with publish(folder, replace=folder.exists()) as staging:
        save_lora(staging / FILE_NAME, *lora)
        save_file(tensors, staging / TENSORS_NAME)
        (staging / STATE_NAME).write_text(json.dumps(place, indent=1), encoding="utf-8")


def _on_cpu(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_checkpoint(
    folder: Path,
    state: LoopState,
    parameters: Mapping[str, nn.Parameter],
    identity: Mapping[str, Any],
    ignored: Collection[str] = (),
) -> int:
    """Put a training back to where it was when `folder` was written; `parameters` are as they were given for saving.

    Differences in what is `ignored` are let pass. Returns how many processes there were.

    Raises:
        ConfigError: the checkpoint is not complete, or of a training that differs in what decides the result.
    """
    try:
        place = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS_NAME)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"--resume_from_checkpoint {folder}: is no complete checkpoint ({error})") from error
    _require_same(folder, place["identity"], json.loads(json.dumps(identity)), ignored)
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"{WEIGHT}{name}"])
    if state.ema:
        state.ema.restore({name: tensors[f"{AVERAGE}{name}"] for name in state.ema.averages})
    restore_optimizer(state.optimizer, unpack(place["optimizer"], tensors))
    state.lr_scheduler.load_state_dict(place["lr_scheduler"])
    state.step = place["step"]
    return int(place.get("processes", 1))


WORDS = {
    "fused_sha256": "the weights of --fused_model (sha256)",
    "fused_loras": "what was fused into --fused_model",
    "dataset_sha256": "the dataset: its files, captions or sizes (sha256)",
    "masks_sha256": "the masks (sha256)",
    "lora_checkpoint_sha256": "--lora_checkpoint (sha256)",
    "micro_batches_per_step": "micro-batches in a step (--gradient_accumulation_steps x processes)",
}
"""What differs, where its name does not say it; the others are called as the options that they come of."""


def _require_same(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str]) -> None:
    differences = [
        f"  {WORDS.get(name, name)}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted({*then, *now} - {*ignored})
        if then.get(name) != now.get(name)
    ]
    if differences:
        raise ConfigError(
            f"--resume_from_checkpoint {folder}: belongs to another training, whose result would not be continued:\n"
            + "\n".join(differences)
            + "\nGive the same options and inputs, or start anew without --resume_from_checkpoint."
        )


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of an output folder, oldest first."""
    complete = [path for path in out.glob("checkpoint-*") if (path / STATE_NAME).is_file()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def choose_checkpoint(asked: str | None, out: Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None for a fresh start.

    Raises:
        ConfigError: the folder that was named is no checkpoint.
    """
    if asked is None:
        return None
    if asked == LATEST:
        found = checkpoints(out)
        return found[-1] if found else None
    folder = out / asked if (out / asked / STATE_NAME).is_file() else Path(asked)
    if not (folder / STATE_NAME).is_file():
        there = ", ".join(path.name for path in checkpoints(out)) or "none"
        raise ConfigError(f"--resume_from_checkpoint {asked}: no checkpoint there; in {out}: {there}")
    return folder


def clear_leftovers(out: Path) -> None:
    """Remove what a killed run had begun to write, and put back what it was replacing.

    Raises:
        OutputError: another run is writing there right now.
    """
    for folder in {path.name.split(".lorafuse-")[0][1:] for path in out.glob(".checkpoint-*.lorafuse-*")}:
        recover(out / folder)
    for path in out.glob(f"{UNCHECKED}*"):
        shutil.rmtree(path)


def keep_newest(out: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`."""
    for path in checkpoints(out)[: -limit if limit else 0]:
        shutil.rmtree(path)
