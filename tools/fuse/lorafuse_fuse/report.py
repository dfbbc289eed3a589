"""What a fuse tells its user: problems, plan and result, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafuse_common.checkpoint import Checkpoint, foreign_weights
from lorafuse_common.manifest import Manifest, Role

from .choices import ProblemKind
from .findings import WEAK_GAIN, Advice, Findings, findings_of
from .plan import FusePlan, LoraPlan, Problem
from .progress import size_text

_NAMES_SHOWN = 3
_RUNTIME_BYTES = 300 << 20
"""Python and torch (220 MB once imported) with what their allocators keep; set so that the estimate is not exceeded."""
_ADVICE = {
    ProblemKind.NO_SUCH_MODULE: "Check that the LoRA is for this model.",
    ProblemKind.SHAPE_MISMATCH: "Check that the LoRA is for this size of the model.",
    ProblemKind.SCALE_CONFLICT: "Remove the wrong source (the alphas, the header entry or adapter_config.json).",
    ProblemKind.INCOMPLETE_MODULE: "Download the file again.",
    ProblemKind.NO_EFFECT: "The fused checkpoint would equal its base.",
    ProblemKind.ALREADY_FUSED: "Otherwise leave it out.",
}
_ALLOWING = {
    ProblemKind.OTHER_COMPONENT: "To fuse only the transformer's part, add --allow OTHER_COMPONENT.",
    ProblemKind.DUPLICATE_MODULE: "If both say the same, keep the first: --allow DUPLICATE_MODULE.",
}


def describe_problems(plan: FusePlan, problems: Sequence[Problem], *, can_allow: bool = True) -> str:
    """All problems grouped by LoRA and kind, with counts, first names and the likeliest cause.

    `can_allow`: whether the command has `--allow`.
    """
    advice = _ADVICE | _ALLOWING if can_allow else _ADVICE
    lines = [f"nothing was written: {len(problems)} problem{'s' if len(problems) > 1 else ''}"]
    for name, lora in {lora.request.label: lora for lora in plan.loras}.items():
        ours = [problem for problem in problems if problem.lora == name]
        if not ours:
            continue
        if ours[0].kind is ProblemKind.NOT_A_LORA:
            lines.append(ours[0].detail)
            continue
        lines.append(f"{name}: {lora.applied} of {lora.modules} modules can be applied to {plan.base.label}")
        if lora.cause:
            lines.append(f"  likeliest cause: {lora.cause}")
        for kind in dict.fromkeys(problem.kind for problem in ours):
            lines += _describe_kind(kind, [problem for problem in ours if problem.kind is kind], advice.get(kind, ""))
    kinds = sorted({problem.kind.value for problem in problems} - {ProblemKind.NOT_A_LORA.value})
    if kinds and can_allow:
        lines.append(
            f"to let a kind pass (what does not fit is then left out): {' '.join(f'--allow {kind}' for kind in kinds)}"
        )
    return "\n".join(lines)


def _describe_kind(kind: ProblemKind, problems: Sequence[Problem], advice: str) -> list[str]:
    if kind in (ProblemKind.NO_EFFECT, ProblemKind.ALREADY_FUSED):
        return [f"  {kind}: {problem.detail}. {advice}".rstrip() for problem in problems]
    names = ", ".join(problem.subject for problem in problems[:_NAMES_SHOWN])
    more = f", and {len(problems) - _NAMES_SHOWN} more" if len(problems) > _NAMES_SHOWN else ""
    return [f"  {len(problems)} x {kind}: {names}{more}", f"    {problems[0].detail}. {advice}".rstrip()]


def describe_plan(plan: FusePlan) -> str:
    """A few lines: the base, each LoRA, what will change."""
    base = plan.base
    layout = f", {base.layout.name} layout" if base.layout else ""
    lines = [f"base   {base.label}: {base.title}{layout}, {base.form}, {size_text(base.nbytes)}"]
    lines += [_describe_lora(lora, base) for lora in plan.loras]
    for component in plan.components:
        where = f" of {component.base.component}" if len(plan.components) > 1 else ""
        lines.append(f"change {len(component.patches)} of {len(component.base.tensors)} tensors{where}")
        lines += [
            f"widen  {name} from {list(component.base.tensors[name].shape)} to {list(shape)}, new columns zero"
            for name, shape in component.widened.items()
        ]
    if left := foreign_weights(plan.bases):
        lines.append(f"leave  {', '.join(map(str, left))}: weights beside the transformer's, which would not be fused")
    return "\n".join(lines)


def _describe_lora(lora: LoraPlan, base: Checkpoint) -> str:
    where = f" into {lora.component}" if lora.component not in (None, "transformer") else ""
    names = f", {lora.layout} names" if base.layout and lora.layout != base.layout.name else ""
    passed = "".join(f", {count} x {kind} not applied" for kind, count in lora.ignored.items())
    passed += "".join(f", {count} harmlessly not: {reason}" for reason, count in lora.harmless.items())
    notes = "".join(f"\n       note: {note}" for note in lora.notes)
    return (
        f"lora   {lora.request.path.name}{where}: {lora.dialect}{names}, strength {lora.request.strength:g}, "
        f"scale {lora.scale or '-'}, {lora.applied} of {lora.modules} modules{passed}{notes}"
    )


def describe_result(manifest: Manifest, seconds: float, remedies: Sequence[Advice] = ()) -> str:
    """What was made, how well the deltas survived rounding, and what can be done for those that did not."""
    found = findings_of(manifest)
    lines = [_summary(manifest, found, seconds)]
    if found.ratio is not None:
        lines.append(f"delta/weight median {found.ratio:.2%}")
    elif manifest.changes:
        lines.append("weights were zero")
    if found.weak:
        least = found.weak[0]
        lines.append(
            f"{len(found.weak)} tensors kept less than {100 * WEAK_GAIN:g} % of their delta after rounding "
            f"(least: {least.gain:.2g} in {least.name}){'; what helps:' if remedies else ''}"
        )
        lines += [f"  {remedy.what}: {remedy.why}" for remedy in remedies]
    if manifest.schedule:
        sigmas = ", ".join(f"{sigma:g}" for sigma in manifest.schedule.sigmas)
        lines.append(
            f"few-step schedule ({manifest.schedule.source}): {len(manifest.schedule.sigmas)} steps at {sigmas}"
        )
    if manifest.role is Role.SCAFFOLD:
        lines.append("role scaffold: a LoRA trained on it is for the model that the LoRAs were fused into")
    return "\n".join(lines)


def _summary(manifest: Manifest, found: Findings, seconds: float) -> str:
    """One line for grep: every number in it is there in every fuse."""
    count = len(manifest.loras)
    return (
        f"lorafuse: fused {found.applied}/{found.modules} modules of {count} LoRA{'s' if count != 1 else ''} "
        f"into {len(manifest.changes)} tensors, gain median {found.gain if found.gain is not None else 1:.3f}, "
        f"{len(found.weak)} tensors below {WEAK_GAIN:g}, {size_text(found.nbytes)}, {seconds:.1f} s"
    )


def plan_json(plan: FusePlan) -> dict[str, Any]:
    """The plan as `--json` prints it."""
    base = plan.base
    return {
        "family": base.family.name if base.family else None,
        "layout": base.layout.name if base.layout else None,
        "origin": base.origin.uri if base.origin else None,
        "targets": sum(len(component.patches) for component in plan.components),
        "loras": [
            {
                "path": str(lora.request.path),
                "origin": lora.request.origin.uri if lora.request.origin else None,
                "component": lora.component,
                "dialect": lora.dialect,
                "layout": lora.layout,
                "strength": lora.request.strength,
                "scale": lora.scale,
                "notes": list(lora.notes),
                "modules": lora.modules,
                "applied": lora.applied,
                "ignored": dict(lora.ignored),
                "harmless": dict(lora.harmless),
            }
            for lora in plan.loras
        ],
        "problems": [
            {"kind": problem.kind.value, "lora": problem.lora, "subject": problem.subject, "detail": problem.detail}
            for problem in plan.problems
        ],
        "output_bytes": plan.output_nbytes,
        "peak_memory_bytes": peak_memory_bytes(plan),
    }


def peak_memory_bytes(plan: FusePlan) -> int:
    """An estimate from headers: the runtime, the pieces, and the factors of the widest edited tensors in fp32."""
    from .blocks import EDIT_BLOCK_ELEMENTS, PIECE_BYTES, SPARE_PIECES, default_workers

    refs = [ref for component in plan.components for ref in component.base.modules.values() if 0 not in ref.shape]
    widest_row = max((ref.numel // (ref.shape[0] if ref.shape else 1) for ref in refs), default=0)
    workers = default_workers()
    scratch = workers * 3 * 4 * max(EDIT_BLOCK_ELEMENTS, widest_row)
    factors = max(
        (
            sum(2 * 4 * ref.numel for patch in patches for ref in patch.module.factors.values())
            for component in plan.components
            for patches in component.patches.values()
        ),
        default=0,
    )
    return _RUNTIME_BYTES + (workers + SPARE_PIECES) * PIECE_BYTES + scratch + 2 * factors
