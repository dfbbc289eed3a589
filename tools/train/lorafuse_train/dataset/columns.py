"""Which columns of a metadata file hold picture and caption: ours, or those of `datasets` image folders."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lorafuse_train.options.config import IMAGE, PROMPT, TrainConfig

IMAGE_COLUMNS, CAPTION_COLUMNS = (IMAGE, "file_name"), (PROMPT, "text", "caption")
"""DiffSynth-Studio's and ours, then those of `datasets`; the first wins, of the others only one may be there."""


def choose_columns(found: Collection[str], config: TrainConfig) -> dict[str, str]:
    """Which of the columns `found` is to be read as `image` and as `prompt`; what is not there is left out.

    Raises:
        ValueError: the user named one that is not there, or two could be meant; the text goes behind the file's name.
    """
    faults: list[str] = []
    chosen = {
        IMAGE: _choose(found, config.image_column, IMAGE_COLUMNS, "--image_column", faults),
        PROMPT: _choose(found, config.caption_column, CAPTION_COLUMNS, "--caption_column", faults),
    }
    if faults:
        raise ValueError("; ".join(faults))
    return {ours: theirs for ours, theirs in chosen.items() if theirs is not None}


def renamed(entry: Mapping[Any, Any], columns: Mapping[str, str]) -> dict[Any, Any]:
    """A row with the chosen columns under our names."""
    row = {name: value for name, value in entry.items() if name not in columns or columns[name] == name}
    return row | {ours: entry[theirs] for ours, theirs in columns.items() if theirs in entry}


def _choose(
    found: Collection[str], named: str | None, usual: tuple[str, ...], option: str, faults: list[str]
) -> str | None:
    if named is not None:
        if named not in found:
            faults.append(f"no column {named!r}, which {option} names; has {sorted(map(str, found))}")
        return named
    there = [name for name in usual if name in found]
    if len(there) > 1 and there[0] != usual[0]:
        faults.append(f"has the columns {' and '.join(map(repr, there))}; choose with {option}")
    return there[0] if there else None
