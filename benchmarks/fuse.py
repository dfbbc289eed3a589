"""python -m benchmarks.fuse --size 6 --rounds 5

Compares a fuse with `cp` and with other programs: wall time, processor seconds and memory of whole processes.
Figures go to stdout, to OUT/fuse-STATE.json and to OUT/fuse-STATE.png; everything else it made is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from benchmarks.contenders import CONTENDERS, Contender, reason_to_skip
from benchmarks.inputs import ROOT, make_inputs
from benchmarks.jobs import Job, job_of
from benchmarks.machine import available_memory_bytes, can_drop_caches, files_below, machine_facts
from benchmarks.measure import run_measured
from benchmarks.rounds import Arena, Run, State, orders, tell
from benchmarks.summary import Floor, Summary, floor_of, summarise, targets
from benchmarks.table import describe_doubts, describe_floor, describe_summaries, describe_targets
from benchmarks.workspace import BenchmarkError, stop_on_signals, workspace


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", type=float, default=6, help="GB of the checkpoint (default: %(default)s)")
    add("--rank", type=int, default=64, help="of the LoRAs (default: %(default)s)")
    add("--loras", type=int, default=1, help="that many are fused at once (default: %(default)s)")
    add("--rounds", type=int, default=5, help="runs of each contender (default: %(default)s)")
    add("--state", type=State, default=State.WARM, choices=list(State), help="what is cached (default: %(default)s)")
    add("--only", nargs="*", default=[], choices=[*CONTENDERS], help="who takes part besides cp (default: all)")
    add("--peer-size", type=float, help="leave other programs out for larger checkpoints than that many GB")
    add("--peer-rounds", type=int, help="let other programs take part in the first rounds only")
    add("--fuse-args", default="", help="further options for lorafuse fuse, such as '--workers 1'")
    add("--seed", type=int, default=0, help="of the order of runs (default: %(default)s)")
    add("--out", type=Path, default=Path("build/bench"), help="where to work and write (default: %(default)s)")
    add("--keep", action="store_true", help="leave the checkpoint and the LoRAs in OUT/work for the next time")
    return parser.parse_args(arguments)


def choose(args: argparse.Namespace, job: Job) -> tuple[list[Contender], dict[str, str]]:
    """Who takes part, and who does not for which reason."""
    names = [name for name in CONTENDERS if name == "cp" or not args.only or name in args.only]
    contenders = [CONTENDERS[name](job) for name in names]
    available = available_memory_bytes()
    reasons = {c.name: reason_to_skip(c, job, args.peer_size, available) for c in contenders}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    return [contender for contender in contenders if contender.name not in skipped], skipped


def run_rounds(args: argparse.Namespace, folder: Path, job: Job, contenders: Sequence[Contender]) -> list[Run]:
    """All rounds; a contender that failed once does not start again.

    Raises:
        BenchmarkError: `cp` or lorafuse fails.
    """
    arena, reference, runs = Arena(folder, args.state), folder / "reference.npy", list[Run]()
    arena.set_up(job, CONTENDERS["lorafuse"](job), reference)
    arena.remember(job)
    by_name = {contender.name: contender for contender in contenders}
    for number, order in enumerate(orders(list(by_name), args.rounds, args.seed)):
        for position, contender in enumerate(by_name[name] for name in order):
            is_over = contender.peer_bytes and args.peer_rounds is not None and number >= args.peer_rounds
            if is_over or any(run.failure for run in runs if run.contender == contender.name):
                continue
            run = arena.run(job, contender, number, position, reference)
            tell(run, contender.label, args.rounds)
            if run.failure and contender.peer_bytes is None:
                raise BenchmarkError(f"{contender.label}: {run.failure}")
            runs.append(run)
    return runs


def measure_floor(folder: Path, job: Job, copy: Summary) -> Floor:
    """The floor of a fuse, measured now."""
    loras = [text for path in job.loras for text in ("--lora", str(path))]
    command = [sys.executable, "-m", "benchmarks.floor", "--base", str(job.base), *loras]
    found: dict[str, object] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)
    torch = [
        run_measured([sys.executable, "-c", "import torch"], os.environ, folder / "log.txt").cpu_seconds
        for _ in range(3)
    ]
    return floor_of(found, copy, 2 * job.base_bytes + job.lora_bytes, min(torch))


def report(
    args: argparse.Namespace,
    job: Job,
    runs: Sequence[Run],
    summaries: Sequence[Summary],
    floor: Floor,
    skipped: Mapping[str, str],
) -> None:
    """Print the table; write the JSON and the picture."""
    from benchmarks.plot import draw_summaries

    ours = next((summary for summary in summaries if summary.name == "lorafuse"), None)
    machine = machine_facts(args.out)
    stem = args.out / f"fuse-{args.state}"
    facts = _facts(args, job, runs, summaries, floor) | {"machine": machine, "skipped": skipped}
    stem.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    title = f"Fusing {args.loras} LoRA{'s' * (args.loras > 1)} of rank {args.rank} into {job.base_bytes / 1e9:.1f} GB"
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['file_system']}, {machine['kernel']}"
    how = {"warm": "inputs in the page cache", "cold": "inputs not in the page cache", "all-cold": "empty page cache"}
    subtitle = f"{how[args.state]} · {args.rounds} interleaved rounds · {where}"
    draw_summaries(stem.with_suffix(".png"), title, subtitle, summaries, runs)
    cores = machine["cores"]
    assert isinstance(cores, int)
    print(f"{title}, {how[args.state]}, {args.rounds} rounds in random order; {where}\n")
    print(describe_summaries(summaries) + "\n")
    print(describe_floor(floor, ours) + "\n")
    print(describe_targets(targets(runs, summaries, floor)))
    print("\n".join(["", *describe_doubts(runs, cores, skipped), f"{stem}.json, {stem}.png"]))


def _facts(
    args: argparse.Namespace, job: Job, runs: Sequence[Run], summaries: Sequence[Summary], floor: Floor
) -> dict[str, object]:
    parameters = {name: value for name, value in vars(args).items() if name not in ("out", "keep")}
    return {
        "benchmark": "fuse",
        "parameters": parameters,
        "base_bytes": job.base_bytes,
        "lora_bytes": job.lora_bytes,
        "shards": sum(path.suffix == ".safetensors" for path in files_below([job.base])),
        "floor": asdict(floor),
        "targets": [asdict(target) for target in targets(runs, summaries, floor)],
        "summaries": [asdict(summary) for summary in summaries],
        "runs": [asdict(run) for run in runs],
    }


def bench(args: argparse.Namespace) -> int:
    """The whole benchmark; 1 where a contender failed.

    Raises:
        BenchmarkError: it cannot be run.
    """
    if args.state is State.ALL_COLD and not can_drop_caches():
        raise BenchmarkError("--state all-cold needs root, to empty the page cache; cold does without")
    with workspace(args.out, keep=args.keep) as folder:
        wants_peft = not args.only or "peft" in args.only
        shape = make_inputs(folder, args.size, {args.rank: args.loras}, peft=wants_peft)
        job = job_of(folder, shape, args.rank, args.loras, shlex.split(args.fuse_args))
        contenders, skipped = choose(args, job)
        runs = run_rounds(args, folder, job, contenders)
        summaries = summarise(runs, {name: make(job).label for name, make in CONTENDERS.items()})
        report(args, job, runs, summaries, measure_floor(folder, job, summaries[0]), skipped)
    return int(any(run.failure for run in runs))


def run_main(work: Callable[[], int]) -> NoReturn:
    """Run a benchmark; what stops it is one line, and leaves nothing behind."""
    stop_on_signals()
    try:
        sys.exit(work())
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {shlex.join(error.cmd)} failed with status {error.returncode}")
    except KeyboardInterrupt:
        print("interrupted: what was made is removed again", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    run_main(lambda: bench(parse_arguments()))


if __name__ == "__main__":
    main()
