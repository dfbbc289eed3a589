"""What a component's files say before any of them is loaded: the precision stored, and the identity of the bytes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_common.errors import CheckpointError
from lorafuse_common.hashing import sha256_of
from lorafuse_common.tensorfile import FLOAT_DTYPES


def stored_dtype(folder: Path) -> torch.dtype:
    """The float dtype that most bytes of a model folder have.

    Asked of the files, because diffusers reads `torch_dtype="auto"` as fp32 and would double a bf16 model.

    Raises:
        CheckpointError: no weights, or most of them quantised.
    """
    nbytes: Counter[str] = Counter()
    for ref in open_checkpoint(folder).tensors.values():
        nbytes[ref.dtype] += ref.nbytes
    most = nbytes.most_common(1)[0][0] if nbytes else "nothing"
    if most not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{folder}: holds mostly {most}; the trainer reads {', '.join(FLOAT_DTYPES)}: use the unquantised model"
        )
    dtype: torch.dtype = getattr(torch, FLOAT_DTYPES[most])
    return dtype


def folder_sha256(folder: Path, known: Mapping[Path, str]) -> str:
    """sha256 over the sorted (path, sha256) of all files in a folder; `known` spares hashing some of them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    records = [(path.relative_to(folder).as_posix(), known.get(path) or sha256_of(path)) for path in files]
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()
