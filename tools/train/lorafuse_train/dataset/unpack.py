"""A data set of the `datasets` library, from the hub or from `save_to_disk`, as an ordinary folder of pictures."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from lorafuse_common.errors import ConfigError, DatasetError
from lorafuse_train.atomic import write_atomically
from lorafuse_train.console import progress, say
from lorafuse_train.dataset.columns import CAPTION_COLUMNS, IMAGE_COLUMNS, choose_columns
from lorafuse_train.options.config import IMAGE, PROMPT, TrainConfig

RECORD, LOCK, METADATA, PICTURES = ".lorafuse_source.json", ".lorafuse_source.lock", "metadata.jsonl", "pictures"
MISSING = "--dataset_name needs the package `datasets`: pip install 'lorafuse[datasets]'"


def unpack_dataset(config: TrainConfig) -> TrainConfig:
    """Write the pictures of `--dataset_name` to `--dataset_base_path`, with a metadata.jsonl; nothing if that was done.

    The bytes of a picture stay as they are. Processes that start together wait for the first of them. Returns the
    options by which the folder is read.

    Raises:
        ConfigError: the package `datasets` is not installed.
        DatasetError: there is no such data set, it has no such columns, or the folder holds something else.
    """
    if config.dataset_name is None:
        return config
    folder = config.dataset_base_path
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _unpack_once(config, folder)
    finally:
        if not (folder / RECORD).exists():  # nothing was unpacked
            (folder / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another process may be at it
                if is_new:
                    folder.rmdir()
    return replace(config, dataset_metadata_path=folder / METADATA, image_column=None, caption_column=None)


def _unpack_once(config: TrainConfig, folder: Path) -> None:
    wanted, found = _wanted(config), _record(folder)
    if found is None and any(entry.name not in (LOCK, RECORD) for entry in folder.iterdir()):
        raise DatasetError(
            f"--dataset_base_path {folder}: is not empty, and not what --dataset_name was unpacked to before; "
            "give an empty or new folder"
        )
    if found == {**wanted, "complete": True}:
        say(f"dataset: {config.dataset_name} was unpacked to {folder} before")
        return
    if found is not None and {**found, "complete": True} != {**wanted, "complete": True}:
        raise DatasetError(
            f"--dataset_base_path {folder}: holds {found.get('name')} as it was unpacked before, not what "
            f"--dataset_name {config.dataset_name} is now; give a new folder or delete it"
        )
    _unpack(config, folder, wanted)


def _wanted(config: TrainConfig) -> dict[str, Any]:
    name = config.dataset_name or ""
    return {
        "name": name,
        "config": config.dataset_config_name,
        "split": config.dataset_split,
        "image": config.image_column,
        "caption": config.caption_column,
        "sha256": _identity(Path(name)) if Path(name).is_dir() else None,
    }


def _identity(folder: Path) -> str:
    """Of a folder on disk: what its .json files say, and the sizes of all files."""
    parts = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_text(encoding="utf-8", errors="replace") if path.suffix == ".json" else ""
        parts.append((path.relative_to(folder).as_posix(), path.stat().st_size, content))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _record(folder: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_atomically(folder / RECORD, lambda file: file.write_text(text, encoding="utf-8"))


def _unpack(config: TrainConfig, folder: Path, wanted: Mapping[str, Any]) -> None:
    rows, columns = _load(config)
    _write_record(folder, {**wanted, "complete": False})
    (folder / PICTURES).mkdir(exist_ok=True)
    say(f"dataset: unpacking {len(rows)} rows of {config.dataset_name} to {folder}")
    lines = []
    for number, row in enumerate(progress(rows, len(rows), "unpacking"), 1):
        name = f"{PICTURES}/{_write_picture(folder / PICTURES, number, row[columns[IMAGE]])}"
        lines.append(json.dumps({IMAGE: name, PROMPT: row[columns[PROMPT]]}, ensure_ascii=False))
    text = "".join(f"{line}\n" for line in lines)
    write_atomically(folder / METADATA, lambda file: file.write_text(text, encoding="utf-8"))
    _write_record(folder, {**wanted, "complete": True})


def _write_picture(folder: Path, number: int, value: Any) -> str:
    """Write one picture's own bytes; the name it was given. A faulty one is left to the check that follows."""
    raw = b""
    if isinstance(value, dict):
        with contextlib.suppress(OSError):
            raw = value.get("bytes") or Path(value.get("path") or "").read_bytes()
    name = f"{number:06d}.{_suffix(raw)}"
    write_atomically(folder / name, lambda file: file.write_bytes(raw))
    return name


def _suffix(raw: bytes) -> str:
    try:
        with Image.open(io.BytesIO(raw)) as picture:
            return {"JPEG": "jpg", "TIFF": "tif"}.get(picture.format or "", (picture.format or "bin").lower())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "bin"


def _load(config: TrainConfig) -> tuple[Any, Mapping[str, str]]:
    """The rows of the split, with pictures as their bytes, and the columns to read."""
    name, split = config.dataset_name or "", config.dataset_split
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(MISSING) from error
    with _explained(name):
        saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
        loaded = library.load_from_disk(name) if saved else library.load_dataset(name, config.dataset_config_name)
    if isinstance(loaded, dict):  # a DatasetDict
        if split not in loaded:
            splits = ", ".join(loaded)
            raise DatasetError(f"--dataset_name {name}: has the splits {splits}; choose with --dataset_split")
        loaded = loaded[split]
    try:
        columns = choose_columns(loaded.column_names, config)
    except ValueError as error:
        raise DatasetError(f"--dataset_name {name}: {error}") from error
    if {IMAGE, PROMPT} - {*columns}:
        raise DatasetError(
            f"--dataset_name {name}: has the columns {', '.join(loaded.column_names)}; expected one of "
            f"{', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}, or --image_column and "
            "--caption_column"
        )
    kind = loaded.features[columns[IMAGE]]
    if not isinstance(kind, library.Image):
        raise DatasetError(f"--dataset_name {name}: column {columns[IMAGE]!r} holds {kind}, expected pictures")
    say(f"columns: {columns[IMAGE]} holds the picture, {columns[PROMPT]} the caption")
    return loaded.cast_column(columns[IMAGE], library.Image(decode=False)), columns


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """What `datasets` raises, as a fault of what was asked for; its errors have no common class."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        text = " ".join(str(error).split())
        raise DatasetError(f"--dataset_name {name}: cannot be loaded ({type(error).__name__}: {text[:300]})") from error
