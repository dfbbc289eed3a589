"""A training from start to end: plan, cache, train, save, load back, draw."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs

from lorafuse_common.errors import ConfigError, LorafuseError, OutputError

from .adapter import (
    FILE_NAME,
    attach,
    compare_effects,
    load_back,
    lora_metadata,
    lora_parameters,
    lora_state,
    save_lora,
    without,
)
from .atomic import write_atomically
from .base import load_transformer, original_transformer
from .config import TrainConfig
from .console import quiet_libraries, say
from .encode import Encodings, fill_cache, free, open_cache
from .gallery import Gallery, choose_prompts, choose_schedules, choose_size, prepare_prompts
from .log import Log, open_log
from .loop import Training, fit, start
from .options import dump_config
from .order import Order
from .plan import Plan, plan_training
from .precision import Precision, choose_precision
from .signals import StopRequest, follow_launcher, stop_requests
from .state import LoopState, checkpoints, choose_checkpoint, keep_newest, load_checkpoint, save_checkpoint
from .summary import describe_end, describe_run

LONGEST_WAIT = timedelta(days=2)
"""How long processes wait for the main one to fill the cache or draw; the default of ten minutes is too short."""
SPARING = (
    "Try --use_gradient_checkpointing, --train_batch_size 1 with --gradient_accumulation_steps, or less --max_pixels."
)
UNSUPPORTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class Stopped(Exception):  # no error: the user asked for it
    """A signal stopped the training after a step; everything that is needed to go on is saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by signal {number} after step {step}; go on with --resume_from_checkpoint latest")
        self.status = 128 + number


def run(config: TrainConfig) -> None:
    """Train a LoRA; the transformer's weights are loaded only when everything before them has succeeded.

    Raises:
        LorafuseError: whatever is wrong with what the user gave.
        Stopped: a signal ended it early.
    """
    quiet_libraries()
    follow_launcher()
    plan = plan_training(config)
    accelerator = _accelerator()
    precision = choose_precision(config, plan.base.dtype, accelerator.device)
    encodings = _encodings(plan, accelerator)
    gallery = _gallery(plan, encodings, precision)
    if config.original_model and accelerator.is_main_process:
        _draw_original(plan, gallery, config.original_model)
    training = _prepare(plan, encodings, precision, accelerator)
    say(describe_run(training))
    state = _resumed(training)
    if accelerator.is_main_process and state.step == 0:
        _start_output(config)
    try:
        with open_log(config.output_path, training.total_steps, state.step) as log, stop_requests() as request:
            fit(training, state, log, functools.partial(_after_step, training, state, gallery, log, request))
    except torch.OutOfMemoryError as error:
        raise LorafuseError(f"{precision.device}: out of memory. {SPARING} ({error})") from error
    if state.step < training.total_steps:
        raise Stopped(request.agreed(accelerator), state.step)
    if accelerator.is_main_process:
        _finish(training, gallery)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _accelerator() -> Accelerator:
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",  # `Precision` decides, not the machine's accelerate config
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    if accelerator.distributed_type in UNSUPPORTED:
        raise ConfigError(
            f"accelerate is set up for {accelerator.distributed_type.value}; only plain data parallelism is supported: "
            "run `accelerate launch --multi_gpu -m lorafuse_train train ...` or change `accelerate config`"
        )
    return accelerator


def _encodings(plan: Plan, accelerator: Accelerator) -> Encodings:
    cache = open_cache(plan)
    if accelerator.is_main_process:
        prompts = (*choose_prompts(plan.config, plan.samples), plan.config.validation_negative_prompt)
        fill_cache(cache, plan, prompts, accelerator.device)
    accelerator.wait_for_everyone()
    return Encodings(cache)


def _gallery(plan: Plan, encodings: Encodings, precision: Precision) -> Gallery:
    latent = plan.recipe.latent_shape(plan.base.pipeline, *choose_size(plan.samples))
    texts = choose_prompts(plan.config, plan.samples)
    prompts = prepare_prompts(plan.config, encodings, texts, latent)
    schedules = choose_schedules(plan.config, plan.base, plan.recipe, latent)
    return Gallery(plan.recipe, plan.base, prompts, schedules, precision)


def _draw_original(plan: Plan, gallery: Gallery, original: Path) -> None:
    """Before the fused transformer is loaded, so that the two are never in memory together."""
    say(f"drawing samples of the original base {original}")
    gallery.draw_original(load_transformer(plan.base, original_transformer(original), gallery.precision.device))
    free(gallery.precision.device)


def _prepare(plan: Plan, encodings: Encodings, precision: Precision, accelerator: Accelerator) -> Training:
    config, recipe, pipeline = plan.config, plan.recipe, plan.base.pipeline
    say("loading the transformer")
    transformer = load_transformer(plan.base, plan.base.transformer, precision.device)
    parameters = attach(transformer, plan.targets, config)
    if config.use_gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    sizes = tuple(sample.size for sample in plan.samples)
    order = Order(
        sizes,
        config.seed,
        config.dataset_repeat,
        config.train_batch_size,
        config.gradient_accumulation_steps,
        accelerator.num_processes,
    )
    shifts = {
        size: config.timestep_shift or recipe.shift(pipeline, recipe.latent_shape(pipeline, *size))
        for size in dict.fromkeys(sizes)
    }
    total = config.max_train_steps or config.num_epochs * order.steps_per_epoch
    return Training(plan, transformer, parameters, encodings, order, shifts, total, precision, accelerator)


def _start_output(config: TrainConfig) -> None:
    """Remove what an earlier run left, except its LoRA, which stays until the new one has been checked."""
    out = config.output_path
    for folder in checkpoints(out):
        shutil.rmtree(folder)
    for path in (*out.glob("samples/step-*.png"), out / "samples.png"):
        path.unlink(missing_ok=True)
    text = dump_config(config)
    write_atomically(out / "train_config.yaml", lambda file: file.write_text(text, encoding="utf-8"))


def _resumed(training: Training) -> LoopState:
    """The state to train from: a checkpoint's where one is to be continued, else a fresh one."""
    config, state = training.plan.config, start(training)
    folder = choose_checkpoint(config.resume_from_checkpoint, config.output_path)
    if folder:
        load_checkpoint(folder, state, lora_parameters(training.transformer), _identity(training))
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
    decisive = (
        "lora_rank", "lora_alpha", "learning_rate", "train_batch_size", "dataset_repeat", "lr_scheduler", "adam_beta1",
        "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "weighting_scheme", "logit_mean",
        "logit_std", "seed",
    )  # fmt: skip
    return {name: getattr(config, name) for name in decisive} | {
        "fused_sha256": plan.base.fused_sha256,
        "base_dtype": str(plan.base.dtype),
        "autocast": training.precision.autocast,
        "dataset_sha256": hashlib.sha256(json.dumps(dataset).encode()).hexdigest(),
        "target_modules": list(plan.targets.modules),
        "timestep_shifts": sorted(training.shifts.values()),
        "micro_batches_per_step": training.order.accumulation * training.order.world,
        "warmup_steps": config.warmup_steps(total),
        # A constant rate may go on for longer than was planned; the others depend on where they end.
        "total_steps": None if config.lr_scheduler.startswith("constant") else total,
    }


def _after_step(training: Training, state: LoopState, gallery: Gallery, log: Log | None, request: StopRequest) -> bool:
    """Checkpoints and grids along the way; whether to stop, after a signal. `_finish` makes the last grid."""
    config, accelerator = training.plan.config, training.accelerator
    stop = bool(request.agreed(accelerator))
    is_last = state.step == training.total_steps
    due = config.checkpointing_steps and (state.step % config.checkpointing_steps == 0 or is_last)
    if (due or stop) and accelerator.is_main_process:
        _save(training, state)
    if config.validation_steps and state.step % config.validation_steps == 0 and not (is_last or stop):
        if accelerator.is_main_process:
            gallery.draw(training.transformer, config.output_path / "samples" / f"step-{state.step}.png")
        accelerator.wait_for_everyone()
    if log:
        log.restart_clock()
    return stop


def _save(training: Training, state: LoopState) -> None:
    out = training.plan.config.output_path
    folder = out / f"checkpoint-{state.step}"
    lora, header = lora_state(training.transformer), _metadata(training, state.step)
    try:
        save_checkpoint(folder, state, lora, header, _identity(training))
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror}); earlier checkpoints are complete"
        ) from error
    keep_newest(out, training.plan.config.checkpoints_total_limit)
    say(f"saved {folder}")


def _finish(training: Training, gallery: Gallery) -> None:
    """Save, prove that diffusers loads what was saved, and only then give it its name; draw the last grid."""
    config, base, transformer = training.plan.config, training.plan.base, training.transformer
    final = config.output_path / FILE_NAME
    unchecked = final.with_name(f"unchecked_{FILE_NAME}")
    save_lora(unchecked, lora_state(transformer), _metadata(training, training.total_steps))
    trained = _probe(gallery, transformer)
    with without(transformer):
        bare = _probe(gallery, transformer)
    load_back(transformer, base.pipeline, unchecked)
    compare_effects(unchecked, bare, trained, _probe(gallery, transformer))
    unchecked.replace(final)
    say(f"saved {final}; diffusers loads it, with the effect it had in training")
    gallery.draw(transformer, config.output_path / "samples.png")
    say(describe_end(training.plan, gallery.schedules, choose_size(training.plan.samples)))


def _metadata(training: Training, steps: int) -> dict[str, str]:
    return lora_metadata(training.plan.base, training.plan.targets, training.plan.config, steps)


@torch.no_grad()
def _probe(gallery: Gallery, transformer: Any) -> torch.Tensor:
    """The model's prediction for the first prompt, halfway through the noise."""
    prompts, precision = gallery.prompts, gallery.precision
    x = prompts.noise[0][None].to(precision.device)
    sigma = torch.full((1,), 0.5, device=precision.device)
    with precision.compute():
        return gallery.recipe.predict(transformer, x, sigma, gallery.recipe.collate(prompts.encoded[:1]))
