"""A training from start to end: plan, cache, train, save, load back, draw."""

from __future__ import annotations

import functools
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs

from lorafuse_common.errors import ConfigError, LorafuseError

from .adapter import (
    ADAPTER,
    FILE_NAME,
    attach,
    compare_effects,
    load_back,
    lora_state,
    save_lora,
    without,
)
from .atomic import write_atomically
from .base import load_transformer, original_transformer
from .config import TrainConfig
from .console import quiet_libraries, say
from .ema import averaged
from .encode import Encodings, fill_cache, free, open_cache
from .gallery import Gallery, choose_prompts, choose_schedules, choose_size, prepare_prompts
from .log import Log, open_log
from .loop import Training, fit
from .memory import describe_memory, estimate_memory, least_memory, require_memory
from .optimizers import check_optimizer
from .options import dump_config
from .pissa import compute_exactly
from .plan import Plan, make_order, plan_training
from .precision import Precision, choose_precision
from .resume import header, resumed, save
from .signals import StopRequest, follow_launcher, stop_requests
from .state import LoopState, checkpoints
from .summary import describe_end, describe_run
from .warm_start import start_from

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
    check_optimizer(config, accelerator.device)
    precision = choose_precision(config, plan.base.dtype, accelerator.device)
    require_memory(least_memory(plan), config)
    encodings = _encodings(plan, accelerator)
    if accelerator.is_main_process:
        memory = estimate_memory(plan, encodings, precision)
        say(describe_memory(memory, config, precision.device))
        require_memory(memory, config)
    gallery = _gallery(plan, encodings, precision)
    if config.original_model and accelerator.is_main_process:
        _draw_original(plan, gallery, config.original_model)
    training = _prepare(plan, encodings, precision, accelerator)
    say(describe_run(training))
    state = resumed(training)
    if accelerator.is_main_process and state.step == 0:
        _start_output(config)
    with open_log(config, training.total_steps, state.step, precision.device) as log:
        number = _fit(training, state, gallery, log)
        if number:
            raise Stopped(number, state.step)
        if accelerator.is_main_process:
            with averaged(state.ema):
                _finish(training, gallery, log)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _fit(training: Training, state: LoopState, gallery: Gallery, log: Log | None) -> int:
    """Train to the end, or until a signal, whose number it returns."""
    device = training.precision.device
    with stop_requests() as request:
        try:
            fit(training, state, log, functools.partial(_after_step, training, state, gallery, log, request))
        except torch.OutOfMemoryError as error:
            raise LorafuseError(f"{device}: out of memory. {SPARING} ({error})") from error
        return request.agreed(training.accelerator) if state.step < training.total_steps else 0


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
        prompts = [*choose_prompts(plan.config, plan.samples), plan.config.validation_negative_prompt]
        prompts += [""] if plan.config.caption_dropout else []
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
    config = plan.config
    say("loading the transformer")
    transformer = load_transformer(plan.base, plan.base.transformer, precision.device)
    parameters = attach(transformer, plan.targets, config)
    if plan.start:
        start_from(plan.start, transformer)
    if config.use_gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    order = make_order(config, plan.samples, accelerator.num_processes)
    total = config.max_train_steps or config.num_epochs * order.steps_per_epoch
    return Training(plan, transformer, parameters, encodings, order, total, precision, accelerator)


def _start_output(config: TrainConfig) -> None:
    """Remove what an earlier run left, except its LoRA, which stays until the new one has been checked."""
    out = config.output_path
    for folder in checkpoints(out):
        shutil.rmtree(folder)
    for path in (*out.glob("samples/step-*.png"), out / "samples.png"):
        path.unlink(missing_ok=True)
    text = dump_config(config)
    write_atomically(out / "train_config.yaml", lambda file: file.write_text(text, encoding="utf-8"))


def _after_step(training: Training, state: LoopState, gallery: Gallery, log: Log | None, request: StopRequest) -> bool:
    """Checkpoints and grids along the way; whether to stop, after a signal. `_finish` makes the last grid."""
    config, accelerator = training.plan.config, training.accelerator
    stop = bool(request.agreed(accelerator))
    is_last = state.step == training.total_steps
    due = config.checkpointing_steps and (state.step % config.checkpointing_steps == 0 or is_last)
    if (due or stop) and accelerator.is_main_process:
        save(training, state)
    if config.validation_steps and state.step % config.validation_steps == 0 and not (is_last or stop):
        if accelerator.is_main_process:
            picture = config.output_path / "samples" / f"step-{state.step}.png"
            with averaged(state.ema):
                gallery.draw(training.transformer, picture)
            if log:
                log.picture("samples", picture, state.step)
        accelerator.wait_for_everyone()
    if log:
        log.restart_clock()
    return stop


def _finish(training: Training, gallery: Gallery, log: Log | None) -> None:
    """Save, prove that diffusers loads what was saved, and only then give it its name; draw the last grid."""
    config, base, transformer = training.plan.config, training.plan.base, training.transformer
    final = config.output_path / FILE_NAME
    if log:
        log.end_bar()
    unchecked = final.with_name(f"unchecked_{FILE_NAME}")
    save_lora(unchecked, lora_state(transformer), header(training, training.total_steps))
    trained = _probe(gallery, transformer)
    with without(transformer):
        bare = _probe(gallery, transformer)
    load_back(transformer, base.pipeline, unchecked)
    if config.starts_from_components:
        compute_exactly(transformer, ADAPTER)
    compare_effects(unchecked, bare, trained, _probe(gallery, transformer))
    unchecked.replace(final)
    say(f"saved {final}; diffusers loads it, with the effect it had in training")
    gallery.draw(transformer, config.output_path / "samples.png")
    if log:
        log.picture("samples", config.output_path / "samples.png", training.total_steps)
    say(describe_end(training.plan, gallery.schedules, choose_size(training.plan.samples)))


@torch.no_grad()
def _probe(gallery: Gallery, transformer: Any) -> torch.Tensor:
    """The model's prediction for the first prompt, halfway through the noise."""
    prompts, precision = gallery.prompts, gallery.precision
    x = prompts.noise[0][None].to(precision.device)
    sigma = torch.full((1,), 0.5, device=precision.device)
    with precision.compute():
        return gallery.recipe.predict(transformer, x, sigma, gallery.recipe.collate(prompts.encoded[:1]))
