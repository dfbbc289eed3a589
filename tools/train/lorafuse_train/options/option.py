"""One option: how its text on the command line, or its value in YAML, becomes a value of its type."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lorafuse_train.options.entry import Entry

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """One type of option: what `--help` calls it, and how its text is read."""

    metavar: str
    read: Callable[[Any], Any]


def _read_int(raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int | str):
        raise ValueError
    return int(raw)


def _read_float(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError
    value = float(raw)  # also text: YAML 1.1 reads `1e-4` as a string
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError
    return value


def _read_bool(raw: Any) -> bool:
    text = str(raw).lower()
    if text not in TRUE + FALSE:
        raise ValueError
    return text in TRUE


def _read_text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError
    return raw


def _read_value(raw: Any) -> Any:
    """A value of unknown type, as YAML reads it; also `1e-4`, which YAML 1.1 takes for text."""
    if isinstance(raw, list):
        return [_read_value(item) for item in raw]
    if not isinstance(raw, str):
        return raw
    try:
        read = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise ValueError from None
    if isinstance(read, list):
        return _read_value(read)
    if isinstance(read, str):
        with contextlib.suppress(ValueError):
            return float(read)
    return read


def _read_path(raw: Any) -> Path:
    if not isinstance(raw, str | Path) or not str(raw):
        raise ValueError
    return Path(raw).expanduser()


KINDS: Mapping[Any, Kind] = {
    int: Kind("WHOLE NUMBER", _read_int),
    float: Kind("NUMBER", _read_float),
    bool: Kind("TRUE|FALSE", _read_bool),
    str: Kind("TEXT", _read_text),
    Path: Kind("PATH", _read_path),
    Any: Kind("VALUE", _read_value),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One field of `TrainConfig` as command line and YAML see it."""

    name: str
    kind: Any
    """A key of `KINDS`."""
    many: bool
    keyed: bool
    """Whether each of the many is a name and a value: `NAME=VALUE`, or a mapping in YAML."""
    required: bool
    default: Any
    """None where it is required."""
    entry: Entry

    def read(self, raw: Any) -> Any:
        """The value in its own type.

        Raises:
            ValueError: its text says what was expected.
        """
        if self.keyed:
            return self._read_pairs(raw)
        if self.many:
            return tuple(self._read_one(item) for item in (raw if isinstance(raw, list | tuple) else [raw]))
        return self._read_one(raw)

    @property
    def metavar(self) -> str:
        """What `--help` calls its value."""
        return f"NAME={KINDS[self.kind].metavar}" if self.keyed else KINDS[self.kind].metavar

    def _read_pairs(self, raw: Any) -> tuple[tuple[str, Any], ...]:
        if isinstance(raw, dict):
            pairs = [(str(name).strip(), value) for name, value in raw.items()]
        else:
            pairs = [self._pair(str(text)) for text in (raw if isinstance(raw, list | tuple) else [raw])]
        twice = [name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]} is given twice")
        return tuple((name, self._read_named(name, value)) for name, value in pairs)

    def _read_named(self, name: str, raw: Any) -> Any:
        try:
            return self._read_one(raw)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _pair(self, text: str) -> tuple[str, str]:
        # A regular expression may hold an equals sign, and so may a value that is text.
        name, equals, value = text.rpartition("=") if text.startswith("regex:") else text.partition("=")
        if not (name.strip() and equals):
            raise ValueError(f"found {text!r}, expected {self.metavar.lower()}")
        return name.strip(), value

    def _read_one(self, raw: Any) -> Any:
        kind, entry = KINDS[self.kind], self.entry
        try:
            value = kind.read(self._as_text(raw))
        except ValueError:
            raise ValueError(f"found {raw!r}, expected a {kind.metavar.lower()}") from None
        if entry.choices and value not in entry.choices:
            raise ValueError(f"found {value!r}, expected {' or '.join(map(repr, entry.choices))}")
        if entry.form and not re.fullmatch(entry.form, value):
            raise ValueError(f"found {value!r}, expected {entry.expected}")
        if entry.bounds is not None and value not in entry.bounds:
            raise ValueError(f"found {value!r}, expected {entry.bounds}")
        return value

    def _as_text(self, raw: Any) -> Any:
        """The word or number that YAML took for a truth value or a number where a text is expected."""
        if self.kind is str and (self.entry.choices or self.entry.form):
            if isinstance(raw, bool):
                return next((word for word in (TRUE if raw else FALSE) if self._takes(word)), raw)
            if isinstance(raw, int | float):
                return str(raw)
        return raw

    def _takes(self, word: str) -> bool:
        return word in self.entry.choices or bool(self.entry.form and re.fullmatch(self.entry.form, word))


def option_of(field: dataclasses.Field[Any], annotation: Any) -> Option:
    """The option that a field of a dataclass declares with its type and default."""
    outer, entry = typing.get_args(annotation)  # Annotated[outer, entry]
    many = typing.get_origin(outer) is tuple
    inner = typing.get_args(outer)[0] if many else outer
    keyed = typing.get_origin(inner) is tuple  # pairs of a name and a value
    inner = typing.get_args(inner)[1] if keyed else inner
    if isinstance(inner, types.UnionType):  # `int | None`
        inner = next(item for item in typing.get_args(inner) if item is not type(None))
    required = field.default is dataclasses.MISSING
    return Option(field.name, inner, many, keyed, required, None if required else field.default, entry)
