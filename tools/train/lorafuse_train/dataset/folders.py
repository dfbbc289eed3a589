"""Where in a dataset's folder its rows are: a metadata file, here or in a `train` folder, or .txt files."""

from __future__ import annotations

from pathlib import Path

from lorafuse_common.errors import DatasetError

METADATA_NAMES = ("metadata.csv", "metadata.json", "metadata.jsonl")
SPLITS = ("train", "data/train")
"""Where `datasets` image folders have the pictures to train on."""


def find_metadata(base: Path, chosen: Path | None) -> Path | None:
    """The metadata file of a dataset; None where captions are in .txt files.

    Raises:
        DatasetError: there are several, or the `chosen` one is not there.
    """
    if chosen is not None:
        if not chosen.is_file():
            raise DatasetError(f"--dataset_metadata_path {chosen}: no such file")
        return chosen
    for folder in (base, *(base / split for split in SPLITS)):
        found = [path for name in METADATA_NAMES if (path := folder / name).is_file()]
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise DatasetError(f"{folder}: has {names}; choose with --dataset_metadata_path")
        if found:
            return found[0]
    deeper = sorted(path.relative_to(base).as_posix() for name in METADATA_NAMES for path in base.glob(f"*/{name}"))
    if deeper:
        raise DatasetError(f"{base}: has {', '.join(deeper[:5])}; choose with --dataset_metadata_path")
    return None


def picture_root(base: Path, metadata: Path, image_column: str) -> Path:
    """What the names in a metadata file are relative to: its own folder in a `datasets` image folder, else `base`."""
    own = metadata.parent
    split = any(own == base / split for split in SPLITS)
    return own if split or (image_column == "file_name" and own.is_relative_to(base)) else base


def unused_splits(base: Path, metadata: Path) -> tuple[str, ...]:
    """The other splits beside the one that is read."""
    if metadata.parent not in [base / split for split in SPLITS]:
        return ()
    return tuple(
        sorted(
            folder.name
            for folder in metadata.parent.parent.iterdir()
            if folder.is_dir() and folder != metadata.parent and not folder.name.startswith(".")
        )
    )
