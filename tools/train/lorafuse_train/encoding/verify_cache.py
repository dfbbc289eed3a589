"""Entries of the cache, computed once more and compared with what is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lorafuse_train.console import progress
from lorafuse_train.encoding.cache import load
from lorafuse_train.encoding.encode import Needed, encoded_controls, encoded_picture, encoded_text, free
from lorafuse_train.options.config_dataset import ALL
from lorafuse_train.plan import Plan
from lorafuse_train.recipes.recipe import Encoded

TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far what is computed again may lie from what is stored, relative to its length: other devices, and other versions
of their libraries, add up in another order. Other encoders, pictures or captions are off by more than ten times that.
"""


@dataclass(frozen=True, slots=True)
class Verified:
    """What a comparison has found."""

    entries: int
    largest: float
    """The largest relative difference of those within tolerance."""
    faults: tuple[str, ...]
    """One for each entry that differs: what it is made of, its file, and how it differs."""


def choose_entries(paths: Sequence[Path], sample: str) -> tuple[Path, ...]:
    """As many of the entries as `--verify_sample` says, spread evenly over their keys, which are as good as random."""
    ordered = sorted(paths, key=lambda path: path.name)
    if sample == ALL:
        return tuple(ordered)
    share = float(sample)
    count = min(len(ordered), math.ceil(share * len(ordered)) if share < 1 else int(share))
    return tuple(ordered[index * len(ordered) // count] for index in range(count)) if count else ()


def verify_entries(plan: Plan, needed: Needed, chosen: Iterable[Path], device: torch.device) -> Verified:
    """Compute the chosen entries again, one model after the other, each loaded only if it is needed."""
    recipe, pipeline, wanted = plan.recipe, plan.base.pipeline, set(chosen)
    seen = {path: partial(encoded_picture, recipe, sample) for path, sample in needed.pictures.items()}
    shown = {path: partial(encoded_controls, recipe, prompt) for path, prompt in needed.controls.items()}
    told = {path: partial(encoded_text, recipe, prompt) for path, prompt in needed.texts.items()}
    rounds: tuple[tuple[Callable[..., Any], Mapping[Path, Callable[[Any], Encoded]]], ...] = (
        (recipe.load_vae, {**seen, **shown}),
        (recipe.load_text_encoder, told),
    )
    differences: list[float] = []
    faults: list[str] = []
    for load_model, jobs in rounds:
        todo = [path for path in jobs if path in wanted]
        if not todo:
            continue
        model = load_model(pipeline, device)
        for path in progress(todo, len(todo), "computing again"):
            fault, difference = _compare(path, jobs[path](model))
            if fault:
                faults.append(f"{_made_of(needed, path)}: {fault} ({path})")
            else:
                differences.append(difference)
        del model
        free(device)
    return Verified(len(wanted), max(differences, default=0.0), tuple(faults))


def _made_of(needed: Needed, path: Path) -> str:
    if path in needed.pictures:
        return f"latents of {needed.pictures[path].path}"
    if path in needed.controls:
        return f"latents of {', '.join(str(control.path) for control in needed.controls[path].controls)}"
    return f"embeddings of {needed.texts[path].caption[:60]!r}"


def _compare(path: Path, again: Encoded) -> tuple[str, float]:
    """How an entry differs, empty where it does not, and by how much, relatively."""
    try:
        stored = load(path)
    except (OSError, SafetensorError) as error:
        return f"cannot be read ({error})", 0.0
    if stored.keys() != again.keys():
        return f"holds {sorted(stored)}, computed again {sorted(again)}", 0.0
    largest = 0.0
    for name, tensor in again.items():
        old = stored[name]
        if (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
            return (
                f"{name} is {tuple(old.shape)} {old.dtype}, computed again {tuple(tensor.shape)} {tensor.dtype}",
                0.0,
            )
        difference = relative_difference(old, tensor)
        if difference > TOLERANCES.get(old.dtype, 0.0):
            return f"{name} differs by {difference:.2g} of its length", 0.0
        largest = max(largest, difference)
    return "", largest


def relative_difference(stored: Tensor, again: Tensor) -> float:
    """|again - stored| / |stored|, in fp64; 0 where both are 0, infinite where only one of them is no number."""
    old, new = stored.double(), again.double()
    if torch.equal(old, new):
        return 0.0
    difference = float((new - old).norm() / old.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return difference if math.isfinite(difference) else math.inf
