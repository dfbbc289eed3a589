"""What a fuse writes down: the inputs' records, the few-step schedule, and whether an output is up to date."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lorafuse_common.checkpoint import Checkpoint, side_files
from lorafuse_common.errors import CheckpointError, ConfigError
from lorafuse_common.hashing import sha256_of
from lorafuse_common.manifest import MANIFEST_NAME, FileRecord, FusedLora, Manifest, Parent, Schedule, read_manifest

from .fit import ProblemKind
from .plan import FusePlan, LoraPlan

SCHEDULE_KEY = "few_step_schedule"
"""Header key of a LoRA that states its schedule: JSON with `sigmas` and `guidance_scale`."""


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
            f"{base.root}: {', '.join(changed)} changed after it was fused, so its {MANIFEST_NAME} no longer says what "
            "is in it. Fuse it again, or remove the manifest to take it as an ordinary base."
        )
    return Parent(manifest.fused_sha256, manifest.loras, manifest.parent)


def base_manifest(base: Checkpoint) -> Manifest | None:
    """The manifest of a base that is itself a fused checkpoint."""
    return read_manifest(base.folder)


def header_recipe(loras: Sequence[FusedLora], version: str) -> str:
    """The recipe in short, for the safetensors header of the fused files."""
    recipe = [{"name": lora.name, "sha256": lora.sha256, "strength": lora.strength} for lora in loras]
    return json.dumps({"version": version, "loras": recipe}, ensure_ascii=False)


def resolve_schedule(asked: str, loras: Sequence[LoraPlan], base: Checkpoint) -> Schedule | None:
    """The few-step schedule: `auto` (a LoRA's header, else the parent's manifest), `none`, or sigmas "1,0.9,0.75,0.5".

    Raises:
        ConfigError: the text is no schedule, or two LoRAs state different ones.
    """
    if asked == "none":
        return None
    if asked != "auto":
        return _schedule(asked.split(","), 1.0, "--schedule")
    found = [_stated_schedule(lora) for lora in loras if SCHEDULE_KEY in lora.metadata]
    if len({(schedule.sigmas, schedule.guidance_scale) for schedule in found}) > 1:
        texts = [f"{schedule.source}: {list(schedule.sigmas)}" for schedule in found]
        raise ConfigError(f"the LoRAs state different few-step schedules ({'; '.join(texts)}); choose with --schedule")
    if found:
        return found[0]
    parent = base_manifest(base)
    return parent.schedule if parent else None


def _stated_schedule(lora: LoraPlan) -> Schedule:
    name = lora.request.path.name
    try:
        stated = json.loads(lora.metadata[SCHEDULE_KEY])
        return _schedule(stated["sigmas"], float(stated.get("guidance_scale", 1.0)), name)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{name}: its header's {SCHEDULE_KEY} is no schedule ({error}); say it with --schedule, or --schedule none"
        ) from error


def _schedule(values: Sequence[object], guidance_scale: float, source: str) -> Schedule:
    try:
        sigmas = tuple(float(str(value)) for value in values)
    except ValueError:
        sigmas = ()
    falls = all(a > b for a, b in itertools.pairwise(sigmas))
    if not sigmas or not falls or not all(math.isfinite(s) and 0 < s <= 1 for s in sigmas):
        raise ConfigError(
            f"{source}: {','.join(map(str, values))!r} is no schedule; expected falling noise levels "
            'between 1 and 0 such as "1,0.9,0.75,0.5", or auto, or none'
        )
    return Schedule(sigmas, guidance_scale, source)


def is_up_to_date(
    manifest: Manifest,
    plan: FusePlan,
    allowed: Sequence[ProblemKind],
    schedule: Schedule | None,
    progress: Callable[[int], object] | None = None,
) -> bool:
    """Whether a fused checkpoint is what these inputs would give again; cheap differences are looked at first."""
    base, loras, paths = plan.base, plan.loras, input_paths(plan.bases)
    wanted = [(lora.request.path.name, lora.component, lora.request.strength, lora.scale) for lora in loras]
    if (
        [(lora.name, lora.component, lora.strength, lora.scale) for lora in manifest.loras] != wanted
        or manifest.component != base.component
        or manifest.schedule != schedule
        or (manifest.dtype, manifest.seed) != (plan.dtype, plan.seed)
        or manifest.allowed != tuple(sorted(kind.value for kind in allowed))
        or [(record.path, record.size) for record in manifest.base]
        != [(path.as_posix(), (base.folder / path).stat().st_size) for path in paths]
    ):
        return False
    return [lora.sha256 for lora in manifest.loras] == [sha256_of(lora.request.path) for lora in loras] and (
        manifest.base == record_files(base.folder, paths, {}, progress)
    )
