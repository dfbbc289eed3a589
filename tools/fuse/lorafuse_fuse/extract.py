"""`lorafuse extract`: the difference of two checkpoints of one architecture as a LoRA.

D = W_fused - W_base        fp32, one tensor at a time; what is kept of it is `lowrank.approximated`
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafuse_common import __version__
from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.errors import CheckpointError
from lorafuse_common.hashing import sha256_of
from lorafuse_common.manifest import FileRecord, read_manifest, weights_sha256
from lorafuse_common.quantised import FP8_DTYPES, Fp8Scale, scale_of
from lorafuse_common.tensorfile import FLOAT_DTYPES, TensorRef

from .fuse import HEADER_KEY

if TYPE_CHECKING:
    import torch

    from .lora_out import Target
    from .merge import Module, Sum

_ROWS_BYTES = 64 << 20
"""What is read of a tensor at a time."""


@dataclass(frozen=True, slots=True)
class Found:
    """One tensor that differs."""

    name: str
    rank: int
    """0 for one that is no matrix, which is kept whole or left out."""
    norm: float
    """Frobenius norm of the difference."""
    share: float
    """The difference relative to the base's tensor."""
    error: float
    """What the rank leaves out, relative to the difference."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was written."""

    found: tuple[Found, ...]
    skipped: tuple[str, ...]
    """Tensors that differ, are no matrices and were left out."""
    equal: int
    nbytes: int

    @property
    def error(self) -> float:
        """What is left out of all differences together, relative to them."""
        whole = math.hypot(*(its.norm for its in self.found))
        return math.hypot(*(its.error * its.norm for its in self.found)) / whole if whole else 0.0


def require_alike(fused: Checkpoint, base: Checkpoint) -> None:
    """Make sure that the two are checkpoints of one architecture and size, in one layout.

    Raises:
        CheckpointError: naming tensors that only one has, that have other shapes, or that are no numbers.
    """
    from .deep import stored_alike

    ours, theirs = _own(fused), _own(base)
    faults = [
        f"{len(names)} tensors are only in {where.label} (first: {names[0]})"
        for where, names in ((fused, sorted(ours.keys() - theirs)), (base, sorted(theirs.keys() - ours)))
        if names
    ]
    both = [name for name in ours if name in theirs]
    shapes = [name for name in both if ours[name].shape != theirs[name].shape]
    if shapes:
        one, other = ours[shapes[0]].shape, theirs[shapes[0]].shape
        faults.append(f"{len(shapes)} tensors have other shapes (first: {shapes[0]}, {list(one)} and {list(other)})")
    known = FLOAT_DTYPES.keys() | FP8_DTYPES
    numberless = [n for n in both if n not in shapes and not {ours[n].dtype, theirs[n].dtype} <= known]
    if odd := [n for n in numberless if not stored_alike(ours[n], theirs[n])]:
        faults.append(
            f"{len(odd)} tensors are of types that cannot be compared (first: {odd[0]}, {ours[odd[0]].dtype})"
        )
    if faults:
        raise CheckpointError(
            f"{fused.label} and {base.label} are no two versions of one checkpoint: {'; '.join(faults)}. Both have to "
            "be in the same layout"
        )


def _own(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """Tensors without the checkpoint's prefix, and without the scales of fp8 weights."""
    scales = {scale.ref.name for scale in _scales(checkpoint).values()}
    prefix = checkpoint.prefix
    return {
        name.removeprefix(prefix): ref
        for name, ref in checkpoint.tensors.items()
        if name.startswith(prefix) and name not in scales
    }


def _scales(checkpoint: Checkpoint) -> dict[str, Fp8Scale]:
    return {
        name: scale
        for name, ref in checkpoint.tensors.items()
        if ref.dtype in FP8_DTYPES and (scale := scale_of(ref, name, checkpoint.tensors))
    }


def extract(
    fused: Checkpoint, base: Checkpoint, target: Target, *, rank: int, energy: float, device: str = "cpu"
) -> Extracted:
    """Write the difference as a LoRA of at most `rank`, of no more in each layer than reaches the share `energy`.

    Raises:
        CheckpointError: they are no two versions of one checkpoint, or do not differ.
        ConvertError, OutputError: it cannot be written so, or there.
    """
    from .lora_out import Vectors, require_place, require_same_origin, require_vectors, write_lora
    from .progress import ByteProgress

    require_alike(fused, base)
    require_place(target.out, [*(file.path for file in fused.files), *(file.path for file in base.files)])
    metadata = _metadata(fused, base, rank, energy)
    require_same_origin(target, metadata)
    with ByteProgress("comparing", 2 * base.nbytes) as progress:
        changed = list(_changed(fused, base, progress))
    if not changed:
        raise CheckpointError(f"{fused.label} and {base.label} do not differ: there is nothing to extract")
    vectors = [module.name for module, _ in changed if not module.is_matrix]
    require_vectors(vectors, target)
    sums, found, scales = [], [], (_scales(fused), _scales(base))
    with ByteProgress("extracting", sum(its.ref.nbytes for its, _ in changed)) as progress:
        for module, ref in changed:
            if module.is_matrix or target.vectors is not Vectors.SKIP:
                its, figures = _extracted(module, ref, scales, (rank, energy), device)
                sums.append(its)
                found.append(figures)
            progress(module.ref.nbytes)
    if not found:
        raise CheckpointError(
            f"{fused.label} and {base.label}: no matrices differ, and --vectors skip leaves out the rest"
        )
    nbytes = write_lora(sums, base, target, metadata)
    skipped = tuple(vectors) if target.vectors is Vectors.SKIP else ()
    return Extracted(tuple(found), skipped, len(_own(base)) - len(found) - len(skipped), nbytes)


def _changed(
    fused: Checkpoint, base: Checkpoint, progress: Callable[[int], object]
) -> Iterator[tuple[Module, TensorRef]]:
    """The modules of the base whose numbers differ, however they are stored, with the fused tensor."""
    from .deep import stored_alike
    from .merge import modules_of

    ours, scales = _own(fused), (_scales(fused), _scales(base))
    modules = modules_of(base)
    for name, ref in _own(base).items():
        made = ours[name]
        rescaled = ref.name in scales[1] or made.name in scales[0]
        if (rescaled or not stored_alike(ref, made)) and bool(_difference(ref, made, scales)[0].any()):
            yield modules[ref.name], made
        progress(ref.nbytes + made.nbytes)


def _extracted(
    module: Module,
    made: TensorRef,
    scales: tuple[Mapping[str, Fp8Scale], Mapping[str, Fp8Scale]],
    asked: tuple[int, float],
    device: str,
) -> tuple[Sum, Found]:
    from lorafuse_common.lowrank import LowRank, approximated

    from .merge import Sum

    difference, before = _difference(module.ref, made, scales)
    norm = _norm(difference)
    share = norm / before if before else math.inf
    if not module.is_matrix:
        vector = difference.reshape(module.ref.shape)
        return Sum(module, None, vector, 0, None), Found(module.name, 0, norm, share, 0.0)
    seed = zlib.crc32(module.name.encode())
    its = approximated(difference.to(device), *asked, seed=seed)
    pair = LowRank(its.matrix.up.cpu(), its.matrix.down.cpu())
    return Sum(module, pair, None, 0, its.error), Found(module.name, pair.rank, norm, share, its.error)


def _difference(
    ref: TensorRef, made: TensorRef, scales: tuple[Mapping[str, Fp8Scale], Mapping[str, Fp8Scale]]
) -> tuple[torch.Tensor, float]:
    """`W_fused - W_base`, `(rows, columns)` in fp32, subtracted in fp64; and the norm of W_base."""
    import torch

    from .reference import matrix, stored_rows

    rows, columns = matrix(ref.shape)
    difference = torch.empty(rows, columns)
    squares = 0.0
    step = max(1, _ROWS_BYTES // (8 * max(1, columns)))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        before = stored_rows(ref, start, stop, scales[1].get(ref.name))
        squares += float(before.square().sum())
        difference[start:stop] = stored_rows(made, start, stop, scales[0].get(made.name)) - before
    if not bool(torch.isfinite(difference).all()):
        raise CheckpointError(f"{made.file}: {made.name} or the base's holds NaN or Inf")
    return difference, math.sqrt(squares)


def _norm(values: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _metadata(fused: Checkpoint, base: Checkpoint, rank: int, energy: float) -> Mapping[str, str]:
    record: dict[str, object] = {
        "version": __version__,
        "family": base.family.name if base.family else None,
        "fused_sha256": _identity(base),
        "fused_loras": [],
        "extracted_from": _identity(fused),
        "rank": rank,
        "energy": energy,
    }
    return {"modelspec.title": f"{fused.root.name} - {base.root.name}", HEADER_KEY: json.dumps(record)}


def _identity(checkpoint: Checkpoint) -> str:
    manifest = read_manifest(checkpoint.folder)
    if manifest and manifest.component == checkpoint.component:
        return manifest.fused_sha256
    folder = checkpoint.folder
    records = [FileRecord(f.path.relative_to(folder).as_posix(), sha256_of(f.path), f.size) for f in checkpoint.files]
    return weights_sha256(records, checkpoint.component)


def describe_extraction(result: Extracted, largest: int | None = None) -> list[str]:
    """A line for each tensor, or for those with the largest error; and the sum."""
    from .lora_out import describe_skipped

    ordered: Sequence[Found] = sorted(result.found, key=lambda its: -its.error) if largest else result.found
    lines = [f"{'rank':>6} {'of weight':>10} {'left out':>9}  tensor"]
    lines += [f"{its.rank or '-':>6} {its.share:10.2%} {its.error:9.2%}  {its.name}" for its in ordered[:largest]]
    matrices = sum(1 for its in result.found if its.rank)
    others = len(result.found) - matrices
    lines.append(
        f"{matrices} matrices{f' and {others} other tensors' if others else ''} differ, {result.equal} are equal; "
        f"the rank leaves out {result.error:.2%} of the difference"
    )
    return lines + describe_skipped(result.skipped)
