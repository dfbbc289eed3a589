"""Checkpoints of a run: what they hold, when they may be continued, and where a run begins."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lorafuse_common.errors import ConfigError, OutputError

from .adapter import adapter_parameters, lora_metadata, lora_state
from .console import say
from .ema import averaged
from .entry import LORA, NOISE, OPTIMIZER, TRAINING
from .loop import Training, start
from .options import OPTIONS, plain_value
from .state import LoopState, choose_checkpoint, keep_newest, load_checkpoint, save_checkpoint

DECISIVE = (LORA, TRAINING, OPTIMIZER, NOISE)
"""The panels whose options a run must have in common with the one it continues."""
STATED_OTHERWISE = (
    "lora_target_modules", "lora_alpha", "num_epochs", "max_train_steps", "gradient_accumulation_steps",
    "timestep_shift", "learning_rate", "lr_warmup_steps",
)  # fmt: skip
"""Except these, which are compared as what comes of them."""


def resumed(training: Training) -> LoopState:
    """The state to train from: a checkpoint's where one is to be continued, else a fresh one."""
    config, state = training.plan.config, start(training)
    folder = choose_checkpoint(config.resume_from_checkpoint, config.output_path)
    if folder:
        load_checkpoint(folder, state, adapter_parameters(training.transformer), _identity(training))
        if state.step > training.total_steps:
            raise ConfigError(
                f"--resume_from_checkpoint {folder}: has done {state.step} steps, more than the {training.total_steps} "
                "of this run; raise --max_train_steps or --num_epochs, or name an earlier checkpoint"
            )
        say(f"going on from {folder}, step {state.step} of {training.total_steps}")
    elif config.resume_from_checkpoint:
        say(f"no checkpoint in {config.output_path}: a fresh start")
    return state


def _identity(training: Training) -> dict[str, Any]:
    """What a continuation must have in common with the run it continues, for the result to be the same."""
    plan, config, total = training.plan, training.plan.config, training.total_steps
    dataset = [(sample.sha256, sample.caption, sample.size) for sample in plan.samples]
    return {
        name: plain_value(config, name)
        for name, option in OPTIONS.items()
        if option.entry.panel in DECISIVE and option.kind is not Path and name not in STATED_OTHERWISE
    } | {
        "lora_alpha": config.alpha,
        "learning_rate": config.peak_learning_rate,
        "dataset_repeat": config.dataset_repeat,
        "fused_sha256": plan.base.fused_sha256,
        "base_dtype": str(plan.base.dtype),
        "autocast": training.precision.autocast,
        "dataset_sha256": hashlib.sha256(json.dumps(dataset).encode()).hexdigest(),
        "lora_checkpoint_sha256": plan.start.sha256 if plan.start else None,
        "masks_sha256": plan.masks.sha256 if plan.masks else None,
        "target_modules": list(plan.targets.modules),
        "timestep_shifts": sorted(plan.shifts.values()),
        "micro_batches_per_step": training.order.accumulation * training.order.world,
        "warmup_steps": config.warmup_steps(total),
        # A constant rate may go on for longer than was planned; the others depend on where they end.
        "total_steps": None if config.lr_scheduler.startswith("constant") else total,
    }


def save(training: Training, state: LoopState) -> None:
    """Write the checkpoint of a step, with the LoRA as it is to be used.

    Raises:
        OutputError: it cannot be written.
    """
    out = training.plan.config.output_path
    folder = out / f"checkpoint-{state.step}"
    with averaged(state.ema):
        lora = lora_state(training.transformer), header(training, state.step)
    try:
        save_checkpoint(folder, state, adapter_parameters(training.transformer), lora, _identity(training))
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror}); earlier checkpoints are complete"
        ) from error
    keep_newest(out, training.plan.config.checkpoints_total_limit)
    say(f"saved {folder}")


def header(training: Training, steps: int) -> dict[str, str]:
    """The header of a LoRA file made after `steps` steps."""
    plan = training.plan
    return lora_metadata(plan.base, plan.targets, plan.config, steps, plan.start.record if plan.start else None)
