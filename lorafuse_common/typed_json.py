"""JSON back into the frozen dataclasses it was written from, by their annotations."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from enum import StrEnum
from typing import Any


def rebuilt(annotation: Any, raw: Any) -> Any:
    """A value of the annotated type from the JSON it was written as.

    Raises:
        TypeError, ValueError, KeyError: it was not written from one.
    """
    if annotation is object:
        return raw
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return annotation(raw)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return None if raw is None else rebuilt(next(a for a in args if a is not type(None)), raw)
    if origin is tuple and isinstance(raw, list):
        return tuple(rebuilt(args[0], item) for item in raw)
    if origin is collections.abc.Mapping and isinstance(raw, dict):
        return {key: rebuilt(args[1], value) for key, value in raw.items()}
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        hints = typing.get_type_hints(annotation)
        unknown = set(raw) - set(hints)
        if unknown:
            raise ValueError(f"unknown entries {sorted(unknown)}")
        needed = [f.name for f in dataclasses.fields(annotation) if f.name in raw or f.default is dataclasses.MISSING]
        return annotation(**{name: rebuilt(hints[name], raw[name]) for name in needed})
    if type(raw) is not annotation and not (annotation is float and type(raw) is int):
        raise TypeError(f"expected {annotation}, found {raw!r:.80}")
    return raw
