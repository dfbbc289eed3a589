"""What a dialect is: how a LoRA file spells a module's name and the roles of its tensors.

A stem is looked up, never guessed: its prefix is known, and what follows is a module's name, with dots or with
underscores for all of them. Which dot an underscore was follows from the names that the base has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class AlphaStyle(StrEnum):
    """How a dialect states the scale of a module."""

    ALWAYS = "an .alpha for every module"
    UNLESS_ONE = "an .alpha where the scale is not 1"
    NEVER = "not at all: the scale is in B"
    CONFIG = "an adapter_config.json beside the file"


@dataclass(frozen=True, slots=True)
class Dialect:
    """One spelling, both for reading and for writing."""

    name: str
    prefixes: tuple[str, ...]
    """What may stand before a module's name; the first is the one that is written."""
    roles: Mapping[str, str]
    """Role -> the suffix this dialect writes: `down` -> `.lora_down.weight`. Roles that it does not name are spelled
    alike in all dialects (`SUFFIXES`)."""
    flat: bool = False
    """Whether the dots of a module's name are written as underscores."""
    layout: str = "diffusers"
    """Whose module names are written, where a family has several layouts."""
    alpha: AlphaStyle | None = None
    """How its files state a scale; None for a dialect that is only read."""

    endings: tuple[str, ...] = ()
    """Further suffixes by which it is told from others that have the same prefixes."""

    def spell(self, module: str) -> str:
        """A module's name (`transformer_blocks.0.attn.to_q`) -> the stem of its keys in the file."""
        return self.prefixes[0] + (flatten(module) if self.flat else module)

    def suffix(self, role: str, parameter: str = "weight") -> str:
        """What this dialect writes after a stem for a role of the module's weight or bias."""
        own = _BIAS_SUFFIXES if parameter == "bias" else self.roles
        return own.get(role) or SUFFIXES[role]

    def tails(self, stem: str) -> tuple[str, ...]:
        """What may be a module's name in a stem, for each prefix that it has."""
        return tuple(stem.removeprefix(prefix) for prefix in self.prefixes if stem.startswith(prefix))


def flatten(module: str) -> str:
    """A module's name with underscores for dots."""
    return module.replace(".", "_")


BARE = ("", "model.", "net.", "module.", "dit.", "pipe.dit.", "unet.", "conditional_transformer.")
"""No prefix, and what dumps and wrappers leave there."""

AB_ROLES = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
AB_DEFAULT_ROLES = {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"}
DOWN_UP_ROLES = {"down": ".lora_down.weight", "up": ".lora_up.weight"}

SUFFIXES = {
    "alpha": ".alpha",
    "mid": ".lora_mid.weight",
    "magnitude": ".dora_scale",
    "diff": ".diff",
    "set_weight": ".set_weight",
    "up_bias": ".lora_B.bias",
    "glora_a1": ".a1.weight",
    "glora_a2": ".a2.weight",
    "glora_b1": ".b1.weight",
    "glora_b2": ".b2.weight",
    "glora_bm": ".bm.weight",
    "oft_blocks": ".oft_blocks",
    "rescale": ".rescale",
    "reshape_weight": ".reshape_weight",
    **{
        role: f".{role}"
        for role in (
            "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        )
    },
}  # fmt: skip
"""How a role is written where a dialect has no spelling of its own."""

_BIAS_SUFFIXES = {"diff": ".diff_b", "set_weight": ".set_bias"}
"""How roles that a bias shares with a weight are written."""

_READ: Mapping[str, tuple[str, str]] = {
    ".lora_down.weight": ("weight", "down"),
    ".lora_up.weight": ("weight", "up"),
    ".lora.down.weight": ("weight", "down"),
    ".lora.up.weight": ("weight", "up"),
    "_lora.down.weight": ("weight", "down"),
    "_lora.up.weight": ("weight", "up"),
    ".lora_linear_layer.down.weight": ("weight", "down"),
    ".lora_linear_layer.up.weight": ("weight", "up"),
    ".lora_mid.weight": ("weight", "mid"),
    ".alpha": ("weight", "alpha"),
    ".dora_scale": ("weight", "magnitude"),
    ".magnitude": ("weight", "magnitude"),
    ".diff": ("weight", "diff"),
    ".w_norm": ("weight", "diff"),
    ".diff_b": ("bias", "diff"),
    ".b_norm": ("bias", "diff"),
    ".set_weight": ("weight", "set_weight"),
    ".set_bias": ("bias", "set_weight"),
    ".modules_to_save.weight": ("weight", "set_weight"),
    ".modules_to_save.bias": ("bias", "set_weight"),
    ".reshape_weight": ("weight", "reshape_weight"),
    ".oft_blocks": ("weight", "oft_blocks"),
    ".rescale": ("weight", "rescale"),
    ".on_input": ("weight", "ia3"),
    ".hra_u": ("weight", "hra"),
}
"""Every fixed suffix -> parameter and role, whichever tool wrote it; one file may mix several styles."""

_PATTERNS: tuple[tuple[re.Pattern[str], str, str | None], ...] = (
    (re.compile(r"\.lora_B(\.[^.]+)??\.bias$"), "bias", "up_bias"),
    (re.compile(r"\.lora_A(\.[^.]+)??(\.weight)?$"), "weight", "down"),
    (re.compile(r"\.lora_B(\.[^.]+)??(\.weight)?$"), "weight", "up"),
    (re.compile(r"(?<=_lora[12])\.down\.weight$"), "weight", "down"),
    (re.compile(r"(?<=_lora[12])\.up\.weight$"), "weight", "up"),
    (re.compile(r"\.lora_magnitude_vector(\.[^.]+)??(\.weight)?$"), "weight", "magnitude"),
    (re.compile(r"\.(?P<role>lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12])(\.[^.]+)?$"), "weight", None),
    (re.compile(r"\.(?P<role>a1|a2|b1|b2|bm)\.weight$"), "weight", "glora_"),
    (re.compile(r"\.oft_[Rr](\.[^.]+)?(\.(weight|scaled_oft))?$"), "weight", "oft_R"),
    (re.compile(r"\.boft_[Rs](\.[^.]+)?$"), "weight", "oft_R"),
    (re.compile(r"\.hra_u\.[^.]+$"), "weight", "hra"),
    (re.compile(r"\.vera_lambda_[bd](\.[^.]+)?$"), "weight", "vera"),
    (re.compile(r"\.ia3_l(\.[^.]+)?$"), "weight", "ia3"),
    (re.compile(r"\.fourierft_spectrum(\.[^.]+)?$"), "weight", "fourierft"),
    (re.compile(r"\.modules_to_save\.[^.]+\.(weight|bias)$"), "weight", "set_weight"),
    (re.compile(r"\.(q_layer|p_layer|lambda_layer|base_[qp]|base_lambda)(\.weight)?$"), "weight", "timestep"),
)
"""The suffixes that carry an adapter's name, with parameter and role; a role of None or one that ends in `_` is
completed by what the suffix spells."""

_WHOLE = re.compile(r"norm\.scale$")
"""BFL's norms, which a control LoRA replaces: a bare parameter, whose whole name is that of a module."""
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
    for suffix, (parameter, role) in _READ.items():
        if key.endswith(suffix) and len(key) > len(suffix):
            return Key(key.removesuffix(suffix), parameter, role)
    if key.endswith(_MODULATION_SUFFIX):
        block = key.removesuffix(_MODULATION_SUFFIX)
        return Key(f"{block}{'.' if '.' in block else '_'}modulation", "weight", "diff")
    if _WHOLE.search(key):
        return Key(key, "weight", "set_weight")
    for pattern, parameter, named in _PATTERNS:
        match = pattern.search(key)
        if match and match.start() > 0:
            role = named if named and not named.endswith("_") else (named or "") + match["role"]
            return Key(key[: match.start()], parameter, role)
    return None
