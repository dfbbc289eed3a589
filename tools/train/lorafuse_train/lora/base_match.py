"""Whether a LoRA belongs to the base that it is about to be used with, by the hashes in its header."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafuse_common.errors import CheckpointError, ConfigError
from lorafuse_common.manifest import Role
from lorafuse_common.tensorfile import read_header
from lorafuse_train.base import Base, fused_loras

KEY = "lorafuse"
"""Where our LoRAs keep their record, as JSON, in the metadata of the file."""
SHOWN = 12
"""Digits of a sha256 in a message."""


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """What a LoRA's header says of the base it was trained on."""

    fused_sha256: str
    loras: tuple[str, ...]
    """What was fused into it, as `name x strength`."""
    is_scaffold: bool = False
    """Whether it was trained to be used without them."""
    original_sha256: str | None = None
    """Of what they were fused into."""

    def __str__(self) -> str:
        if self.is_scaffold and self.original_sha256:
            return f"{_described((), self.original_sha256)}, through {_described(self.loras, self.fused_sha256)}"
        return _described(self.loras, self.fused_sha256)

    def fits(self, sha256: str) -> bool:
        """Whether the base with these weights is the one that it is for."""
        return sha256 == self.fused_sha256 or (self.is_scaffold and sha256 == self.original_sha256)


def trained_on(path: Path) -> TrainedOn | None:
    """What the header of a LoRA file says; None where it is not from this trainer, or cannot be read."""
    try:
        record = json.loads(read_header(path).metadata[KEY])
        fused, base = record["fused_sha256"], record.get("base") or {}
        loras = tuple(_name(lora["name"], lora["strength"]) for lora in record.get("fused_loras") or ())
        scaffold = record.get("role") == Role.SCAFFOLD
        return TrainedOn(str(fused), loras, scaffold, base.get("sha256")) if fused else None
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return None


def require_same_base(path: Path, base: Base, *, option: str, allowed: bool) -> None:
    """Make sure that a LoRA of ours meets the base it was trained on; others say nothing of theirs, and pass.

    `option` is how the user named the file, `allowed` is --allow_base_mismatch.

    Raises:
        ConfigError: it was trained on another base; names both.
    """
    found = trained_on(path)
    if allowed or found is None or found.fits(base.fused_sha256):
        return
    here = tuple(_name(lora.name, lora.strength) for lora in (fused_loras(base.manifest) if base.manifest else ()))
    raise ConfigError(
        f"{option} {path}: was trained on another base: {found}; --fused_model {base.folder} is "
        f"{_described(here, base.fused_sha256)}. Its effect there is not what was trained: give the checkpoint that "
        "it was trained on, or --allow_base_mismatch"
    )


def _name(name: Any, strength: Any) -> str:
    return f"{name} x {float(strength):g}"


def _described(loras: tuple[str, ...], sha256: str) -> str:
    fused = f"with {', '.join(loras)} fused" if loras else "with nothing fused"
    return f"one {fused} (sha256 {sha256[:SHOWN]}...)"
