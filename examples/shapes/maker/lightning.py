"""Distils the guided base into a two-step LoRA by copying where its own trajectories go."""

from __future__ import annotations

from typing import NamedTuple

import drawing
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from maker.base import matmul_attention
from maker.dit import Guidance, noise_levels, starting_noise, trajectory, velocity
from maker.lora import IMAGE_SIDE, TEXT_SIDE, attach, module_names
from maker.progress import Progress
from maker.text import Context, caption_numbers

STEPS, TEACHER_STEPS = 2, 16
GUIDANCE = 2.0
PICTURES, BATCH = 3072, 48
RANK, ALPHA = 32, 16.0
PEAK_RATE, WARMUP = 2e-3, 30


class Trajectories(NamedTuple):
    """The teacher's states at the noise levels the student visits."""

    states: Tensor  # (PICTURES, STEPS + 1, tokens, channels)
    captions: Tensor


def schedule() -> dict[str, object]:
    """What a sampler has to know to use the LoRA."""
    return {"sigmas": noise_levels(STEPS)[:-1].double().tolist(), "guidance_scale": 1.0}


def select(context: Context, rows: Tensor) -> Context:
    return Context(*(part[rows] for part in context))


@torch.no_grad()
def teach(teacher: QwenImageTransformer2DModel, plain: Context, empty: Context) -> Trajectories:
    numbers = caption_numbers(drawing.random_scenes(PICTURES, np.random.default_rng(21)))
    noise, guidance = starting_noise(PICTURES, seed=1001), Guidance(GUIDANCE, empty)
    progress = Progress("teacher", PICTURES // 128, every=4)
    states = []
    for rows in torch.split(torch.arange(PICTURES), 128):
        with matmul_attention(), torch.autocast("cpu", torch.bfloat16):
            visited = trajectory(teacher, noise[rows], select(plain, numbers[rows]), TEACHER_STEPS, guidance)
        states.append(torch.stack(visited[:: TEACHER_STEPS // STEPS], 1))
        progress.step(0)
    return Trajectories(torch.cat(states), numbers)


def distil(model: QwenImageTransformer2DModel, lessons: Trajectories, plain: Context, steps: int) -> None:
    """Attaches the LoRA, then trains it; the deterministic target needs neither critic nor noise."""
    parameters = attach(model, module_names((*IMAGE_SIDE, "img_mod.1"), TEXT_SIDE), RANK, ALPHA)
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0)
    levels, generator = noise_levels(STEPS), torch.Generator().manual_seed(2)
    progress = Progress("lightning", steps, every=100)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1, (step + 1) / WARMUP, 1.4 * (1 - step / steps))
        rows = torch.randint(0, PICTURES, (BATCH,), generator=generator)
        at = torch.randint(0, STEPS, (BATCH,), generator=generator)
        start, end = lessons.states[rows, at], lessons.states[rows, at + 1]
        # The straight line from one visited state to the next.
        target = (start - end) / (levels[at] - levels[at + 1])[:, None, None]
        with matmul_attention(), torch.autocast("cpu", torch.bfloat16):
            predicted = velocity(model, start, levels[at], select(plain, lessons.captions[rows]))
        loss = F.mse_loss(predicted.float(), target)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step(loss.item())
    model.eval()
