"""From command line and YAML file to one checked `TrainConfig`."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lorafuse_common.errors import ConfigError

from .config import Entry, TrainConfig, conflicts

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


def _read_path(raw: Any) -> Path:
    if not isinstance(raw, str | Path) or not str(raw):
        raise ValueError
    return Path(raw).expanduser()


KINDS: Mapping[type, Kind] = {
    int: Kind("WHOLE NUMBER", _read_int),
    float: Kind("NUMBER", _read_float),
    bool: Kind("TRUE|FALSE", _read_bool),
    str: Kind("TEXT", _read_text),
    Path: Kind("PATH", _read_path),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One field of `TrainConfig` as command line and YAML see it."""

    name: str
    kind: type
    many: bool
    required: bool
    default: Any
    """None where it is required."""
    entry: Entry

    def read(self, raw: Any) -> Any:
        """The value in its own type.

        Raises:
            ValueError: its text says what was expected.
        """
        if self.many:
            return tuple(self._read_one(item) for item in (raw if isinstance(raw, list | tuple) else [raw]))
        return self._read_one(raw)

    def _read_one(self, raw: Any) -> Any:
        kind = KINDS[self.kind]
        try:
            value = kind.read(raw)
        except ValueError:
            raise ValueError(f"found {raw!r}, expected a {kind.metavar.lower()}") from None
        if self.entry.choices and value not in self.entry.choices:
            raise ValueError(f"found {value!r}, expected {' or '.join(map(repr, self.entry.choices))}")
        if self.entry.bounds is not None and value not in self.entry.bounds:
            raise ValueError(f"found {value!r}, expected {self.entry.bounds}")
        return value


def _option(field: dataclasses.Field[Any], annotation: Any) -> Option:
    outer, entry = typing.get_args(annotation)  # Annotated[outer, entry]
    many = typing.get_origin(outer) is tuple
    inner = typing.get_args(outer)[0] if many else outer
    if isinstance(inner, types.UnionType):  # `int | None`
        inner = next(item for item in typing.get_args(inner) if item is not type(None))
    required = field.default is dataclasses.MISSING
    return Option(field.name, inner, many, required, None if required else field.default, entry)


_HINTS = typing.get_type_hints(TrainConfig, include_extras=True)
OPTIONS: Mapping[str, Option] = {
    field.name: _option(field, _HINTS[field.name]) for field in dataclasses.fields(TrainConfig)
}


def resolve_config(given: Mapping[str, Any]) -> TrainConfig:
    """The options of a run: what was `given` on the command line, then the file `given["config"]`, then defaults.

    None and empty lists in `given` mean "not given".

    Raises:
        ConfigError: listing every unknown key, wrong type, value out of range, missing option and contradiction.
    """
    chosen = {name: raw for name, raw in given.items() if raw is not None and raw != []}
    faults: list[str] = []
    faulty: set[str] = set()
    in_file = read_file(Path(chosen["config"]), faults) if "config" in chosen else {}
    values: dict[str, Any] = {}
    for name, raw, where in [
        *((name, raw, f"{chosen['config']}: ") for name, raw in in_file.items() if name not in chosen),
        *((name, raw, "--") for name, raw in chosen.items()),
    ]:
        try:
            values[name] = OPTIONS[name].read(raw)
        except ValueError as error:
            faults.append(f"{where}{name}: {error}")
            faulty.add(name)
    required = [name for name, option in OPTIONS.items() if option.required]
    faults += [f"--{name} is missing" for name in required if name not in {**in_file, **chosen}]
    # Faulty and missing options get stand-ins, so that contradictions among the others are found in the same go.
    config = TrainConfig(**{**dict.fromkeys(required, Path()), **values})
    faults += [f"{', '.join(names)}: {text}" for names, text in conflicts(config) if faulty.isdisjoint(names)]
    if faults:
        raise ConfigError("the options cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults))
    return config


def read_file(path: Path, faults: list[str]) -> dict[str, Any]:
    """The keys and raw values of a YAML file, without its nulls; unknown keys are added to `faults`.

    Dashes in keys are read as underscores.

    Raises:
        ConfigError: the file cannot be read as a YAML mapping.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict | None):
        raise ConfigError(f"--config {path}: expected lines such as `lora_rank: 32`, found a {type(raw).__name__}")
    values = {}
    for key, value in (raw or {}).items():
        name = str(key).replace("-", "_")
        if name not in OPTIONS or name == "config":
            faults.append(f"{path}: unknown key {key!r}{suggest(name)}")
        elif name in values:
            faults.append(f"{path}: {name} is given twice")
        elif value is not None:
            values[name] = value
    return values


def suggest(name: str) -> str:
    """` (did you mean 'x'?)` where an option has a similar name, else an empty text."""
    close = difflib.get_close_matches(name, OPTIONS, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def dump_config(config: TrainConfig) -> str:
    """The options as YAML text that `--config` reads back."""
    plain = {
        name: _plain(getattr(config, name))
        for name in OPTIONS
        if name != "config" and getattr(config, name) is not None
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
