"""Update rules carried out, in memory and by way of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lorafuse_common.algebras import ALGEBRAS, Block, algebra_of
from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_fuse.choices import LoraRequest
from lorafuse_fuse.fuse import FuseOptions, fuse, require_clean
from lorafuse_fuse.plan import plan_fuse

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class InMemory:
    """A weight as `prepare` sees it."""

    whole: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.whole.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.whole[start:stop].reshape(stop - start, -1).clone()


def applied(
    factors: Tensors, base: torch.Tensor, alpha: float | None, strength: float, cuts: Sequence[int] = ()
) -> torch.Tensor:
    """The base after one rule's change, made in blocks that end at `cuts`."""
    shapes = {role: tuple(factor.shape) for role, factor in factors.items()}
    rule = algebra_of(shapes)
    assert rule and sum(one.claims(shapes) for one in ALGEBRAS) == 1
    assert rule.misfit(shapes, tuple(base.shape)) is None
    rank, weight = rule.rank(shapes), InMemory(base)
    scale = alpha / rank if alpha is not None and rank else 1.0
    prepared = rule.prepare(factors, weight, scale, alpha)
    delta = torch.zeros_like(weight.rows(0, len(base)))
    for start, stop in zip((0, *cuts), (*cuts, len(base)), strict=True):
        block = Block(start, stop, weight.rows(start, stop), delta[start:stop])
        rule.add_delta(prepared, block, scale, strength)
    return base + delta.view(base.shape)


def fused(folder: Path, base: Tensors, lora: Tensors) -> dict[str, torch.Tensor]:
    """What a file becomes that a LoRA's file is fused into at strength 0.5."""
    save_file({name: value.detach().clone() for name, value in base.items()}, folder / "base.safetensors")
    save_file({name: value.detach().clone() for name, value in lora.items()}, folder / "lora.safetensors")
    plan = plan_fuse(open_checkpoint(folder / "base.safetensors"), [LoraRequest(folder / "lora.safetensors", 0.5)])
    require_clean(plan, ())
    fuse(plan, FuseOptions(folder / "out"))
    return load_file(folder / "out" / "base.safetensors")
