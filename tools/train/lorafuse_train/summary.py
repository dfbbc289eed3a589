"""The texts that tell a user what is about to be trained, and what to do with the result."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lorafuse_train.base import Base, absent_parts, fused_loras
from lorafuse_train.dataset.data import Sample
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.lora.lora_file import load_arguments
from lorafuse_train.lora.ranks import module_strengths, trainable
from lorafuse_train.lora.targets import Targets
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.recipes.recipe import Recipe
from lorafuse_train.samples.sample import Schedule
from lorafuse_train.video_usage import fixed_sigmas, pipeline_class, takes_sigmas, video_lines

if TYPE_CHECKING:
    from lorafuse_train.plan import Plan
    from lorafuse_train.steps.loop import Training  # these two print the texts below


def describe_base(base: Base) -> str:
    """What was fused, and how it samples."""
    dtype = str(base.dtype).removeprefix("torch.")
    expert = f"\n  training {base.expert}" if base.expert else ""
    if base.manifest is None:
        return f"base: {base.folder} ({base.family.title}, {dtype}), nothing fused{expert}"
    loras = ", ".join(f"{lora.name} x {lora.strength:g}" for lora in fused_loras(base.manifest)) or "no LoRA"
    few = base.manifest.schedule
    steps = f"; {len(few.sigmas)}-step schedule" if few else ""
    return f"base: {base.folder} ({base.family.title}, {dtype}), fused: {loras}{steps}{expert}"


def describe_targets(targets: Targets, config: TrainConfig) -> str:
    """The matches of every pattern, and the size of the LoRA."""
    counts = "\n".join(f"  {pattern:<24} {count:>4}" for pattern, count in targets.counts.items())
    idle = f"\n  left out, for nothing reads their output: {', '.join(targets.idle)}" if targets.idle else ""
    kind = "DoRA" if config.use_dora else "LoRA"
    strengths = Counter((s.rank, s.alpha, s.scale) for s in module_strengths(targets, config).values())
    groups = [
        f"rank {rank}, alpha {alpha:g}" + (f", scale {scale:.4g}" if scale != 1 else "")
        for rank, alpha, scale in strengths
    ]
    if len(groups) > 1:
        groups = [f"{count} of {group}" for group, count in zip(groups, strengths.values(), strict=True)]
    return (
        f"{kind}: {'; '.join(groups)}, {len(targets.modules)} modules, "
        f"{trainable(targets, config):,} parameters\n{counts}{idle}"
    )


def describe_dataset(samples: Sequence[Sample], recipe: Recipe) -> str:
    """How many pictures and videos of which sizes, and how many controls they have."""
    sizes = Counter(
        f"{width}x{height}" + (f"x{frames}" if frames > 1 else "")
        for frames, height, width in (sample.shape for sample in samples)
    )
    shown = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(5))
    more = f", {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""
    videos = sum(sample.excerpt is not None for sample in samples)
    counted = {"pictures": len(samples) - videos, "videos": videos}
    what = " and ".join(f"{count} {name}" for name, count in counted.items() if count)
    return f"dataset: {what}: {shown}{more}{_describe_controls(samples, recipe)}"


def _describe_controls(samples: Sequence[Sample], recipe: Recipe) -> str:
    counts = Counter(len(sample.controls) for sample in samples)
    if not any(counts):
        is_for_edits = recipe.controls[1] and recipe.name != recipe.family
        return "\n  no control pictures (column edit_image): it learns to draw from text alone" if is_for_edits else ""
    sizes = Counter(f"{width}x{height}" for sample in samples for height, width in (c.size for c in sample.controls))
    each = ", ".join(f"{number} for {count}" for number, count in sorted(counts.items()))
    shown = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(5))
    more = f", {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""
    return f"\n  control pictures: {each}; seen as {shown}{more}"


def describe_run(training: Training) -> str:
    """How long, how precisely, on what noise levels."""
    precision, order = training.precision, training.order
    computed = "bf16 autocast" if precision.autocast else "no autocast"
    return (
        f"training: {training.total_steps} steps ({order.steps_per_epoch} an epoch) of "
        f"{order.batch_size} x {order.accumulation} x {order.world} pictures (batch x accumulation x processes) "
        f"on {precision.device}, {computed} {precision.reason}\n"
        f"{describe_noise(training.plan)}"
    )


def describe_noise(plan: Plan) -> str:
    """Which noise levels are drawn, and how they count."""
    config, levels = plan.config, plan.levels
    density = "uniform" if levels.is_uniform else f"logit-normal ({levels.mean:g}, {levels.std:g})"
    shifts = ", ".join(sorted({f"{shift:.4g}" for shift in plan.shifts.values()}))
    few = f"{', '.join(f'{sigma:g}' for sigma in levels.few)}, as lorafuse.json records"
    parts = {0.0: f"{density}, shift {shifts}", 1.0: few}
    drawn = parts.get(levels.few_share, f"{parts[0.0]}; for {levels.few_share:.0%} {few}")
    between = f", from {levels.low:g} to {levels.high:g}" if (levels.low, levels.high) != (0, 1) else ""
    weighting = f"; loss weighted by {config.loss_weighting}" if config.loss_weighting != "none" else ""
    return f"noise levels: {drawn}{between}{weighting}"


def describe_end(plan: Plan, schedules: Sequence[Schedule], size: tuple[int, int]) -> str:
    """Where everything is, and code that draws a picture of `size` (height, width) with the new LoRA."""
    out = plan.config.output_path
    board = f"; tensorboard --logdir {out / 'logs'}" if "tensorboard" in plan.config.report_to else ""
    code = "\n".join(f"  {line}" for line in usage(plan, schedules[0], size))
    return (
        f"LoRA:    {out / FILE_NAME}\n"
        f"samples: {out / 'samples.png'}\n"
        f"metrics: {out / 'metrics.csv'}{board}\n"
        f"use it:\n{code}"
    )


class Places(NamedTuple):
    """Where code finds what it loads."""

    pipeline: str
    fused: str
    """The same, or a bare transformer."""
    lora: str


def _shown_controls(plan: Plan, size: tuple[int, int], *, by_name: bool) -> str:
    """Python for the control pictures of a sample of that size; nothing where there are none, or videos are drawn."""
    having = [sample for sample in plan.samples if sample.controls]
    if not having or plan.recipe.frame_step:
        return ""
    chosen = next((sample for sample in having if sample.size == size), having[0])
    paths = [control.path.name if by_name else str(control.path) for control in chosen.controls]
    loaded = [f"load_image({json.dumps(path, ensure_ascii=False)})" for path in paths]
    return loaded[0] if len(loaded) == 1 else f"[{', '.join(loaded)}]"


def usage(plan: Plan, schedule: Schedule, size: tuple[int, int], places: Places | None = None) -> list[str]:
    """Lines of Python, complete but for a device: the pipeline with the new LoRA, at the schedule it is meant for.

    Without `places`, everything is where this run has it.
    """
    base, guidance = plan.base, plan.recipe.guidance_arguments(schedule.guidance_scale)
    here = Places(str(base.pipeline), str(base.folder), str(plan.config.output_path))
    pipeline, fused, lora = (json.dumps(place, ensure_ascii=False) for place in places or here)
    few = base.manifest.schedule if base.manifest else None
    parts = "".join(f", {part}=None" for part in absent_parts(base.pipeline, plan.recipe))
    loader = pipeline_class(plan)
    imports = loader + ", FlowMatchEulerDiscreteScheduler" * bool(few)
    if base.pipeline != base.folder:
        name = base.config["_class_name"]
        imports += f", {name}"
        parts += f", {base.component}={name}.from_pretrained({fused}, dtype={base.dtype})"
    into = "".join(f", {name}={value}" for name, value in load_arguments(base.component).items())
    steps = f"num_inference_steps={len(schedule.sigmas)}"
    lines = [
        f"import torch; from diffusers import {imports}",
        f"pipe = {loader}.from_pretrained({pipeline}, dtype={base.dtype}{parts})",
        f'pipe.load_lora_weights({lora}, weight_name="{FILE_NAME}"{into})',
    ]
    if few:
        lines.append("pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # these sigmas are shifted already")
        sigmas = f"sigmas=[{', '.join(f'{sigma:.8g}' for sigma in schedule.sigmas)}]"
        if takes_sigmas(base.pipeline):
            steps += f", {sigmas}"
        else:
            lines += fixed_sigmas(sigmas)
    call = f'prompt="a prompt", {plan.recipe.size_arguments(*size)}, {steps}, {guidance}'
    controls = _shown_controls(plan, size, by_name=places is not None)
    if controls:
        lines[0] += "; from diffusers.utils import load_image"
        call = f"image={controls}, {call}"
    if plan.recipe.frame_step:
        return [*lines, *video_lines(call, plan)]
    return [*lines, f"image = pipe({call}).images[0]"]
