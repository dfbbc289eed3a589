"""One model on disk: a single file, a diffusers model folder, or a component of a whole pipeline folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from .errors import CheckpointError
from .families import FAMILIES, family_of_class
from .manifest import KEPT_FOLDER, MANIFEST_NAME, Origin
from .naming import Family, Layout, candidates
from .strangers import refusal_of
from .tensorfile import TensorFile, TensorRef, read_header

DEFAULT_COMPONENT = "transformer"
COMFY_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
PREFIXES = ("", *COMFY_PREFIXES, "transformer.", "model.", "net.")
"""What single-file checkpoints put before the transformer's names."""
_INDEX_SUFFIX = ".safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
MAX_JSON_BYTES = 32 << 20
"""The index of a model of 100000 tensors has about 10 MB."""
_WEIGHTS_STEMS = ("diffusion_pytorch_model", "model")


class Form(StrEnum):
    """How a model lies on disk; a fuse writes the form it read."""

    FILE = "file"
    MODEL = "model folder"
    PIPELINE = "pipeline folder"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model whose headers have been read and checked; no weights are in memory."""

    root: Path
    """The file or folder as it was given."""
    form: Form
    component: str | None
    """The pipeline's folder that holds the transformer; None unless `form` is PIPELINE."""
    files: tuple[TensorFile, ...]
    """The weight files: one, or the shards in the order of their names."""
    index: Path | None
    """The file that lists the shards, where there are several."""
    tensors: Mapping[str, TensorRef]
    prefix: str
    """What stands before the transformer's own names in the file, mostly nothing."""
    modules: Mapping[str, TensorRef]
    """Module name without prefix -> its weight; a bare parameter (`scale_shift_table`) counts as a module."""
    biases: Mapping[str, TensorRef]
    """Module name without prefix -> its bias, where it has one."""
    class_name: str | None
    family: Family | None
    layout: Layout | None
    origin: Origin | None = None
    """Where on the hub it came from."""
    only: frozenset[Path] | None = None
    """The files of its folder that belong to it, relative to it; None for all. The hub's cache may hold others."""

    @property
    def label(self) -> str:
        """What to call the place it lies at in a message."""
        return self.origin.uri if self.origin else str(self.root)

    @property
    def folder(self) -> Path:
        """What the paths of its files are relative to."""
        return self.root.parent if self.form is Form.FILE else self.root

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.size for file in self.files)

    @property
    def title(self) -> str:
        """What to call it in a message."""
        return self.family.title if self.family else self.class_name or "a model of no known family"


def open_checkpoint(path: Path, component: str | None = None) -> Checkpoint:
    """Read the headers of a model; `component` names the transformer's folder within a pipeline.

    Raises:
        CheckpointError: nothing there, no weights, a broken file, shards that do not match their index.
    """
    _require_there(path)
    if not path.is_dir():
        _refuse_component(path, component, "a single file")
        return _checkpoint(path, Form.FILE, None, _Weights((read_header(path),), None), None)
    if (path / "model_index.json").is_file():
        chosen = component or DEFAULT_COMPONENT
        folder = path / chosen
        if not folder.is_dir() or not _is_name(chosen):
            parts = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
            raise CheckpointError(f"{path}: this pipeline has no folder {chosen!r}; --component can be one of {parts}")
        return _checkpoint(path, Form.PIPELINE, chosen, _weight_files(folder), _class_name(folder))
    _refuse_component(path, component, "a model folder without model_index.json")
    return _checkpoint(path, Form.MODEL, None, _weight_files(path), _class_name(path))


def _require_there(path: Path) -> None:
    try:
        path.stat()
        if path.is_dir():
            next(path.iterdir(), None)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path}: no such file or folder; expected a .safetensors file, a model folder or a pipeline folder "
            "on disk (a model on the hub has to be downloaded first)"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _is_name(text: str) -> bool:
    """Whether a text names something in a folder, and nothing outside it."""
    return text not in ("", ".", "..") and not {"/", "\0"} & set(text) and len(text.encode(errors="replace")) < 256


def _refuse_component(path: Path, component: str | None, what: str) -> None:
    if component is not None:
        raise CheckpointError(f"{path}: is {what}, so there is no component {component!r} to choose in it")


class _Weights(NamedTuple):
    files: tuple[TensorFile, ...]
    listed_by: Path | None


def _checkpoint(root: Path, form: Form, component: str | None, weights: _Weights, class_name: str | None) -> Checkpoint:
    tensors: dict[str, TensorRef] = {}
    for file in weights.files:
        for name, ref in file.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{root}: tensor {name!r} is in both {tensors[name].file.name} and {file.path.name}"
                )
            tensors[name] = ref
    prefix, found = identify_prefix(tensors, class_name)
    own = {name.removeprefix(prefix): ref for name, ref in tensors.items() if name.startswith(prefix)}
    family = found[0] if found else (family_of_class(class_name) if class_name else None)
    return Checkpoint(
        root=root,
        form=form,
        component=component,
        files=weights.files,
        index=weights.listed_by,
        tensors=tensors,
        prefix=prefix,
        modules={name.removesuffix(".weight"): ref for name, ref in own.items() if not name.endswith(".bias")},
        biases={name.removesuffix(".bias"): ref for name, ref in own.items() if name.endswith(".bias")},
        class_name=class_name,
        family=family,
        layout=found[1] if found else None,
    )


def identify_prefix(
    tensors: Mapping[str, TensorRef], class_name: str | None
) -> tuple[str, tuple[Family, Layout] | None]:
    """The prefix under which the most names belong to known families, and the one family that they fit, if it is one.

    For a model of no known family, the prefixes that only ComfyUI writes are taken off all the same.
    """
    best, prefix, family = 0, "", None
    for tried in PREFIXES:
        names = [n.removeprefix(tried).removesuffix(".weight") for n in tensors if n.startswith(tried)]
        found = candidates(names, FAMILIES, class_name)
        explained = found[0][1].explained(names) if found else 0
        if explained > best:
            best, prefix, family = explained, tried, found[0] if len(found) == 1 else None
    if not best:
        prefix = next((p for p in COMFY_PREFIXES if any(name.startswith(p) for name in tensors)), "")
    return prefix, family


def _class_name(folder: Path) -> str | None:
    config = read_json(folder / "config.json")
    name = config.get("_class_name") if config else None
    return name if isinstance(name, str) else None


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, or None where there is no file.

    Raises:
        CheckpointError: it is no JSON object, or far too large for one that belongs to a model.
    """
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are more than any such file has")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _weight_files(folder: Path) -> _Weights:
    indexes = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    loose = sorted(folder.glob("*.safetensors"))
    for stem in _WEIGHTS_STEMS:  # the names that from_pretrained loads win over variants beside them
        if (index := folder / f"{stem}{_INDEX_SUFFIX}") in indexes:
            return _sharded(index)
        if (single := folder / f"{stem}.safetensors") in loose:
            return _Weights((read_header(single),), None)
    if len(indexes) == 1:
        return _sharded(indexes[0])
    if len(loose) == 1:
        return _Weights((read_header(loose[0]),), None)
    if loose or indexes:
        names = [p.name for p in (*indexes, *loose)]
        raise CheckpointError(
            f"{folder}: several weight files ({names[:6]}) and none has diffusers' name, "
            "diffusion_pytorch_model.safetensors. Give the one file you mean instead of the folder."
        )
    unread = sorted(f"{p.name}: {why}" for p in folder.iterdir() if (why := refusal_of(p.suffix)))
    hint = f" It has {unread[0]}" if unread else ""
    raise CheckpointError(f"{folder}: no .safetensors weights and no model_index.json in it.{hint}")


def _sharded(index: Path) -> _Weights:
    found = read_json(index) or {}
    weight_map, metadata = found.get("weight_map"), found.get("metadata", {})
    if not isinstance(metadata, dict) or not isinstance(metadata.get("total_size", 0), int | float):
        raise CheckpointError(f"{index}: expected a 'metadata' object with the shards' total_size, a number")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: expected a 'weight_map' from tensor names to file names")
    shards = sorted(set(weight_map.values()))
    outside = [name for name in shards if not _is_name(name)]
    if outside:
        raise CheckpointError(f"{index}: names files outside its folder: {outside[:3]}")
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index}: {len(absent)} of {len(shards)} shards are missing: {absent[:3]}; download them"
        )
    files = tuple(read_header(index.parent / name) for name in shards)
    in_files = {name: file.path.name for file in files for name in file.tensors}
    wrong = sorted(name for name in {*weight_map, *in_files} if weight_map.get(name) != in_files.get(name))
    if wrong:
        raise CheckpointError(
            f"{index}: does not agree with its shards on {len(wrong)} tensors (first: {wrong[0]!r}: "
            f"index says {weight_map.get(wrong[0])}, found in {in_files.get(wrong[0])})"
        )
    return _Weights(files, index)


def side_files(checkpoints: Sequence[Checkpoint]) -> tuple[Path, ...]:
    """Every file of a model besides the weights of some of its transformers, relative to its folder and sorted.

    Left out are hidden files, the `lorafuse.json` and LoRAs of a base that was itself fused, and other weights that
    lie beside a transformer's or in the root (variants, single-file copies): they would be mistaken for fused ones.
    """
    return tuple(path for path in _other_files(checkpoints) if not _is_foreign_weight(checkpoints, path))


def foreign_weights(checkpoints: Sequence[Checkpoint]) -> tuple[Path, ...]:
    """The weights that `side_files` leaves out, relative to the folder."""
    return tuple(path for path in _other_files(checkpoints) if _is_foreign_weight(checkpoints, path))


def _other_files(checkpoints: Sequence[Checkpoint]) -> tuple[Path, ...]:
    root = checkpoints[0].root
    if checkpoints[0].form is Form.FILE:
        return ()
    weights = {file.path for checkpoint in checkpoints for file in checkpoint.files}
    found = []
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        subfolders[:] = [] if real in visited else [name for name in subfolders if not name.startswith(".")]
        if real in visited:
            continue  # a link that leads back up
        visited.add(real)
        paths = (Path(folder) / name for name in names if not name.startswith("."))
        found += [path.relative_to(root) for path in paths if path not in weights and path.is_file()]
    only = checkpoints[0].only
    ours = (MANIFEST_NAME, KEPT_FOLDER)
    return tuple(sorted(path for path in found if path.parts[0] not in ours and (only is None or path in only)))


def _is_foreign_weight(checkpoints: Sequence[Checkpoint], path: Path) -> bool:
    folders = {Path(), *(Path(checkpoint.component or ".") for checkpoint in checkpoints)}
    is_weight = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(_INDEX_SUFFIX)
    indexes = {checkpoint.index for checkpoint in checkpoints}
    return path.parent in folders and is_weight and checkpoints[0].root / path not in indexes
