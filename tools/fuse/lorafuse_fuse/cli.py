"""`lorafuse fuse models/Qwen-Image --lora lightning.safetensors --lora style.safetensors:0.8 --out models/fused`."""

from __future__ import annotations

import json
import math
import re
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafuse_common import __version__
from lorafuse_common.errors import ConfigError, LorafuseError

from .carry import Components
from .fit import ProblemKind
from .plan import FusePlan, LoraRequest, blocking, open_bases, plan_fuse

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Fuse LoRAs into a diffusion-transformer checkpoint, once and on disk, to train new LoRAs on it.",
)
BaseArgument = Annotated[Path, typer.Argument(help="A .safetensors file, a model folder or a whole pipeline folder.")]
LoraOption = Annotated[
    list[str],
    typer.Option(
        "--lora", "--lora_fused", "--lora-fused", metavar="FILE[:STRENGTH][@COMPONENT]", show_default=False,
        help="A LoRA to fuse, strength 1 where none is given; repeat it for several. The format is detected. "
        "@transformer_2 fuses it into that transformer of the pipeline (Wan 2.2 has two).",
    ),
]  # fmt: skip
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it appears complete or not at all.")]
ComponentOption = Annotated[
    str | None,
    typer.Option(help="Which transformer of a pipeline, such as transformer_2. Default: transformer."),
]
ComponentsOption = Annotated[
    Components,
    typer.Option(help="Large files of the pipeline's other components: link (reflink, else symlink) or copy."),
]
AllowOption = Annotated[
    list[ProblemKind] | None,
    typer.Option(metavar="KIND", help=f"Let one kind of problem pass: {', '.join(ProblemKind)}. Repeatable."),
]
ScheduleOption = Annotated[
    str,
    typer.Option(help='The few-step schedule to record: "1,0.9,0.75,0.5" (noise levels), auto (from the LoRAs), none.'),
]
AlphaOption = Annotated[
    list[str] | None,
    typer.Option(
        "--alpha", metavar="FILE=ALPHA", help="The alpha of all modules of a LoRA, whatever its file says. Repeatable."
    ),
]
WidenOption = Annotated[
    bool,
    typer.Option(
        "--widen-inputs",
        help="Let a LoRA with more input channels (FLUX.1 control) widen the base; config.json is updated.",
    ),
]
PlainFp8Option = Annotated[
    bool,
    typer.Option(
        "--plain-fp8",
        help="Edit fp8 weights that have no scale. They keep 3 bits of each number: most of a LoRA is rounded away.",
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Plan only, from headers; write nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace --out where it is another fused checkpoint, or a damaged one.")
]


@app.callback(invoke_without_command=True)
def lorafuse(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Without a command there is only the version to ask for."""
    if version:
        typer.echo(f"lorafuse {__version__}")
        raise typer.Exit


@app.command("fuse")
def fuse_command(
    base: BaseArgument,
    lora: LoraOption,
    out: OutOption,
    component: ComponentOption = None,
    components: ComponentsOption = Components.LINK,
    allow: AllowOption = None,
    schedule: ScheduleOption = "auto",
    alpha: AlphaOption = None,
    widen_inputs: WidenOption = False,
    plain_fp8: PlainFp8Option = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Write a new checkpoint: BASE with the LoRAs added. BASE and the LoRAs are only read."""
    from .fuse import FuseOptions, check_out, fuse, require_clean
    from .record import resolve_schedule
    from .report import describe_plan, plan_json

    allowed = tuple(allow or ())
    facts: dict[str, Any] = {}
    try:
        requests = with_alphas([parse_lora(text) for text in lora], alpha or [])
        plan = plan_fuse(open_bases(base, component, requests), requests, plain_fp8=plain_fp8)
        facts = plan_json(plan)
        _say(describe_plan(plan))
        check_out(plan, out)
        require_clean(plan, allowed)
        steps = resolve_schedule(schedule, plan.loras, plan.base)
        options = FuseOptions(out, allowed, steps, components, force, widen_inputs)
        _say_allowed(plan, allowed)
        if dry_run:
            needs = any(component.widened for component in plan.components) and not widen_inputs
            _say(f"dry run: clean{', but writing it needs --widen-inputs' if needs else ''}; nothing was written")
        else:
            facts |= _announce(fuse(plan, options), out)
    except LorafuseError as error:
        facts["error"] = str(error)
        raise
    except KeyboardInterrupt:
        _say("interrupted: nothing was written")
        raise typer.Exit(130) from None
    finally:
        if as_json:
            typer.echo(json.dumps(facts))


def _announce(result: Any, out: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from .report import describe_result

    if result.up_to_date:
        _say(f"{out} is up to date: same base, LoRAs and strengths")
    else:
        _say(describe_result(result.manifest, result.seconds))
        folder = shlex.quote(str(out))
        _say(
            f"wrote {out}; next: lorafuse-train train --fused_model {folder} --dataset_base_path DIR --output_path DIR"
        )
    return {
        "seconds": round(result.seconds, 3),
        "up_to_date": result.up_to_date,
        "changes": [asdict(change) for change in result.manifest.changes],
    }


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="A LoRA, a checkpoint or a fused checkpoint.")],
    component: ComponentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what PATH is: family, layout and dtype; a LoRA's dialect, ranks and scales; a fused checkpoint's recipe."""
    from .inspection import describe_facts, inspect_path

    facts = inspect_path(path, component)
    typer.echo(json.dumps(facts) if as_json else describe_facts(facts))


def parse_lora(text: str) -> LoraRequest:
    """`FILE[:STRENGTH][@COMPONENT]`; what belongs to the name of a file that exists is never taken off it.

    Raises:
        ConfigError: what follows the colon is no strength.
    """
    name, component = text, None
    if not Path(text).exists() and (found := re.fullmatch(r"(.+)@([A-Za-z]\w*)(:[^/]*)?", text)):
        name, component = found[1] + (found[3] or ""), found[2]
    path, colon, tail = name.rpartition(":")
    if not colon or not path or Path(name).exists():
        return LoraRequest(Path(name), component=component)
    try:
        strength = float(tail)
    except ValueError:
        if tail and "/" not in tail and not tail.endswith(".safetensors"):
            raise ConfigError(f"--lora {text}: {tail!r} is no strength; expected FILE[:STRENGTH][@COMPONENT]") from None
        return LoraRequest(Path(name), component=component)
    if not -1e3 < strength < 1e3:
        raise ConfigError(f"--lora {text}: strength {tail} is out of range; strengths are about 1")
    return LoraRequest(Path(path), strength, component)


def with_alphas(requests: list[LoraRequest], texts: list[str]) -> list[LoraRequest]:
    """The requests with the alphas that `FILE=ALPHA` states, by path or by file name.

    Raises:
        ConfigError: one is malformed, or names no LoRA of this command.
    """
    stated: dict[str, float] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            stated[name] = float(value)
        except ValueError:
            stated[name] = 0.0
        known = [request for request in requests if name in (str(request.path), request.path.name)]
        if not known or not 0 < stated[name] < math.inf:
            names = ", ".join(request.path.name for request in requests)
            raise ConfigError(f"--alpha {text}: expected FILE=ALPHA with one of {names} and a positive number")
    return [
        replace(request, alpha=stated.get(str(request.path), stated.get(request.path.name))) for request in requests
    ]


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _say_allowed(plan: FusePlan, allowed: tuple[ProblemKind, ...]) -> None:
    passed = [problem for problem in plan.problems if problem not in blocking(plan.problems, allowed)]
    if passed:
        kinds = sorted({problem.kind.value for problem in passed})
        _say(f"allowed: {len(passed)} problems of kind {', '.join(kinds)} pass; their modules are not applied")


def main() -> None:
    """Run the command line; a fault in the input is one message and status 1, a bug keeps its traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that staging is removed
    try:
        app()
    except LorafuseError as error:
        _say(f"error: {error}")
        sys.exit(1)
