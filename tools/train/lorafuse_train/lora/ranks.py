"""The rank, alpha and scale of every module of a LoRA, from the options and their patterns."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafuse_common.errors import ConfigError
from lorafuse_train.lora.targets import Targets, expression_of
from lorafuse_train.options.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Strength:
    """How one module's LoRA counts."""

    rank: int
    alpha: float
    scale: float
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""


def module_strengths(targets: Targets, config: TrainConfig) -> dict[str, Strength]:
    """The strength of every target module.

    Raises:
        ConfigError: listing every pattern that matches no target, is no regular expression or contradicts another,
            and every module that is too small for how it should start.
    """
    faults: list[str] = []
    ranks = _matched("rank_pattern", config.rank_pattern, targets.modules, faults)
    alphas = _matched("alpha_pattern", config.alpha_pattern, targets.modules, faults)
    found = {}
    for module in targets.modules:
        rank = int(ranks.get(module, config.lora_rank))
        alpha = alphas.get(module, float(rank) if config.lora_alpha is None else config.lora_alpha)
        found[module] = Strength(rank, alpha, alpha / (math.sqrt(rank) if config.use_rslora else rank))
    if config.init_lora_weights == "orthogonal" or config.starts_from_components:
        kinds = targets.convolutions[:1]
        faults += [f"--init_lora_weights {config.init_lora_weights}: {name} is no linear layer" for name in kinds]
    if config.starts_from_components:
        faults += _too_small(targets, found, config.init_lora_weights)
    if faults:
        raise ConfigError("\n".join(faults))
    return found


def _matched(
    option: str, patterns: Sequence[tuple[str, float]], modules: Sequence[str], faults: list[str]
) -> dict[str, float]:
    """Module -> what the pattern says that matches it."""
    found: dict[str, tuple[str, float]] = {}
    for text, value in patterns:
        try:
            expression = expression_of(option, text)
        except ConfigError as error:
            faults.append(str(error))
            continue
        matched = [module for module in modules if expression.fullmatch(module)]
        if not matched:
            faults.append(f"--{option} {text}={value:g}: none of the {len(modules)} target modules is so named")
        for module in matched:
            before, earlier = found.setdefault(module, (text, value))
            if earlier != value:
                faults.append(f"--{option}: {module} has {earlier:g} by {before} and {value:g} by {text}")
                break
    return {module: value for module, (_, value) in found.items()}


def _too_small(targets: Targets, strengths: Mapping[str, Strength], init: str) -> list[str]:
    small = [
        f"--init_lora_weights {init}: {module} is {rows}x{columns}, too small for rank {strengths[module].rank}; "
        f"give it a lower one, --rank_pattern {module}={min(rows, columns)}"
        for module, (rows, columns) in targets.shapes.items()
        if strengths[module].rank > min(rows, columns)
    ]
    return small[:3]


def trainable(targets: Targets, config: TrainConfig) -> int:
    """The parameters of the LoRA."""
    strengths = module_strengths(targets, config)
    rows = sum(rows for rows, _ in targets.shapes.values()) if config.use_dora else 0
    return rows + sum(strengths[module].rank * size for module, size in targets.parameters.items())


def adapter_arguments(targets: Targets, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """PEFT's `r`, `lora_alpha`, `target_modules` and patterns that give every module its rank and alpha."""
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    exact = f"^(?:{'|'.join(map(re.escape, targets.modules))})$"
    return {
        "r": int(rank),
        "lora_alpha": alpha,
        "target_modules": exact if targets.namesakes else list(targets.modules),
        "rank_pattern": {name: int(value) for name, value in rank_pattern.items()},
        "alpha_pattern": alpha_pattern,
    }


def _common(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The value that most modules have, and one expression for all modules of each other value.

    One, because PEFT tries every expression on every module.
    """
    groups: dict[float, list[str]] = {}
    for module, value in values.items():
        groups.setdefault(value, []).append(module)
    most = max(groups, key=lambda value: len(groups[value]))
    return most, {
        f"^(?:{'|'.join(map(re.escape, modules))})$": value for value, modules in groups.items() if value != most
    }
