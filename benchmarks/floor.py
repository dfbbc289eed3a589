"""python -m benchmarks.floor --base BASE --lora LORA

The processor seconds of a fuse's arithmetic alone, on one core and in memory: hashing and editing, without I/O.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_common.tensorfile import TensorRef, read_rows
from lorafuse_fuse.blocks import EDIT_BLOCK_ELEMENTS, PIECE_BYTES
from lorafuse_fuse.choices import LoraRequest
from lorafuse_fuse.edit import Editor
from lorafuse_fuse.plan import ComponentPlan, plan_fuse

_REPEATS = 3
_HASHED_BYTES = 256 << 20


def processor_seconds(work: Callable[[], object]) -> float:
    """Median of a few repetitions, after one that touches the memory."""
    work()
    found = []
    for _ in range(_REPEATS):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return statistics.median(found)


def sha256_seconds_per_gb() -> float:
    """Of memory that does not fit in a cache, by the pieces that a fuse hashes."""
    piece = bytes(PIECE_BYTES)
    digest = hashlib.sha256()

    def work() -> None:
        for _ in range(_HASHED_BYTES // PIECE_BYTES):
            digest.update(piece)

    return processor_seconds(work) / (_HASHED_BYTES // PIECE_BYTES * PIECE_BYTES / 1e9)


def edit_seconds(plan: ComponentPlan) -> float:
    """What lorafuse's own editor takes for the tensors of one block in memory, scaled to all edited ones."""
    sample = [name for name in plan.patches if name.startswith("transformer_blocks.0.")]
    total = sum(plan.base.tensors[name].numel for name in plan.patches)
    part, seconds = 0, 0.0
    for name in sample:
        ref = plan.base.tensors[name]
        data = read_rows(ref, 0, ref.shape[0])
        part += ref.numel
        seconds += processor_seconds(lambda ref=ref, data=data: _edit(plan, ref, data))  # type: ignore[misc]
    return seconds * total / part


def _edit(plan: ComponentPlan, ref: TensorRef, data: bytearray) -> None:
    editor = Editor(plan, ref, torch.device("cpu"))
    editor.change(memoryview(data), 0)
    editor.figures()


def parts_seconds(ranks: Sequence[int], columns: int, elements: int) -> dict[str, float]:
    """What the steps of an edit take for `elements` elements, each on its own and written as directly as can be."""
    rows = max(1, EDIT_BLOCK_ELEMENTS // columns)
    stored = torch.randn(rows, columns).to(torch.bfloat16)
    before, delta, exact = torch.randn(3, rows, columns)
    factors = [(torch.randn(rows, rank), torch.randn(rank, columns)) for rank in ranks]

    def figures() -> None:
        exact.sub_(stored)
        for left, right in ((before, before), (delta, delta), (exact, exact), (exact, delta)):
            float(torch.dot(left.view(-1), right.view(-1)))

    def product() -> None:
        torch.mm(*factors[0], out=delta)
        for up, down in factors[1:]:
            delta.addmm_(up, down)

    steps: dict[str, Callable[[], object]] = {
        "widen": lambda: before.copy_(stored),
        "product": product,
        "sum": lambda: torch.add(before, delta, out=exact),
        "round": lambda: stored.copy_(exact),
        "figures": figures,
    }
    times = max(1, (1 << 25) // (rows * columns))
    blocks = elements / (rows * columns)
    return {name: processor_seconds(lambda work=work: _repeat(work, times)) / times * blocks  # type: ignore[misc]
            for name, work in steps.items()}  # fmt: skip


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def measure_floor(base: Path, loras: Sequence[Path]) -> dict[str, object]:
    """Processor seconds: of hashing one GB, of all edits, and of the steps of an edit."""
    torch.set_num_threads(1)
    (plan,) = plan_fuse(open_checkpoint(base), [LoraRequest(path) for path in loras]).components
    edited = {name: plan.base.tensors[name] for name in plan.patches}
    elements = sum(ref.numel for ref in edited.values())
    columns = max(math.prod(ref.shape[1:]) for ref in edited.values())
    first = next(iter(plan.patches.values()))
    ranks = [patch.module.factors["down"].shape[0] for patch in first]
    return {
        "sha256_seconds_per_gb": sha256_seconds_per_gb(),
        "edit_seconds": edit_seconds(plan),
        "edited_elements": elements,
        "parts_seconds": parts_seconds(ranks, min(columns, 4 * 3072), elements),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the checkpoint to fuse into")
    parser.add_argument("--lora", type=Path, action="append", required=True, help="a LoRA to fuse; repeatable")
    args = parser.parse_args()
    print(json.dumps(measure_floor(args.base, args.lora)))


if __name__ == "__main__":
    main()
