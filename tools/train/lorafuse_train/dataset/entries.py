"""The lines of a metadata file as labelled mappings, whatever its format."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lorafuse_common.errors import DatasetError

Entry: TypeAlias = tuple[str, dict[Any, Any]]
"""What to call it in a message, and its values by column; what is under None had no column."""
LONGEST_VALUE = 1 << 24
"""Characters in one value of a CSV file; Python's own limit of 131072 is there against unclosed quotes."""


@dataclass(frozen=True, slots=True)
class Entries:
    """A metadata file, read."""

    columns: tuple[str, ...]
    """The first line of a CSV file; every key that a JSON object has."""
    is_table: bool
    """Whether the columns are said once for all entries, as in CSV."""
    entries: tuple[Entry, ...]


def read_entries(source: Path, faults: list[str]) -> Entries:
    """Read `source`; entries that are broken go to `faults` instead.

    Raises:
        DatasetError: the file as a whole cannot be read.
    """
    text = _text(source)
    if source.suffix.lower() == ".csv":
        return _table(source, text)
    if source.suffix.lower() == ".json":
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{source}: cannot be read ({error})") from error
        if not isinstance(parsed, list):
            raise DatasetError(f"{source}: expected a list of objects, found a {type(parsed).__name__}")
        found = [(f"entry {number}", entry) for number, entry in enumerate(parsed, 1)]
    elif source.suffix.lower() == ".jsonl":
        found = list(_json_lines(text, faults))
    else:
        raise DatasetError(f"{source}: expected .csv, .json or .jsonl")
    entries = tuple((label, entry) for label, entry in found if _is_object(label, entry, faults))
    columns = dict.fromkeys(key for _, entry in entries for key in entry)
    return Entries(tuple(columns), False, entries)


def _text(source: Path) -> str:
    try:
        raw = source.read_bytes()
    except OSError as error:
        raise DatasetError(f"{source}: cannot be read ({error})") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DatasetError(f"{source}: line {line}: is not UTF-8 (byte {error.start}); {encoding_hint(raw)}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")  # a caption is the same whatever system it was saved on


def encoding_hint(raw: bytes) -> str:
    """What to do about a text that is not UTF-8."""
    named = "it looks like UTF-16; " if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    return f"{named}save it as UTF-8"


def _table(source: Path, text: str) -> Entries:
    before = csv.field_size_limit(LONGEST_VALUE)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = tuple(reader.fieldnames or ())
        entries = tuple((f"row {number} (line {reader.line_num})", entry) for number, entry in enumerate(reader, 1))
    except csv.Error as error:
        hint = "is a double quote missing, or one too many?"
        raise DatasetError(f"{source}: after line {reader.line_num}: not CSV ({error}); {hint}") from error
    finally:
        csv.field_size_limit(before)
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise DatasetError(f"{source}: its first line has the column {twice[0]!r} more than once")
    return Entries(columns, True, entries)


def separator_hint(columns: tuple[str, ...]) -> str:
    """` (...)` where the first line of a CSV file seems to have another separator than a comma."""
    only = columns[0] if len(columns) == 1 else ""
    other = next((name for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")) if mark in only), None)
    return f" (separated by {other}? expected commas)" if other else ""


def _json_lines(text: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    # Not `splitlines`: JSON texts may hold U+2028 and other characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                faults.append(f"line {number}: not JSON ({error})")


def _is_object(label: str, entry: Any, faults: list[str]) -> bool:
    if not isinstance(entry, dict):
        faults.append(f"{label}: expected an object, found a {type(entry).__name__}")
    return isinstance(entry, dict)
