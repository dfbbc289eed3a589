"""`lorafuse fuse models/Qwen-Image --lora lightning.safetensors --lora style.safetensors:0.8 --out models/fused`."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafuse_common import __version__
from lorafuse_common.errors import LorafuseError

from .asking import parse_lora, with_alphas
from .choices import STORED_AS, Components, Device, Dtype, KeepLoras, ProblemKind, Rounding
from .file_commands import convert_command, inspect_command, report_command, verify_command
from .lora_commands import export_command, extract_command
from .options import (
    AllowOption,
    AlphaOption,
    BaseArgument,
    ComponentOption,
    ComponentsOption,
    DeviceOption,
    DryRunOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    KeepLorasOption,
    LoraOption,
    OutOption,
    PlainFp8Option,
    ReportOption,
    RoleOption,
    RoundingOption,
    ScheduleOption,
    SeedOption,
    WidenOption,
    WorkersOption,
)
from .stopping import Stopped, stopped_by_signals
from .terminal import facts_printed, say

if TYPE_CHECKING:
    from .hub.base import Found
    from .plan import FusePlan

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
    role: RoleOption = None,
    schedule: ScheduleOption = "auto",
    keep_loras: KeepLorasOption = KeepLoras.COPY,
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
    from .fuse import FuseOptions, check_out, fuse, require_clean, require_widening
    from .hub.base import locate_base
    from .hub.names import HubLora
    from .hub.repository import fetch_lora, locate_lora
    from .lineage import with_repeats
    from .plan import open_bases, plan_fuse
    from .report import describe_plan, plan_json
    from .usage import choose_usage

    allowed = tuple(allow or ())
    with _facts(out, as_json=as_json) as facts:
        asked = [locate_lora(text, say) or parse_lora(text) for text in lora]
        requests = [fetch_lora(found, say) if isinstance(found, HubLora) else found for found in asked]
        requests = with_alphas(requests, alpha or [])
        source = locate_base(base, {request.component or component for request in requests}, say)

        def plan_for(found: Found) -> FusePlan:
            return with_repeats(
                plan_fuse(
                    found.mark(open_bases(found.path, component, requests)),
                    requests,
                    plain_fp8=plain_fp8,
                    dtype=STORED_AS[dtype],
                    seed=seed if rounding is Rounding.STOCHASTIC else None,
                )
            )

        with source.headers() as found:
            plan = plan_for(found)
            facts |= plan_json(plan)
            say(describe_plan(plan))
            check_out(plan, out)
            if report:
                from .html_report import check_report

                check_report(report, (out, found.path, *(request.path for request in requests)), force=force)
            require_clean(plan, allowed)
            usage = choose_usage(role, schedule, plan.loras, plan.base)
            options = FuseOptions(
                out, allowed, usage.schedule, components, force, widen_inputs, workers, device, usage.role, keep_loras
            )
            _say_allowed(plan, allowed)
            for remark in usage.remarks:
                say(remark)
        if dry_run:
            needs = any(component.widened for component in plan.components) and not widen_inputs
            say(f"dry run: clean{', but writing it needs --widen-inputs' if needs else ''}; nothing was written")
        else:
            if not source.is_here:
                if not widen_inputs:
                    require_widening(plan)
                plan = plan_for(source.fetch())
                check_out(plan, out)
            facts |= _announce(fuse(plan, options), out, report)


@contextlib.contextmanager
def _facts(out: Path, *, as_json: bool) -> Iterator[dict[str, Any]]:
    """`facts_printed`, in which a signal that ended the run says what became of `out`."""
    from .fuse import folder_identity

    before = folder_identity(out)
    with facts_printed(as_json=as_json) as facts:
        try:
            yield facts
        except Stopped as stop:
            kept = folder_identity(out) == before
            stop.message += ": nothing was written" if kept else f", but {out} was complete already"
            facts["error"] = stop.message
            raise


def _announce(result: Any, out: Path, report: Path | None) -> dict[str, Any]:
    from dataclasses import asdict

    from .findings import advice, edited_tensors, open_fused
    from .report import describe_result

    edited = edited_tensors(result.manifest, open_fused(out, result.manifest))

    if result.up_to_date:
        say(f"{out} is up to date: same base, LoRAs and strengths")
    else:
        say(describe_result(result.manifest, result.seconds, advice(result.manifest, edited)))
        folder = shlex.quote(str(out))
        say(f"wrote {out}; next: lorafuse-train train --fused_model {folder} --dataset_base_path DIR --output_path DIR")
    if report:
        from .html_report import write_report

        write_report(out, result.manifest, report)
        say(f"report {report}")
    return {
        "seconds": round(result.seconds, 3),
        "up_to_date": result.up_to_date,
        "changes": [asdict(change) for change in result.manifest.changes],
    }


app.command("inspect")(inspect_command)
app.command("convert")(convert_command)
app.command("verify")(verify_command)
app.command("report")(report_command)
app.command("export")(export_command)
app.command("extract")(extract_command)


def _say_allowed(plan: FusePlan, allowed: tuple[ProblemKind, ...]) -> None:
    from .plan import blocking

    passed = [problem for problem in plan.problems if problem not in blocking(plan.problems, allowed)]
    for problem in passed:
        if problem.kind is ProblemKind.ALREADY_FUSED:
            say(f"allowed: {problem.subject} {problem.detail.partition('. To ')[0]}")
    passed = [problem for problem in passed if problem.kind is not ProblemKind.ALREADY_FUSED]
    if passed:
        kinds = sorted({problem.kind.value for problem in passed})
        say(f"allowed: {len(passed)} problems of kind {', '.join(kinds)} pass; their modules are not applied")


def main() -> None:
    """Run the command line; a fault in the input is one message and status 1, a bug keeps its traceback."""
    try:
        with stopped_by_signals():
            app()
    except Stopped as stop:
        say(stop.message)
        raise
    except LorafuseError as error:
        say(f"error: {error}")
        sys.exit(1)
    except OSError as error:  # a path that no file can have, a disk that fails while all is looked at
        say(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        sys.exit(1)
