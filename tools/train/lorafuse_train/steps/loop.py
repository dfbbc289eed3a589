"""The training loop: one page that reads from top to bottom."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from lorafuse_common.errors import LorafuseError
from lorafuse_train.dataset.order import MicroBatch, Order, seed_for
from lorafuse_train.encoding.encode import Encodings
from lorafuse_train.few_step.coupling import choose_coupling
from lorafuse_train.few_step.objective_base import ObjectiveBase
from lorafuse_train.few_step.preserve import Preservation
from lorafuse_train.lora.adapter import FILE_NAME, dropout
from lorafuse_train.plan import Plan
from lorafuse_train.precision import Precision
from lorafuse_train.steps.ema import Ema
from lorafuse_train.steps.log import Log, StepRecord
from lorafuse_train.steps.objective import add_noise, draw, drops_caption, loss_sum
from lorafuse_train.steps.optimizers import build_optimizer
from lorafuse_train.steps.state import LoopState, checkpoints
from lorafuse_train.steps.timesteps import loss_weights

MOST_NAMES = 8


@dataclass(frozen=True)
class Training:
    """All that the loop reads, and nothing that it changes but the LoRA's weights."""

    plan: Plan
    transformer: Any
    parameters: Mapping[str, nn.Parameter]
    """What is trained, by its name in the model."""
    encodings: Encodings
    order: Order
    total_steps: int
    precision: Precision
    accelerator: Accelerator
    objective_base: ObjectiveBase = field(default_factory=ObjectiveBase)
    """Which weights the training loss runs through."""
    preservation: Preservation | None = None
    """The second loss, of weights as they are."""


def start(training: Training) -> LoopState:
    """Optimizer, learning-rate schedule and moving average before the first step."""
    config, parameters = training.plan.config, training.parameters
    optimizer = build_optimizer(config, parameters.values())
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.warmup_steps(training.total_steps),
        num_training_steps=training.total_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    ema = Ema(parameters, config.ema_decay, config.ema_update_after_step) if config.ema_decay else None
    return LoopState(optimizer, lr_scheduler, ema)


def fit(training: Training, state: LoopState, log: Log | None, after_step: Callable[[], bool]) -> None:
    """Train from `state` until `total_steps` steps are done, or `after_step` says to stop.

    Raises:
        LorafuseError: the loss or its gradient is not finite; the weights are then as they were before that step.
    """
    config, accelerator = training.plan.config, training.accelerator
    optimizer, lr_scheduler = state.optimizer, state.lr_scheduler
    for step in range(state.step, training.total_steps):
        # ---- one step: the loss is the mean over all its pictures, however they are split up ----
        micro_batches = training.order.step(step)
        pictures = sum(len(micro.samples) for micro in micro_batches)
        losses = torch.zeros(2, device=training.precision.device)  # of the pictures, and of what is preserved
        parts: dict[MicroBatch, Tensor] = {}
        for micro in micro_batches[accelerator.process_index :: accelerator.num_processes]:
            with dropout(
                training.transformer, config.lora_dropout, seed_for("dropout", config.seed, step, micro.first)
            ):
                with training.objective_base.in_use():
                    part = _loss_sum(training, step, micro) / pictures
                    torch.autograd.backward(part)
                kept = _preserved_sum(training, step, micro)
                if kept is not None:
                    torch.autograd.backward(kept / pictures)
                    losses[1] += kept.detach() / pictures
            parts[micro] = part.detach()
            losses[0] += parts[micro]
        loss, preserve_loss = _summed(training, losses)
        grad_norm = nn.utils.clip_grad_norm_(training.parameters.values(), config.max_grad_norm or math.inf)
        if not (math.isfinite(loss.item()) and math.isfinite(grad_norm.item())):
            faulty = [micro for micro, part in parts.items() if not math.isfinite(part.item())]
            raise LorafuseError(_not_finite(training, step + 1, loss, grad_norm, faulty or micro_batches))
        lr = _rate(optimizer)
        torch.manual_seed(seed_for("update", config.seed, step))  # for optimizers that round by chance
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        state.step = step + 1
        if state.ema:
            state.ema.update(state.step)
        # -----------------------------------------------------------------------------------------
        if log:
            epoch = round(state.step / training.order.steps_per_epoch, 4)
            record = StepRecord(state.step, epoch, loss.item(), lr, grad_norm.item(), preserve_loss.item())
            log.add(record, pictures)
        if after_step():
            return


def _rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate of the next update; Prodigy multiplies what the schedule says with a factor of its own."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1))


def _loss_sum(training: Training, step: int, micro: MicroBatch) -> Tensor:
    """The summed loss of one micro-batch, shape (), with a graph to the LoRA's weights."""
    plan, config, precision = training.plan, training.plan.config, training.precision
    samples = [plan.samples[index] for index in micro.samples]
    x0 = torch.stack([training.encodings.latents(sample) for sample in samples])  # (B, C, h, w) or (B, C, f, h, w)
    prompts = [
        sample.uncaptioned if drops_caption(config.caption_dropout, config.seed, step, place) else sample.prompt
        for place, sample in enumerate(samples, micro.first)
    ]
    condition = plan.recipe.collate([training.encodings.condition(prompt) for prompt in prompts])
    shift = plan.shifts[samples[0].shape]
    coupling = choose_coupling(config, x0)
    random = draw(plan.levels, shift, tuple(x0.shape[1:]), config.seed, step, micro.first, len(x0), coupling)
    x0, noise, sigma = (tensor.to(precision.device) for tensor in (x0, random.noise, random.sigma))
    mask = plan.masks.weights(samples).to(precision.device) if plan.masks else None
    with precision.compute():
        velocity = plan.recipe.predict(training.transformer, add_noise(x0, noise, sigma), sigma, condition)
    return loss_sum(velocity, x0, noise, loss_weights(config.loss_weighting, sigma), mask)


def _preserved_sum(training: Training, step: int, micro: MicroBatch) -> Tensor | None:
    """The second loss for a micro-batch, shape (), through the weights that samples are drawn with; None without."""
    if training.preservation is None:
        return None
    places = range(micro.first, micro.first + len(micro.samples))
    seed = training.plan.config.seed
    return training.preservation.loss_sum(training.transformer, training.precision, seed, step, places)


def _summed(training: Training, losses: Tensor) -> Tensor:
    """Add up losses (2,) and gradients over all processes.

    Done by hand in place of DistributedDataParallel, which would broadcast the frozen base, average rather than sum
    over pictures, and wait for ever where a process has no micro-batch left in an epoch.
    """
    if training.accelerator.num_processes == 1:
        return losses
    parameters = training.parameters.values()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    own = torch.cat([losses, *(gradient.flatten() for gradient in gradients)])
    flat: Tensor = training.accelerator.reduce(own, "sum")
    parts = torch.split(flat[len(losses) :], [gradient.numel() for gradient in gradients])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return flat[: len(losses)]


def _not_finite(
    training: Training, step: int, loss: Tensor, grad_norm: Tensor, micro_batches: Sequence[MicroBatch]
) -> str:
    plan, config = training.plan, training.plan.config
    names = dict.fromkeys(
        os.path.relpath(plan.samples[index].path, config.dataset_base_path)
        for micro in micro_batches
        for index in micro.samples
    )
    shown = ", ".join([*names][:MOST_NAMES]) + (
        f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    )
    good = checkpoints(config.output_path)
    advice = "Lower --learning_rate, or try --mixed_precision no --base_dtype fp32."
    kept = "No checkpoint was saved before."
    if good:
        kept = f"The last good checkpoint is {good[-1]}."
        advice += f" With changed options, --lora_checkpoint {good[-1] / FILE_NAME} goes on from its LoRA."
    return (
        f"step {step}: the loss is {loss.item():g} and its gradient's norm {grad_norm.item():g}, with {shown}. "
        f"Nothing was saved at this step. {kept} {advice}"
    )
