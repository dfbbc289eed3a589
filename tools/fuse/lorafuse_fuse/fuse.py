"""The walk of a fuse: plan, check, write into a staging folder, record, publish."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafuse_common import __version__
from lorafuse_common.checkpoint import Form, side_files
from lorafuse_common.errors import LorafuseError, ManifestError, OutputError, PlanError
from lorafuse_common.hashing import remember, remembered, sha256_of, stat_identity
from lorafuse_common.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    FileRecord,
    Manifest,
    Role,
    Schedule,
    dump_manifest,
    read_manifest,
    verify_manifest,
)
from lorafuse_common.publish import publish, real_path, recover
from lorafuse_common.tensorfile import read_header

from .adjust import adjusted_files
from .blocks import default_workers
from .carry import SMALL_BYTES, carry
from .choices import Components, KeepLoras, ProblemKind
from .keep import Keeper, kept_nbytes
from .plan import FusePlan, blocking, without_damaged
from .progress import ByteProgress, size_text
from .record import (
    base_manifest,
    difference,
    header_recipe,
    input_paths,
    record_files,
    record_lora,
    record_parent,
)
from .report import describe_problems
from .watch import require_names_of_text, require_unchanged, watch_inputs

HEADER_KEY = "lorafuse"


@dataclass(frozen=True, slots=True)
class FuseOptions:
    """How to fuse, apart from what."""

    out: Path
    allowed: tuple[ProblemKind, ...] = ()
    schedule: Schedule | None = None
    components: Components = Components.LINK
    force: bool = False
    widen_inputs: bool = False
    workers: int | None = None
    """Threads that edit; None for as many as there are cores, up to a limit. The result is the same."""
    device: str = "cpu"
    """Where to do the arithmetic: `cpu` or `cuda`."""
    role: Role = Role.DEPLOY
    keep_loras: KeepLoras = KeepLoras.COPY


@dataclass(frozen=True, slots=True)
class FuseResult:
    """What a fuse made, or found already made."""

    manifest: Manifest
    seconds: float
    up_to_date: bool


def require_clean(plan: FusePlan, allowed: Sequence[ProblemKind] | None) -> None:
    """Raise PlanError with all problems that the user did not allow; None: where nothing can be allowed."""
    if stopping := blocking(plan.problems, allowed or ()):
        raise PlanError(describe_problems(plan, stopping, can_allow=allowed is not None))


def require_widening(plan: FusePlan) -> None:
    """Raise PlanError where the plan changes the shape of the model, for a user who has not said that it may."""
    names = [f"{name} to {list(shape)}" for component in plan.components for name, shape in component.widened.items()]
    if names:
        raise PlanError(
            f"nothing was written: a LoRA brings more input channels than {plan.base.label} has, and would widen "
            f"{', '.join(names)}; the fused model then takes that many channels. Add --widen-inputs to do so."
        )


def check_out(plan: FusePlan, out: Path) -> None:
    """Refuse an output that would touch an input.

    Raises:
        OutputError: `out` is, holds or lies inside the base or a LoRA's place, or is no folder name.
    """
    if out.suffix == ".safetensors":
        raise OutputError(
            f"--out {out}: is a file name; --out names a folder, in which the fused file keeps the base's name"
        )
    final, base = real_path(out), plan.base.root.resolve()
    if final.is_mount():
        raise OutputError(f"--out {out}: is where a disk is mounted, and cannot be replaced; name a folder in it")
    if final == base or (base.is_dir() and base in final.parents):
        raise OutputError(f"--out {out}: is or lies inside the base {plan.base.label}; the base is never changed")
    for path in (base, *(lora.request.path.resolve() for lora in plan.loras)):
        if final in path.parents:
            raise OutputError(f"--out {out}: holds the input {path.name}, which would be lost; choose another folder")


def fuse(plan: FusePlan, options: FuseOptions) -> FuseResult:
    """Carry out a clean plan, or find that `options.out` already is its result.

    The shape of the model is changed only where `options.widen_inputs` says so.

    Raises:
        PlanError, OutputError, CheckpointError: see the messages; nothing is left under `options.out` then.
    """
    started = time.monotonic()
    if not options.widen_inputs:
        require_widening(plan)
    require_names_of_text(plan)
    watched = watch_inputs(plan)
    recover(options.out)
    seen = folder_identity(options.out)
    if seen and (existing := _existing(plan, options)):
        return FuseResult(existing, time.monotonic() - started, up_to_date=True)
    _check_space(plan, options)
    from .execute import check_device

    check_device(options.device)
    with _named_faults(options.out), publish(options.out, replace=True) as staging:
        if folder_identity(options.out) != seen:  # nobody else can have the lock now
            raise OutputError(f"{options.out}: was changed by another run meanwhile; run again to see what it is now")
        try:
            manifest = _write(_checked(plan, options), options, staging)
        except Exception:
            require_unchanged(watched)  # the better reason: what went wrong may well come of it
            raise
        require_unchanged(watched)
        (staging / MANIFEST_NAME).write_text(dump_manifest(manifest), encoding="utf-8")
    remember({plan.base.folder / record.path: record.sha256 for record in manifest.base}, watched)
    remember({options.out / record.path: record.sha256 for record in manifest.outputs})
    return FuseResult(manifest, time.monotonic() - started, up_to_date=False)


@contextlib.contextmanager
def _named_faults(out: Path) -> Iterator[None]:
    """One line for whatever stops the writing; what is no user's error keeps its traceback as its cause."""
    try:
        yield
    except LorafuseError:
        raise
    except MemoryError as error:
        raise OutputError(f"{out}: nothing was written: there is not enough memory") from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise OutputError(f"{out}: nothing was written: {error.strerror or error}{where}") from error
    except Exception as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())
        raise OutputError(f"{out}: nothing was written, for a fault in lorafuse itself: {fault[:500]}") from error


def folder_identity(out: Path) -> str | None:
    """What tells one output from the one that replaces it; None where there is none."""
    try:
        return stat_identity(out)
    except OSError:
        return None


def _checked(plan: FusePlan, options: FuseOptions) -> FusePlan:
    """The plan less the damaged factors that the user lets pass; reads all of them."""
    from .execute import check_factors

    problems = check_factors(plan)
    if stopping := blocking(problems, options.allowed):
        raise PlanError(describe_problems(plan, stopping))
    return without_damaged(plan, problems)


def _existing(plan: FusePlan, options: FuseOptions) -> Manifest | None:
    """The manifest of an up-to-date output; None where it may be replaced."""
    out = options.out
    if out.is_dir() and not any(out.iterdir()):
        return None
    if not (out / MANIFEST_NAME).is_file():
        raise OutputError(
            f"{out}: exists and is no fused checkpoint (it has no {MANIFEST_NAME}), so it is not replaced. "
            "Choose another --out, or remove it yourself."
        )
    try:
        manifest = read_manifest(out)
        with ByteProgress("checking inputs", plan.nbytes) as progress:
            usage = (options.role, options.schedule)
            other = difference(manifest, plan, usage, options.allowed, progress) if manifest else None
        if manifest and not other:
            verify_manifest(out, manifest, hashes=options.force)
            return manifest
    except ManifestError:
        if options.force:
            return None
        raise
    if options.force:
        return None
    raise OutputError(
        f"{out}: is a fused checkpoint of other inputs (what differs: {other or 'its manifest'}). "
        "Choose another --out, or replace it with --force."
    )


def _check_space(plan: FusePlan, options: FuseOptions) -> None:
    from .execute import free_bytes

    needed, free = plan.output_nbytes, free_bytes(real_path(options.out).parent)
    needed += kept_nbytes(plan, base_manifest(plan.base), options.keep_loras)
    for path in side_files(plan.bases):
        size = (plan.base.root / path).stat().st_size
        needed += size if options.components is Components.COPY or size <= SMALL_BYTES else 0
    if needed > free:
        raise OutputError(f"{options.out}: needs {size_text(needed)}, its disk has {size_text(free)} free")


def _write(plan: FusePlan, options: FuseOptions, staging: Path) -> Manifest:
    """Fill the staging folder and return its manifest, which the caller writes last."""
    from .execute import Written, write_fused

    base = plan.base
    keeper = Keeper(options.keep_loras, staging, real_path(options.out))
    loras = tuple(keeper.file_of(record_lora(lora), lora.request.path) for lora in plan.loras)
    earlier = base_manifest(base)
    origin = earlier.fused_sha256 if earlier else None
    recipe = header_recipe(loras, __version__, options.role, options.schedule, origin)
    sources: dict[Path, str] = {}
    outputs: dict[Path, FileRecord] = {}
    written: list[Written] = []
    with ByteProgress("fusing", plan.nbytes) as progress:
        for component, file in [(c, file) for c in plan.components for file in c.base.files]:
            path = file.path.relative_to(base.folder)
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            done = write_fused(
                component,
                file,
                {**file.metadata, HEADER_KEY: recipe},
                staging / path,
                progress,
                workers=options.workers or default_workers(),
                known_sha256=remembered(file.path),
                device=options.device,
            )
            read_header(staging / path)  # raises where what was written does not fit its header
            sources[path] = done.source_sha256
            outputs[path] = FileRecord(path.as_posix(), done.output_sha256, done.output_size)
            written.append(done)
    outputs.update(_carry_over(plan, options, staging))
    return Manifest(
        schema=SCHEMA,
        version=__version__,
        family=base.family.name if base.family else None,
        layout=base.layout.name if base.layout else None,
        component=base.component,
        base=record_files(base.folder, input_paths(plan.bases), sources),
        loras=loras,
        allowed=tuple(sorted(kind.value for kind in options.allowed)),
        dtype=plan.dtype,
        seed=plan.seed,
        schedule=options.schedule,
        outputs=tuple(outputs[path] for path in sorted(outputs, key=str)),
        changes=tuple(change for done in written for change in done.changes),
        parent=keeper.parent_of(record_parent(base, sources), base.folder),
        origin=base.origin,
        role=options.role,
    )


def _carry_over(plan: FusePlan, options: FuseOptions, staging: Path) -> Mapping[Path, FileRecord]:
    """Bring every other file along; a carried file has its source's hash."""
    base = plan.base
    if base.form is Form.FILE:
        return {}
    paths = side_files(plan.bases)
    total = sum((base.root / path).stat().st_size for path in paths)
    with ByteProgress("carrying over and hashing the other components", total) as progress:
        for path in paths:
            carry(base.root / path, staging / path, options.out / path, options.components)
            sha256_of(base.root / path, progress)
    records = dict(zip(paths, record_files(base.root, paths, {}), strict=True))
    adjusted = adjusted_files(plan.components)
    for path, text in adjusted.items():
        (staging / path).write_text(text, encoding="utf-8")
    return records | dict(zip(adjusted, record_files(staging, tuple(adjusted), {}), strict=True))
