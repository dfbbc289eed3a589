"""`lorafuse convert`: one LoRA in another dialect, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_common.conversion import (
    Conversion,
    Converted,
    family_named,
    plan_conversion,
    writable,
    write_conversion,
)
from lorafuse_common.dialects import Dialect
from lorafuse_common.errors import ConfigError
from lorafuse_common.lora import read_lora

from .progress import size_text


def dialect_named(name: str) -> Dialect:
    """The dialect that `--to` names.

    Raises:
        ConfigError: there is none of that name, or it is only read.
    """
    found = next((dialect for dialect in writable() if dialect.name == name), None)
    if found is None:
        raise ConfigError(f"--to {name}: expected one of {', '.join(dialect.name for dialect in writable())}")
    return found


def convert(
    lora: Path,
    to: str,
    out: Path,
    *,
    base: Path | None = None,
    family: str | None = None,
    component: str | None = None,
    leaves_others: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Convert one file; returns facts about it.

    Raises:
        LorafuseError: see the messages; nothing is left under `out` then.
    """
    dialect = dialect_named(to)
    if base and family:
        raise ConfigError("--base and --family: give one; a checkpoint says of which family it is")
    plan = plan_conversion(
        read_lora(lora, component),
        dialect,
        base=open_checkpoint(base, component) if base else None,
        family=family_named(family) if family else None,
        component=component,
        leaves_others=leaves_others,
    )
    return _facts(plan, write_conversion(plan, out, force=force))


def _facts(plan: Conversion, done: Converted) -> dict[str, Any]:
    family = plan.vocabulary.family
    return {
        "lora": str(plan.lora.path),
        "out": str(done.path),
        "family": family.name if family else None,
        "from": {"dialect": plan.read_as.name, "layout": plan.read_layout, "modules": plan.modules_read},
        "to": {"dialect": plan.to.name, "layout": plan.vocabulary.layout, "modules": done.modules},
        "left_out": dict(done.left_out),
        "bytes": done.nbytes,
        "up_to_date": done.up_to_date,
    }


def describe_conversion(facts: dict[str, Any]) -> str:
    """What was read and what was written."""
    read, written = (
        f"{facts[side]['dialect']}{' (' + facts[side]['layout'] + ' names)' if facts[side]['layout'] else ''}"
        for side in ("from", "to")
    )
    left = "".join(f"; not written: {count} {reason}" for reason, count in facts["left_out"].items())
    state = "is up to date" if facts["up_to_date"] else "written"
    return (
        f"{read} -> {written}: {facts['from']['modules']} modules read, {facts['to']['modules']} written{left}\n"
        f"{facts['out']}: {size_text(facts['bytes'])}, {state}"
    )
