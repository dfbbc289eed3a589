"""What there is to fuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.inputs import LoraShape, Shape, base_path, lora_path, peft_path


@dataclass(frozen=True, slots=True)
class Job:
    """One fuse that all contenders do."""

    base: Path
    loras: tuple[Path, ...]
    adapters: tuple[Path, ...]
    """The same LoRAs as PEFT folders; empty where no peer takes part."""
    out: Path
    base_bytes: int
    lora_bytes: int
    shard_bytes: int
    """Of the largest shard."""
    fuse_options: tuple[str, ...] = ()
    """Further options for lorafuse."""


def job_of(folder: Path, shape: Shape, rank: int, count: int, fuse_options: Sequence[str] = ()) -> Job:
    """Fuse `count` LoRAs of a rank into a checkpoint; all of them are there already."""
    loras = [LoraShape(shape, rank, index) for index in range(count)]
    base, paths = base_path(folder, shape), [lora_path(folder, lora) for lora in loras]
    shards = [path.stat().st_size for path in base.glob("*.safetensors")]
    return Job(
        base=base,
        loras=tuple(paths),
        adapters=tuple(path for lora in loras if (path := peft_path(folder, lora)).exists()),
        out=folder / "result",
        base_bytes=sum(shards),
        lora_bytes=sum(path.stat().st_size for path in paths),
        shard_bytes=max(shards),
        fuse_options=tuple(fuse_options),
    )
