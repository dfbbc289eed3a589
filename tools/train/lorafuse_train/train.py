"""A training from start to end: plan, cache, train, save, load back, draw."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from lorafuse_common.errors import LorafuseError
from lorafuse_train.atomic import write_atomically
from lorafuse_train.base import load_transformer, original_transformer
from lorafuse_train.console import quiet_libraries, say
from lorafuse_train.dataset.data import Prompt
from lorafuse_train.encoding.encode import Encodings, fill_cache, free, open_cache
from lorafuse_train.few_step.prepare import prepare, prompts_to_encode
from lorafuse_train.launch import make_accelerator
from lorafuse_train.lora.adapter import attach, spare_casts
from lorafuse_train.lora.finish import present, save_result, upload
from lorafuse_train.lora.warm_start import start_from
from lorafuse_train.memory import describe_memory, estimate_memory, least_memory, require_memory
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import dump_config
from lorafuse_train.plan import Plan, make_order, plan_training
from lorafuse_train.precision import choose_precision
from lorafuse_train.samples.drawn_prompts import choose_size
from lorafuse_train.samples.gallery import Gallery
from lorafuse_train.samples.health import PLOT_NAME
from lorafuse_train.samples.original_rows import original_on_host
from lorafuse_train.samples.validation import Validation, is_due, prepare_gallery, prompts_to_draw
from lorafuse_train.signals import StopRequest, follow_launcher, stop_requests
from lorafuse_train.steps.ema import averaged
from lorafuse_train.steps.log import Log, open_log
from lorafuse_train.steps.loop import Training, fit
from lorafuse_train.steps.optimizers import check_optimizer
from lorafuse_train.steps.resume import resumed, save
from lorafuse_train.steps.state import LoopState, checkpoints
from lorafuse_train.summary import describe_end, describe_run

SPARING = (
    "Try --use_gradient_checkpointing, --train_batch_size 1 with --gradient_accumulation_steps, or less --max_pixels."
)


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
    accelerator = make_accelerator()
    check_optimizer(config, accelerator.device)
    precision = choose_precision(config, plan.base.dtype, accelerator.device)
    require_memory(least_memory(plan), config)
    encodings = _encodings(plan, accelerator)
    if accelerator.is_main_process:
        memory = estimate_memory(plan, encodings, precision)
        say(describe_memory(memory, config, precision.device))
        require_memory(memory, config)
    gallery = prepare_gallery(plan, encodings, precision)
    if config.original_model and accelerator.is_main_process:
        _draw_original(plan, gallery, config.original_model)
    training = _prepare(plan, encodings, gallery, accelerator)
    say(describe_run(training))
    state = resumed(training)
    if accelerator.is_main_process and state.step == 0:
        _start_output(config)
    with open_log(config, training.total_steps, state.step, precision.device) as log:
        validation = Validation.of(training, gallery, log) if log else None
        if validation and state.step == 0:
            with _memory_explained(precision.device):
                validation.start()
        accelerator.wait_for_everyone()
        number = _fit(training, state, validation, log)
        if number:
            raise Stopped(number, state.step)
        if validation:
            with averaged(state.ema):
                _finish(training, validation)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _fit(training: Training, state: LoopState, validation: Validation | None, log: Log | None) -> int:
    """Train to the end, or until a signal, whose number it returns."""
    if log:
        log.restart_clock()
    with stop_requests() as request:
        with _memory_explained(training.precision.device):
            fit(training, state, log, functools.partial(_after_step, training, state, validation, request))
        return request.agreed(training.accelerator) if state.step < training.total_steps else 0


@contextmanager
def _memory_explained(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LorafuseError(f"{device}: out of memory. {SPARING} ({error})") from error


def _encodings(plan: Plan, accelerator: Accelerator) -> Encodings:
    cache = open_cache(plan)
    fill_cache(cache, plan, prompts_of(plan), accelerator.device)  # the processes share what is to be done
    accelerator.wait_for_everyone()
    return Encodings(cache)


def prompts_of(plan: Plan) -> list[Prompt]:
    """What a training encodes besides its samples and their captions."""
    without_captions = [sample.uncaptioned for sample in plan.samples] if plan.config.caption_dropout else []
    return [*prompts_to_draw(plan), *prompts_to_encode(plan), *without_captions]


def _draw_original(plan: Plan, gallery: Gallery, original: Path) -> None:
    """Before the fused transformer is loaded, so that the two are never in memory together."""
    say(f"drawing samples of the original base {original}")
    folder = original_transformer(original, plan.base.component)
    gallery.draw_original(load_transformer(plan.base, folder, gallery.precision.device), folder)
    free(gallery.precision.device)


def _prepare(plan: Plan, encodings: Encodings, gallery: Gallery, accelerator: Accelerator) -> Training:
    config, precision = plan.config, gallery.precision
    say("loading the transformer")
    transformer = load_transformer(plan.base, plan.base.transformer, precision.device)
    objective_base, preservation = prepare(plan, encodings, transformer, precision, accelerator)
    if config.original_model and plan.base.is_scaffold and accelerator.is_main_process:
        gallery.original = original_on_host(
            original_transformer(config.original_model, plan.base.component), transformer
        )
    parameters = attach(transformer, plan.targets, config)
    if precision.autocast:
        spare_casts(transformer)
    if plan.start:
        start_from(plan.start, transformer)
    if config.use_gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    order = make_order(config, plan.samples, accelerator.num_processes)
    total = config.max_train_steps or config.num_epochs * order.steps_per_epoch
    return Training(
        plan, transformer, parameters, encodings, order, total, precision, accelerator, objective_base, preservation
    )


def _start_output(config: TrainConfig) -> None:
    """Remove what an earlier run left, except its LoRA, which stays until the new one has been checked."""
    out = config.output_path
    for folder in checkpoints(out):
        shutil.rmtree(folder)
    films = (*out.glob("samples/step-*.mp4"), *out.glob("samples-*.mp4"))
    pictures = (*out.glob("samples/step-*.png"), *out.glob("images/*.png"), out / "samples.png", out / PLOT_NAME)
    for path in (*films, *pictures):
        path.unlink(missing_ok=True)
    text = dump_config(config)
    write_atomically(out / "train_config.yaml", lambda file: file.write_text(text, encoding="utf-8"))


def _after_step(training: Training, state: LoopState, validation: Validation | None, request: StopRequest) -> bool:
    """Checkpoints and grids along the way; whether to stop, after a signal. `_finish` makes the last grid."""
    config, accelerator = training.plan.config, training.accelerator
    stop = bool(request.agreed(accelerator))
    is_last = state.step == training.total_steps
    due = config.checkpointing_steps and (state.step % config.checkpointing_steps == 0 or is_last)
    if (due or stop) and accelerator.is_main_process:
        save(training, state)
    if is_due(training.plan, state.step) and not (is_last or stop):
        if validation:
            with averaged(state.ema):
                validation.after_step(state.step)
        accelerator.wait_for_everyone()
    if validation:
        validation.log.restart_clock()
    return stop


def _finish(training: Training, validation: Validation) -> None:
    """Save what was trained, proven to load; draw the last grid; write the model card and push it."""
    gallery = validation.gallery
    validation.log.end_bar()
    save_result(training, gallery)
    validation.run(training.total_steps, training.plan.config.output_path / "samples.png")
    present(training, gallery)
    say(describe_end(training.plan, gallery.schedules, choose_size(training.plan.samples)))
    upload(training, gallery)
