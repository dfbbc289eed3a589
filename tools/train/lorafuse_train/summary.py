"""The texts that tell a user what is about to be trained, and what to do with the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .adapter import FILE_NAME
from .base import Base, fused_loras
from .config import TrainConfig
from .data import Sample
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
    return (
        f"LoRA: rank {config.lora_rank}, alpha {config.alpha:g}, {len(targets.modules)} modules, "
        f"{targets.trainable(config.lora_rank):,} parameters\n{counts}{idle}"
    )


def describe_dataset(samples: Sequence[Sample]) -> str:
    """How many pictures of which sizes."""
    sizes = Counter(f"{width}x{height}" for height, width in (sample.size for sample in samples))
    shown = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(5))
    more = f", {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""
    return f"dataset: {len(samples)} pictures: {shown}{more}"


def describe_run(training: Training) -> str:
    """How long, how precisely, on what noise levels."""
    config, precision, order = training.plan.config, training.precision, training.order
    shifts = Counter(f"{shift:.4g}" for shift in training.shifts.values())
    levels = "uniform" if config.weighting_scheme == "none" else "logit-normal"
    computed = "bf16 autocast" if precision.autocast else "no autocast"
    return (
        f"training: {training.total_steps} steps ({order.steps_per_epoch} an epoch) of "
        f"{order.batch_size} x {order.accumulation} x {order.world} pictures (batch x accumulation x processes) "
        f"on {precision.device}, {computed} {precision.reason}\n"
        f"noise levels: {levels}, shift {', '.join(shifts)}"
    )


def describe_end(plan: Plan, schedules: Sequence[Schedule], size: tuple[int, int]) -> str:
    """Where everything is, and code that draws a picture of `size` (height, width) with the new LoRA."""
    out = plan.config.output_path
    code = "\n".join(f"  {line}" for line in usage(plan, schedules[0], size))
    return (
        f"LoRA:    {out / FILE_NAME}\n"
        f"samples: {out / 'samples.png'}\n"
        f"log:     {out / 'log.csv'}; tensorboard --logdir {out / 'logs'}\n"
        f"use it:\n{code}"
    )


def usage(plan: Plan, schedule: Schedule, size: tuple[int, int]) -> list[str]:
    """Lines of Python, complete but for a device: the pipeline with the new LoRA, at the schedule it is meant for."""
    base, guidance = plan.base, plan.recipe.guidance_arguments(schedule.guidance_scale)
    few = base.manifest.schedule if base.manifest else None
    transformer = ""
    imports = "DiffusionPipeline" + ", FlowMatchEulerDiscreteScheduler" * bool(few)
    if base.pipeline != base.folder:
        name = base.config["_class_name"]
        imports += f", {name}"
        transformer = f', transformer={name}.from_pretrained("{base.folder}", dtype={base.dtype})'
    steps = f"num_inference_steps={len(schedule.sigmas)}"
    lines = [
        f"import torch; from diffusers import {imports}",
        f'pipe = DiffusionPipeline.from_pretrained("{base.pipeline}", dtype={base.dtype}{transformer})',
        f'pipe.load_lora_weights("{plan.config.output_path}", weight_name="{FILE_NAME}")',
    ]
    if few:
        lines.append("pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # these sigmas are shifted already")
        steps += f", sigmas=[{', '.join(f'{sigma:.8g}' for sigma in schedule.sigmas)}]"
    call = f'"a prompt", height={size[0]}, width={size[1]}, {steps}, {guidance}'
    return [*lines, f"image = pipe({call}).images[0]"]
