"""What was fused before: the fuses that led to a checkpoint, and LoRAs that are fused once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.hashing import sha256_of
from lorafuse_common.manifest import FusedLora, Origin

from .choices import ProblemKind
from .entries import LoraPlan, Problem
from .plan import FusePlan
from .record import base_manifest

_SHOWN = 12
"""Digits of a sha256 in a message."""


def with_repeats(plan: FusePlan) -> FusePlan:
    """The plan with what there is to say of LoRAs that the base already holds, or that are asked for twice.

    The same file at the same strength is a problem: mostly the same command run on its own result. At another
    strength it is a note, which the manifest records: that is how one strengthens, weakens or takes out what is there.
    """
    loras, problems = [], list(plan.problems)
    for index, lora in enumerate(plan.loras):
        problem, notes = _repeat(lora, plan.loras[:index], plan.base)
        problems += [problem] if problem else []
        loras.append(replace(lora, notes=(*lora.notes, *notes)))
    return replace(plan, loras=tuple(loras), problems=tuple(problems))


def _repeat(lora: LoraPlan, before: Sequence[LoraPlan], base: Checkpoint) -> tuple[Problem | None, tuple[str, ...]]:
    same = [(its.strength, where) for its, where in _earlier(lora, base)]
    path = lora.request.path.resolve()
    for other in before:
        if other.request.path.resolve() == path and other.component == lora.component:
            same.append((other.request.strength, "this command"))
    if not same or not lora.applied:
        return None, ()
    strength = lora.request.strength
    total = strength + sum(its for its, _ in same)
    given = ", ".join(f"at {its:g} by {where}" for its, where in same)
    text = f"is fused already: {given}. With {strength:g} more it is {total:g} in all"
    if strength not in [its for its, _ in same]:
        return None, (text,)
    detail = f"{text}. To strengthen it deliberately, allow that"
    return Problem(ProblemKind.ALREADY_FUSED, lora.request.label, str(lora.request.path), detail), ()


def _earlier(lora: LoraPlan, base: Checkpoint) -> list[tuple[FusedLora, str]]:
    """The same file in the base's lineage, with the fuse it came in by; hashed only where the size agrees."""
    manifest = base_manifest(base)
    if manifest is None or not lora.request.path.is_file():
        return []
    size = lora.request.path.stat().st_size
    found = []
    for depth, (_, loras) in enumerate(manifest.lineage):
        where = "the fuse that made the base" if depth == 0 else f"a fuse {depth} before the one that made the base"
        found += [(its, where) for its in loras if its.size == size and its.component in (None, lora.component)]
    digest = sha256_of(lora.request.path) if found else ""
    return [(its, where) for its, where in found if its.sha256 == digest]


def lineage_tree(facts: Mapping[str, Any]) -> list[str]:
    """The fuses that led to a checkpoint, the last one first; `facts` are those of `inspect`."""
    lines = [f"fused checkpoint {facts['fused_sha256'][:_SHOWN]}"]
    level: Mapping[str, Any] | None = facts
    indent = ""
    while level is not None:
        lines += [f"{indent}+- {_lora_line(lora)}" for lora in level["loras"]]
        role = "" if level["role"] == "deploy" else f"  (role {level['role']}: dropped at inference)"
        parent = level["parent"]
        if parent:
            lines.append(f"{indent}`- fused into {parent['fused_sha256'][:_SHOWN]}{role}")
        else:
            lines.append(f"{indent}`- fused into {_root(facts, level)}{role}")
        level, indent = parent, indent + "   "
    return lines


def _root(facts: Mapping[str, Any], level: Mapping[str, Any]) -> str:
    digest = level.get("base_sha256")
    origin = f", {facts['origin']}" if facts.get("origin") and not facts["parent"] else ""
    return f"the original base{f' {digest[:_SHOWN]}' if digest else ''}{origin}"


def _lora_line(lora: Mapping[str, Any]) -> str:
    where = f" into {lora['component']}" if lora["component"] not in (None, "transformer") else ""
    origin = f", from {Origin(**lora['origin']).uri}" if lora.get("origin") else ""
    return (
        f"{lora['name']} x {lora['strength']:g}{where}: {lora['dialect']}, scale {lora['scale']}, "
        f"{lora['applied']} of {lora['modules']} modules{origin}"
    )
