"""From command line and YAML file to one checked `TrainConfig`."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from lorafuse_common.errors import ConfigError
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.conflicts import conflicts
from lorafuse_train.options.option import Option, option_of

_HINTS = typing.get_type_hints(TrainConfig, include_extras=True)
OPTIONS: Mapping[str, Option] = {
    field.name: option_of(field, _HINTS[field.name]) for field in dataclasses.fields(TrainConfig)
}
NOWHERE = Path("\0")
"""Stands for a path that was not given; no file can have this name."""


def resolve_config(given: Mapping[str, Any], optional: Collection[str] = ()) -> TrainConfig:
    """The options of a run: what was `given` on the command line, then the file `given["config"]`, then defaults.

    None and empty lists in `given` mean "not given". Required ones among `optional` are `NOWHERE` where not given.

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
    missing = [name for name in required if name not in {**in_file, **chosen}]
    faults += [f"--{name} is missing" for name in missing if name not in optional]
    # Faulty and missing options get stand-ins, so that contradictions among the others are found in the same go.
    config = TrainConfig(**{**dict.fromkeys(required, NOWHERE), **values})
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
        name: plain_value(config, name) for name in OPTIONS if name != "config" and getattr(config, name) is not None
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def plain_value(config: TrainConfig, name: str) -> Any:
    """The value of an option as YAML and JSON know it."""
    value = getattr(config, name)
    return {key: _plain(item) for key, item in value} if OPTIONS[name].keyed else _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
