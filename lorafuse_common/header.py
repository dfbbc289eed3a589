"""The JSON of a safetensors header, by the format's own grammar and in memory proportional to what it says.

`json.loads` reads more than the format knows (UTF-16, NaN, lone surrogates, a key twice), and builds whatever it is
told to before anyone can object: 100 MB of `[],[],` become 3 GB. So the two levels that the format has are walked here,
and only strings and the few words of a tensor's entry are left to `json`.

Refused, though the reference implementation reads them: a name or metadata key that occurs twice (it takes the last),
entries with fields that the format does not know (it drops them, and a rewrite would too) or as bare lists, and names
and entries longer, or more of them, than any real file has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

MAX_NAMES = 250_000
"""The largest real checkpoints have a few ten thousand."""
MAX_NAME_CHARACTERS = 512
MAX_ENTRY_CHARACTERS = 4096
"""Room for a shape of 200 dimensions; what is longer is no entry."""
_LARGEST = 2**63 - 1
"""What file offsets, and torch, count up to."""
_BLANKS = "[ \\t\\n\\r]*"
_SPACE, _OPEN, _COMMA, _COLON = (re.compile(f"{before}{_BLANKS}") for before in ("", "{", f"{_BLANKS},", f"{_BLANKS}:"))
_FIELDS = {"dtype", "shape", "data_offsets"}
_NEEDS = "needs dtype, shape and data_offsets, and no more"

T = TypeVar("T")


class HeaderError(Exception):
    """What is wrong with a header; the text goes behind the file's name."""


class Entry(NamedTuple):
    """What a header says of one tensor; the numbers are whole, from 0 to 2^63 - 1."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the end of the header."""
    end: int


class Header(NamedTuple):
    """A header in the order in which it is written."""

    metadata: dict[str, str]
    entries: dict[str, Entry]


def parse_header(raw: bytes) -> Header:
    """The metadata and entries that a header spells; whether these fit each other is not looked at.

    Raises:
        HeaderError: it is no UTF-8, no JSON, or says something else than the format knows.
    """
    metadata: dict[str, str] = {}
    entries: dict[str, Entry] = {}

    def read_value(name: str, text: str, at: int) -> tuple[None, int]:
        if name == "__metadata__":
            at = _metadata(text, at, metadata)
        else:
            entries[name], at = _entry(name, text, at)
        return None, at

    try:
        text = str(raw, "utf-8")
        at = _past(_SPACE, text, 0)
        if text[at : at + 1] != "{":
            raise HeaderError("not a safetensors file: its header is no JSON object")
        _, at = _object(text, at, read_value)
        if _past(_SPACE, text, at) < len(text):
            raise ValueError(f"something follows its end at character {at}")
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"not a safetensors file: its header is no valid JSON ({error})") from error
    return Header(metadata, entries)


def _past(token: re.Pattern[str], text: str, at: int) -> int:
    """Where what follows `token`, which should be at `at`, begins."""
    found = token.match(text, at)
    if found is None:
        raise ValueError(f"expected {token.pattern.strip(_BLANKS)!r} at character {at}")
    return found.end()


def _object(text: str, at: int, read_value: Callable[[str, str, int], tuple[T, int]]) -> tuple[dict[str, T], int]:
    """The object that begins at `at`, and where it ends; `read_value` does so for the value of a key."""
    found: dict[str, T] = {}
    at = _past(_OPEN, text, at)
    while text[at : at + 1] != "}":
        if found:
            at = _past(_COMMA, text, at)
        key, at = _string("", text, at)
        if key in found:
            raise ValueError(f"the key {quoted(key)} occurs twice")
        if len(key) > MAX_NAME_CHARACTERS:
            raise HeaderError(f"has a name of {len(key)} characters, {quoted(key)}; real ones have a hundred")
        if len(found) == MAX_NAMES:
            raise HeaderError(f"has more than {MAX_NAMES} names in its header, which no real file has")
        found[key], at = read_value(key, text, _past(_COLON, text, at))
        at = _past(_SPACE, text, at)
    return found, at + 1


def _string(_: str, text: str, at: int) -> tuple[str, int]:
    if text[at : at + 1] != '"':
        raise ValueError(f"expected a string at character {at}")
    found, at = _ENTRY.raw_decode(text, at)
    assert isinstance(found, str)
    if not found.isascii():
        found.encode()  # a lone surrogate (`\ud800`) is a ValueError: it could not be written again
    return found, at


def _metadata(text: str, at: int, into: dict[str, str]) -> int:
    if text.startswith("null", at):
        return at + 4
    try:
        found, at = _object(text, at, _string)
    except ValueError as error:
        raise HeaderError(f"the header's __metadata__ must map strings to strings ({error})") from error
    into.update(found)
    return at


def _entry(name: str, text: str, at: int) -> tuple[Entry, int]:
    stop = text.find("}", at, at + MAX_ENTRY_CHARACTERS) + 1 if text[at : at + 1] == "{" else 0
    raw = text[at : stop or at + 80]
    try:
        fields: dict[str, Any] = _ENTRY.decode(raw) if stop else {}
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"tensor {quoted(name)}: {_NEEDS}, has {quoted(raw)} ({error})") from error
    if fields.keys() != _FIELDS or not isinstance(fields["dtype"], str):
        raise HeaderError(f"tensor {quoted(name)}: {_NEEDS}, has {quoted(raw)}")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or "-" in raw:  # `-0` is no whole number in JSON
        raise HeaderError(f"tensor {quoted(name)}: shape and offsets must be whole numbers, has {quoted(raw)}")
    if len(offsets) != 2:
        raise HeaderError(f"tensor {quoted(name)}: needs two data_offsets, has {quoted(raw)}")
    return Entry(fields["dtype"], tuple(shape), *offsets), stop


def _are_sizes(found: object) -> bool:
    return isinstance(found, list) and all(type(n) is int and 0 <= n <= _LARGEST for n in found)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("one of its fields occurs twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no whole number")


_ENTRY = json.JSONDecoder(object_pairs_hook=_once, parse_float=_no_number, parse_constant=_no_number)


def quoted(text: str) -> str:
    """A text from a file as messages show it: on one line, and not more of it than helps."""
    return repr(text if len(text) <= 120 else f"{text[:120]}...")
