"""Prompts to draw, from a file: one a line, or with a seed, size, steps, guidance and pictures of their own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorafuse_common.errors import ConfigError

SUFFIXES = (".txt", ".csv", ".json", ".jsonl", ".yaml", ".yml")
CONTROLS = "edit_image"
"""The key of the pictures that an edit model is given, as in a data set's metadata."""
MOST_FAULTS = 20
LARGEST_SEED, LARGEST_SIDE, MOST_STEPS = 2**63 - 1, 16_384, 1000


@dataclass(frozen=True, slots=True)
class ValidationPrompt:
    """One column of a grid; None means as the options say."""

    prompt: str
    seed: int | None = None
    """The noise is then that of `torch.Generator().manual_seed(seed)`, which most pipelines start from, too."""
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    """Of the long schedule."""
    guidance_scale: float | None = None
    """Of the long schedule; 1: none."""
    negative_prompt: str | None = None
    controls: tuple[Path, ...] = ()
    """Pictures that an edit model is given."""


def read_prompts(path: Path, option: str = "--validation_prompts") -> tuple[ValidationPrompt, ...]:
    """The prompts of a .txt (one a line), .csv, .json, .jsonl or .yaml file; pictures lie relative to it.

    Raises:
        ConfigError: listing every fault with its line.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{option} {path}: expected a file that ends with {', '.join(SUFFIXES)}")
    faults: list[str] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        prompts = [
            prompt
            for label, entry in READERS[path.suffix.lower()](text, faults)
            if (prompt := _read(label, entry, path.parent, faults)) is not None
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path}: cannot be read ({error})") from error
    if not prompts and not faults:
        raise ConfigError(f"{option} {path}: holds no prompt")
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:MOST_FAULTS])
        more = f"\n  and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise ConfigError(f"{option} {path}: {len(faults)} fault{'s' * (len(faults) != 1)}:\n{shown}{more}")
    return tuple(prompts)


def _text_lines(text: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    # Not `splitlines`: prompts may hold U+2028 and other characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", line.strip()


def _json_lines(text: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    for label, line in _text_lines(text, faults):
        try:
            yield label, json.loads(line)
        except ValueError as error:
            faults.append(f"{label}: not JSON ({error})")


def _json_list(text: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        faults.append(f"not JSON ({error})")
        return
    if not isinstance(entries, list):
        faults.append(f"expected a list, found a {type(entries).__name__}")
        return
    yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, 1))


def _csv_rows(text: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        if "prompt" not in (reader.fieldnames or ()):
            faults.append(f"line 1: no column 'prompt'; found {reader.fieldnames}")
            return
        for row in reader:
            line, label = reader.line_num, f"line {reader.line_num}"
            if None in row:
                faults.append(f"{label}: more values than columns; put prompts that contain commas in double quotes")
            else:
                yield label, {key: value for key, value in row.items() if value}
    except csv.Error as error:
        faults.append(f"line {line + 1}: not CSV ({error})")


def _yaml_list(text: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.SequenceNode):
            faults.append("expected a list, one `- ` a prompt")
            return
        for item in node.value:
            yield f"line {item.start_mark.line + 1}", loader.construct_object(item, deep=True)
    except yaml.YAMLError as error:
        faults.append(f"not YAML ({' '.join(str(error).split())})")
    finally:
        loader.dispose()


READERS: Mapping[str, Callable[[str, list[str]], Iterator[tuple[str, Any]]]] = {
    ".txt": _text_lines,
    ".csv": _csv_rows,
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".yaml": _yaml_list,
    ".yml": _yaml_list,
}
"""How the lines of a file become labelled entries: texts or mappings."""


def _whole(raw: Any, low: int, high: int) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int | str) or not low <= (value := int(raw)) <= high:
        raise ValueError(f"a whole number from {low} to {high}")
    return value


def _seed(raw: Any) -> int:
    return _whole(raw, 0, LARGEST_SEED)


def _side(raw: Any) -> int:
    return _whole(raw, 1, LARGEST_SIDE)


def _steps(raw: Any) -> int:
    return _whole(raw, 1, MOST_STEPS)


def _scale(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str) or not 1 <= (value := float(raw)) < 1000:
        raise ValueError("a number of at least 1 (none)")
    return value


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError("a text")
    return raw


VALUES: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "seed": ("a whole number that is not negative", _seed),
    "height": ("a number of pixels", _side),
    "width": ("a number of pixels", _side),
    "steps": (f"a whole number from 1 to {MOST_STEPS}", _steps),
    "guidance_scale": ("a number of at least 1, which is none", _scale),
    "negative_prompt": ("a text", _text),
}
"""Optional key -> what is expected of it, and how it is read."""


def _read(label: str, entry: Any, folder: Path, faults: list[str]) -> ValidationPrompt | None:
    """One entry, or None where it has faults, which are noted."""
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        faults.append(f"{label}: expected a text or a mapping, found a {type(entry).__name__}")
        return None
    found: list[str] = []
    if unknown := sorted(str(key) for key in entry if key not in (*VALUES, "prompt", CONTROLS)):
        found.append(f"unknown {', '.join(unknown)}; known: prompt, {', '.join(VALUES)}, {CONTROLS}")
    prompt = entry.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        found.append("no prompt")
    values: dict[str, Any] = {}
    for name, (expected, read) in VALUES.items():
        if entry.get(name) is not None:
            try:
                values[name] = read(entry[name])
            except ValueError:
                found.append(f"{name}: found {entry[name]!r}, expected {expected}")
    if ("height" in entry) != ("width" in entry):
        found.append("height and width belong together")
    controls = _controls(entry.get(CONTROLS), folder, found)
    if found:
        faults.append(f"{label}: {'; '.join(found)}")
        return None
    return ValidationPrompt(str(prompt).strip(), controls=controls, **values)


def _controls(raw: Any, folder: Path, found: list[str]) -> tuple[Path, ...]:
    """The pictures of an entry: a name, a list of names, or in a .csv such a list as JSON."""
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        try:
            raw = json.loads(raw)
        except ValueError as error:
            found.append(f"{CONTROLS}: not JSON ({error})")
            return ()
    names = raw if isinstance(raw, list) else [] if raw is None else [raw]
    if not all(isinstance(name, str) and name.strip() for name in names):
        found.append(f"{CONTROLS}: found {raw!r}, expected a file or a list of files")
        return ()
    paths = tuple(folder / name.strip() for name in names)
    found += [f"{path}: no such file" for path in paths if not path.is_file()]
    return paths
