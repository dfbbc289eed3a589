"""The training loop: one page that reads from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from lorafuse_common.errors import LorafuseError

from .encode import Encodings
from .log import Log, StepRecord
from .objective import NoiseLevels, add_noise, draw, loss_sum
from .order import MicroBatch, Order
from .plan import Plan
from .precision import Precision
from .state import LoopState


@dataclass(frozen=True)
class Training:
    """All that the loop reads, and nothing that it changes but the LoRA's weights."""

    plan: Plan
    transformer: Any
    parameters: Sequence[nn.Parameter]
    encodings: Encodings
    order: Order
    shifts: Mapping[tuple[int, int], float]
    """Timestep shift by picture size."""
    total_steps: int
    precision: Precision
    accelerator: Accelerator


def start(training: Training) -> LoopState:
    """Optimiser and learning-rate schedule before the first step."""
    config = training.plan.config
    optimizer = torch.optim.AdamW(
        training.parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.warmup_steps(training.total_steps),
        num_training_steps=training.total_steps,
    )
    return LoopState(optimizer, lr_scheduler)


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
        loss = torch.zeros((), device=training.precision.device)
        for micro in micro_batches[accelerator.process_index :: accelerator.num_processes]:
            part = _loss_sum(training, step, micro) / pictures
            part.backward()  # type: ignore[no-untyped-call]  # torch's is untyped
            loss += part.detach()
        loss = _summed(training, loss)
        grad_norm = nn.utils.clip_grad_norm_(training.parameters, config.max_grad_norm)
        _require_finite(step + 1, loss, grad_norm)
        lr = lr_scheduler.get_last_lr()[0]
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        state.step = step + 1
        # -----------------------------------------------------------------------------------------
        if log:
            log.add(StepRecord(state.step, loss.item(), lr, grad_norm.item()))
        if after_step():
            return


def _loss_sum(training: Training, step: int, micro: MicroBatch) -> Tensor:
    """The summed loss of one micro-batch, shape (), with a graph to the LoRA's weights."""
    config, recipe, precision = training.plan.config, training.plan.recipe, training.precision
    samples = [training.plan.samples[index] for index in micro.samples]
    levels = NoiseLevels(config.weighting_scheme, config.logit_mean, config.logit_std)
    x0 = torch.stack([training.encodings.latents(sample) for sample in samples])  # (B, C, h, w)
    condition = recipe.collate([training.encodings.caption(sample.caption) for sample in samples])
    random = draw(
        levels, training.shifts[samples[0].size], tuple(x0.shape[1:]), config.seed, step, micro.first, len(x0)
    )
    x0, noise, sigma = (tensor.to(precision.device) for tensor in (x0, random.noise, random.sigma))
    with precision.compute():
        velocity = recipe.predict(training.transformer, add_noise(x0, noise, sigma), sigma, condition)
    return loss_sum(velocity, x0, noise)


def _summed(training: Training, loss: Tensor) -> Tensor:
    """Add up loss and gradients over all processes.

    Done by hand in place of DistributedDataParallel, which would broadcast the frozen base, average rather than sum
    over pictures, and wait for ever where a process has no micro-batch left in an epoch.
    """
    if training.accelerator.num_processes == 1:
        return loss
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in training.parameters]
    own = torch.cat([loss.flatten(), *(gradient.flatten() for gradient in gradients)])
    flat: Tensor = training.accelerator.reduce(own, "sum")
    parts = torch.split(flat[1:], [gradient.numel() for gradient in gradients])
    for parameter, part in zip(training.parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return flat[0]


def _require_finite(step: int, loss: Tensor, grad_norm: Tensor) -> None:
    if not (math.isfinite(loss.item()) and math.isfinite(grad_norm.item())):
        raise LorafuseError(
            f"step {step}: the loss is {loss.item():g} and its gradient's norm {grad_norm.item():g}. Nothing was "
            "saved at this step. Lower --learning_rate, or try --mixed_precision no --base_dtype fp32."
        )
