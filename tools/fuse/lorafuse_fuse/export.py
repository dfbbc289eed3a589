"""`lorafuse export`: one LoRA for the original base that holds what was fused and what was trained on it.

The fused folder has the names and shapes of the original, so that all LoRAs are planned onto it, whatever their
dialects and layouts; what they add to each tensor is then added up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafuse_common import __version__
from lorafuse_common.checkpoint import Checkpoint, open_checkpoint
from lorafuse_common.errors import CheckpointError, ConfigError, PlanError
from lorafuse_common.hashing import sha256_of
from lorafuse_common.manifest import FusedLora, Manifest, Role, find_lora
from lorafuse_common.tensorfile import read_header

from .choices import LoraRequest, ProblemKind
from .fuse import HEADER_KEY, require_clean
from .plan import FusePlan, plan_fuse, without_damaged

if TYPE_CHECKING:
    from .lora_out import Target

_OUR_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A fused LoRA and its file."""

    lora: FusedLora
    path: Path


@dataclass(frozen=True, slots=True)
class Layer:
    """One tensor of the result."""

    module: str
    parameter: str
    ranks: int
    """All ranks that went into it; 0 where a sum was dense."""
    rank: int
    """What was written; 0 for a vector."""
    error: float | None
    """What compression took away, relative to the whole delta; None where it took nothing."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    out: Path
    loras: tuple[FusedLora, ...]
    """Those that were fused, the first fuse first."""
    layers: tuple[Layer, ...]
    skipped: tuple[str, ...]
    """Tensors that the LoRAs change, that are no matrices and were left out."""
    nbytes: int


def lora_file(path: Path) -> Path:
    """The LoRA that a path means: the file, or the one in a training's output folder.

    Raises:
        ConfigError: there is no such file, or several.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; expected the new LoRA")
        return path
    found = [path / name for name in _OUR_NAMES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:3]) or "no .safetensors file"
        raise ConfigError(f"{path}: is a folder with {names}; name the LoRA's file")
    return found[0]


def ingredients(
    folder: Path, manifest: Manifest, component: str | None, given: Sequence[Path]
) -> tuple[tuple[Ingredient, ...], tuple[FusedLora, ...]]:
    """The fused LoRAs that stay, with their files, the first fuse first; and those that are scaffolds.

    Raises:
        ConfigError: naming every file that is not found, or that was given and was not fused.
    """
    fused = [(role, lora) for role, loras in reversed(manifest.lineage) for lora in loras]
    ours = [(role, lora) for role, lora in fused if lora.component in (None, component)]
    digests = {path: sha256_of(path) for path in given if path.is_file()}
    faults = [f"--lora {path}: no such file" for path in given if path not in digests]
    known = {lora.sha256 for _, lora in fused}
    faults += [f"--lora {path}: was not fused into {folder}" for path, digest in digests.items() if digest not in known]
    found, dropped = [], []
    for role, lora in ours:
        path = next((p for p, digest in digests.items() if digest == lora.sha256), None) or find_lora(lora, folder)
        if role is Role.SCAFFOLD:
            dropped.append(lora)
        elif path is None:
            where = f"; it came from {lora.origin.uri}" if lora.origin else ""
            faults.append(f"{lora.name} (sha256 {lora.sha256[:12]}...) is not found: give it with --lora FILE{where}")
        else:
            found.append(Ingredient(lora, path))
    if faults:
        raise ConfigError("\n".join(["the fused LoRAs are needed to add them up:", *(f"  {f}" for f in faults)]))
    return tuple(found), tuple(dropped)


def require_trained_on(path: Path, folder: Path, manifest: Manifest, *, allowed: bool) -> str | None:
    """Make sure that a new LoRA was trained on this fused checkpoint; what is said where its header does not tell.

    Raises:
        ConfigError: its header says that it was trained on another one.
    """
    try:
        record = json.loads(read_header(path).metadata[HEADER_KEY])
        trained = record["fused_sha256"]
    except CheckpointError as error:
        raise ConfigError(f"{path}: cannot be read as a LoRA: {error}") from error
    except (KeyError, TypeError, ValueError):
        return f"note: {path.name} does not say what it was trained on; it is taken to be {folder}"
    if trained == manifest.fused_sha256:
        return None
    text = (
        f"{path}: was trained on another base (sha256 {str(trained)[:12]}...) than {folder} "
        f"({manifest.fused_sha256[:12]}...)"
    )
    if not allowed:
        raise ConfigError(f"{text}. Give the fused folder that it was trained on, or --allow-base-mismatch")
    return f"note: {text}"


def plan_sum(base: Checkpoint, found: Sequence[Ingredient], new: LoraRequest, component: str | None) -> FusePlan:
    """All LoRAs fitted to the base, each as it was when it was fused.

    Raises:
        PlanError: the new LoRA does not fit, or a fused one would be applied otherwise than was recorded.
    """
    requests = [LoraRequest(its.path, its.lora.strength, component, its.lora.alpha) for its in found]
    plan = plan_fuse(base, [*requests, replace(new, component=component)], plain_fp8=True)
    passed = {request.label: set(its.lora.ignored) for request, its in zip(requests, found, strict=True)}
    problems = [p for p in plan.problems if p.kind.value not in passed.get(p.lora, ())]
    require_clean(replace(plan, problems=tuple(problems)), None)
    for its, now in zip(found, plan.loras, strict=False):
        lost = its.lora.ignored.get(ProblemKind.NOT_FINITE.value, 0)
        if (now.applied - lost, now.scale) != (its.lora.applied, its.lora.scale):
            raise PlanError(
                f"{its.path}: would be applied as {now.applied} modules at scale {now.scale}; it was fused as "
                f"{its.lora.applied} at {its.lora.scale}. A configuration beside the file may have changed"
            )
    if any(ProblemKind.NOT_FINITE.value in its.lora.ignored for its in found):
        from .execute import check_factors

        return without_damaged(plan, check_factors(plan))
    return plan


def export(
    folder: Path,
    manifest: Manifest,
    new: LoraRequest,
    found: Sequence[Ingredient],
    target: Target,
    *,
    component: str | None,
    rank: int | None,
) -> Exported:
    """Write the sum of all LoRAs as one for the original base.

    Raises:
        PlanError: some of them cannot be added up; says which and why.
        ConvertError, OutputError: it cannot be written so, or there.
    """
    from .lora_out import Vectors, require_place, require_same_origin, require_vectors, write_lora
    from .merge import merged, modules_of, obstacles
    from .progress import ByteProgress

    base = open_checkpoint(folder, component)
    plan = plan_sum(base, found, new, component)
    only = plan.components[0]
    if lines := obstacles(only, rank):
        raise PlanError(
            "\n".join(["nothing was written: what the LoRAs do together is no LoRA:", *(f"  {line}" for line in lines)])
            + "\nlorafuse extract FUSED --base BASE --rank N approximates what was fused, whatever it was"
        )
    modules = modules_of(base)
    require_place(target.out, [new.path, *(its.path for its in found), *(file.path for file in base.files)])
    metadata = _metadata(manifest, found, new, base, rank)
    require_same_origin(target, metadata)
    vectors = tuple(name for name in only.patches if not modules[name].is_matrix)
    require_vectors(vectors, target)
    skipped = vectors if target.vectors is Vectors.SKIP else ()
    if len(skipped) == len(only.patches):
        raise PlanError("nothing was written: the LoRAs change no matrices, and --vectors skip leaves out the rest")
    total = sum(ref.nbytes for patches in only.patches.values() for p in patches for ref in p.module.factors.values())
    sums = []
    with ByteProgress("adding up", total) as progress:
        for name, patches in only.patches.items():
            if name not in skipped:
                sums.append(merged(modules[name], patches, rank))
            progress(sum(ref.nbytes for patch in patches for ref in patch.module.factors.values()))
    nbytes = write_lora(sums, base, target, metadata)
    layers = tuple(
        Layer(its.module.name, its.module.parameter, its.ranks, its.pair.rank if its.pair else 0, its.error)
        for its in sums
    )
    return Exported(target.out, tuple(its.lora for its in found), layers, skipped, nbytes)


def _metadata(
    manifest: Manifest, found: Sequence[Ingredient], new: LoraRequest, base: Checkpoint, rank: int | None
) -> Mapping[str, str]:
    """What the header says: for which weights it is, and what is in it."""
    parts: list[dict[str, Any]] = [
        {"name": its.lora.name, "sha256": its.lora.sha256, "strength": its.lora.strength} for its in found
    ]
    parts.append({"name": new.path.name, "sha256": sha256_of(new.path), "strength": new.strength})
    record = {
        "version": __version__,
        "family": base.family.name if base.family else None,
        "fused_sha256": manifest.original_of(base.component),
        "fused_loras": [],
        "sum_of": parts,
        "exported_from": manifest.fused_sha256,
        "compressed_to_rank": rank,
    }
    title = " + ".join(Path(part["name"]).stem for part in parts)
    kept = {key: text for key, text in read_header(new.path).metadata.items() if key in _KEPT_KEYS}
    return {**kept, "modelspec.title": title, HEADER_KEY: json.dumps(record, ensure_ascii=False)}


_KEPT_KEYS = ("modelspec.trigger_phrase", "ss_tag_frequency", "modelspec.architecture", "modelspec.sai_model_spec")
"""What of the new LoRA's header holds for the sum as well."""
