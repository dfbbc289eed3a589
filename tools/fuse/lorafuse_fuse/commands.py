"""The commands that a manifest stands for: the fuse that made it, and the check that it is what was made."""

from __future__ import annotations

import shlex
from collections.abc import Collection

from lorafuse_common.manifest import FusedLora, Manifest

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def number(value: float) -> str:
    """A number as one would type it, with all its digits."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def base_text(manifest: Manifest) -> str:
    """What stands for the base in a command: its name on the hub, its file, or BASE."""
    if manifest.origin:
        return manifest.origin.uri
    return manifest.base[0].path if len(manifest.base) == 1 else "BASE"


def fuse_command(manifest: Manifest, extra: Collection[str] = ()) -> str:
    """The command that gives the same checkpoint again; paths are not known, so names stand for them."""
    lines = [f"lorafuse fuse {shlex.quote(base_text(manifest))}"]
    several = len({lora.component for lora in manifest.loras}) > 1
    lines += [f"--lora {shlex.quote(_lora_text(lora, with_component=several))}" for lora in manifest.loras]
    if not several and manifest.component not in (None, "transformer"):
        lines.append(f"--component {shlex.quote(str(manifest.component))}")
    lines += [f"--alpha {shlex.quote(f'{lora.name}={number(lora.alpha)}')}" for lora in manifest.loras if lora.alpha]
    if manifest.dtype:
        lines.append(f"--dtype {_DTYPES.get(manifest.dtype, manifest.dtype)}")
    if manifest.seed is not None:
        lines.append(f"--rounding stochastic --seed {manifest.seed}")
    lines.append(f"--role {manifest.role}")  # whatever the LoRAs' names and headers say of it
    if manifest.schedule is None:
        lines.append("--schedule none")
    elif manifest.schedule.source.startswith("--schedule "):
        lines.append(f"--schedule {shlex.quote(manifest.schedule.source.removeprefix('--schedule '))}")
    elif manifest.schedule.source == "--schedule":
        lines.append(f'--schedule "{",".join(number(sigma) for sigma in manifest.schedule.sigmas)}"')
    lines += [f"--allow {kind}" for kind in manifest.allowed]
    return " \\\n  ".join([*lines, *extra, "--out FUSED"])


def verify_command(manifest: Manifest) -> str:
    """The command that adds everything up again."""
    loras = [f"--lora {shlex.quote(_source(lora))}" for lora in manifest.loras]
    return " \\\n  ".join(["lorafuse verify FUSED --deep", f"--base {shlex.quote(base_text(manifest))}", *loras])


def _source(lora: FusedLora) -> str:
    return lora.origin.uri if lora.origin else lora.name


def _lora_text(lora: FusedLora, *, with_component: bool) -> str:
    strength = "" if lora.strength == 1 and not (with_component and lora.origin) else f":{number(lora.strength)}"
    return f"{_source(lora)}{strength}{f'@{lora.component}' if with_component and lora.component else ''}"
