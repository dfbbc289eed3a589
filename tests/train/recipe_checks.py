"""What is asked of every recipe in the same way."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train.runs import step_rows

from lorafuse_common.naming import Family
from lorafuse_train.lora.adapter import attach
from lorafuse_train.lora.targets import Targets, resolve_targets
from lorafuse_train.options.options import resolve_config
from lorafuse_train.precision import Precision
from lorafuse_train.recipes.recipe import Encoded, Recipe
from lorafuse_train.steps.objective import add_noise, loss_sum

CPU = Precision(torch.device("cpu"), autocast=False, reason="")


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


def check_run(out: Path, printed: str) -> None:
    """A finished training: its losses are numbers, its grid is there, and the code that it printed draws a picture."""
    assert all(float(row["loss"]) > 0 for row in step_rows(out))
    assert (out / "samples.png").is_file()
    scope: dict[str, Any] = {}
    after = printed.split("use it:\n")[1].splitlines(keepends=True)
    code = "".join(itertools.takewhile(lambda line: line.startswith("  "), after))
    exec(textwrap.dedent(code), scope)
    assert scope["image"].size == (32, 32)
