"""Carrying out a plan on weight files: one pass over each that copies untouched bytes and edits the rest."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lorafuse_common.errors import ConfigError
from lorafuse_common.lora import is_zero_product
from lorafuse_common.manifest import TensorChange
from lorafuse_common.signals import held_signals
from lorafuse_common.tensorfile import DTYPE_BITS, TensorFile, TensorRef, encode_header, read_tensor

from .choices import ProblemKind
from .codec import scale_bytes
from .edit import Editor, piece_rows
from .plan import ComponentPlan, FusePlan, Problem
from .stream import Stream

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Written:
    """What one pass over a weight file found and made."""

    source_sha256: str
    output_sha256: str
    output_size: int
    changes: tuple[TensorChange, ...]


def check_factors(plan: FusePlan) -> tuple[Problem, ...]:
    """Read every factor once, before anything is written: NaN, Inf, and LoRAs that were never trained."""
    problems = []
    trained = {lora.request.label: False for lora in plan.loras if lora.applied}
    modules = {(patch.lora, patch.module.stem, patch.module.parameter): patch for patch in plan.patches}
    torch.set_num_threads(1)  # factors are too small to share out: on a busy machine waiting threads cost seconds
    for patch in modules.values():
        factors = {role: read_tensor(ref) for role, ref in patch.module.factors.items()}
        if not all(bool(torch.isfinite(factor).all()) for factor in factors.values()):
            problems.append(
                Problem(ProblemKind.NOT_FINITE, patch.lora, patch.module.stem, "holds NaN or Inf; the file is damaged")
            )
        trained[patch.lora] |= not is_zero_product({role: not factor.any() for role, factor in factors.items()})
    for name, is_trained in trained.items():
        if not is_trained:
            detail = "all its deltas are zero: it was never trained"
            problems.append(Problem(ProblemKind.NO_EFFECT, name, name, detail))
    return tuple(problems)


def write_fused(
    plan: ComponentPlan,
    source: TensorFile,
    metadata: Mapping[str, str],
    out: Path,
    progress: Progress,
    *,
    workers: int,
    known_sha256: str | None = None,
    device: str = "cpu",
) -> Written:
    """Write a copy of `source`, a file of the plan's base, to `out` with its patches added; both are hashed on the way.

    The result does not depend on the number of workers. Where the source's hash is known it is not computed again.

    Raises:
        CheckpointError: the source ended early, or a fused value is not finite.
    """
    header = encode_header(source, metadata, plan.stored)
    size = len(header)
    editors: dict[str, Future[Editor]] = {}
    allocate = bytearray if device == "cpu" else _pinned

    def heeding(count: int) -> None:
        held.heed()
        progress(count)

    with (
        held_signals() as held,
        Stream(source.path, out, heeding, workers, allocate, hash_source=known_sha256 is None) as stream,
    ):
        stream.replace(source.data_start, header)
        for ref in source.tensors.values():
            size += _pass(stream, plan, ref, editors, torch.device(device))
    changes = tuple(editors[name].result().figures() for name in source.tensors if name in editors)
    return Written(known_sha256 or stream.source_hash.hexdigest(), stream.output_hash.hexdigest(), size, changes)


def _pinned(size: int) -> memoryview:
    """Memory that a GPU copies from and to on its own."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().data


def _pass(
    stream: Stream, plan: ComponentPlan, ref: TensorRef, editors: dict[str, Future[Editor]], device: torch.device
) -> int:
    """Send one tensor through the stream, edited where the plan says so; returns its bytes in the output.

    A weight's editor is prepared by a worker, ahead of the pieces that need it: workers take jobs in order.
    """

    def editor_of(weight: TensorRef) -> Future[Editor]:
        if weight.name not in editors:
            editors[weight.name] = stream.workers.submit(Editor, plan, weight, device)
        return editors[weight.name]

    owner = plan.scale_owners.get(ref.name)
    if owner is not None:  # the new scale of an fp8 weight
        editor = editor_of(plan.base.tensors[owner])
        stream.edit(ref.nbytes, ref.nbytes, lambda _: memoryview(scale_bytes(editor.result().out)))
        return ref.nbytes
    if ref.name not in plan.patches:
        stream.copy(ref.nbytes)
        return ref.nbytes
    stored = plan.stored_as(ref)
    columns, rows = math.prod(stored.shape[1:]), ref.shape[0] if ref.shape else 1
    row_bytes = columns * DTYPE_BITS[stored.dtype] // 8
    future = editor_of(ref)
    for start, stop in piece_rows(ref, columns):
        change = partial(_change, future, start)
        stream.edit((stop - start) * ref.nbytes // rows, (stop - start) * row_bytes, change)
    return rows * row_bytes


def _change(editor: Future[Editor], start: int, data: memoryview) -> memoryview:
    return editor.result().change(data, start)


def check_device(device: str) -> None:
    """Raise ConfigError where torch cannot compute on `device`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch finds no CUDA device; leave the flag out to compute on the CPU")


def free_bytes(folder: Path) -> int:
    """Free space where `folder` lies or will lie."""
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
