"""`verify --deep`: plan the recorded fuse again and hold every tensor against base and LoRAs, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorafuse_common.errors import CheckpointError
from lorafuse_common.manifest import Manifest
from lorafuse_common.tensorfile import TensorFile, TensorRef, read_header

from .choices import LoraRequest, ProblemKind
from .deviation import Deviation, deviations
from .execute import check_factors
from .faults import Fault, FaultKind
from .fuse import HEADER_KEY
from .plan import ComponentPlan, FusePlan, open_bases, plan_fuse, without_damaged

_BLOCK_BYTES = 8 << 20
Progress = Callable[[int], object]


@dataclass(slots=True)
class Comparison:
    """What holding every tensor against base and LoRAs has found so far."""

    deviations: list[Deviation] = field(default_factory=list)
    """Of the edited tensors."""
    untouched: int = 0
    """Tensors that were found to be the base's, byte for byte."""
    faults: list[Fault] = field(default_factory=list)


def plan_again(manifest: Manifest, base: Path, files: Sequence[Path]) -> FusePlan:
    """The plan of a recorded fuse; `files` are its LoRAs in the manifest's order, all else comes from the manifest."""
    pairs = zip(files, manifest.loras, strict=True)
    requests = [LoraRequest(path, its.strength, its.component, its.alpha) for path, its in pairs]
    passed = {kind for its in manifest.loras for kind in its.ignored}
    plan = plan_fuse(
        open_bases(base, None, requests),
        requests,
        plain_fp8=ProblemKind.UNEDITABLE_DTYPE not in passed,
        dtype=manifest.dtype,
        seed=manifest.seed,
    )
    return without_damaged(plan, check_factors(plan)) if ProblemKind.NOT_FINITE in passed else plan


def plan_faults(plan: FusePlan, manifest: Manifest) -> list[Fault]:
    """Where the plan is not what the manifest says was done."""
    faults = []
    for lora, recorded in zip(plan.loras, manifest.loras, strict=True):
        now = f"{lora.applied} of {lora.modules} modules at scale {lora.scale or '-'}"
        then = f"{recorded.applied} of {recorded.modules} modules at scale {recorded.scale or '-'}"
        if now != then:
            detail = f"would be applied as {now}; was recorded as {then}"
            faults.append(Fault(FaultKind.OTHER_PLAN, recorded.name, detail))
    planned = {(component.base.component, name) for component in plan.components for name in component.patches}
    changed = {(change.component, change.name) for change in manifest.changes}
    for its, detail in ((planned - changed, "the LoRAs change it, the manifest lists no change of it"),
                        (changed - planned, "the manifest lists a change of it, the LoRAs make none")):  # fmt: skip
        faults += [Fault(FaultKind.OTHER_PLAN, name, detail) for _, name in sorted(its, key=str)]
    return faults


def compare(plan: FusePlan, folder: Path, progress: Progress) -> Comparison:
    """Every tensor of a fused folder against base and LoRAs; memory is for one tensor at a time."""
    found = Comparison()
    for component in plan.components:
        pairs = list(_file_pairs(component, folder, found.faults))
        fused = {ref.name: ref for _, file in pairs for ref in file.tensors.values()}
        for source, _ in pairs:
            for ref in source.tensors.values():
                _compare_tensor(component, ref, fused, found)
                progress(ref.nbytes)
    return found


def _file_pairs(component: ComponentPlan, folder: Path, faults: list[Fault]) -> Iterator[tuple[TensorFile, TensorFile]]:
    """Each weight file of the base with the fused one, where that can be read; faults of headers on the way."""
    for source in component.base.files:
        path = source.path.relative_to(component.base.folder)
        try:
            fused = read_header(folder / path)
        except CheckpointError as error:
            faults.append(Fault(FaultKind.HEADER, path.as_posix(), str(error)))
            continue
        details = _header_faults(component, source, fused)
        faults += [Fault(FaultKind.HEADER, path.as_posix(), detail) for detail in details]
        yield source, fused


def _header_faults(component: ComponentPlan, source: TensorFile, fused: TensorFile) -> Iterator[str]:
    """Tensors and metadata of a fused file's header that are not what the base's lead to."""
    if lacking := [name for name in source.tensors if name not in fused.tensors]:
        yield f"lacks {len(lacking)} tensors of the base's (first: {lacking[0]})"
    if added := [name for name in fused.tensors if name not in source.tensors]:
        yield f"has {len(added)} tensors that the base's has not (first: {added[0]})"
    if not lacking and not added and (source.header_order, [*source.tensors]) != (fused.header_order, [*fused.tensors]):
        yield "has its tensors in another order than the base's"
    for name, ref in source.tensors.items():
        made, wanted = fused.tensors.get(name), component.stored_as(ref)
        if made and (made.dtype, made.shape) != wanted:
            yield f"{name} is {made.dtype} {list(made.shape)}, should be {wanted.dtype} {list(wanted.shape)}"
    kept = {key: text for key, text in fused.metadata.items() if key != HEADER_KEY}
    if kept != {key: text for key, text in source.metadata.items() if key != HEADER_KEY}:
        yield "has another __metadata__ than the base's"


def _compare_tensor(
    component: ComponentPlan, ref: TensorRef, fused: Mapping[str, TensorRef], found: Comparison
) -> None:
    made = fused.get(ref.name)
    if made is None or (made.dtype, made.shape) != component.stored_as(ref) or ref.name in component.scale_owners:
        return  # a fault of the header; or a scale, which is compared with its weight
    if ref.name not in component.patches:
        at = first_difference(ref, made)
        if at is None:
            found.untouched += 1
        else:
            detail = f"differs from the base at its byte {at}, and no LoRA changes it"
            found.faults.append(Fault(FaultKind.UNTOUCHED, ref.name, detail))
        return
    scale = component.scales.get(ref.name)
    if ref.numel and (scale is None or scale.ref.name in fused):
        its = deviations(component, ref, fused)
        found.deviations += its
        found.faults += [Fault(FaultKind.DEVIATION, each.name, _describe(each)) for each in its if each.is_fault]


def _describe(deviation: Deviation) -> str:
    return (
        f"is up to {deviation.ulps:g} units in the last place of {deviation.dtype} ({deviation.absolute:g}) away from "
        f"base + LoRAs; rounding gives {deviation.limit:g}"
    )


def first_difference(first: TensorRef, second: TensorRef) -> int | None:
    """Where the bytes of two tensors of one size differ; None where they are the same."""
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        for start in range(0, first.nbytes, _BLOCK_BYTES):
            count = min(_BLOCK_BYTES, first.nbytes - start)
            left, right = one.read(count), other.read(count)
            if left != right:
                return start + next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), 0)
    return None


def stored_alike(first: TensorRef, second: TensorRef) -> bool:
    """Whether two tensors of one shape have the same dtype and bytes."""
    return first.dtype == second.dtype and first_difference(first, second) is None
