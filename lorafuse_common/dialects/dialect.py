"""What a dialect is: how a LoRA file spells a module's name and the roles of its tensors.

Spelling only runs forwards, from a module's name to its spelling: which dot an underscore was is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Dialect:
    """One spelling, both for reading and for writing."""

    name: str
    spell: Callable[[str], str]
    """A module's name (`transformer_blocks.0.attn.to_q`) -> the stem of its keys in the file."""
    roles: Mapping[str, str]
    """Role -> the suffix this dialect writes: `down` -> `.lora_down.weight`."""


def dotted(prefix: str) -> Callable[[str], str]:
    """The module's own name behind a prefix."""
    return lambda module: prefix + module


def flat(prefix: str) -> Callable[[str], str]:
    """The module's name with underscores for dots, behind a prefix."""
    return lambda module: prefix + module.replace(".", "_")


AB_ROLES = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
AB_DEFAULT_ROLES = {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"}
DOWN_UP_ROLES = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"}

_SUFFIXES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".magnitude": "magnitude",
    ".diff": "diff",
    ".set_weight": "set_weight",
    ".w_norm": "diff",
    ".reshape_weight": "reshape_weight",
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
    ".on_input": "on_input",
}
"""Every known suffix -> role, whichever tool wrote it; one file may mix several styles."""

_PATTERNS: tuple[tuple[re.Pattern[str], str | None], ...] = (
    (re.compile(r"\.lora_A(\.[^.]+)??(\.weight)?$"), "down"),
    (re.compile(r"\.lora_B(\.[^.]+)??(\.weight)?$"), "up"),
    (re.compile(r"\.lora_B(\.[^.]+)??\.bias$"), "up_bias"),
    (re.compile(r"(?<=_lora[12])\.down\.weight$"), "down"),
    (re.compile(r"(?<=_lora[12])\.up\.weight$"), "up"),
    (re.compile(r"\.lora_magnitude_vector(\.[^.]+)??(\.weight)?$"), "magnitude"),
    (re.compile(r"\.(?P<role>lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12])(\.[^.]+)?$"), None),
    (re.compile(r"\.oft_R(\.[^.]+)?\.(weight|scaled_oft)$"), "oft_R"),
    (re.compile(r"\.(a1|a2|b1|b2|bm)\.weight$"), "glora"),
)
"""The suffixes that carry an adapter's name, with their role; None where the suffix spells the role itself."""


_BIAS_SUFFIXES = {".diff_b": "diff", ".b_norm": "diff"}
"""Those of a bias -> role."""

_MODULATION_SUFFIX = ".diff_m"
"""LightX2V's difference of a block's `modulation`, which is a parameter of the block, named like a module of it."""


class Key(NamedTuple):
    """What a key of a LoRA file says."""

    stem: str
    """The module as the file spells it."""
    parameter: str
    """`weight` or `bias`."""
    role: str


def split_key(key: str) -> Key | None:
    """Which module, parameter and role a key is for; None where its suffix is unknown."""
    for suffix, role in _SUFFIXES.items():
        if key.endswith(suffix) and len(key) > len(suffix):
            return Key(key.removesuffix(suffix), "weight", role)
    for suffix, role in _BIAS_SUFFIXES.items():
        if key.endswith(suffix) and len(key) > len(suffix):
            return Key(key.removesuffix(suffix), "bias", role)
    if key.endswith(_MODULATION_SUFFIX):
        block = key.removesuffix(_MODULATION_SUFFIX)
        return Key(f"{block}{'.' if '.' in block else '_'}modulation", "weight", "diff")
    for pattern, named in _PATTERNS:
        match = pattern.search(key)
        if match and match.start() > 0:
            return Key(key[: match.start()], "weight", named or match["role"])
    return None
