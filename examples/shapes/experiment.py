"""python examples/shapes/experiment.py --out build/experiment --seeds 3 --jobs 2

Compares ways of training a LoRA on the demo's few-step base, and writes few-step.md with a table, a plot and grids.
Each training is a process of its own, and what is done is not done again: start it once more and it goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from drawing import CAPTIONS
from trials.variants import VARIANTS, TrainedOn, variant_named
from trials.workspace import Workspace, write_json

BASES = ("drawn", "original", "fused")
"""What is scored besides the trainings."""


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/experiment"), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each variant (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=480, help="of each training (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=256, help="pictures in each score (default: %(default)s)")
    parser.add_argument("--style", choices=list(CAPTIONS), default="ink", help="the new one (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default: %(default)s)")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="VARIANT", help=", ".join(names))
    parser.add_argument("--docs", type=Path, help="folder to write few-step.md and its pictures to (default: --out)")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Prepare, train and score what is missing, write it down."""
    options = arguments()
    space = Workspace(options.out, options.steps, options.style, options.samples, options.threads)
    if options.trial:
        from trials.trial import run_trial

        run_trial(space, options.trial)
        return
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    # Seeds outermost: an experiment that is cut short has all variants.
    names = [*BASES, *(f"{name}-{seed}" for seed in seeds for name in options.only)]
    space.prepare({variant_named(name).trained_on for name in options.only} | {TrainedOn.FUSED})
    missing = [name for name in names if not (space.run_of(name) / "results.json").is_file()]
    print(f"{len(names) - len(missing)} of {len(names)} are there ({space.run_of('')})", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [
            name
            for name, well in zip(missing, pool.map(lambda n: in_process(space, n), missing), strict=True)
            if not well
        ]
    found = {name: read(space, name) for name in names if name not in failed}
    write_json(space.run_of("results.json"), found)
    from trials.document import write_document

    print(f"written: {write_document(space, found, options.docs or space.out)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their output is in log.txt of {space.run_of('')}")


def in_process(space: Workspace, name: str) -> bool:
    """Run one trial; its output goes to a file."""
    folder, started = space.run_of(name), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--trial", name, "--out", str(space.out), "--steps", str(space.steps),
               "--style", space.style, "--samples", str(space.samples), "--threads", str(space.threads)]  # fmt: skip
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    said = "done" if done.returncode == 0 else f"failed, see {folder / 'log.txt'}"
    print(f"{name}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
    return done.returncode == 0


def read(space: Workspace, name: str) -> dict[str, Any]:
    """What a trial found."""
    found: dict[str, Any] = json.loads((space.run_of(name) / "results.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
