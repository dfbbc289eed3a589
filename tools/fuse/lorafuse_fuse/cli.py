"""`lorafuse fuse models/Qwen-Image --lora lightning.safetensors --lora style.safetensors:0.8 --out models/fused`."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafuse_common import __version__
from lorafuse_common.errors import LorafuseError

from .asking import parse_lora, with_alphas
from .carry import Components
from .convert import Losable
from .fit import ProblemKind
from .options import (
    STORED_AS,
    AllowOption,
    AlphaOption,
    BaseArgument,
    ComponentOption,
    ComponentsOption,
    Device,
    DeviceOption,
    DryRunOption,
    Dtype,
    DtypeOption,
    FamilyOption,
    FileOption,
    ForceOption,
    ForOption,
    JsonOption,
    LoraArgument,
    LoraOption,
    LoseOption,
    OutOption,
    PlainFp8Option,
    ReplaceOption,
    ReportOption,
    Rounding,
    RoundingOption,
    ScheduleOption,
    SeedOption,
    ToOption,
    WidenOption,
    WorkersOption,
)
from .plan import FusePlan, LoraRequest, blocking, open_bases, plan_fuse
from .stopping import Stopped, stopped_by_signals
from .terminal import printable

if TYPE_CHECKING:
    from .verify import GivenLora

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Fuse LoRAs into a diffusion-transformer checkpoint, once and on disk, to train new LoRAs on it.",
)


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
    dtype: DtypeOption = Dtype.KEEP,
    rounding: RoundingOption = Rounding.NEAREST,
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    device: DeviceOption = Device.CPU,
    dry_run: DryRunOption = False,
    report: ReportOption = None,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Write a new checkpoint: BASE with the LoRAs added. BASE and the LoRAs are only read."""
    from .fuse import FuseOptions, check_out, folder_identity, fuse, require_clean, require_widening
    from .hub.base import Found, locate_base
    from .hub.names import HubLora
    from .hub.repository import fetch_lora, locate_lora
    from .record import resolve_schedule
    from .report import describe_plan, plan_json

    allowed = tuple(allow or ())
    facts: dict[str, Any] = {}
    before = folder_identity(out)
    try:
        asked = [locate_lora(text, _say) or parse_lora(text) for text in lora]
        requests = [fetch_lora(found, _say) if isinstance(found, HubLora) else found for found in asked]
        requests = with_alphas(requests, alpha or [])
        source = locate_base(base, {request.component or component for request in requests}, _say)

        def plan_for(found: Found) -> FusePlan:
            return plan_fuse(
                found.mark(open_bases(found.path, component, requests)),
                requests,
                plain_fp8=plain_fp8,
                dtype=STORED_AS[dtype],
                seed=seed if rounding is Rounding.STOCHASTIC else None,
            )

        with source.headers() as found:
            plan = plan_for(found)
            facts = plan_json(plan)
            _say(describe_plan(plan))
            check_out(plan, out)
            if report:
                from .html_report import check_report

                check_report(report, (out, found.path, *(request.path for request in requests)), force=force)
            require_clean(plan, allowed)
            steps = resolve_schedule(schedule, plan.loras, plan.base)
            options = FuseOptions(out, allowed, steps, components, force, widen_inputs, workers, device)
            _say_allowed(plan, allowed)
        if dry_run:
            needs = any(component.widened for component in plan.components) and not widen_inputs
            _say(f"dry run: clean{', but writing it needs --widen-inputs' if needs else ''}; nothing was written")
        else:
            if not source.is_here:
                if not widen_inputs:
                    require_widening(plan)
                plan = plan_for(source.fetch())
                check_out(plan, out)
            facts |= _announce(fuse(plan, options), out, report)
    except LorafuseError as error:
        facts["error"] = str(error)
        raise
    except Stopped as stop:
        kept = folder_identity(out) == before
        stop.message += ": nothing was written" if kept else f", but {out} was complete already"
        facts["error"] = stop.message
        raise
    finally:
        if as_json:
            typer.echo(json.dumps(facts))


def _announce(result: Any, out: Path, report: Path | None) -> dict[str, Any]:
    from dataclasses import asdict

    from .findings import advice, edited_tensors, open_fused
    from .report import describe_result

    edited = edited_tensors(result.manifest, open_fused(out, result.manifest))

    if result.up_to_date:
        _say(f"{out} is up to date: same base, LoRAs and strengths")
    else:
        _say(describe_result(result.manifest, result.seconds, advice(result.manifest, edited)))
        folder = shlex.quote(str(out))
        _say(
            f"wrote {out}; next: lorafuse-train train --fused_model {folder} --dataset_base_path DIR --output_path DIR"
        )
    if report:
        from .html_report import write_report

        write_report(out, result.manifest, report)
        _say(f"report {report}")
    return {
        "seconds": round(result.seconds, 3),
        "up_to_date": result.up_to_date,
        "changes": [asdict(change) for change in result.manifest.changes],
    }


@app.command("inspect")
def inspect_command(
    path: Annotated[str, typer.Argument(help="A LoRA, a checkpoint or a fused checkpoint; or a LoRA on the hub.")],
    component: ComponentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what PATH is: family, layout and dtype; a LoRA's dialect, ranks and scales; a fused checkpoint's recipe."""
    from .hub.repository import fetch_lora, locate_lora
    from .inspection import describe_facts, inspect_path

    asked = locate_lora(path, _say)
    found = fetch_lora(asked, _say) if asked else LoraRequest(Path(path))
    facts = inspect_path(found.path, component)
    if found.origin:
        facts["origin"] = found.origin.uri
    typer.echo(json.dumps(facts) if as_json else printable(describe_facts(facts)))


@app.command("convert")
def convert_command(
    lora: LoraArgument,
    to: ToOption,
    out: FileOption,
    base: ForOption = None,
    family: FamilyOption = None,
    component: ComponentOption = None,
    allow: LoseOption = None,
    as_json: JsonOption = False,
    force: ReplaceOption = False,
) -> None:
    """Write a LoRA in another dialect: names, layout and scale change, what it adds to the weights does not."""
    from .convert import convert, describe_conversion

    leaves_others = Losable.OTHER_COMPONENT in (allow or [])
    facts: dict[str, Any] = {}
    try:
        facts = convert(
            lora, to, out, base=base, family=family, component=component, leaves_others=leaves_others, force=force
        )
        _say(describe_conversion(facts))
    except LorafuseError as error:
        facts["error"] = str(error)
        raise
    finally:
        if as_json:
            typer.echo(json.dumps(facts))


@app.command("verify")
def verify_command(
    fused: Annotated[Path, typer.Argument(help="A fused checkpoint: the folder with its lorafuse.json.")],
    base: Annotated[str | None, typer.Option(metavar="BASE", help="What it was fused into, to hash that too.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:STRENGTH][@COMPONENT]", help="A LoRA that is in it, to hash that too. Repeatable."),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Add base and LoRAs up again in float64 and compare every tensor; needs both."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say whether FUSED is what its lorafuse.json records, down to the last bit; exit status 0 where it is."""
    from .hub.base import locate_base
    from .verify import describe_verification, recorded, verification_json, verify

    facts: dict[str, Any] = {}
    try:
        folder, manifest = recorded(fused)
        source = locate_base(base, {its.component for its in manifest.loras}, _say) if base else None
        given = [_given(text) for text in lora or []]
        found = verify(folder, manifest, source.fetch().path if source else None, given, deep=deep)
        facts = verification_json(found)
        _say(describe_verification(found))
    except LorafuseError as error:
        facts["error"] = str(error)
        raise
    finally:
        if as_json:
            typer.echo(json.dumps(facts))
    raise typer.Exit(1 if found.faults else 0)


@app.command("report")
def report_command(
    fused: Annotated[Path, typer.Argument(help="A fused checkpoint: the folder with its lorafuse.json.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page (HTML) to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace --out where it is something else.")] = False,
) -> None:
    """Write a page about FUSED: its recipe, what of the LoRAs arrived, and what to do where too little did."""
    from .html_report import check_report, write_report
    from .verify import recorded

    folder, manifest = recorded(fused)
    check_report(out, (folder,), force=force)
    write_report(folder, manifest, out)
    _say(f"wrote {out}")


def _given(text: str) -> GivenLora:
    """A LoRA to verify, with its strength only where that is stated."""
    from .hub.repository import fetch_lora, locate_lora
    from .verify import GivenLora

    asked = locate_lora(text, _say)
    request = fetch_lora(asked, _say) if asked else parse_lora(text)
    is_stated = not Path(text).exists() and re.search(r":[-+.\deE]+(@[A-Za-z]\w*)?$", text)
    return GivenLora(request.path, request.strength if is_stated else None, request.component)


def _say(text: str) -> None:
    typer.echo(printable(text), err=True)


def _say_allowed(plan: FusePlan, allowed: tuple[ProblemKind, ...]) -> None:
    passed = [problem for problem in plan.problems if problem not in blocking(plan.problems, allowed)]
    if passed:
        kinds = sorted({problem.kind.value for problem in passed})
        _say(f"allowed: {len(passed)} problems of kind {', '.join(kinds)} pass; their modules are not applied")


def main() -> None:
    """Run the command line; a fault in the input is one message and status 1, a bug keeps its traceback."""
    try:
        with stopped_by_signals():
            app()
    except Stopped as stop:
        _say(stop.message)
        raise
    except LorafuseError as error:
        _say(f"error: {error}")
        sys.exit(1)
    except OSError as error:  # a path that no file can have, a disk that fails while all is looked at
        _say(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        sys.exit(1)
