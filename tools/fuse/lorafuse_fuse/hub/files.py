"""Which files of a repository are needed: one set of weights for each component, and what is small beside them.

Names are relative to the folder that is asked for. What is left out would be loaded by nobody: half-precision
variants, pickles and Flax or ONNX files where there are safetensors, single-file copies and pictures in the root.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from lorafuse_common.errors import HubError
from lorafuse_common.manifest import KEPT_FOLDER

MODEL_INDEX = "model_index.json"
_SAFETENSORS = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NEVER = (".gguf", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".tflite", ".ot", ".flashpack")
_TEXT = ("", ".json", ".md", ".py", ".txt", ".yaml", ".yml")
"""How files in the root end that are fetched: configurations, code of custom pipelines, the model card, LICENSE."""
_SAFE_STEMS, _PICKLE_STEMS = ("diffusion_pytorch_model", "model"), ("diffusion_pytorch_model", "pytorch_model")
_LORA_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call the LoRA of a repository."""
_IN_TRAINING = re.compile(r"(^|/)(checkpoint|optimizer|scheduler|random_states)", re.IGNORECASE)
_SHOWN = 8


def parts_of(model_index: Mapping[str, Any]) -> tuple[str, ...]:
    """The folders that a pipeline is made of; `[null, null]` stands for a component that it goes without."""
    return tuple(name for name, value in model_index.items() if isinstance(value, list) and any(value))


def pipeline_files(listing: Collection[str], parts: Collection[str], fused: Collection[str], where: str) -> list[str]:
    """What `from_pretrained` needs of a pipeline; the `fused` components must have safetensors.

    Raises:
        HubError: a fused component is not there or has no safetensors.
    """
    safe = {part for part in parts if any(_lies_in(name, part, _SAFETENSORS) for name in listing)}
    for name in fused:
        if name not in safe:
            raise HubError(
                f"{where}: this pipeline has no folder {name!r} with .safetensors weights; "
                f"--component can be one of {sorted(safe)}"
            )
    found = _small_files(listing)
    for part in parts:
        found += [f"{part}/{name}" for name in _part_files([n[len(part) + 1 :] for n in listing if _lies_in(n, part)])]
    return sorted(found)


def model_files(listing: Collection[str], where: str) -> list[str]:
    """What a folder with one model needs.

    Raises:
        HubError: it holds no safetensors weights, or several that could be meant.
    """
    here = {name for name in listing if "/" not in name}
    weights = one_set_of_weights(here)
    files = [name for name in weights if name.endswith(_SAFETENSORS)]
    if not files or (len(files) > 1 and not any(name.endswith(".json") for name in weights)):
        others = sorted(name for name in listing if name.endswith(_SAFETENSORS))
        what = "several models" if files else f"no {MODEL_INDEX} and no .safetensors weights"
        raise HubError(f"{where}: has {what}; name what you mean: {_some(others, where)}")
    return sorted({*_small_files(listing), *weights})


def lora_file(listing: Collection[str], path: str, where: str) -> str:
    """The LoRA that is meant by a file's name, or by a folder or repository that holds only one.

    Raises:
        HubError: there is none, or more than one.
    """
    if path in listing:
        if not path.endswith(_SAFETENSORS):
            raise HubError(f"{where}: is no .safetensors file, and no other kind is read")
        return path
    inside = [name for name in listing if not path or _lies_in(name, path)]
    if not inside:
        raise no_such_file(listing, path, where)
    of_kind = [name for name in inside if name.endswith(_SAFETENSORS)]
    found = [name for name in of_kind if not _IN_TRAINING.search(name[len(path) :])]
    named = [name for name in found if name.rpartition("/")[2] in _LORA_NAMES and name.rpartition("/")[0] == path]
    for chosen in (found, named):
        if len(chosen) == 1:
            return chosen[0]
    if not found:
        raise HubError(f"{where}: has no .safetensors file that could be a LoRA")
    raise HubError(f"{where}: has {len(found)} .safetensors files; name the LoRA: {_some(sorted(found), where, path)}")


def no_such_file(listing: Collection[str], path: str, where: str) -> HubError:
    """The error for a path that a repository does not have, with what it might have been."""
    near = difflib.get_close_matches(path, listing, 3, 0.5) or [n for n in listing if n.endswith(_SAFETENSORS)]
    has = ", ".join(sorted(near)[:_SHOWN]) or "no .safetensors files"
    return HubError(f"{where}: the repository has no {path!r}; it has {has}")


def absent_shards(names: Collection[str]) -> list[str]:
    """The shards that `x-00001-of-00003.safetensors` promises and that are not among the names."""
    promised: set[str] = set()
    for name in names:
        if shard := re.fullmatch(r"(.*-)(\d+)(-of-(\d+)\.\w+)", name):
            promised |= {f"{shard[1]}{i:0{len(shard[2])}}{shard[3]}" for i in range(1, int(shard[4]) + 1)}
    return sorted(promised - set(names))


def one_set_of_weights(names: Collection[str]) -> set[str]:
    """Of the files of one folder, the weights that are loaded by default, with their index where they are sharded."""
    for ending, stems in ((_SAFETENSORS, _SAFE_STEMS), (".bin", _PICKLE_STEMS)):
        of_kind = {name for name in names if name.endswith(ending)}
        plain = {name for name in of_kind if "." not in name.removesuffix(ending)}  # without .fp16 and the like
        for stem in stems:
            index, shards = f"{stem}{ending}.index.json", {n for n in plain if re.match(rf"{stem}-\d+-of-\d+\.", n)}
            if index in names and shards:
                return {index, *shards}
            if f"{stem}{ending}" in names:
                return {f"{stem}{ending}"}
        if chosen := plain or of_kind:
            indexes = {name for name in names if f"{ending}.index." in name}
            return {*chosen, *(n for n in indexes if n.removesuffix(".json").count(".") == 2 or not plain)}
    return {name for name in names if name.endswith(_PICKLES)}


def _part_files(names: Collection[str]) -> list[str]:
    """The files of a component's folder, folders within it included."""
    found = []
    for folder in sorted({str(PurePosixPath(name).parent) for name in names}):
        inside = [PurePosixPath(name).name for name in names if str(PurePosixPath(name).parent) == folder]
        weights = one_set_of_weights(inside)
        chosen = [name for name in inside if name in weights or not (_is_weight(name) or name.startswith("."))]
        found += chosen if folder == "." else [f"{folder}/{name}" for name in chosen]
    return found


def _is_weight(name: str) -> bool:
    return name.endswith((_SAFETENSORS, *_PICKLES, *_NEVER)) or bool(re.search(r"\.index\.(\w+\.)?json$", name))


def _small_files(listing: Collection[str]) -> list[str]:
    here = [name for name in listing if "/" not in name and not name.startswith(".") and not _is_weight(name)]
    kept = [name for name in listing if _lies_in(name, KEPT_FOLDER)]  # the LoRAs of a checkpoint that was fused
    text = [name for name in here if PurePosixPath(name).suffix.lower() in _TEXT or name.upper().startswith("LICENSE")]
    return kept + text


def _lies_in(name: str, folder: str, ending: str = "") -> bool:
    return name.startswith(f"{folder}/") and name.endswith(ending)


def _some(names: Sequence[str], where: str, path: str = "") -> str:
    """The first of some names, spelt as they can be asked for."""
    shown = [f"{where}/{name[len(path) + 1 if path else 0 :]}" for name in names[:_SHOWN]]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(shown)}{more}" if names else "the file or folder (it has no .safetensors at all)"
