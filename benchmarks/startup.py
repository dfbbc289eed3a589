"""How long lorafuse takes before it does anything: its help, and a dry run on a checkpoint of 40 GB."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders import clean_environment, lorafuse_command
from benchmarks.inputs import LoraShape, base_path, lora_path, make_inputs
from benchmarks.summary import Spread, Target, spread
from benchmarks.workspace import remove

MOST_HELP_SECONDS = 0.3
MOST_DRY_RUN_SECONDS = 3.0
_TIMES = 10
_RANK = 64


@dataclass(frozen=True, slots=True)
class StartUp:
    """Wall seconds, with everything in the page cache."""

    help_seconds: Spread
    dry_run_seconds: Spread
    dry_run_bytes: int

    @property
    def targets(self) -> tuple[Target, ...]:
        """What issue 4 asks for."""
        size, help_median, dry_median = (
            self.dry_run_bytes / 1e9,
            self.help_seconds.median,
            self.dry_run_seconds.median,
        )
        texts = (
            f"lorafuse --help, s <= {MOST_HELP_SECONDS:g}",
            f"dry run on {size:.1f} GB, s <= {MOST_DRY_RUN_SECONDS:g}",
        )
        return (
            Target(texts[0], help_median, MOST_HELP_SECONDS, help_median <= MOST_HELP_SECONDS),
            Target(texts[1], dry_median, MOST_DRY_RUN_SECONDS, dry_median <= MOST_DRY_RUN_SECONDS),
        )


def measure_startup(folder: Path, size_gb: float, *, keep: bool) -> StartUp:
    """Time both, on a checkpoint that has headers but no data, and a whole LoRA."""
    shape = make_inputs(folder, size_gb, {_RANK: 1}, sparse=True)
    lora = LoraShape(shape, _RANK, 0)
    base = base_path(folder, shape, sparse=True)
    environment = clean_environment(folder / "cache")
    fuse = [str(base), f"--lora={lora_path(folder, lora)}", "--out", str(folder / "result"), "--dry-run"]
    found = StartUp(
        _seconds([*lorafuse_command(), "--help"], environment),
        _seconds([*lorafuse_command(), "fuse", *fuse], environment),
        shape.nbytes,
    )
    if not keep:
        remove(base)
        remove(lora_path(folder, lora))
    return found


def _seconds(command: Sequence[str], environment: Mapping[str, str]) -> Spread:
    """Of some runs, after one that fills the page cache."""
    found = []
    for _ in range(_TIMES + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, env=dict(environment), capture_output=True)
        found.append(time.perf_counter() - started)
    return spread(found[1:])
