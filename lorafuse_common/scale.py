"""Where a LoRA's scale comes from: what the user says, per-module alpha, the file's metadata, then 1.

    W' = W + strength * scale * D        scale = alpha / rank, or alpha / sqrt(rank) with rslora

Precedence is never used to settle a disagreement: two sources that give different scales are a conflict. Only kohya's
`ss_` entries are no second source: they tell how a training was set up, and its tensors carry what came of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .dialects import Key
from .errors import LoraFileError

ADAPTER_CONFIG = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"
_MAX_CONFIG_BYTES = 8 << 20
_PEFT_TYPES = ("LORA", "LOHA", "LOKR")
"""The kinds of PEFT adapters that an algebra here computes."""
_STATIC_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "default", "true", "false")
"""`init_lora_weights` values that leave the base weights alone (eva only chooses A)."""
_HEADER_ALPHAS = (
    ("transformer.lora_alpha", "transformer.r"),
    ("lora_alpha", "r"),
    ("network_alpha", "network_dim"),
    ("alpha", "rank"),
    ("ss_network_alpha", "ss_network_dim"),
)
"""Header keys that state one alpha for the whole file, with those that state its rank."""


_TENSOR_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Header keys that hold a hash of the tensors."""


class ScaleConflictError(Exception):
    """Two sources disagree; the text says how."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What PEFT's LoraConfig, LoHaConfig or LoKrConfig says of a file's scale."""

    source: str
    """The header key or the file's name, for messages."""
    kind: str
    """PEFT's `peft_type`."""
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    saved: tuple[str, ...]
    """`modules_to_save`: modules that the file holds whole."""
    unfusable: str | None
    """Why the adapter cannot be added to a weight, where it cannot."""

    def scale(self, module: str) -> tuple[int, float]:
        """The rank and scale this config gives a module."""
        rank = self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.rank)
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, module), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True, slots=True)
class HeaderAlpha:
    """One alpha for the whole file, as a key of its header states it."""

    source: str
    alpha: float
    rank: float | None
    is_setting: bool
    """Whether it tells how a training was set up rather than what the tensors are."""


@dataclass(frozen=True, slots=True)
class ScaleSources:
    """All that a LoRA file says of its scale besides its own `.alpha` tensors."""

    config: AdapterConfig | None = None
    header: HeaderAlpha | None = None

    def split_saved(self, key: str) -> Key | None:
        """A key of a module that the configuration says is saved whole, which replaces the base's."""
        stem, _, parameter = key.rpartition(".")
        saved = self.config.saved if self.config else ()
        if parameter in ("weight", "bias") and any(stem == name or stem.endswith(f".{name}") for name in saved):
            return Key(stem, parameter, "set_weight")
        return None


def lasting_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of a LoRA's header stays true once its tensors have changed: neither a scale nor a hash of them."""
    passing = {METADATA_KEY, *_TENSOR_HASHES, *(key for keys in _HEADER_ALPHAS for key in keys)}
    return {key: value for key, value in metadata.items() if key not in passing}


def pattern_key(patterns: Collection[str], module: str) -> str:
    """The first pattern that matches the tail of a module's name, else the name itself.

    The rule of `peft.utils.other.get_pattern_key` (not imported: it takes seconds); a test compares the two.
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def read_scale_sources(path: Path, metadata: Mapping[str, str], component: str = "transformer") -> ScaleSources:
    """What a LoRA file's header and an `adapter_config.json` beside it say of its scale for one transformer.

    Raises:
        LoraFileError: a source is broken, or the two configurations disagree.
    """
    found = []
    if METADATA_KEY in metadata:
        found.append(_parse(f"{path.name}'s header key {METADATA_KEY}", metadata[METADATA_KEY], path, component))
    beside = path.parent / ADAPTER_CONFIG
    if beside.is_file():
        found.append(_parse(ADAPTER_CONFIG, _text_of(beside), beside, component))
    if len(found) == 2 and _facts(found[0]) != _facts(found[1]):
        raise LoraFileError(
            f"{path}: its header's {METADATA_KEY} and the {ADAPTER_CONFIG} beside it disagree "
            f"({_facts(found[0])} and {_facts(found[1])}). Remove the one that belongs to another file."
        )
    return ScaleSources(found[0] if found else None, _header_alpha(metadata))


def _header_alpha(metadata: Mapping[str, str]) -> HeaderAlpha | None:
    for alpha_key, rank_key in _HEADER_ALPHAS:
        alpha, rank = _number(metadata.get(alpha_key)), _number(metadata.get(rank_key))
        if alpha is not None:
            return HeaderAlpha(f"header key {alpha_key}", alpha, rank, alpha_key.startswith("ss_"))
    return None


def _number(text: str | None) -> float | None:
    """kohya writes `None` and `Dynamic` where there is no one number."""
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _facts(config: AdapterConfig) -> tuple[object, ...]:
    return config.kind, config.rank, config.alpha, config.rslora, dict(config.rank_pattern), dict(config.alpha_pattern)


def _parse(source: str, text: str, path: Path, component: str) -> AdapterConfig:
    try:
        found: dict[str, Any] = json.loads(text)
        prefix = f"{component}." if any(key.startswith(f"{component}.") for key in found) else "transformer."
        raw = {key.removeprefix(prefix): value for key, value in found.items()}
        unfusable = _unfusable(raw)
        rank = int(_positive(raw.get("r", 1) if unfusable else raw["r"]))  # some of PEFT's other kinds have none
        return AdapterConfig(
            source=source,
            kind=str(raw.get("peft_type") or "LORA").rpartition(".")[2],
            rank=rank,
            alpha=_positive(raw.get("lora_alpha", raw.get("alpha", rank))),
            rslora=bool(raw.get("use_rslora", False)),
            rank_pattern={_pattern(k): int(_positive(v)) for k, v in (raw.get("rank_pattern") or {}).items()},
            alpha_pattern={_pattern(k): _positive(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
            saved=tuple(str(name) for name in raw.get("modules_to_save") or ()),
            unfusable=unfusable,
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, re.error) as error:
        raise LoraFileError(
            f"{path}: {source} is no LoRA configuration ({type(error).__name__}: {error}); "
            "expected JSON with r and lora_alpha"
        ) from error


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise LoraFileError(f"{path}: {path.stat().st_size} bytes are more than any LoRA configuration has")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise LoraFileError(f"{path}: cannot be read: {error.strerror}") from error


def _pattern(text: str) -> str:
    """A regular expression from a file, which must not be one that takes forever on a module's name."""
    re.compile(text)
    if len(text) > 1024 or re.search(r"\)\s*[*+{]", text) or len(re.findall(r"[*+{]", text)) > 2:
        raise ValueError(f"the pattern {text[:120]!r} repeats more than two things")
    return text


def _positive(value: object) -> float:
    number = float(str(value))
    if not 0 < number < math.inf or isinstance(value, bool):
        raise ValueError(f"{value!r} is no positive number")
    return number


def _unfusable(raw: Mapping[str, Any]) -> str | None:
    kind = str(raw.get("peft_type") or "LORA").rpartition(".")[2]
    if kind not in _PEFT_TYPES:
        return f"its configuration says peft_type {kind}, which is not one of {', '.join(_PEFT_TYPES)}"
    if raw.get("fan_in_fan_out"):
        return "it was trained with fan_in_fan_out, on transposed weights that no diffusion transformer has"
    if raw.get("layer_replication"):
        return "it was trained on replicated layers (layer_replication), which the base has only once"
    if raw.get("target_parameters"):
        return "it was trained on target_parameters, which have no module of their own"
    init = raw.get("init_lora_weights", True)
    if init not in _STATIC_INITS:
        return (
            f"it was trained with init_lora_weights={init!r}, which also changed the base weights; "
            "convert it with PEFT's path_initial_model_for_weight_conversion first"
        )
    return None


def resolve_scale(
    module: str, rank: int | None, alpha: float | None, sources: ScaleSources, said: float | None = None
) -> tuple[float, str]:
    """The scale of one module (its name as in its layout) and where it came from.

    `rank` None stands for a rule that takes no alpha; `said` is the alpha that the user states for the whole file.

    Raises:
        ScaleConflictError: alpha is not a positive number, or two sources disagree.
    """
    config = sources.config
    if rank is None:
        if config and config.kind == "LOKR" and alpha is None:  # PEFT alone scales those too
            return config.scale(module)[1], config.source
        return 1.0, "1 (full factors)"
    if said is not None:
        return said / rank, "--alpha"
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ScaleConflictError(f"alpha is {alpha}; expected a positive number")
    if config:
        return _configured(module, rank, alpha, config)
    if sources.header and not (sources.header.is_setting and alpha is not None):
        return _headed(rank, alpha, sources.header)
    return (1.0, "1 (no alpha)") if alpha is None else (alpha / rank, "alpha/rank")


def _configured(module: str, rank: int, alpha: float | None, config: AdapterConfig) -> tuple[float, str]:
    stated_rank, stated = config.scale(module)
    if stated_rank != rank:
        raise ScaleConflictError(f"its tensors have rank {rank}, {config.source} says {stated_rank}")
    if alpha is not None and not math.isclose(alpha / rank, stated, rel_tol=1e-3):
        raise ScaleConflictError(
            f".alpha {alpha:g} / rank {rank} gives {alpha / rank:g}, {config.source} gives {stated:g}"
        )
    return stated, config.source


def _headed(rank: int, alpha: float | None, header: HeaderAlpha) -> tuple[float, str]:
    if not (math.isfinite(header.alpha) and header.alpha > 0):
        raise ScaleConflictError(f"{header.source} is {header.alpha}; expected a positive number")
    if alpha is not None and not math.isclose(alpha, header.alpha, rel_tol=1e-3):
        raise ScaleConflictError(f".alpha is {alpha:g}, {header.source} says {header.alpha:g}")
    if alpha is None and header.rank is not None and header.rank != rank:
        raise ScaleConflictError(f"its tensors have rank {rank}, the header says {header.rank:g}")
    return header.alpha / rank, "alpha/rank" if alpha is not None else header.source
