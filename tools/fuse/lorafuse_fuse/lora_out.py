"""A LoRA written from sums for the tensors of a base, in any dialect: names, dtypes, metadata, one file or none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.conversion import plan_conversion, write_conversion
from lorafuse_common.conversion.factors import Stored, stored
from lorafuse_common.conversion.spelling import Scaling, adapter_config
from lorafuse_common.conversion.writer import other_content, publish_files, temporary_beside, write_tensors
from lorafuse_common.dialects import Dialect
from lorafuse_common.dialects.comfy import COMFY
from lorafuse_common.dialects.diffusers import DIFFUSERS
from lorafuse_common.errors import CheckpointError, ConvertError, OutputError
from lorafuse_common.lora import read_lora
from lorafuse_common.scale import ADAPTER_CONFIG, METADATA_KEY
from lorafuse_common.tensorfile import FLOAT_DTYPES, read_header

from .fuse import HEADER_KEY
from .merge import Sum

_SHOWN = 5


class Vectors(StrEnum):
    """What becomes of changes that no LoRA of rank r can hold: norms, biases, bare parameters."""

    AUTO = "auto"
    DIFF = "diff"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a LoRA goes, and how."""

    out: Path
    to: Dialect
    dtype: str | None
    """What its tensors are stored as (`BF16`); None for the narrowest that loses nothing of the factors."""
    vectors: Vectors
    force: bool


def require_place(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse a place that would harm an input, or that is none for a LoRA.

    Raises:
        OutputError: it says why.
    """
    if out.suffix != ".safetensors" or out.is_dir():
        raise OutputError(f"--out {out}: expected the name of a .safetensors file")
    if clash := next((path for path in inputs if path.resolve() == out.resolve()), None):
        raise OutputError(f"--out {out}: is the input {clash}, which is never changed")


def require_same_origin(target: Target, metadata: Mapping[str, str]) -> None:
    """Refuse to replace a LoRA of something else, before hours of work; one of the same is compared afterwards.

    Raises:
        OutputError: there is one, and no `--force`.
    """
    if target.out.exists() and not target.force and _origin(target.out) != metadata[HEADER_KEY]:
        raise OutputError(other_content(target.out))


def _origin(path: Path) -> str | None:
    try:
        return read_header(path).metadata.get(HEADER_KEY)
    except CheckpointError:
        return None


def require_vectors(names: Sequence[str], target: Target) -> None:
    """Refuse changes of norms and biases in a dialect whose readers know none, unless the user said what to do.

    Raises:
        ConvertError: listing them.
    """
    if names and target.vectors is Vectors.AUTO and target.to.name in ("diffusers", "peft"):
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ConvertError(
            f"{len(names)} tensors differ that are no matrices ({', '.join(names[:_SHOWN])}{more}), and a LoRA for "
            f"{target.to.name} can only hold matrices. --to comfyui writes them as .diff and .diff_b; --vectors skip "
            "leaves them out"
        )


def describe_skipped(names: Sequence[str]) -> list[str]:
    """A line about changes that are left out, if there are any."""
    shown = ", ".join(names[:_SHOWN])
    return [f"left out: {len(names)} tensors that differ and are no matrices ({shown})"] if names else []


def write_lora(sums: Sequence[Sum], base: Checkpoint, target: Target, metadata: Mapping[str, str]) -> int:
    """Write the sums as a LoRA for `base` and return its size; scales are in B.

    Raises:
        ConvertError: the dialect cannot hold some of them.
        OutputError: it may not, or cannot, be written there.
    """
    spelled = DIFFUSERS if base.layout is None or base.layout.name == "diffusers" else COMFY
    tensors = _tensors(sums, spelled, target.dtype)
    written = {"format": "pt", **metadata}
    if target.to is spelled:
        if (target.out.parent / ADAPTER_CONFIG).exists():
            raise OutputError(
                f"--out {target.out}: would lie beside an {ADAPTER_CONFIG}, which states the scale of another LoRA, "
                "and be read with it. Choose another folder."
            )
        written |= _rank_metadata(sums) if spelled is DIFFUSERS else {}
        publish_files({target.out: lambda file: write_tensors(file, tensors, written)}, replace=target.force)
        return target.out.stat().st_size
    try:
        with temporary_beside(target.out) as file:
            write_tensors(file, tensors, written)
            file.flush()
            middle = Path(file.name)
            plan = plan_conversion(read_lora(middle), target.to, base=base)
            return write_conversion(plan, target.out, force=target.force).nbytes
    except ConvertError as error:
        raise ConvertError(str(error).replace(str(middle), f"--out {target.out}")) from error


def _rank_metadata(sums: Sequence[Sum]) -> dict[str, str]:
    """Where ranks differ: some versions of diffusers take the first module's for the alpha of all others."""
    scalings = {its.module.name: Scaling(its.pair.rank, 1.0) for its in sums if its.pair}
    if len({scaling.rank for scaling in scalings.values()}) < 2:
        return {}
    settings = adapter_config(scalings, ("down", "up"))
    prefixed = {DIFFUSERS.prefixes[0] + name: value for name, value in settings.items()}
    return {METADATA_KEY: json.dumps(prefixed, sort_keys=True)}


def _tensors(sums: Sequence[Sum], dialect: Dialect, dtype: str | None) -> dict[str, Stored]:
    pairs = [factor for its in sums if its.pair for factor in (its.pair.up, its.pair.down)]
    widest = _widest(pairs) if dtype is None else _torch(dtype)
    tensors: dict[str, Stored] = {}
    for its in sums:
        stem, shape = dialect.spell(its.module.name), its.module.ref.shape
        if its.pair:
            rank, ones = its.pair.rank, (1,) * (len(shape) - 2)
            up = its.pair.up.to(widest).reshape(shape[0], rank, *ones)
            down = its.pair.down.to(widest).reshape(rank, *shape[1:])
            tensors[stem + dialect.suffix("down")] = stored(down)
            tensors[stem + dialect.suffix("up")] = stored(up)
        elif its.vector is not None:
            values = its.vector.to(torch.float32 if dtype is None else widest)
            tensors[stem + dialect.suffix("diff", its.module.parameter)] = stored(values)
    return tensors


def _widest(factors: Sequence[torch.Tensor]) -> torch.dtype:
    """One dtype for the file: loaders give mixed ones to a model as they are, and its products then fail."""
    found = factors[0].dtype if factors else torch.float32
    for factor in factors:
        found = torch.promote_types(found, factor.dtype)
    return torch.float32 if found is torch.float64 else found


def _torch(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, FLOAT_DTYPES[name])
    return found
