"""Where a LoRA's scale comes from: per-module alpha, then the file's metadata, then 1.

    W' = W + strength * scale * D        scale = alpha / rank, or alpha / sqrt(rank) with rslora

Precedence is never used to settle a disagreement: two sources that give different scales are a conflict.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LoraFileError

ADAPTER_CONFIG = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"
_STATIC_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "default", "true", "false")
"""`init_lora_weights` values that leave the base weights alone (eva only chooses A)."""


class ScaleConflictError(Exception):
    """Two sources disagree; the text says how."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What PEFT's LoraConfig says of a file's scale."""

    source: str
    """The header key or the file's name, for messages."""
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    unfusable: str | None
    """Why the adapter cannot be added to a weight, where it cannot."""

    def scale(self, module: str) -> tuple[int, float]:
        """The rank and scale this config gives a module."""
        rank = self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.rank)
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, module), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def pattern_key(patterns: Collection[str], module: str) -> str:
    """The first pattern that matches the tail of a module's name, else the name itself.

    The rule of `peft.utils.other.get_pattern_key` (not imported: it takes seconds); a test compares the two.
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def read_adapter_config(path: Path, metadata: Mapping[str, str]) -> AdapterConfig | None:
    """The LoraConfig in a LoRA file's header, or in an `adapter_config.json` beside it; None where there is neither.

    Raises:
        LoraFileError: it is broken, or the two disagree.
    """
    found = []
    if METADATA_KEY in metadata:
        found.append(_parse(f"{path.name}'s header key {METADATA_KEY}", metadata[METADATA_KEY], path))
    beside = path.parent / ADAPTER_CONFIG
    if beside.is_file():
        found.append(_parse(ADAPTER_CONFIG, beside.read_text(encoding="utf-8", errors="replace"), beside))
    if len(found) == 2 and _facts(found[0]) != _facts(found[1]):
        raise LoraFileError(
            f"{path}: its header's {METADATA_KEY} and the {ADAPTER_CONFIG} beside it disagree "
            f"({_facts(found[0])} and {_facts(found[1])}). Remove the one that belongs to another file."
        )
    return found[0] if found else None


def _facts(config: AdapterConfig) -> tuple[object, ...]:
    return config.rank, config.alpha, config.rslora, dict(config.rank_pattern), dict(config.alpha_pattern)


def _parse(source: str, text: str, path: Path) -> AdapterConfig:
    try:
        raw: dict[str, Any] = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
        return AdapterConfig(
            source=source,
            rank=int(raw["r"]),
            alpha=float(raw.get("lora_alpha", raw["r"])),
            rslora=bool(raw.get("use_rslora", False)),
            rank_pattern={str(k): int(v) for k, v in (raw.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
            unfusable=_unfusable(raw),
        )
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise LoraFileError(
            f"{path}: {source} is no LoRA configuration ({type(error).__name__}: {error}); "
            "expected JSON with r and lora_alpha"
        ) from error


def _unfusable(raw: Mapping[str, Any]) -> str | None:
    kind = str(raw.get("peft_type") or "LORA")
    if kind != "LORA":
        return f"its configuration says peft_type {kind}"
    init = raw.get("init_lora_weights", True)
    if init not in _STATIC_INITS:
        return (
            f"it was trained with init_lora_weights={init!r}, which also changed the base weights; "
            "convert it with PEFT's path_initial_model_for_weight_conversion first"
        )
    return None


def resolve_scale(
    module: str, rank: int | None, alpha: float | None, config: AdapterConfig | None
) -> tuple[float, str]:
    """The scale of one module (its name as in its layout) and where it came from; `rank` None takes no alpha.

    Raises:
        ScaleConflictError: alpha is not a positive number, or two sources disagree.
    """
    if rank is None:
        return 1.0, "1 (full factors)"
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ScaleConflictError(f"alpha is {alpha}; expected a positive number")
    if config is None:
        return (1.0, "1 (no alpha)") if alpha is None else (alpha / rank, "alpha/rank")
    stated_rank, stated = config.scale(module)
    if stated_rank != rank:
        raise ScaleConflictError(f"its tensors have rank {rank}, {config.source} says {stated_rank}")
    if alpha is not None and not math.isclose(alpha / rank, stated, rel_tol=1e-3):
        raise ScaleConflictError(
            f".alpha {alpha:g} / rank {rank} gives {alpha / rank:g}, {config.source} gives {stated:g}"
        )
    return stated, config.source
