"""What commands print: lines for people, of which control characters are shown, not obeyed; and JSON for programs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import typer

from lorafuse_common.errors import LorafuseError


def printable(text: str) -> str:
    """A text as it may be printed: escape sequences, overwriting returns and undecodable bytes are spelled out."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def say(text: str) -> None:
    """A line for people, on stderr."""
    typer.echo(printable(text), err=True)


@contextlib.contextmanager
def facts_printed(*, as_json: bool) -> Iterator[dict[str, Any]]:
    """What a command finds out, to be filled in; printed at its end, with its error if there was one."""
    facts: dict[str, Any] = {}
    try:
        yield facts
    except LorafuseError as error:
        facts["error"] = str(error)
        raise
    finally:
        if as_json:
            typer.echo(json.dumps(facts))
