"""Texts that files bring along, on a terminal: their control characters are shown, not obeyed."""

from __future__ import annotations

import typer


def printable(text: str) -> str:
    """A text as it may be printed: escape sequences, overwriting returns and undecodable bytes are spelled out."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def say(text: str) -> None:
    """A line for people, on stderr."""
    typer.echo(printable(text), err=True)
