"""Trains a style LoRA by plain flow matching, as any LoRA trainer would."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from maker.base import draw_sigmas, matmul_attention, noised
from maker.dit import SHIFT, velocity
from maker.lora import attach
from maker.progress import Progress
from maker.text import Context

WARMUP = 20


class StyleRecipe(NamedTuple):
    """The choices of one style training."""

    modules: list[str]
    rank: int
    rate: float
    steps: int
    batch: int


def train_style(model: QwenImageTransformer2DModel, latents: Tensor, context: Context, recipe: StyleRecipe) -> None:
    """Attaches a LoRA to the model, then trains it on latents with one row of context each."""
    parameters = attach(model, recipe.modules, recipe.rank, recipe.rank)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0)
    generator = torch.Generator().manual_seed(3)
    progress = Progress("style", recipe.steps, every=100)
    model.train()
    for step in range(recipe.steps):
        rate = recipe.rate * min(1, (step + 1) / WARMUP, 1.4 * (1 - step / recipe.steps))
        optimizer.param_groups[0]["lr"] = rate
        rows = torch.randint(0, len(latents), (recipe.batch,), generator=generator)
        sigma = draw_sigmas(recipe.batch, SHIFT, 1.0, generator)
        noisy, target = noised(latents[rows], sigma, generator)
        with matmul_attention(), torch.autocast("cpu", torch.bfloat16):
            predicted = velocity(model, noisy, sigma, Context(*(part[rows] for part in context)))
        loss = F.mse_loss(predicted.float(), target)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step(loss.item())
    model.eval()
