"""What keeps the few-step ability, put together: from the plan to what the loop uses, with what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_train.base import original_transformer
from lorafuse_train.console import say
from lorafuse_train.dataset.data import Prompt
from lorafuse_train.dataset.order import seed_for
from lorafuse_train.encoding.encode import Encodings
from lorafuse_train.few_step.objective_base import (
    ObjectiveBase,
    leftover,
    load_objective,
    original_weights,
    recorded_leftover,
)
from lorafuse_train.few_step.preserve import Preservation, usual_samples
from lorafuse_train.few_step.trajectories import Request, Trajectories, choose_folder, compute_missing, locate
from lorafuse_train.plan import Plan
from lorafuse_train.precision import Precision
from lorafuse_train.samples.gallery import choose_schedules

MIB = 2**20


def prepare(
    plan: Plan, encodings: Encodings, transformer: Any, precision: Precision, accelerator: Accelerator
) -> tuple[ObjectiveBase, Preservation | None]:
    """The weights that the training loss runs through, and the second loss, for a transformer without a new LoRA."""
    objective = load_objective(plan.objective, transformer, plan.base.dtype, precision.device)
    preservation = None
    if plan.preserving:
        trajectories = _trajectories(plan, encodings, precision)
        preservation = Preservation(plan.preserving, trajectories, encodings, plan.recipe)
        if accelerator.is_main_process:
            texts = [encodings.condition(prompt) for prompt in plan.preserving.prompts]
            negative = [encodings.condition(prompt) for prompt in negatives(plan)]
            compute_missing(trajectories, plan.recipe, transformer, (texts, negative), precision)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        say(_describe_objective(plan, objective, transformer))
        if plan.objective.taken_off:
            say(_describe_leftover(plan, encodings, transformer, objective, precision))
        if plan.preserving:
            say(_describe_preserving(plan))
    return objective, preservation


def prompts_to_encode(plan: Plan) -> list[Prompt]:
    """What the encodings must hold besides the dataset's captions and the samples' prompts."""
    return [*plan.preserving.prompts, *negatives(plan)] if plan.preserving else []


def negatives(plan: Plan) -> list[Prompt]:
    """The negative prompt of each of the preservation prompts, whose controls it shares."""
    assert plan.preserving
    text = plan.config.validation_negative_prompt
    return [replace(prompt, caption=text) for prompt in plan.preserving.prompts]


def _trajectories(plan: Plan, encodings: Encodings, precision: Precision) -> Trajectories:
    """Where the trajectories that the training preserves lie."""
    assert plan.preserving
    latent = tuple(encodings.latents(usual_samples(plan.samples)[0]).shape)
    few, *_ = choose_schedules(plan.config, plan.base, plan.recipe, latent)
    request = Request(plan.preserving.prompts, few, latent, plan.config.validation_negative_prompt)
    root = choose_folder(plan.base.folder, plan.config.cache)
    return locate(root, request, plan.base.fused_sha256, encodings.cache, precision, str(plan.base.dtype))


def _describe_objective(plan: Plan, objective: ObjectiveBase, transformer: Any) -> str:
    chosen = plan.objective
    weights = "fused weights without a part of what was fused" if chosen.leaves_some else f"{chosen.base} weights"
    text = f"training loss: through the {weights}, {chosen.reason}"
    if objective.fused:
        names = ", ".join(f"{source.path.name} x {-source.strength:g}" for source in chosen.taken_off)
        # A token costs a layer as many products as it has weights, and a LoRA as many as it has.
        base = sum(parameter.numel() for parameter in transformer.parameters())
        more = sum(a.numel() + b.numel() for a, b in objective.fused.factors.values()) / base
        text += f"; taken off: {names} ({objective.fused.nbytes / MIB:.1f} MiB, about {more:.0%} more time a step)"
        if len(chosen.taken_off) > 1 and not chosen.leaves_some:
            text += "\n  if one of them alone brought the few steps, say so: --objective_base without:NAME"
    if objective.original:
        size = objective.original.nbytes / MIB
        text += f"; {len(objective.original.pairs)} tensors of {chosen.original} are kept beside ({size:.1f} MiB)"
    if chosen.adapter:
        text += f"\n  with {chosen.adapter.path.name} x {chosen.adapter.strength:g}, which samples are without"
    return text


def _describe_preserving(plan: Plan) -> str:
    assert plan.preserving
    keeping = plan.preserving
    prompts = len({prompt.caption for prompt in keeping.prompts})
    return (
        f"preservation: weight {keeping.weight:g} {keeping.reason}, on {len(keeping.prompts)} trajectories of "
        f"{prompts} prompts; for {keeping.share:.0%} of the pictures another pass, so steps take about "
        f"{keeping.share:.0%} longer"
    )


def _describe_leftover(
    plan: Plan, encodings: Encodings, transformer: Any, objective: ObjectiveBase, precision: Precision
) -> str:
    """How near the fused weights without the fused LoRAs come to the original ones: rounding stays."""
    manifest, original = plan.base.manifest, plan.config.original_model
    assert manifest
    fused = open_checkpoint(plan.base.transformer)
    if original is None or plan.objective.leaves_some:
        share = recorded_leftover(manifest, fused)
        return f"  exact but for rounding: {share:.2%} of what the last fuse changed, by lorafuse.json"
    folder = original_transformer(original, plan.base.component)
    share = leftover(plan.objective.taken_off, fused, open_checkpoint(folder))
    text = f"  what rounding left of them: {share:.2%} of what they changed in the weights of {original}"
    whole = sum(parameter.nbytes for parameter in transformer.parameters())
    if precision.device.type == "cuda" and torch.cuda.mem_get_info(precision.device)[0] < 1.2 * whole:
        return text  # no room for the original weights
    gap, change = velocity_gap(plan, encodings, transformer, objective, precision)
    return f"{text}, and {gap / change:.2%} in a velocity"


@torch.no_grad()
def velocity_gap(
    plan: Plan, encodings: Encodings, transformer: Any, objective: ObjectiveBase, precision: Precision
) -> tuple[float, float]:
    """|v' - v| and |v_fused - v| at one state halfway, v' through the fused weights without the LoRAs, v through
    those of `--original_model`."""
    assert plan.config.original_model
    folder = original_transformer(plan.config.original_model, plan.base.component)
    sample = usual_samples(plan.samples)[0]
    x0 = encodings.latents(sample)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed_for("leftover")))
    x = (0.5 * x0 + 0.5 * noise)[None].to(precision.device)
    condition = plan.recipe.collate([encodings.condition(sample.prompt)])

    def velocity() -> Tensor:
        with precision.compute():
            return plan.recipe.predict(transformer, x, torch.full((1,), 0.5, device=x.device), condition).float()

    fused = velocity()
    with objective.in_use():
        minus = velocity()
    with original_weights(folder, transformer).swapped_in():
        original = velocity()
    return float((minus - original).norm()), float((fused - original).norm())
