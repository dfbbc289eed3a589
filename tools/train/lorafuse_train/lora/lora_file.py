"""The file of a LoRA: written whole, loaded back as a user would, and compared with what was trained."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafuse_common.checkpoint import DEFAULT_COMPONENT, open_checkpoint
from lorafuse_common.conversion import plan_conversion, write_conversion
from lorafuse_common.dialects.diffusers import DIFFUSERS
from lorafuse_common.errors import LorafuseError
from lorafuse_common.lora import read_lora
from lorafuse_common.tensorfile import encode_header, read_header
from lorafuse_train.atomic import write_atomically
from lorafuse_train.experts import SECOND
from lorafuse_train.lora.adapter import ADAPTER, PREFIX

LOADING_FAILS = (ValueError, KeyError, RuntimeError, TypeError, AttributeError, AssertionError, IndexError)
"""What diffusers and PEFT raise of a LoRA that they cannot read."""


def save_lora(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA file whole; the same LoRA gives the same bytes."""

    def write(file: Path) -> None:
        save_file(dict(state), file)
        # `save_file` would write the metadata in an order that changes from run to run.
        set_metadata(file, metadata)

    write_atomically(path, write)


def set_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Give a safetensors file this header, sorted, with the hash of its tensors under the names that readers know."""
    plain = read_header(file)
    tensors = file.read_bytes()[plain.data_start :]
    digest = hashlib.sha256(tensors).hexdigest()
    hashes = {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    file.write_bytes(encode_header(plain, dict(sorted({**metadata, **hashes}.items()))) + tensors)


def write_blank(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A file of fp32 zeros with these tensors, which takes no space on most disks."""
    header, at = {}, 0
    for name, shape in shapes.items():
        nbytes = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(raw)) + raw)
        opened.truncate(8 + len(raw) + at)


def read_as_diffusers(
    lora: Path, transformer: Path, *, leaves_others: bool = False
) -> tuple[dict[str, Tensor], Mapping[str, int]]:
    """A LoRA in any dialect, as one of the transformer in that folder: as diffusers spells it, its own scale within B.

    Also how many of its modules are left out for which reason, where `leaves_others`.

    Raises:
        LorafuseError: it is for another model, or cannot be spelled so.
    """
    conversion = plan_conversion(
        read_lora(lora), DIFFUSERS, base=open_checkpoint(transformer), leaves_others=leaves_others
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        write_conversion(conversion, file)
        return load_file(file), conversion.left_out


def pipeline_of(transformer: Any, folder: Path) -> Any:
    """The pipeline in `folder` with this transformer and nothing else, so that there is no second copy of weights.

    Where there are two experts it stands for both: diffusers asks the first for its config whichever it loads into.
    """
    import diffusers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    absent = dict.fromkeys(name for name, part in index.items() if isinstance(part, list) and name != "transformer")
    if absent.get(SECOND, transformer) is None and index[SECOND] != [None, None]:
        absent[SECOND] = transformer
    return getattr(diffusers, index["_class_name"])(transformer=transformer, **absent)


def load_back(transformer: Any, pipeline: Path, file: Path, component: str = DEFAULT_COMPONENT) -> None:
    """Drop the LoRA at hand and load `file` in its place, as a user would: through the pipeline's class.

    diffusers rounds a LoRA to the base's precision; it is widened again to what the file holds, so that what is
    compared next is the loading and not the rounding.

    Raises:
        LorafuseError: diffusers loads other keys or other values than the file holds.
    """
    saved = load_file(file)
    transformer.unload_lora()
    loaded = pipeline_of(transformer, pipeline)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "While injecting the PEFT adapters, an inconsistency")  # those zeros
            loaded.load_lora_weights(
                file.parent, weight_name=file.name, adapter_name=ADAPTER, **load_arguments(component)
            )
    except LOADING_FAILS as error:
        raise LorafuseError(f"{file}: diffusers does not load the new LoRA ({error})") from error
    found = lora_parameters(transformer)
    # To a LoRA without Wan 2.1's image modules diffusers adds zeros for them.
    filled = {name for name in {*found} - {*saved} if not found[name].any()}
    wrong = {*saved} ^ {*found} - filled
    wrong |= {name for name in {*saved} & {*found} if not _rounds_to(saved[name], found[name])}
    if wrong:
        raise LorafuseError(
            f"{file}: {len(wrong)} of {len(saved)} tensors are not what diffusers loads from it (first: {min(wrong)})"
        )
    for name, parameter in found.items():
        parameter.requires_grad_(False)
        if name in saved:
            parameter.data = saved[name].to(parameter.device)


def load_arguments(component: str) -> dict[str, bool]:
    """What `load_lora_weights` must be told, for a file never says which expert it is for: its names are the same."""
    return {"load_into_transformer_2": True} if component == SECOND else {}


def lora_parameters(transformer: Any) -> dict[str, nn.Parameter]:
    """The LoRA's own parameters, under the names they have in a file."""
    return {
        f"{PREFIX}{name.replace(f'.{ADAPTER}.', '.').replace('vector.weight', 'vector')}": parameter
        for name, parameter in transformer.named_parameters()
        if f".{ADAPTER}." in name
    }


def _rounds_to(saved: Tensor, found: Tensor) -> bool:
    return saved.shape == found.shape and bool(saved.to(found.dtype).equal(found.detach().cpu()))


def compare_effects(file: Path, bare: Tensor, trained: Tensor, loaded: Tensor) -> None:
    """Compare predictions of the base alone, with the trained LoRA, and with the LoRA as loaded from `file`.

    Raises:
        LorafuseError: the LoRA changes nothing, or has another effect once loaded.
    """
    effect = (trained - bare).norm().item()
    if effect == 0:
        raise LorafuseError(
            f"{file}: the new LoRA changes nothing that the model predicts; train for more steps or at a higher "
            "--learning_rate (the steps of the warm-up hardly count)"
        )
    gap = (loaded - trained).norm().item()
    if not gap <= 0.01 * effect:
        raise LorafuseError(
            f"{file}: loaded through diffusers it predicts something else than it did in training "
            f"(off by {gap / effect:.1%} of its effect)"
        )
