"""How far the original base with an exported LoRA is from the fused checkpoint with the new LoRA.

    E = (W_base + D_export) - (W_fused + D_new)        float64, one tensor at a time

W_fused was rounded when it was fused, so E is what that rounding took, and what compression took.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafuse_common.checkpoint import Checkpoint, Form, open_checkpoint
from lorafuse_common.errors import CheckpointError
from lorafuse_common.hashing import sha256_of
from lorafuse_common.manifest import FileRecord, Manifest, weights_sha256
from lorafuse_common.tensorfile import TensorRef

from .choices import LoraRequest
from .deep import stored_alike
from .plan import ComponentPlan, plan_fuse
from .progress import ByteProgress
from .reference import delta_of, matrix, stored_rows


@dataclass(frozen=True, slots=True)
class LayerError:
    """One tensor; norms are Frobenius'."""

    name: str
    error: float
    """|E|"""
    whole: float
    """|(W_fused + D_new) - W_base|: all that the LoRAs do."""
    new: float
    """|D_new|"""

    @property
    def relative(self) -> float:
        """The error relative to all that the LoRAs do."""
        return self.error / self.whole if self.whole else (math.inf if self.error else 0.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All tensors that anything changes."""

    layers: tuple[LayerError, ...]
    strangers: tuple[str, ...]
    """Tensors of the fused checkpoint that differ from the base's though no LoRA changes them."""

    @property
    def relative(self) -> float:
        """Of all tensors together."""
        whole = math.hypot(*(layer.whole for layer in self.layers))
        return math.hypot(*(layer.error for layer in self.layers)) / whole if whole else 0.0

    @property
    def worst(self) -> LayerError | None:
        """The tensor with the largest relative error."""
        return max(self.layers, key=lambda layer: layer.relative, default=None)


def require_original(base: Checkpoint, manifest: Manifest, *, allowed: bool) -> None:
    """Make sure that a base is the one that the first fuse started from.

    Raises:
        CheckpointError: it is another one.
    """
    wanted = manifest.original_of(base.component)
    records = [
        FileRecord(file.path.relative_to(base.folder).as_posix(), sha256_of(file.path), file.size)
        for file in base.files
    ]
    same = {record.sha256 for record in records} <= {record.sha256 for record in manifest.base}
    is_renamed = base.form is Form.FILE and same and manifest.parent is None
    is_original = is_renamed or weights_sha256(records, base.component) == wanted
    if wanted is not None and not is_original and not allowed:
        raise CheckpointError(
            f"--base {base.root}: is not what the first LoRA was fused into (its weights are recorded as "
            f"{wanted[:12]}...). Give that checkpoint, or --allow-base-mismatch"
        )


def compare(folder: Path, base: Checkpoint, exported: Path, new: LoraRequest, component: str | None) -> Comparison:
    """Every tensor that the LoRAs change, or that differs.

    Raises:
        CheckpointError: the two checkpoints have other tensors.
    """
    fused = open_checkpoint(folder, component)
    odd = sorted(
        name
        for name in {*fused.tensors, *base.tensors}
        if name not in fused.tensors or name not in base.tensors
        or fused.tensors[name].shape != base.tensors[name].shape
    )  # fmt: skip
    if odd:
        raise CheckpointError(f"{base.root} and {folder} have other tensors or shapes (first: {odd[0]})")
    whole = plan_fuse(base, [LoraRequest(exported)], plain_fp8=True).components[0]
    extra = plan_fuse(fused, [LoraRequest(new.path, new.strength, component)], plain_fp8=True).components[0]
    layers: list[LayerError] = []
    strangers: list[str] = []
    with ByteProgress("comparing with the fused checkpoint", base.nbytes) as progress:
        for name, ref in base.tensors.items():
            if name in whole.patches or name in extra.patches:
                layers.append(_layer(whole, extra, ref, fused.tensors[name]))
            elif not stored_alike(ref, fused.tensors[name]):
                strangers.append(name)
            progress(ref.nbytes)
    return Comparison(tuple(layers), tuple(strangers))


def _layer(whole: ComponentPlan, extra: ComponentPlan, ref: TensorRef, made: TensorRef) -> LayerError:
    before, after = _numbers(whole, ref), _numbers(extra, made)
    new = delta_of(extra, made).values if made.name in extra.patches else torch.zeros(1, 1, dtype=torch.float64)
    target = after.add_(new).sub_(before)  # all that the LoRAs do
    error = delta_of(whole, ref).values - target if ref.name in whole.patches else target
    return LayerError(ref.name, _norm(error), _norm(target), _norm(new))


def _numbers(plan: ComponentPlan, ref: TensorRef) -> torch.Tensor:
    return stored_rows(ref, 0, matrix(ref.shape)[0], plan.scales.get(ref.name))


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def describe_comparison(found: Comparison, largest: int = 5) -> list[str]:
    """A summary line and the tensors that are furthest off."""
    worst: Sequence[LayerError] = sorted(found.layers, key=lambda layer: -layer.relative)[:largest]
    lines = [
        f"original base + this LoRA against fused + new LoRA: error {found.relative:.2g} of all that the LoRAs do, in "
        f"{len(found.layers)} tensors: what rounding the fused file took, and compression. Furthest off:"
    ]
    lines += [f"  {layer.relative:8.2g}  {layer.name}" for layer in worst]
    if found.strangers:
        lines.append(
            f"note: {len(found.strangers)} tensors of the fused checkpoint differ from the base though no LoRA changes "
            f"them (first: {found.strangers[0]})"
        )
    return lines
