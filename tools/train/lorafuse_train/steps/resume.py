"""Checkpoints of a run: what they hold, when they may be continued, and where a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafuse_common.errors import ConfigError, OutputError
from lorafuse_train.base import fused_loras
from lorafuse_train.console import say
from lorafuse_train.lora.adapter import adapter_parameters, lora_state
from lorafuse_train.lora.metadata import dataset_sha256, lora_header
from lorafuse_train.options.entry import FEW_STEP, LORA, NOISE, OPTIMIZER, TRAINING
from lorafuse_train.options.options import OPTIONS, plain_value
from lorafuse_train.steps.ema import averaged
from lorafuse_train.steps.loop import Training, start
from lorafuse_train.steps.state import (
    LoopState,
    choose_checkpoint,
    clear_leftovers,
    keep_newest,
    load_checkpoint,
    save_checkpoint,
)

DECISIVE = (LORA, TRAINING, OPTIMIZER, NOISE, FEW_STEP)
"""The panels whose options a run must have in common with the one it continues."""
STATED_OTHERWISE = (
    "lora_target_modules", "lora_alpha", "num_epochs", "max_train_steps", "gradient_accumulation_steps",
    "timestep_shift", "learning_rate", "lr_warmup_steps", "objective_base", "preserve_weight", "preserve_share",
    "preserve_count",
)  # fmt: skip
"""Except these, which are compared as what comes of them."""
OF_THE_BASE = ("fused_sha256", "fused_loras")
"""What --allow_base_mismatch lets pass."""


def resumed(training: Training) -> LoopState:
    """The state to train from: a checkpoint's where one is to be continued, else a fresh one."""
    config, state = training.plan.config, start(training)
    if training.accelerator.is_main_process:
        clear_leftovers(config.output_path)
    folder = choose_checkpoint(config.resume_from_checkpoint, config.output_path)
    if folder:
        ignored = OF_THE_BASE if config.allow_base_mismatch else ()
        parameters = adapter_parameters(training.transformer)
        before = load_checkpoint(folder, state, parameters, _identity(training), ignored)
        if state.step > training.total_steps:
            raise ConfigError(
                f"--resume_from_checkpoint {folder}: has done {state.step} steps, more than the {training.total_steps} "
                "of this run; raise --max_train_steps or --num_epochs, or name an earlier checkpoint"
            )
        say(f"going on from {folder}, step {state.step} of {training.total_steps}")
        if before != training.accelerator.num_processes:
            say(
                f"{before} processes before, {training.accelerator.num_processes} now: the result is the same but for "
                "fp32 rounding, not byte for byte"
            )
    elif config.resume_from_checkpoint:
        say(f"no checkpoint in {config.output_path}: a fresh start")
    return state


def _identity(training: Training) -> dict[str, Any]:
    """What a continuation must have in common with the run it continues, for the result to be the same."""
    plan, config, total = training.plan, training.plan.config, training.total_steps
    manifest = plan.base.manifest
    return {
        name: plain_value(config, name)
        for name, option in OPTIONS.items()
        if option.entry.panel in DECISIVE and option.kind is not Path and name not in STATED_OTHERWISE
    } | {
        "lora_alpha": config.alpha,
        "learning_rate": config.peak_learning_rate,
        "dataset_repeat": config.dataset_repeat,
        "fused_sha256": plan.base.fused_sha256,
        "fused_loras": [f"{lora.name} x {lora.strength:g}" for lora in fused_loras(manifest)] if manifest else [],
        "base_dtype": str(plan.base.dtype),
        "autocast": training.precision.autocast,
        "dataset_sha256": dataset_sha256(plan.samples),
        "lora_checkpoint_sha256": plan.start.sha256 if plan.start else None,
        "masks_sha256": plan.masks.sha256 if plan.masks else None,
        "target_modules": list(plan.targets.modules),
        "timestep_shifts": sorted(plan.shifts.values()),
        "micro_batches_per_step": training.order.accumulation * training.order.world,
        "warmup_steps": config.warmup_steps(total),
        # A constant rate may go on for longer than was planned; the others depend on where they end.
        "preserved": training.preservation.identity if training.preservation else None,
        **plan.objective.identity,
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
        parameters, processes = adapter_parameters(training.transformer), training.accelerator.num_processes
        save_checkpoint(folder, state, parameters, lora, _identity(training), processes)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror}); earlier checkpoints are complete"
        ) from error
    keep_newest(out, training.plan.config.checkpoints_total_limit)
    say(f"saved {folder}")


def header(training: Training, steps: int) -> dict[str, str]:
    """The header of a LoRA file made after `steps` steps."""
    return lora_header(training.plan, steps)
