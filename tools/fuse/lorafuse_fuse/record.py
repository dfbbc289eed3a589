"""What a fuse writes down: the inputs' records, and whether an output is up to date."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lorafuse_common.checkpoint import Checkpoint, side_files
from lorafuse_common.errors import CheckpointError
from lorafuse_common.hashing import sha256_of
from lorafuse_common.manifest import (
    MANIFEST_NAME,
    FileRecord,
    FusedLora,
    Manifest,
    Parent,
    Role,
    Schedule,
    read_manifest,
    weights_sha256,
)

from .choices import ProblemKind
from .plan import FusePlan, LoraPlan


def weight_paths(bases: Sequence[Checkpoint]) -> tuple[Path, ...]:
    """The weight files of some transformers of one model, relative to its folder."""
    return tuple(file.path.relative_to(base.folder) for base in bases for file in base.files)


def input_paths(bases: Sequence[Checkpoint]) -> tuple[Path, ...]:
    """Every file of the base that takes part, relative to its folder and sorted."""
    return tuple(sorted((*weight_paths(bases), *side_files(bases)), key=str))


def record_files(
    folder: Path, paths: Sequence[Path], known: Mapping[Path, str], progress: Callable[[int], object] | None = None
) -> tuple[FileRecord, ...]:
    """Size and sha256 of files; `known` holds digests that were computed on the way."""
    records = []
    for path in paths:
        digest = known.get(path) or sha256_of(folder / path, progress)
        records.append(FileRecord(path.as_posix(), digest, (folder / path).stat().st_size))
    return tuple(records)


def record_lora(plan: LoraPlan) -> FusedLora:
    """One LoRA's entry in the manifest."""
    path = plan.request.path
    return FusedLora(
        name=path.name,
        sha256=sha256_of(path),
        size=path.stat().st_size,
        component=plan.component,
        dialect=plan.dialect or "",
        strength=plan.request.strength,
        scale=plan.scale,
        modules=plan.modules,
        applied=plan.applied,
        ignored={**plan.ignored, **plan.harmless},
        origin=plan.request.origin,
        alpha=plan.request.alpha,
        notes=plan.notes,
    )


def record_parent(base: Checkpoint, digests: Mapping[Path, str]) -> Parent | None:
    """The recipe of a base that is itself a fused checkpoint; `digests` are those of its weight files as just read.

    Raises:
        CheckpointError: the weights are no longer those that its manifest describes.
    """
    manifest = base_manifest(base)
    if manifest is None:
        return None
    recorded = {record.path: record.sha256 for record in manifest.outputs}
    changed = [str(path) for path, digest in digests.items() if recorded.get(path.as_posix(), digest) != digest]
    if changed:
        raise CheckpointError(
            f"{base.label}: {', '.join(changed)} changed after it was fused, so its {MANIFEST_NAME} does not say what "
            "is in it. Fuse it again, or remove the manifest to take it as an ordinary base."
        )
    base_sha256 = weights_sha256(manifest.base, manifest.component)
    return Parent(manifest.fused_sha256, manifest.loras, manifest.parent, manifest.role, base_sha256)


def base_manifest(base: Checkpoint) -> Manifest | None:
    """The manifest of a base that is itself a fused checkpoint."""
    return read_manifest(base.folder)


def header_recipe(
    loras: Sequence[FusedLora], version: str, role: Role, schedule: Schedule | None, parent: str | None
) -> str:
    """The recipe in short, for the safetensors header of the fused files; `parent` identifies a base that was fused."""
    recipe = {
        "version": version,
        "loras": [{"name": lora.name, "sha256": lora.sha256, "strength": lora.strength} for lora in loras],
        "role": role.value,
        "schedule": dataclasses.asdict(schedule) if schedule else None,
        "parent": parent,
    }
    return json.dumps(recipe, ensure_ascii=False)


def difference(
    manifest: Manifest,
    plan: FusePlan,
    usage: tuple[Role, Schedule | None],
    allowed: Sequence[ProblemKind],
    progress: Callable[[int], object] | None = None,
) -> str | None:
    """In what a fused checkpoint is not what these inputs would give again, or None; cheap things are looked at first.

    Where the LoRA files are kept is no difference.
    """
    base, loras, paths = plan.base, plan.loras, input_paths(plan.bases)
    wanted = [(lora.request.path.name, lora.component, lora.request.strength, lora.scale) for lora in loras]
    sizes = [(path.as_posix(), (base.folder / path).stat().st_size) for path in paths]
    checks = (
        ("LoRAs", [(lora.name, lora.component, lora.strength, lora.scale) for lora in manifest.loras], wanted),
        ("component", manifest.component, base.component),
        ("role", manifest.role, usage[0]),
        ("schedule", manifest.schedule, usage[1]),
        ("--dtype or --rounding", (manifest.dtype, manifest.seed), (plan.dtype, plan.seed)),
        ("--allow", manifest.allowed, tuple(sorted(kind.value for kind in allowed))),
        ("base", [(record.path, record.size) for record in manifest.base], sizes),
    )
    for what, recorded, now in checks:
        if recorded != now:
            return what
    if [lora.sha256 for lora in manifest.loras] != [sha256_of(lora.request.path) for lora in loras]:
        return "LoRAs"
    return None if manifest.base == record_files(base.folder, paths, {}, progress) else "base"
