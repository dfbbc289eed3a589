"""What the figures of a fused checkpoint say: how much of the deltas arrived, and what to do where too little did."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from lorafuse_common.checkpoint import Checkpoint, open_checkpoint
from lorafuse_common.errors import CheckpointError
from lorafuse_common.manifest import Manifest, TensorChange
from lorafuse_common.quantised import FP8_DTYPES
from lorafuse_common.tensorfile import DTYPE_BITS, TensorRef

from .progress import size_text

WEAK_GAIN = 0.95
"""Below it, a delta is pointed out as weakened."""


class Advice(NamedTuple):
    """One thing that can be done about weakened deltas."""

    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Findings:
    """The figures of a whole fuse."""

    applied: int
    """Modules of the LoRAs."""
    modules: int
    ratio: float | None
    """The median of delta/weight; None where there is none."""
    gain: float | None
    weak: tuple[TensorChange, ...]
    """The weakest first."""
    nbytes: int
    """Of the weight files."""


def findings_of(manifest: Manifest) -> Findings:
    """Sum a manifest up."""
    ratios = [ratio for change in manifest.changes if (ratio := ratio_of(change)) is not None]
    folders = {f"{component}/" if component else "" for component in components_of(manifest)}
    weights = [record for record in manifest.outputs if record.path.endswith(".safetensors")]
    return Findings(
        applied=sum(lora.applied for lora in manifest.loras),
        modules=sum(lora.modules for lora in manifest.loras),
        ratio=median(ratios) if ratios else None,
        gain=median(change.gain for change in manifest.changes) if manifest.changes else None,
        weak=tuple(sorted((c for c in manifest.changes if c.gain < WEAK_GAIN), key=lambda c: (c.gain, c.name))),
        nbytes=sum(record.size for record in weights if any(record.path.startswith(folder) for folder in folders)),
    )


def ratio_of(change: TensorChange) -> float | None:
    """delta/weight of a tensor; None where the weight was zero."""
    return change.delta_rms / change.weight_rms if change.weight_rms else None


def components_of(manifest: Manifest) -> tuple[str | None, ...]:
    """The transformers that were fused."""
    return tuple(dict.fromkeys((manifest.component, *(lora.component for lora in manifest.loras))))


def open_fused(folder: Path, manifest: Manifest) -> dict[str | None, Checkpoint]:
    """The fused transformers' headers, by component; what cannot be read is left out."""
    found = {}
    for component in components_of(manifest):
        try:
            found[component] = open_checkpoint(folder, component)
        except CheckpointError:
            continue
    return found


def edited_tensors(manifest: Manifest, fused: Mapping[str | None, Checkpoint]) -> tuple[TensorRef, ...]:
    """The changed tensors as they are stored now."""
    places = [(fused.get(change.component), change.name) for change in manifest.changes]
    return tuple(base.tensors[name] for base, name in places if base and name in base.tensors)


def advice(manifest: Manifest, edited: Collection[TensorRef]) -> tuple[Advice, ...]:
    """What lets more of weakened deltas arrive, the surest first; nothing where none is weak."""
    if not any(change.gain < WEAK_GAIN for change in manifest.changes):
        return ()
    dtypes = {ref.dtype for ref in edited}
    found = []
    if dtypes & FP8_DTYPES.keys():
        why = "fp8 keeps 2 or 3 bits of a number, bf16 keeps 7"
        found.append(Advice("Fuse into the bf16 checkpoint of this model", why))
    elif dtypes - {"F32", "F64"}:
        more = sum(ref.numel * (32 - DTYPE_BITS[ref.dtype]) // 8 for ref in edited if DTYPE_BITS[ref.dtype] < 32)
        why = f"stores the changed tensors without that loss, in {size_text(more)} more"
        found.append(Advice("--dtype float32", why))
    if manifest.parent:
        why = "each fuse of this chain rounded once more; one fuse rounds once"
        found.append(Advice("Fuse all LoRAs into the original base in one command", why))
    elif len(manifest.loras) == 1:
        why = "all deltas of one fuse are summed, and rounded once"
        found.append(Advice("Fuse further LoRAs in the same command", why))
    low = ", ".join(lora.name for lora in manifest.loras if abs(lora.strength) < 1)
    why = "the larger a delta is beside its weight, the less of it rounding takes"
    found.append(Advice(f"A higher strength{f' for {low}' if low else ''}", why))
    return tuple(found)
