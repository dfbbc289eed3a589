"""What is asked of every recipe in the same way."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn
from train.runs import step_rows

from lorafuse_common.naming import Family
from lorafuse_train.dataset.order import seed_for
from lorafuse_train.lora.adapter import attach
from lorafuse_train.lora.targets import Targets, resolve_targets
from lorafuse_train.options.options import resolve_config
from lorafuse_train.precision import Precision
from lorafuse_train.recipes.recipe import Encoded, Recipe
from lorafuse_train.steps.objective import add_noise, loss_sum

CPU = Precision(torch.device("cpu"), autocast=False, reason="")
LIGHTNING = (1.0, 0.9, 0.75, 0.5)
"""bf16 has no number for 1000 times the third, and rounds it to 752."""


def config(rank: int) -> Any:
    """Options that ask for a LoRA of that rank."""
    return resolve_config({"fused_model": "x", "dataset_base_path": "x", "output_path": "x", "lora_rank": rank})


def noise(count: int, *shape: int, seed: int = 0) -> Tensor:
    """eps (B, C, h, w) of a seed."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def gap_to_neighbours(recipe: Recipe, transformer: Any, captions: Sequence[Encoded], shape: tuple[int, ...]) -> float:
    """The largest difference between predictions of a batch and of its pictures alone."""
    x, sigma = noise(len(captions), *shape), torch.linspace(0.1, 1, len(captions))
    with torch.no_grad():
        together = recipe.predict(transformer, x, sigma, recipe.collate(captions))
        alone = [
            recipe.predict(transformer, x[i : i + 1], sigma[i : i + 1], recipe.collate(captions[i : i + 1]))
            for i in range(len(captions))
        ]
    return float((together - torch.cat(alone)).abs().max())


def told_timesteps(
    recipe: Recipe, pipeline: Any, caption: Encoded, start: Tensor, call: Mapping[str, Any]
) -> tuple[list[float], list[float]]:
    """What the model is told of Lightning's four noise levels, by the recipe and by the pipeline in its precision."""
    told: list[float] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, arguments, named: told.append(float(named["timestep"][0])), with_kwargs=True
    )
    with torch.no_grad():
        for sigma in LIGHTNING:
            recipe.predict(pipeline.transformer, start, torch.tensor([sigma]), recipe.collate([caption]))
    ours, few = told.copy(), FlowMatchEulerDiscreteScheduler(shift=1.0)
    told.clear()
    drawing = type(pipeline)(**{**pipeline.components, "scheduler": few})
    drawing.set_progress_bar_config(disable=True)
    drawing(**call, sigmas=[*LIGHTNING], num_inference_steps=len(LIGHTNING), output_type="latent")
    hook.remove()
    return ours, told


def silent_modules(recipe: Recipe, transformer: Any, caption: Encoded, shape: tuple[int, ...]) -> set[str]:
    """The linear layers that never hear of the loss, by autograd."""
    transformer.requires_grad_(False)
    names = tuple(name for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    attach(transformer, Targets(names, {}, (), {}), config(rank=2))
    predicted = recipe.predict(transformer, noise(1, *shape), torch.tensor([0.5]), recipe.collate([caption]))
    torch.autograd.backward(predicted.sum())
    return {
        name.removesuffix(".lora_B.default.weight")
        for name, parameter in transformer.named_parameters()
        if "lora_B" in name and (parameter.grad is None or not parameter.grad.any())
    }


def losses_on_one_latent(
    recipe: Recipe, transformer: Any, family: Family, caption: Encoded, shape: tuple[int, ...], steps: int
) -> list[float]:
    """The loss of every step of a training of the family's preset on a single x0, noised always in the same way."""
    transformer.requires_grad_(False)
    attach(transformer, resolve_targets(transformer, family, "preset"), config(rank=8))
    optimizer = torch.optim.AdamW((p for p in transformer.parameters() if p.requires_grad), lr=0.04)
    x0, eps, sigma = noise(1, *shape, seed=9), noise(1, *shape), torch.tensor([0.5])
    losses = []
    for _ in range(steps):
        velocity = recipe.predict(transformer, add_noise(x0, eps, sigma), sigma, recipe.collate([caption]))
        loss = loss_sum(velocity, x0, eps)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_run(out: Path, printed: str, drawn: str | None = None) -> None:
    """A finished training: its losses are numbers, its grid is there, and the code that it printed draws a picture.

    Of the prompt `drawn`, if given, and from the same noise, that picture is the trainer's own last one.
    """
    assert all(float(row["loss"]) > 0 for row in step_rows(out))
    assert (out / "samples.png").is_file()
    scope: dict[str, Any] = {}
    after = printed.split("use it:\n")[1].splitlines(keepends=True)
    code = "".join(itertools.takewhile(lambda line: line.startswith("  "), after))
    if drawn:
        seed = f"generator=torch.Generator().manual_seed({seed_for('sample', 0, 0)})"
        code = code.replace('prompt="a prompt"', f'prompt="{drawn}", {seed}')
        assert seed in code
    exec(textwrap.dedent(code), scope)
    assert scope["image"].size == (32, 32)
    if drawn:
        with Image.open(out / "images" / "0.png") as own:
            theirs, ours = (np.asarray(picture.convert("RGB")).astype(int) for picture in (scope["image"], own))
        assert np.abs(theirs - ours).max() <= 1
