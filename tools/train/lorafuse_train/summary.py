"""The texts that tell a user what is about to be trained, and what to do with the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .adapter import FILE_NAME
from .base import Base, absent_parts, fused_loras
from .config import TrainConfig
from .data import Sample
from .ranks import module_strengths, trainable
from .sample import Schedule
from .targets import Targets

if TYPE_CHECKING:
    from .loop import Training  # these two print the texts below
    from .plan import Plan


def describe_base(base: Base) -> str:
    """What was fused, and how it samples."""
    dtype = str(base.dtype).removeprefix("torch.")
    if base.manifest is None:
        return f"base: {base.folder} ({base.family.title}, {dtype}), nothing fused"
    loras = ", ".join(f"{lora.name} x {lora.strength:g}" for lora in fused_loras(base.manifest)) or "no LoRA"
    few = base.manifest.schedule
    steps = f"; {len(few.sigmas)}-step schedule" if few else ""
    return f"base: {base.folder} ({base.family.title}, {dtype}), fused: {loras}{steps}"


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


def describe_dataset(samples: Sequence[Sample]) -> str:
    """How many pictures of which sizes."""
    sizes = Counter(f"{width}x{height}" for height, width in (sample.size for sample in samples))
    shown = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(5))
    more = f", {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""
    return f"dataset: {len(samples)} pictures: {shown}{more}"


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


def usage(plan: Plan, schedule: Schedule, size: tuple[int, int]) -> list[str]:
    """Lines of Python, complete but for a device: the pipeline with the new LoRA, at the schedule it is meant for."""
    base, guidance = plan.base, plan.recipe.guidance_arguments(schedule.guidance_scale)
    few = base.manifest.schedule if base.manifest else None
    parts = "".join(f", {part}=None" for part in absent_parts(base.pipeline, plan.recipe))
    imports = "DiffusionPipeline" + ", FlowMatchEulerDiscreteScheduler" * bool(few)
    if base.pipeline != base.folder:
        name = base.config["_class_name"]
        imports += f", {name}"
        parts += f', transformer={name}.from_pretrained("{base.folder}", dtype={base.dtype})'
    steps = f"num_inference_steps={len(schedule.sigmas)}"
    lines = [
        f"import torch; from diffusers import {imports}",
        f'pipe = DiffusionPipeline.from_pretrained("{base.pipeline}", dtype={base.dtype}{parts})',
        f'pipe.load_lora_weights("{plan.config.output_path}", weight_name="{FILE_NAME}")',
    ]
    if few:
        lines.append("pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # these sigmas are shifted already")
        steps += f", sigmas=[{', '.join(f'{sigma:.8g}' for sigma in schedule.sigmas)}]"
    call = f'prompt="a prompt", height={size[0]}, width={size[1]}, {steps}, {guidance}'
    return [*lines, f"image = pipe({call}).images[0]"]
