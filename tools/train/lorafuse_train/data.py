"""The dataset: rows from a metadata file or sidecars, every one of them checked before any model is loaded."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafuse_common.errors import DatasetError

from .config import TrainConfig
from .console import progress
from .pictures import SUFFIXES, Geometry, open_picture

METADATA_NAMES = ("metadata.csv", "metadata.json", "metadata.jsonl")
IMAGE, PROMPT = "image", "prompt"
MOST_FAULTS = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the dataset, not yet checked."""

    label: str
    """What to call it in a message: `row 3`, `line 4`, or a file's name."""
    path: Path
    caption: str
    mask: Path | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture that can be decoded, with its caption."""

    path: Path
    caption: str
    sha256: str
    """Of the file's bytes."""
    size: tuple[int, int]
    """(height, width) it trains at."""
    mask: Path | None = None
    """The file that says which parts of it are learned, where there is one."""


def read_dataset(config: TrainConfig, geometry: Geometry) -> list[Sample]:
    """Read and check every row, decoding every picture.

    Raises:
        DatasetError: listing all faults, by row; nothing is skipped.
    """
    root = config.dataset_base_path
    if not root.is_dir():
        raise DatasetError(f"--dataset_base_path {root}: no such folder")
    if geometry.fixed and any(side % geometry.multiple for side in geometry.fixed):
        height, width = geometry.fixed
        raise DatasetError(f"--height {height} --width {width}: both must be multiples of {geometry.multiple}")
    faults: list[str] = []
    source = _metadata_path(config)
    rows = list(_sidecar_rows(root, faults) if source is None else _metadata_rows(config, source, faults))
    if not rows and not faults:
        raise DatasetError(f"{source or root}: no pictures. {_expectation()}")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checked = list(progress(pool.map(lambda row: _check(row, geometry), rows), len(rows), "checking pictures"))
    faults += [sample for sample in checked if isinstance(sample, str)]
    samples = [sample for sample in checked if isinstance(sample, Sample)]
    faults += _duplicates(rows)
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:MOST_FAULTS])
        more = f"\n  and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise DatasetError(f"{source or root}: {len(faults)} fault{'s' * (len(faults) != 1)}:\n{shown}{more}")
    return samples


def _expectation() -> str:
    return (
        f"Expected {', '.join(METADATA_NAMES[:-1])} or {METADATA_NAMES[-1]} with the columns {IMAGE!r} and "
        f"{PROMPT!r}, or pictures with .txt files of the same name beside them"
    )


def _metadata_path(config: TrainConfig) -> Path | None:
    if config.dataset_metadata_path is not None:
        if not config.dataset_metadata_path.is_file():
            raise DatasetError(f"--dataset_metadata_path {config.dataset_metadata_path}: no such file")
        return config.dataset_metadata_path
    found = [path for name in METADATA_NAMES if (path := config.dataset_base_path / name).is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DatasetError(f"{config.dataset_base_path}: has {names}; choose with --dataset_metadata_path")
    return found[0] if found else None


def _metadata_rows(config: TrainConfig, source: Path, faults: list[str]) -> Iterator[Row]:
    """The rows of a metadata file; broken ones go to `faults` instead."""
    root, mask_key = config.dataset_base_path, config.mask_column
    for label, entry in _entries(source, faults):
        lacking = [key for key in (IMAGE, PROMPT) if not isinstance(entry.get(key), str)]
        if None in entry:
            faults.append(f"{label}: more values than columns; put captions that contain commas in double quotes")
        elif lacking:
            faults.append(f"{label}: no text under {' and '.join(map(repr, lacking))}; has {sorted(map(str, entry))}")
        elif not entry[IMAGE].strip():
            faults.append(f"{label}: {IMAGE!r} is empty")
        else:
            mask = str(entry.get(mask_key) or "").strip() if mask_key else ""
            yield Row(label, root / entry[IMAGE].strip(), entry[PROMPT].strip(), root / mask if mask else None)


def _entries(source: Path, faults: list[str]) -> Iterator[tuple[str, dict[Any, Any]]]:
    try:
        text = source.read_text(encoding="utf-8-sig")
        parsed = json.loads(text) if source.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{source}: cannot be read ({error})") from error
    if source.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        missing = {IMAGE, PROMPT} - set(reader.fieldnames or ())
        if missing:
            raise DatasetError(f"{source}: no column {sorted(missing)}; its first line has {reader.fieldnames}")
        yield from _csv_entries(source, reader)
    elif source.suffix == ".json":
        if not isinstance(parsed, list):
            raise DatasetError(f"{source}: expected a list of objects, found a {type(parsed).__name__}")
        for number, entry in enumerate(parsed, 1):
            yield from _object(f"entry {number}", entry, faults)
    elif source.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield from _json_line(f"line {number}", line, faults)
    else:
        raise DatasetError(f"{source}: expected .csv, .json or .jsonl")


def _csv_entries(source: Path, reader: csv.DictReader[str]) -> Iterator[tuple[str, dict[Any, Any]]]:
    try:
        for number, entry in enumerate(reader, 1):
            yield f"row {number} (line {reader.line_num})", entry
    except csv.Error as error:
        raise DatasetError(f"{source}: line {reader.line_num}: not CSV ({error})") from error


def _json_line(label: str, line: str, faults: list[str]) -> Iterator[tuple[str, dict[Any, Any]]]:
    try:
        yield from _object(label, json.loads(line), faults)
    except ValueError as error:
        faults.append(f"{label}: not JSON ({error})")


def _object(label: str, entry: Any, faults: list[str]) -> Iterator[tuple[str, dict[Any, Any]]]:
    if isinstance(entry, dict):
        yield label, entry
    else:
        faults.append(f"{label}: expected an object, found a {type(entry).__name__}")


def _sidecar_rows(root: Path, faults: list[str]) -> Iterator[Row]:
    """Every picture below `root` with the `.txt` beside it; hidden folders, such as our cache, are not entered."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in name.parts):
            continue
        sidecar = path.with_suffix(".txt")
        try:
            yield Row(str(name), path, sidecar.read_text(encoding="utf-8-sig").strip())
        except FileNotFoundError:
            faults.append(f"{name}: no caption; expected {sidecar.relative_to(root)}")
        except (OSError, UnicodeDecodeError) as error:
            faults.append(f"{sidecar.relative_to(root)}: cannot be read ({error})")


def _check(row: Row, geometry: Geometry) -> Sample | str:
    """The sample, or all that is wrong with the row as one text."""
    faults = [] if row.caption else ["the caption is empty"]
    try:
        raw = row.path.read_bytes()
        picture = open_picture(raw)
        size = geometry.size(picture.height, picture.width)
        if 0 not in size and not faults:
            return Sample(row.path, row.caption, hashlib.sha256(raw).hexdigest(), size, row.mask)
        if 0 in size:
            found = f"{picture.width}x{picture.height}"
            faults.append(f"{row.path}: is {found} pixels; both sides need at least {geometry.multiple}")
    except FileNotFoundError:
        faults.append(f"{row.path}: no such file")
    except OSError as error:
        faults.append(f"{row.path}: cannot be read ({error.strerror})")
    except ValueError as error:
        faults.append(f"{row.path}: {error}")
    return f"{row.label}: {'; '.join(faults)}"


def _duplicates(rows: list[Row]) -> list[str]:
    """Rows that repeat an earlier one; the same picture under another caption is fine."""
    first: dict[tuple[Path, str], Row] = {}
    faults = []
    for row in rows:
        earlier = first.setdefault((row.path, row.caption), row)
        if earlier is not row:
            faults.append(f"{row.label}: repeats {earlier.label}; --dataset_repeat shows every picture more often")
    return faults
