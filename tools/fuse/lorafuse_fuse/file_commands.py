"""The commands about one file or folder: inspect, convert, verify, report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .asking import lora_request
from .choices import LoraRequest, Losable
from .options import (
    ComponentOption,
    FamilyOption,
    FileOption,
    ForOption,
    JsonOption,
    LoraArgument,
    LoseOption,
    ReplaceOption,
    ToOption,
)
from .terminal import facts_printed, printable, say

if TYPE_CHECKING:
    from .verify import GivenLora


def inspect_command(
    path: Annotated[str, typer.Argument(help="A LoRA, a checkpoint or a fused checkpoint; or a LoRA on the hub.")],
    component: ComponentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what PATH is: family, layout and dtype; a LoRA's dialect, ranks and scales; a fused checkpoint's recipe."""
    from .hub.repository import fetch_lora, locate_lora
    from .inspection import describe_facts, inspect_path

    asked = locate_lora(path, say)
    found = fetch_lora(asked, say) if asked else LoraRequest(Path(path))
    facts = inspect_path(found.path, component)
    if found.origin:
        facts["origin"] = found.origin.uri
    typer.echo(json.dumps(facts) if as_json else printable(describe_facts(facts)))


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
    with facts_printed(as_json=as_json) as facts:
        facts |= convert(
            lora, to, out, base=base, family=family, component=component, leaves_others=leaves_others, force=force
        )
        say(describe_conversion(facts))


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

    with facts_printed(as_json=as_json) as facts:
        folder, manifest = recorded(fused)
        source = locate_base(base, {its.component for its in manifest.loras}, say) if base else None
        given = [_given(text) for text in lora or []]
        found = verify(folder, manifest, source.fetch().path if source else None, given, deep=deep)
        facts |= verification_json(found)
        say(describe_verification(found))
    raise typer.Exit(1 if found.faults else 0)


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
    say(f"wrote {out}")


def _given(text: str) -> GivenLora:
    """A LoRA to verify, with its strength only where that is stated."""
    from .verify import GivenLora

    request = lora_request(text)
    is_stated = not Path(text).exists() and re.search(r":[-+.\deE]+(@[A-Za-z]\w*)?$", text)
    return GivenLora(request.path, request.strength if is_stated else None, request.component)
