"""The rows of a dataset as its metadata file or its folders tell them, before any picture is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafuse_common.errors import DatasetError
from lorafuse_train.console import say
from lorafuse_train.dataset.columns import choose_columns, renamed
from lorafuse_train.dataset.entries import Entries, encoding_hint, read_entries, separator_hint
from lorafuse_train.dataset.folders import METADATA_NAMES, find_metadata, picture_root, unused_splits
from lorafuse_train.dataset.pictures import SUFFIXES
from lorafuse_train.options.config import AUTO_KEYS, EDIT_IMAGE, IMAGE, PROMPT, VIDEO, TrainConfig

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the dataset, not yet checked."""

    label: str
    """What to call it in a message: `row 3`, `line 4`, or a file's name."""
    path: Path
    caption: str
    mask: Path | None = None
    is_video: bool = False
    """A video file or a folder of frames, and no picture."""
    controls: tuple[Path, ...] = ()
    """Its control pictures, in the order in which the model sees them."""
    fault: str = ""
    """Why it has no caption, where its .txt file cannot be read."""


@dataclass(frozen=True, slots=True)
class FileKeys:
    """Which columns hold files."""

    targets: tuple[str, ...]
    """What is learned; a row has one of them."""
    controls: tuple[str, ...]
    chosen: bool
    """Whether the user named them, so that all of them must be there."""


def file_keys(config: TrainConfig) -> FileKeys:
    """`--data_file_keys`, read."""
    if config.data_file_keys == AUTO_KEYS:
        return FileKeys((IMAGE, VIDEO), (EDIT_IMAGE,), chosen=False)
    keys = config.file_keys
    targets = tuple(key for key in keys if key in (IMAGE, VIDEO))
    return FileKeys(targets, tuple(key for key in keys if key not in targets), chosen=True)


def expectation() -> str:
    """What a dataset looks like, for an error message."""
    return (
        f"Expected {', '.join(METADATA_NAMES[:-1])} or {METADATA_NAMES[-1]} with the columns {IMAGE!r} and "
        f"{PROMPT!r}, or pictures with .txt files of the same name beside them"
    )


def metadata_path(config: TrainConfig) -> Path | None:
    """The metadata file; None where pictures have sidecars.

    Raises:
        DatasetError: it is not there, or there is more than one.
    """
    return find_metadata(config.dataset_base_path, config.dataset_metadata_path)


def metadata_rows(config: TrainConfig, source: Path, faults: list[str]) -> Iterator[Row]:
    """The rows of a metadata file; broken ones go to `faults` instead.

    Raises:
        DatasetError: the file as a whole cannot be read.
    """
    if config.dataset_control_path:
        raise DatasetError(
            f"--dataset_control_path is for pictures with .txt files; name control pictures in {source}, in a column "
            f"{EDIT_IMAGE!r}"
        )
    keys, found = file_keys(config), read_entries(source, faults)
    columns = _choose_columns(source, found, config)
    if found.is_table:
        _require_columns(source, tuple(renamed(dict.fromkeys(found.columns), columns)), keys)
    root = picture_root(config.dataset_base_path, source, columns.get(IMAGE, IMAGE))
    _say_what_is_read(config, source, columns)
    for label, entry in found.entries:
        try:
            yield _row(label, renamed(entry, columns), root, config, keys)
        except ValueError as error:
            faults.append(f"{label}: {error}")


def _row(label: str, entry: dict[Any, Any], root: Path, config: TrainConfig, keys: FileKeys) -> Row:
    """One row.

    Raises:
        ValueError: it is not as it should be.
    """
    if None in entry:
        raise ValueError("more values than columns; put captions that contain commas in double quotes")
    filled = [key for key in keys.targets if entry.get(key) not in (None, "", [])]
    if len(filled) > 1:
        raise ValueError(f"has both {filled[0]!r} and {filled[1]!r}; a row is one of them")
    named = filled or [key for key in keys.targets if isinstance(entry.get(key), str)] or [keys.targets[0]]
    lacking = [key for key in (named[0], PROMPT) if not isinstance(entry.get(key), str)]
    lacking += [key for key in keys.controls if keys.chosen and key not in entry]
    if lacking:
        raise ValueError(f"no text under {' and '.join(map(repr, lacking))}; has {sorted(map(str, entry))}")
    target = named[0]
    if not entry[target].strip():
        raise ValueError(f"{target!r} is empty")
    mask_key = config.mask_column
    mask = str(entry.get(mask_key) or "").strip() if mask_key else ""
    controls = tuple(root / name for key in keys.controls for name in _names(key, entry.get(key)))
    path = root / entry[target].strip()
    return Row(label, path, entry[PROMPT].strip(), root / mask if mask else None, target == VIDEO, controls)


def _names(key: str, value: Any) -> list[str]:
    """The files that a cell names: a list, a list as JSON text, or one file.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{key!r} is {value!r}, no JSON list; write {_LIST}") from None
    if value is None or value == "":
        return []
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{key!r} is {value!r}; expected a file's name or {_LIST}")
    return [name.strip() for name in names]


_LIST = 'a list such as ["a.png", "b.png"]'


def _choose_columns(source: Path, found: Entries, config: TrainConfig) -> dict[str, str]:
    try:
        return choose_columns(found.columns, config) if found.entries or found.is_table else {}
    except ValueError as error:
        raise DatasetError(f"{source}: {error}") from error


def _say_what_is_read(config: TrainConfig, source: Path, columns: Mapping[str, str]) -> None:
    """Where it is not what lies nearest."""
    others = [f"{theirs!r} as {ours}" for ours, theirs in columns.items() if ours != theirs]
    unused = unused_splits(config.dataset_base_path, source)
    if source.parent != config.dataset_base_path:
        left = f"; not {', '.join(unused)}" if unused else ""
        say(f"dataset: reading {source}{left}")
    if others:
        say(f"dataset: reading the columns {' and '.join(others)}")


def _require_columns(source: Path, columns: Sequence[str], keys: FileKeys) -> None:
    if keys.chosen:
        needed = {*keys.targets, *keys.controls, PROMPT}
    else:
        needed = {PROMPT} if {*keys.targets} & {*columns} else {keys.targets[0], PROMPT}
    missing = sorted(needed - {*columns})
    if missing:
        raise DatasetError(
            f"{source}: no column {missing}; its first line has {list(columns)}{separator_hint(tuple(columns))}; "
            "--image_column and --caption_column name others"
        )


def sidecar_rows(config: TrainConfig, faults: list[str], *, videos: bool) -> Iterator[Row]:
    """Every picture (and where the family draws them, video) below the dataset's folder, with the `.txt` beside it.

    Hidden folders, such as our cache, are not entered, and neither are those of `--dataset_control_path`, in each of
    which a picture has its control picture under the same name, whatever the ending.

    Raises:
        DatasetError: a folder of control pictures is not there.
    """
    root, folders = config.dataset_base_path, config.dataset_control_path
    controls = [_by_stem(folder, faults) for folder in folders]
    suffixes = (*SUFFIXES, *VIDEO_SUFFIXES) if videos else SUFFIXES
    outside = {folder.resolve() for folder in folders}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.suffix.lower() not in suffixes or hidden or not outside.isdisjoint(path.resolve().parents):
            continue
        stem = name.with_suffix("")
        # What is not there keeps a name, for the check of the row to miss it.
        shown = tuple(there.get(stem, folder / f"{stem}.*") for folder, there in zip(folders, controls, strict=True))
        caption, fault = _sidecar_caption(path.with_suffix(".txt"), root)
        yield Row(str(name), path, caption, None, path.suffix.lower() in VIDEO_SUFFIXES, shown, fault)


def _sidecar_caption(path: Path, root: Path) -> tuple[str, str]:
    """The caption in a .txt file, or why there is none."""
    name = path.relative_to(root)
    try:
        return path.read_text(encoding="utf-8-sig").strip(), ""
    except FileNotFoundError:
        return "", f"no caption; expected {name}"
    except UnicodeDecodeError as error:
        return "", f"{name}: is not UTF-8; {encoding_hint(error.object)}"
    except OSError as error:
        return "", f"{name}: cannot be read ({error.strerror})"


def _by_stem(folder: Path, faults: list[str]) -> dict[Path, Path]:
    """The pictures below a folder by their names in it without the ending."""
    if not folder.is_dir():
        raise DatasetError(f"--dataset_control_path {folder}: no such folder")
    found: dict[Path, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            earlier = found.setdefault(path.relative_to(folder).with_suffix(""), path)
            if earlier is not path:
                faults.append(f"{folder}: has both {earlier.name} and {path.name}; which of them is the control?")
    return found
