"""What a fuse will do: a pure function of headers and alphas that accounts for every tensor of every LoRA."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorafuse_common.algebras import Shape
from lorafuse_common.checkpoint import Checkpoint, open_checkpoint
from lorafuse_common.errors import CheckpointError, ConfigError
from lorafuse_common.quantised import Fp8Scale, packed_format
from lorafuse_common.tensorfile import DTYPE_BITS, Stored, TensorRef

from .choices import LoraRequest, ProblemKind
from .entries import LoraPlan, Patch, Problem
from .fit import Ground, ground_of
from .lora_plan import plan_lora

__all__ = [
    "ComponentPlan",
    "FusePlan",
    "LoraPlan",
    "Patch",
    "Problem",
    "blocking",
    "open_bases",
    "plan_fuse",
    "without_damaged",
]


@dataclass(frozen=True, slots=True)
class ComponentPlan:
    """What becomes of the tensors of one transformer."""

    base: Checkpoint
    patches: Mapping[str, tuple[Patch, ...]]
    """Tensor of the base -> what is added to it, in the order of the LoRAs."""
    scales: Mapping[str, Fp8Scale]
    """Tensor -> its scale, for scaled fp8 weights."""
    widened: Mapping[str, Shape]
    """Tensor -> the shape it gets, where a LoRA brings more input columns."""
    stored: Mapping[str, Stored] = field(default_factory=dict)
    """Tensor -> how it is stored, where that changes."""
    seed: int | None = None
    """Of stochastic rounding; None rounds to the nearest."""
    loras: int = 1
    """How many LoRAs the fuse has, those for another component included."""

    @property
    def scale_owners(self) -> dict[str, str]:
        """Scale tensor -> the edited fp8 weight that it belongs to."""
        return {self.scales[name].ref.name: name for name in self.patches if name in self.scales}

    @property
    def added_bytes(self) -> int:
        """By how much the output's tensors are larger than the base's."""
        return sum(
            math.prod(stored.shape) * DTYPE_BITS[stored.dtype] // 8 - self.base.tensors[name].nbytes
            for name, stored in self.stored.items()
        )

    def stored_as(self, ref: TensorRef) -> Stored:
        """How a tensor is stored in the output."""
        return self.stored.get(ref.name, Stored(ref.dtype, ref.shape))


@dataclass(frozen=True, slots=True)
class FusePlan:
    """Everything that `execute` will do."""

    components: tuple[ComponentPlan, ...]
    """One, or both experts of a pipeline that has two."""
    loras: tuple[LoraPlan, ...]
    problems: tuple[Problem, ...]
    dtype: str | None = None
    """What edited tensors are stored as; None for what they are."""
    seed: int | None = None
    """Of stochastic rounding; None rounds to the nearest."""

    @property
    def bases(self) -> tuple[Checkpoint, ...]:
        """The transformers that are fused."""
        return tuple(component.base for component in self.components)

    @property
    def base(self) -> Checkpoint:
        """The first component's checkpoint: its root and form are those of all."""
        return self.components[0].base

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files that are read."""
        return sum(component.base.nbytes for component in self.components)

    @property
    def output_nbytes(self) -> int:
        """Bytes that the weight files will have, but for what is added to their headers."""
        return self.nbytes + sum(component.added_bytes for component in self.components)

    @property
    def patches(self) -> tuple[Patch, ...]:
        """All patches of all tensors."""
        return tuple(p for component in self.components for patches in component.patches.values() for p in patches)


def open_bases(root: Path, component: str | None, requests: Sequence[LoraRequest]) -> tuple[Checkpoint, ...]:
    """The transformers that the LoRAs are for, in the order in which they are named.

    Raises:
        CheckpointError: one is not there, cannot be read, or has a packed format.
    """
    named = dict.fromkeys(request.component or component for request in requests)
    bases = tuple(open_checkpoint(root, name) for name in named)
    for base in bases:
        if packed := packed_format(base.tensors):
            raise CheckpointError(
                f"{base.root}: is quantised ({packed}), and such packed weights cannot be edited. "
                "Fuse into the bf16 or fp16 checkpoint and quantise the result."
            )
    return bases


def plan_fuse(
    bases: Checkpoint | Sequence[Checkpoint],
    requests: Sequence[LoraRequest],
    *,
    plain_fp8: bool = False,
    dtype: str | None = None,
    seed: int | None = None,
) -> FusePlan:
    """Look every module of every LoRA up in its base; nothing is written and no factor is read.

    Of several bases, a request is for that of its component. Edited tensors are stored as `dtype` (the safetensors
    spelling; None keeps theirs), rounded to the nearest, or stochastically with a `seed`.

    Raises:
        ConfigError: another dtype is asked for scaled fp8 weights. What does not fit is no error but a problem.
    """
    grounds = [ground_of(base, plain_fp8) for base in ([bases] if isinstance(bases, Checkpoint) else bases)]
    patches: list[dict[str, list[Patch]]] = [{} for _ in grounds]
    widened: list[dict[str, Shape]] = [{} for _ in grounds]
    plans, problems = [], []
    for place, request in enumerate(requests):
        index = next((i for i, g in enumerate(grounds) if request.component == g.base.component), 0)
        planned = plan_lora(grounds[index], requests, place)
        plans.append(planned.plan)
        problems += planned.problems
        for tensor, shape in planned.widened.items():
            widened[index][tensor] = max(shape, widened[index].get(tensor, shape))
        for tensor, patch in planned.patches:
            patches[index].setdefault(tensor, []).append(patch)
    components = tuple(
        replace(
            _component(ground, {name: tuple(ps) for name, ps in found.items()}, wide, dtype, seed), loras=len(requests)
        )
        for ground, found, wide in zip(grounds, patches, widened, strict=True)
    )
    return FusePlan(components, tuple(plans), tuple(problems), dtype, seed)


def _component(
    ground: Ground,
    patches: Mapping[str, tuple[Patch, ...]],
    widened: Mapping[str, Shape],
    dtype: str | None,
    seed: int | None,
) -> ComponentPlan:
    if dtype and (scaled := [name for name in patches if name in ground.scales]):
        raise ConfigError(
            f"--dtype: {scaled[0]} and {len(scaled) - 1} more are fp8 weights with scales, which stay fp8; "
            "fuse into the bf16 or fp32 checkpoint to store another dtype"
        )
    tensors = ground.base.tensors
    stored = {name: Stored(dtype or tensors[name].dtype, widened.get(name, tensors[name].shape)) for name in patches}
    changed = {name: its for name, its in stored.items() if its != (tensors[name].dtype, tensors[name].shape)}
    return ComponentPlan(ground.base, patches, ground.scales, widened, changed, seed)


def blocking(problems: Sequence[Problem], allowed: Collection[ProblemKind]) -> tuple[Problem, ...]:
    """The problems that the user did not allow; a file that is no LoRA cannot be allowed."""
    passing = set(allowed) - {ProblemKind.NOT_A_LORA}
    return tuple(problem for problem in problems if problem.kind not in passing)


def without_damaged(plan: FusePlan, problems: Sequence[Problem]) -> FusePlan:
    """The plan less the modules that turned out to be damaged, for a user who allows that."""
    damaged = {(p.lora, p.subject) for p in problems if p.kind is ProblemKind.NOT_FINITE}
    if not damaged:
        return plan

    def intact(component: ComponentPlan) -> ComponentPlan:
        kept = {
            name: tuple(patch for patch in its if (patch.lora, patch.module.stem) not in damaged)
            for name, its in component.patches.items()
        }
        patches = {name: its for name, its in kept.items() if its}
        stored = {name: its for name, its in component.stored.items() if name in patches}  # the others stay as they are
        widened = {name: shape for name, shape in component.widened.items() if name in patches}
        return replace(component, patches=patches, stored=stored, widened=widened)

    counts = Counter(lora for lora, _ in damaged)
    loras = tuple(
        replace(lora, applied=lora.applied - lost, ignored={**lora.ignored, ProblemKind.NOT_FINITE.value: lost})
        if (lost := counts[lora.request.label])
        else lora
        for lora in plan.loras
    )
    return replace(plan, loras=loras, components=tuple(map(intact, plan.components)))
