"""Architectures as data: which modules a diffusion transformer has, and how each layout names them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to name the modules of an architecture."""

    name: str
    """`diffusers` or `original` (which ComfyUI also uses)."""
    modules: tuple[str, ...]
    """Templates of the modules a LoRA can change; `{}` stands for a block number."""

    @property
    def patterns(self) -> frozenset[str]:
        """The templates in the form `pattern_of` gives, for counting how many names they explain."""
        return frozenset(pattern_of(module) for module in self.modules)


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture, such as Qwen-Image."""

    name: str
    """The name used in files and on command lines: `qwen_image`."""
    title: str
    """The name used in messages: `Qwen-Image`."""
    transformer_classes: tuple[str, ...]
    """Its classes in diffusers, as `config.json` spells them."""
    layouts: tuple[Layout, ...]
    widths: Mapping[int, str] = field(default_factory=dict)
    """Hidden width -> what that size is called (`14B`), where a family has several sizes."""
    lora_targets: tuple[str, ...] = ()
    """Suffixes of the modules that a new LoRA trains by default."""
    idle_modules: tuple[str, ...] = ()
    """Modules whose output nothing reads, so that they never get a gradient; `{last}` is the last block's number."""


def pattern_of(name: str) -> str:
    """A name with numbers blanked and separators equal: `blocks.0.attn.to_q` and `blocks_7_attn_to_q` agree.

    For recognising families only. Which module a LoRA means is always looked up among the base's own names.
    """
    return "_".join("#" if word.isdigit() or word == "{}" else word for word in re.split(r"[._]", name))


def candidates(
    names: Iterable[str], families: Collection[Family], class_name: str | None = None
) -> tuple[tuple[Family, Layout], ...]:
    """The families and layouts whose templates explain the most of `names` (module names), all that tie.

    Where `class_name` (from a `config.json`) is given, only its own family is considered.
    """
    named = [family for family in families if class_name is None or class_name in family.transformer_classes]
    patterns = {pattern_of(name) for name in names}
    scored = [(len(patterns & layout.patterns), family, layout) for family in named for layout in family.layouts]
    best = max((score for score, _, _ in scored), default=0)
    return tuple((family, layout) for score, family, layout in scored if score == best > 0)


def identify(
    names: Iterable[str], families: Collection[Family], class_name: str | None = None
) -> tuple[Family, Layout] | None:
    """The one family and layout that `candidates` finds; None where there are none or several."""
    found = candidates(names, families, class_name)
    return found[0] if len(found) == 1 else None
