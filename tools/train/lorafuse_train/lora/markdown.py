"""Text from users as Markdown and YAML that stay valid whatever it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

_SPECIAL = re.compile(r"([\\`*_\[\]<>~&#$!{}])")


def plain(text: str) -> str:
    """Text as it is, in one line: nothing in it is markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Text as inline code, in one line."""
    line = " ".join(text.split()) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def block(lines: Iterable[str], language: str) -> str:
    """Lines of code."""
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; bars in them, also in code, are escaped, as tables want it."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def front_matter(facts: Mapping[str, Any]) -> str:
    """The YAML at the head of a model card, without entries that are None or empty."""
    given = {name: value for name, value in facts.items() if value not in (None, "", [], {})}
    return f"---\n{yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1000)}---\n"
