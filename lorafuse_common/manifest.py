"""`lorafuse.json`: what went into a fused checkpoint, what came out, and how to check it.

Deterministic: no clocks, hosts or absolute paths, so the same inputs give the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from .errors import ManifestError
from .hashing import sha256_of
from .typed_json import rebuilt

MANIFEST_NAME = "lorafuse.json"
KEPT_FOLDER = "lorafuse"
"""Where a fused folder keeps copies of its LoRAs, which are no part of the model."""
SCHEMA = 3
_READ = (2, SCHEMA)
"""The schemas that are read: what 2 did not know has the meaning that its defaults have."""
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: its path relative to its checkpoint, and what is in it."""

    path: str
    sha256: str
    size: int


class Role(StrEnum):
    """What becomes of the fused LoRAs once the new LoRA is used."""

    DEPLOY = "deploy"
    """They stay: the new LoRA is for the fused checkpoint."""
    SCAFFOLD = "scaffold"
    """They are there for the training only: the new LoRA is for the checkpoint that they were fused into."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a few-step checkpoint wants to be sampled: for role `scaffold`, the one that the LoRAs were fused into."""

    sigmas: tuple[float, ...]
    """The noise levels visited (after any shift), 1 is pure noise; without the final 0."""
    guidance_scale: float
    """Classifier-free guidance to sample with, 1 means none; what the model is told, where guidance is embedded."""
    source: str
    """Where it was learnt from: `--schedule`, a LoRA's file name, or the parent's manifest."""
    scheduler: Mapping[str, object] | None = None
    """The config of the diffusers scheduler that gives these noise levels, where it is known."""
    loras: tuple[str, ...] = ()
    """The fused LoRAs that made it few-step, by `FusedLora.name`, as far as names and headers told."""

    @property
    def steps(self) -> int:
        """How many predictions a picture takes, guidance apart."""
        return len(self.sigmas)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where on the hub an input came from."""

    repo: str
    revision: str
    """The commit, whatever branch or tag was asked for."""
    path: str
    """The file or folder within the repository; empty for all of it."""

    @property
    def uri(self) -> str:
        """In the hub's own spelling: `hf://owner/repo@revision/path`."""
        return f"hf://{self.repo}@{self.revision}{'/' if self.path else ''}{self.path}"


@dataclass(frozen=True, slots=True)
class FusedLora:
    """One LoRA that was fused."""

    name: str
    sha256: str
    size: int
    component: str | None
    """The transformer that it was fused into; None outside a pipeline folder."""
    dialect: str
    strength: float
    scale: str
    """Where its scale came from, and the values: `alpha/rank 0.5`."""
    modules: int
    """Diffusion-transformer modules in the file."""
    applied: int
    """How many of them were fused."""
    ignored: Mapping[str, int]
    """Why the others were not: problem kind, or the reason why that is harmless -> count."""
    origin: Origin | None = None
    """Where it came from, if from the hub."""
    alpha: float | None = None
    """What `--alpha` stated for all its modules."""
    notes: tuple[str, ...] = ()
    """What was unusual about it, which may still be meant."""
    file: str | None = None
    """Where its file can be found again, relative to the fused folder: the copy that is kept in it, or, where none
    is, the original if that lies near; None where it lies far away."""


@dataclass(frozen=True, slots=True)
class TensorChange:
    """What a fuse did to one tensor, with W before, D the summed fp32 delta and E what arrived after rounding."""

    name: str
    component: str | None
    """The folder of the pipeline that it lies in."""
    weight_rms: float
    delta_rms: float
    loss: float
    """`|round(W + D) - (W + D)| / |D|`: the share of the delta that rounding destroyed."""
    gain: float
    """`<E, D> / <D, D>`: 1 means the delta arrived at full strength."""
    lora_rms: tuple[float, ...] = ()
    """Of the delta of each LoRA alone, in the order of `Manifest.loras`, where a fuse has several."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The fused checkpoint that served as base, where the base was one."""

    fused_sha256: str
    loras: tuple[FusedLora, ...]
    parent: Parent | None
    role: Role = Role.DEPLOY
    """Of these LoRAs."""
    base_sha256: str | None = None
    """Identity of the weights that they were fused into; None where schema 2 did not record it."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole record."""

    schema: int
    version: str
    family: str | None
    layout: str | None
    component: str | None
    """The folder of the pipeline that was fused, the first where there are two; None for a model folder or file."""
    base: tuple[FileRecord, ...]
    loras: tuple[FusedLora, ...]
    allowed: tuple[str, ...]
    """The problem kinds that the user let pass."""
    dtype: str | None
    """What edited tensors are stored as (`BF16`, `F32`); None where they keep theirs."""
    seed: int | None
    """Of stochastic rounding; None where values were rounded to the nearest."""
    schedule: Schedule | None
    outputs: tuple[FileRecord, ...]
    changes: tuple[TensorChange, ...]
    parent: Parent | None
    origin: Origin | None = None
    """Where the base came from, if from the hub."""
    role: Role = Role.DEPLOY
    """Of the LoRAs of this fuse; those of earlier ones have the role that `parent` records."""

    @property
    def lineage(self) -> tuple[tuple[Role, tuple[FusedLora, ...]], ...]:
        """Every fuse that led to the weights, the last one first: role and LoRAs of each."""
        found, parent = [(self.role, self.loras)], self.parent
        while parent is not None:
            found.append((parent.role, parent.loras))
            parent = parent.parent
        return tuple(found)

    @property
    def original_sha256(self) -> str | None:
        """Identity of the weights that the first fuse of the lineage started from, where it is known."""
        return self.original_of(self.component)

    def original_of(self, component: str | None) -> str | None:
        """The same for another transformer of the pipeline, which is not recorded where there were several fuses."""
        parent = self.parent
        if parent is None:
            return weights_sha256(self.base, component)
        if component != self.component:
            return None
        while parent.parent is not None:
            parent = parent.parent
        return parent.base_sha256

    @property
    def fused_sha256(self) -> str:
        """Identity of the fused weights: sha256 over the sorted names and hashes of their files."""
        return weights_sha256(self.outputs, self.component)


def weights_sha256(records: Iterable[FileRecord], component: str | None) -> str:
    """sha256 over the sorted (file name, sha256) of the safetensors files of one component."""
    folder = f"{component}/" if component else ""
    weights = sorted(
        (record.path.removeprefix(folder), record.sha256)
        for record in records
        if record.path.startswith(folder) and record.path.endswith(".safetensors")
    )
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as JSON text, the same for equal manifests."""
    return json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a fused checkpoint, or None where there is none.

    Raises:
        ManifestError: it is there but broken, or written by a newer lorafuse.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are more than any has")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] not in _READ:
            raise ManifestError(f"{path}: schema {raw['schema']}, this lorafuse reads {SCHEMA}: fuse again")
        manifest: Manifest = rebuilt(Manifest, raw)
        _require_inside((*manifest.base, *manifest.outputs))
        _require_relative(lora for _, loras in manifest.lineage for lora in loras)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{path}: broken ({type(error).__name__}: {error}): fuse again") from error
    return manifest


def _require_inside(records: Iterable[FileRecord]) -> None:
    for record in records:
        path = PurePosixPath(record.path)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{record.path!r} lies outside its folder")


def _require_relative(loras: Iterable[FusedLora]) -> None:
    for lora in loras:
        if lora.file is not None and (not lora.file or PurePosixPath(lora.file).is_absolute()):
            raise ValueError(f"{lora.file!r} is no path relative to its folder")


def find_lora(lora: FusedLora, folder: Path) -> Path | None:
    """The file of a LoRA that was fused into the checkpoint in `folder`; None where it is gone, or is not what it was.

    An `adapter_config.json` that says its scale lies beside it.
    """
    if lora.file is None:
        return None
    path = folder / lora.file
    try:
        is_same = path.is_file() and path.stat().st_size == lora.size and sha256_of(path) == lora.sha256
    except OSError:
        return None
    return path if is_same else None


def verify_manifest(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Check that every recorded file is there with its size and, on `hashes`, its sha256.

    Raises:
        ManifestError: listing every file that is missing or differs.
    """
    faults = []
    for record in manifest.outputs:
        path = folder / record.path
        if not path.is_file():
            faults.append(f"{record.path} is missing{' (a broken link)' if path.is_symlink() else ''}")
        elif path.stat().st_size != record.size:
            faults.append(f"{record.path} has {path.stat().st_size} bytes, was written with {record.size}")
        elif hashes and sha256_of(path) != record.sha256:
            faults.append(f"{record.path} has another sha256 than when it was written")
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise ManifestError(
            f"{folder}: does not match its {MANIFEST_NAME}: {'; '.join(faults[:5])}{more}. Fuse it again with --force."
        )
