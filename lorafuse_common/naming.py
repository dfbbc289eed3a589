"""Architectures as data: which modules a diffusion transformer has, how each layout names them, which rows they share.

A layout maps a module to its *parts* in order, each a name that all layouts share (diffusers' module, or half of one).
FLUX's `single_blocks.{}.linear1` is `(to_q, to_k, to_v, proj_mlp)` with shares `(1, 1, 1, 4)`; `final_layer.adaLN` is
`(shift, scale)` where diffusers' `norm_out.linear` is `(scale, shift)`. Fused, split and swapped weights are then one
rule: find the rows of each part.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Parts:
    """What the rows of one module are, from the first to the last."""

    names: tuple[str, ...]
    shares: tuple[int, ...]
    """How the rows divide among them: `(1, 1, 1, 4)`."""

    def rows(self, total: int) -> tuple[tuple[str, int, int], ...] | None:
        """(part, first row, count) for a weight of `total` rows; None where they do not divide so."""
        whole = sum(self.shares)
        if total % whole:
            return None
        found, first = [], 0
        for name, share in zip(self.names, self.shares, strict=True):
            found.append((name, first, total // whole * share))
            first += total // whole * share
        return tuple(found)


def parts(*names: str, shares: tuple[int, ...] = ()) -> Parts:
    """Parts of equal share, or of the shares given."""
    return Parts(names, shares or (1,) * len(names))


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """One way to name the modules of an architecture."""

    name: str
    """`diffusers` or `original` (which ComfyUI also uses)."""
    modules: Mapping[str, Parts]
    """Module -> parts. In both, `{}` stands for a block number, `{last}` for the last one."""

    def explained(self, modules: Iterable[str]) -> int:
        """How many of this layout's modules occur among `modules`, whatever their dialect's separators."""
        return len(self._patterns() & {p for module in modules for p in (pattern_of(module), _blanked(module))})

    def is_whole(self, modules: Iterable[str]) -> bool:
        """Whether `modules` has every module of this layout."""
        return self.explained(modules) == len(self._patterns())

    def _patterns(self) -> set[str]:
        return {pattern_of(re.sub(r"\{\w*\}", "#", module)) for module in self.modules}

    def expand(self, blocks: int) -> dict[str, Parts]:
        """Every module's own name -> its parts, for a model whose highest block number is `blocks - 1`."""
        found: dict[str, Parts] = {}
        for module, its in self.modules.items():
            numbers = range(blocks) if "{}" in module else (blocks - 1,)
            for number in numbers:
                own, *its_names = (
                    text.replace("{}", str(number)).replace("{last}", str(number)) for text in (module, *its.names)
                )
                found[own] = Parts(tuple(its_names), its.shares)
        return found


def names(*modules: str) -> dict[str, Parts]:
    """Modules that are their own only part, for a layout's table."""
    return {module: parts(module) for module in modules}


class Size(NamedTuple):
    """One published model of a family."""

    width: int
    """The input width of most of its layers."""
    blocks: int
    """How many its longest stack of blocks has."""
    title: str
    """What it is called: `14B`."""


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """One architecture, such as Qwen-Image."""

    name: str
    """The name used in files and on command lines: `qwen_image`."""
    title: str
    """The name used in messages: `Qwen-Image`."""
    transformer_classes: tuple[str, ...]
    """Its classes in diffusers, as `config.json` spells them."""
    layouts: tuple[Layout, ...]
    sizes: tuple[Size, ...] = ()
    """The models that were published."""
    lora_targets: tuple[str, ...] = ()
    """Suffixes of the modules that a new LoRA trains by default, `{}` for a block number where one end is ambiguous."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Parts that some versions of the model lack, so that a LoRA of another version harmlessly misses -> the reason."""
    widenable: Mapping[str, str] = field(default_factory=dict)
    """Input embedders that may get more input columns -> the key of `config.json` that counts them."""
    idle_modules: tuple[str, ...] = ()
    """Modules whose output nothing reads, so that they never get a gradient; `{last}` is the last block's number."""


def pattern_of(name: str) -> str:
    """A name with one separator for both: `blocks.0.attn.to_q` and `blocks_0_attn_to_q` agree.

    For recognising families only. Which module a LoRA means is always looked up among the base's own names.
    """
    return name.replace(".", "_")


def _blanked(name: str) -> str:
    """The pattern with its first number, which may be a block's, as `#`."""
    return re.sub(r"(?<=_)\d+(?=_|$)", "#", pattern_of(name), count=1)


def candidates(
    modules: Iterable[str], families: Collection[Family], class_name: str | None = None
) -> tuple[tuple[Family, Layout], ...]:
    """The families and layouts that explain the most of `modules`, all that tie.

    Where one that ties is there as a whole, those that lack modules are left out: LTX-2 has all of LTX-Video's names.
    Where `class_name` (from a `config.json`) is given, only its own family is considered.
    """
    found = tuple(modules)
    named = [family for family in families if class_name is None or class_name in family.transformer_classes]
    scored = [(layout.explained(found), family, layout) for family in named for layout in family.layouts]
    best = max((score for score, _, _ in scored), default=0)
    tied = tuple((family, layout) for score, family, layout in scored if score == best > 0)
    return tuple((family, layout) for family, layout in tied if layout.is_whole(found)) or tied


def narrowed(
    tied: tuple[tuple[Family, Layout], ...], width: int | None, blocks: int
) -> tuple[tuple[Family, Layout], ...]:
    """Those of some families that tie which have a published size of this width and of at least so many blocks.

    Those with exactly so many come before those with more; where no size fits, nothing is left out.
    """

    def fits(family: Family, exactly: bool) -> bool:
        sizes = [size for size in family.sizes if width in (None, size.width)]
        return any(size.blocks == blocks if exactly else size.blocks >= blocks for size in sizes)

    for exactly in (True, False):
        if found := tuple((family, layout) for family, layout in tied if fits(family, exactly)):
            return found
    return tied
