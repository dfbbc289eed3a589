"""Which modules get the LoRA, decided on a model without weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lorafuse_common.errors import ConfigError
from lorafuse_common.families import family_of_suffixes
from lorafuse_common.naming import Family

PRESET, REGEX = "preset", "regex:"
TARGETABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Targets:
    """The modules to train, and how they were chosen."""

    modules: tuple[str, ...]
    """Full names, sorted."""
    counts: Mapping[str, int]
    """Pattern -> modules it matched that are trained."""
    idle: tuple[str, ...]
    """Modules that matched but were left out, because nothing reads their output."""
    parameters: Mapping[str, int]
    """Full name -> rows plus columns of its weight: LoRA parameters per unit of rank."""
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Full name -> rows and columns."""
    convolutions: tuple[str, ...] = ()
    """Those of the modules that are no linear layers."""
    namesakes: tuple[str, ...] = ()
    """Those of the modules whose name other modules end in, which PEFT would take for them."""


def meta_model(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """The transformer that `config` describes, with shapes but without memory.

    Raises:
        ConfigError: the installed diffusers has no such class.
    """
    import diffusers

    cls = getattr(diffusers, class_name, None)
    if cls is None:
        raise ConfigError(f"diffusers {diffusers.__version__} has no class {class_name}; install a newer one")
    with torch.device("meta"):
        model: nn.Module = cls.from_config(dict(config))
    return model


def resolve_targets(model: nn.Module, family: Family, patterns: str) -> Targets:
    """Match `patterns` (`preset`, comma-separated name endings, or `regex:...`) against the model's modules.

    An ending matches as in PEFT: the whole name, or what follows a dot; `{}` in it is any block's number.

    Raises:
        ConfigError: listing every pattern that matches nothing, with the likeliest reason and this family's list.
    """
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, TARGETABLE)}
    sizes = {name: weight.shape[0] + weight[0].numel() for name, weight in weights.items()}
    wanted = _patterns(family, patterns)
    matches = {text: {name for name in sizes if pattern.fullmatch(name)} for text, pattern in wanted.items()}
    unmatched = [text for text, names in matches.items() if not names]
    if unmatched:
        raise ConfigError(_no_match(family, unmatched, patterns, sizes))
    idle = idle_modules(family, list(sizes))
    found = set[str]().union(*matches.values())
    if found <= idle:
        raise ConfigError(
            f"--lora_target_modules {patterns}: only names modules that cannot learn, for nothing reads "
            f"their output: {', '.join(sorted(found))}"
        )
    modules = tuple(sorted(found - idle))
    return Targets(
        modules,
        {text: len(names - idle) for text, names in matches.items()},
        tuple(sorted(found & idle)),
        {name: sizes[name] for name in modules},
        {name: (weights[name].shape[0], weights[name][0].numel()) for name in modules},
        tuple(name for name in modules if weights[name].ndim > 2),
        tuple(name for name in modules if any(other.endswith(f".{name}") for other in weights)),
    )


def _patterns(family: Family, patterns: str) -> dict[str, re.Pattern[str]]:
    """Each pattern as the user wrote it, and the expression for full names that it stands for."""
    if patterns == PRESET and not family.lora_targets:
        raise ConfigError(f"--lora_target_modules: {family.title} has no preset; give name endings such as to_q,to_k")
    if patterns.startswith(REGEX):
        return {patterns: expression_of("lora_target_modules", patterns)}
    endings = family.lora_targets if patterns == PRESET else [text.strip() for text in patterns.split(",")]
    return {text: expression_of("lora_target_modules", text) for text in endings if text}


def expression_of(option: str, text: str) -> re.Pattern[str]:
    """The expression for full names that a name ending or `regex:...` stands for.

    Raises:
        ConfigError: it is no regular expression.
    """
    if not text.startswith(REGEX):
        return re.compile(rf"(?:.*\.)?{re.escape(text)}".replace(r"\{\}", r"\d+"))
    try:
        return re.compile(text.removeprefix(REGEX))
    except re.error as error:
        raise ConfigError(f"--{option} {text}: not a regular expression ({error})") from error


def _no_match(family: Family, unmatched: list[str], patterns: str, sizes: Mapping[str, int]) -> str:
    message = f"--lora_target_modules {patterns}: {', '.join(unmatched)}: no module of this {family.title} is so named."
    other = family_of_suffixes(unmatched)
    if other is not None and other != family:
        message += f" These are {other.title} names."
    if family.lora_targets:
        message += f" For {family.title}: --lora_target_modules {','.join(family.lora_targets)} (or `preset`)."
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in sizes})
    return f"{message} All that can be trained: {', '.join(kinds)}."


def idle_modules(family: Family, names: list[str]) -> set[str]:
    """The modules among `names` that never get a gradient; `{last}` in a template is the highest number there is."""
    idle = set()
    for template in family.idle_modules:
        head, found, tail = template.partition("{last}")
        numbered = re.compile(rf"{re.escape(head)}(\d+)(\..*)?")
        numbers = [int(match[1]) for name in names if (match := numbered.fullmatch(name))]
        if not found or numbers:
            idle.add(f"{head}{max(numbers)}{tail}" if found else template)
    return idle & set(names)
