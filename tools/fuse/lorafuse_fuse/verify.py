"""`lorafuse verify`: whether a fused checkpoint is what its manifest says, and on request what base and LoRAs give."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_common.errors import CheckpointError, ConfigError, ManifestError
from lorafuse_common.hashing import BLOCK_BYTES, remember, stat_identity
from lorafuse_common.manifest import (
    KEPT_FOLDER,
    MANIFEST_NAME,
    FileRecord,
    FusedLora,
    Manifest,
    find_lora,
    read_manifest,
)

from .faults import Fault, FaultKind
from .progress import ByteProgress, size_text

if TYPE_CHECKING:
    from .deviation import Deviation

_WORST_SHOWN = 3


@dataclass(frozen=True, slots=True)
class GivenLora:
    """A LoRA that a fused checkpoint is said to be made of."""

    path: Path
    strength: float | None = None
    """None where it was not stated."""
    component: str | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, and every fault."""

    folder: Path
    files: int
    nbytes: int
    is_deep: bool
    """Whether that was asked for."""
    base: Path | None
    loras: tuple[Path, ...]
    deviations: tuple[Deviation, ...] | None
    """Of the edited tensors; None where base and LoRAs were not added again."""
    untouched: int
    """Tensors that are the base's, byte for byte."""
    faults: tuple[Fault, ...]


def recorded(fused: Path) -> tuple[Path, Manifest]:
    """The folder of a fused checkpoint, which may be named by a file in it, and its manifest.

    Raises:
        ManifestError: there is no manifest, or it is broken.
    """
    folder = fused if fused.is_dir() else fused.parent
    manifest = read_manifest(folder)
    if manifest is None:
        raise ManifestError(f"{fused}: is no fused checkpoint: there is no {MANIFEST_NAME} in {folder}")
    return folder, manifest


def verify(
    folder: Path, manifest: Manifest, base: Path | None, loras: Sequence[GivenLora], *, deep: bool = False
) -> Verification:
    """Hash every file of a fused checkpoint, and its base and LoRAs where they are given; `deep` adds them up again.

    Digests are computed, never remembered ones. Where no LoRA is given, `deep` takes the copies that were kept.

    Raises:
        ConfigError: `deep` without the base, or without LoRAs.
    """
    if deep and not loras:
        kept = [(its, find_lora(its, folder)) for its in manifest.loras]
        loras = [GivenLora(path, None, its.component) for its, path in kept if path]
    if deep and (base is None or not loras):
        names = " ".join(f"--lora {lora.name}" for lora in manifest.loras)
        raise ConfigError(f"--deep adds the LoRAs up again, so it needs --base BASE {names}")
    records = (*manifest.outputs, *_kept_records(manifest))
    faults = [*_file_faults(folder, records, "verifying", None), *_loaded_faults(folder, manifest)]
    inputs = list(_base_faults(base, manifest)) if base else []
    matched, others = match_loras(manifest.loras, loras, all_needed=deep)
    inputs += others
    found: tuple[Deviation, ...] | None = None
    untouched = 0
    if deep and base and not inputs:
        from .deep import compare, plan_again, plan_faults

        plan = plan_again(manifest, base, matched)
        faults += plan_faults(plan, manifest)
        with ByteProgress("adding up again", plan.nbytes) as progress:
            compared = compare(plan, folder, progress)
        faults += compared.faults
        found, untouched = tuple(compared.deviations), compared.untouched
    nbytes = sum(record.size for record in manifest.outputs)
    paths = tuple(lora.path for lora in loras)
    return Verification(folder, len(manifest.outputs), nbytes, deep, base, paths, found, untouched, (*faults, *inputs))


def fresh_sha256(path: Path, progress: Callable[[int], object]) -> str:
    """Hex sha256 of a file as it is now; the memory of hashes learns it and is not asked."""
    identity = stat_identity(path)
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            progress(len(block))
    if stat_identity(path) == identity:
        remember({path: digest.hexdigest()})
    return digest.hexdigest()


def _kept_records(manifest: Manifest) -> tuple[FileRecord, ...]:
    """The copies of LoRAs in the fused folder."""
    files = {its.file: its for _, loras in manifest.lineage for its in loras if its.file}
    kept = {file: its for file, its in files.items() if PurePosixPath(file).parts[0] == KEPT_FOLDER}
    return tuple(FileRecord(file, its.sha256, its.size) for file, its in kept.items())


def _file_faults(folder: Path, records: Sequence[FileRecord], label: str, kind: FaultKind | None) -> Iterator[Fault]:
    """Recorded files that are missing or differ; all faults are of one `kind` where one is given."""
    with ByteProgress(label, sum(record.size for record in records)) as progress:
        for record in records:
            if fault := _file_fault(folder, record, progress):
                yield Fault(kind or fault.kind, fault.subject, fault.detail)


def _file_fault(folder: Path, record: FileRecord, progress: Callable[[int], object]) -> Fault | None:
    path = folder / record.path
    if not path.is_file():
        return Fault(FaultKind.MISSING, record.path, f"is missing{' (a broken link)' if path.is_symlink() else ''}")
    try:
        if path.stat().st_size != record.size:
            detail = f"has {path.stat().st_size} bytes, {record.size} were recorded"
            return Fault(FaultKind.SIZE, record.path, detail)
        if fresh_sha256(path, progress) != record.sha256:
            return Fault(FaultKind.SHA256, record.path, "has another sha256 than recorded")
    except OSError as error:
        return Fault(FaultKind.MISSING, record.path, f"cannot be read: {error.strerror}")
    return None


def _loaded_faults(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Weight files that loading the folder would take and that were not recorded, such as one put beside the shards."""
    recorded = {record.path for record in manifest.outputs}
    if len(recorded) == 1:
        return  # a single file is loaded by its name
    for component in dict.fromkeys((manifest.component, *(lora.component for lora in manifest.loras))):
        try:
            files = open_checkpoint(folder, component).files
        except CheckpointError as error:
            yield Fault(FaultKind.HEADER, component or folder.name, str(error))
            continue
        for file in files:
            if (path := file.path.relative_to(folder).as_posix()) not in recorded:
                yield Fault(FaultKind.UNRECORDED, path, "would be loaded, and was not written by the fuse")


def _base_faults(base: Path, manifest: Manifest) -> Iterator[Fault]:
    """Files of the base that are not those that were fused into."""
    folder, records = base, manifest.base
    if base.is_file():  # its name does not matter
        folder = base.parent
        if len(records) != 1:
            yield Fault(FaultKind.OTHER_BASE, str(base), f"is one file; the base was a folder of {len(records)} files")
            return
        records = (FileRecord(base.name, records[0].sha256, records[0].size),)
    for fault in _file_faults(folder, records, "verifying the base", FaultKind.OTHER_BASE):
        yield Fault(fault.kind, f"base {fault.subject}", fault.detail)


def match_loras(
    recorded: Sequence[FusedLora], given: Sequence[GivenLora], *, all_needed: bool
) -> tuple[list[Path], list[Fault]]:
    """Which given file each recorded LoRA is, by sha256, and what does not agree."""
    faults, digests = [], {}
    with ByteProgress("verifying the LoRAs", sum(g.path.stat().st_size for g in given if g.path.is_file())) as progress:
        for lora in given:
            try:
                digests[lora] = fresh_sha256(lora.path, progress)
            except OSError as error:
                faults.append(Fault(FaultKind.OTHER_LORA, str(lora.path), f"cannot be read: {error.strerror}"))
    used: set[GivenLora] = set()
    matched = []
    for its in recorded:
        found = [lora for lora, digest in digests.items() if digest == its.sha256 and _may_be(lora, its)]
        best = min(found, key=lambda lora: (lora.strength not in (None, its.strength), lora in used), default=None)
        if best is None:
            if all_needed:
                detail = f"was fused (sha256 {its.sha256[:12]}...) and is not given"
                faults.append(Fault(FaultKind.OTHER_LORA, its.name, detail))
            continue
        used.add(best)
        matched.append(best.path)
        if best.strength not in (None, its.strength):
            detail = f"was fused with strength {its.strength:g}, not {best.strength:g}"
            faults.append(Fault(FaultKind.OTHER_STRENGTH, its.name, detail))
    for lora in digests:
        if lora not in used:
            faults.append(Fault(FaultKind.OTHER_LORA, str(lora.path), _why_not(lora, digests[lora], recorded)))
    return matched, faults


def _may_be(given: GivenLora, recorded: FusedLora) -> bool:
    return given.component in (None, recorded.component)


def _why_not(given: GivenLora, digest: str, recorded: Sequence[FusedLora]) -> str:
    same = [lora for lora in recorded if lora.sha256 == digest]
    if same and not any(_may_be(given, lora) for lora in same):
        return f"was fused into {same[0].component}, not {given.component}"
    if same:
        return f"is given more often than the {len(same)} times that it was fused"
    namesakes = [lora.sha256 for lora in recorded if lora.name == given.path.name]
    theirs = f": the one of this name has sha256 {namesakes[0][:12]}..." if namesakes else ""
    return f"is none of the LoRAs that were fused (sha256 {digest[:12]}...){theirs}"


def verification_json(found: Verification) -> dict[str, Any]:
    """The verification as `--json` prints it."""
    rows = [asdict(deviation) for deviation in found.deviations] if found.deviations is not None else None
    return {
        "path": str(found.folder),
        "good": not found.faults,
        "files": found.files,
        "bytes": found.nbytes,
        "base": str(found.base) if found.base else None,
        "loras": [str(path) for path in found.loras],
        "faults": [asdict(fault) for fault in found.faults],
        "deviations": rows,
        "untouched": found.untouched,
    }


def describe_verification(found: Verification) -> str:
    """One line for each thing that was checked and for each fault, and one with the verdict."""
    lines = [f"files  {found.files}, {size_text(found.nbytes)}, hashed"]
    if found.base or found.loras:
        inputs = [*([f"base {found.base}"] if found.base else []), *(path.name for path in found.loras)]
        lines.append(f"inputs {', '.join(inputs)}: hashed")
    if found.deviations is not None:
        lines.append(
            f"deep   {len(found.deviations)} tensors added up again in float64, "
            f"{found.untouched} compared with the base byte for byte"
        )
        worst = sorted(found.deviations, key=lambda deviation: -deviation.ulps)[:_WORST_SHOWN]
        lines += [f"       {d.ulps:g} ulp of {d.dtype} ({d.absolute:g}) at most in {d.name}" for d in worst]
    elif found.is_deep:
        lines.append("deep   not done: it would compare with other inputs than those that were fused")
    lines += [f"fault  {fault.kind}: {fault.subject}: {fault.detail}" for fault in found.faults]
    count = len(found.faults)
    verdict = "good" if not count else f"{count} fault{'s' if count > 1 else ''}"
    return "\n".join([*lines, f"lorafuse: verified {found.folder}: {verdict}"])
