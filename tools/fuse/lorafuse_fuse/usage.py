"""How a fused checkpoint is to be used: the role of its LoRAs and the few-step schedule, with what is said of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorafuse_common.checkpoint import Checkpoint, Form, read_json
from lorafuse_common.errors import ConfigError
from lorafuse_common.manifest import Manifest, Role, Schedule

from .entries import LoraPlan
from .few_step import Kind, Recognised, looks_few_step, recognise
from .record import base_manifest
from .schedule import checked_schedule, read_schedule

SCHEDULE_KEY = "few_step_schedule"
"""Header key of a LoRA that states its schedule: JSON with `sigmas` and `guidance_scale`."""
ROLE_KEY = "lorafuse.role"
"""Header key of a LoRA that states its role."""
_TITLES = ("modelspec.title", "ss_output_name", "title", "name")
"""Header keys that hold a LoRA's name."""
_COMMON_NAMES = (
    "high_noise_model",
    "low_noise_model",
    "diffusion_pytorch_model",
    "pytorch_lora_weights",
    "adapter_model",
    "model",
    "lora",
)
"""File names that say nothing, as many repositories use them."""
_OVERRIDE = 'say otherwise with --schedule "1,0.9,0.75,0.5", a file, or none'


@dataclass(frozen=True, slots=True)
class Usage:
    """What is recorded, and what the user is told of it."""

    role: Role
    schedule: Schedule | None
    remarks: tuple[str, ...]


def choose_usage(role: Role | None, schedule: str, loras: Sequence[LoraPlan], base: Checkpoint) -> Usage:
    """The role (None: what the LoRAs are recognised as) and the schedule (see `--schedule`).

    Raises:
        ConfigError: the schedule is none, LoRAs want different ones, or they have different roles.
    """
    remarks: list[str] = []
    chosen = role or _role(loras, base, remarks)
    if role is Role.DEPLOY and (adapters := [lora for lora in loras if _scaffold_sign(lora, base)]):
        remarks.append(
            f"note: {_names(adapters)} is a de-distill adapter, and is to stay at inference (--role deploy): the "
            "result needs many steps"
        )
    found = _schedule(chosen, schedule, loras, base, remarks)
    return Usage(chosen, found, tuple(remarks))


def _role(loras: Sequence[LoraPlan], base: Checkpoint, remarks: list[str]) -> Role:
    signs = [(lora, sign) for lora in loras if (sign := _scaffold_sign(lora, base))]
    if not signs:
        return Role.DEPLOY
    if len(signs) < len(loras):
        others = [lora for lora in loras if all(lora is not its for its, _ in signs)]
        raise ConfigError(
            f"{_names([lora for lora, _ in signs])} is for training only ({signs[0][1]}), {_names(others)} is not, and "
            "one fuse has one role. Fuse them one after the other, or say --role deploy or --role scaffold for both"
        )
    remarks.append(f"role scaffold: {signs[0][1]}; it is dropped at inference. If it is to stay, say --role deploy")
    return Role.SCAFFOLD


def _scaffold_sign(lora: LoraPlan, base: Checkpoint) -> str | None:
    """What says that a LoRA is there for the training only."""
    if lora.metadata.get(ROLE_KEY) == Role.SCAFFOLD.value:
        return f"the header of {lora.request.path.name} says so ({ROLE_KEY})"
    found = recognise(_names_of(lora), _family(base), (Kind.DEDISTILL,))
    return f"{lora.request.path.name} is {found[0].known.title}, by {found[0].where}" if found else None


def _names(loras: Sequence[LoraPlan]) -> str:
    return ", ".join(lora.request.path.name for lora in loras)


def _family(base: Checkpoint) -> str | None:
    return base.family.name if base.family else None


def _names_of(lora: LoraPlan) -> dict[str, str]:
    """Where a LoRA's names are found -> the names."""
    path, origin = lora.request.path, lora.request.origin
    names = {"its file name": path.stem}
    if path.stem in _COMMON_NAMES:  # the folder's name speaks for such a file, and only for such a one
        names["its name on the hub" if origin else "the name of its folder"] = (
            f"{origin.repo}/{origin.path}" if origin else f"{path.absolute().parent.name}/{path.stem}"
        )
    titles = {f"its header's {key}": lora.metadata[key] for key in _TITLES if lora.metadata.get(key)}
    return names | titles


def _schedule(
    role: Role, asked: str, loras: Sequence[LoraPlan], base: Checkpoint, remarks: list[str]
) -> Schedule | None:
    if asked == "none":
        return None
    if asked != "auto":
        stated = read_schedule(asked)
        return replace(stated, loras=_made_few_step(loras, base)) if role is Role.DEPLOY else stated
    found = [(lora, its) for lora in loras if (its := _of_lora(lora, base, remarks))]
    if role is Role.SCAFFOLD:
        remarks += [f"{lora.request.path.name}: its schedule is not recorded: it is a scaffold" for lora, _ in found]
        return _of_base(base, remarks)
    if taken := [lora for lora, _ in found if lora.request.strength <= 0]:
        remarks.append(f"{_names(taken)} is taken out of the base (negative strength): no few-step schedule is kept")
        found = [(lora, its) for lora, its in found if lora.request.strength > 0]
        if not found:
            return None
    if len({(_levels(its), its.guidance_scale) for _, its in found}) > 1:  # to 4 digits, as they are shown
        texts = [f"{lora.request.path.name}: {_levels(its)}" for lora, its in found]
        raise ConfigError(f"the LoRAs want different few-step schedules ({'; '.join(texts)}); choose with --schedule")
    if found:
        return replace(found[0][1], loras=_made_few_step(loras, base))
    if any(_scaffold_sign(lora, base) for lora in loras):
        return None
    return _of_base(base, remarks)


def _made_few_step(loras: Sequence[LoraPlan], base: Checkpoint) -> tuple[str, ...]:
    """The names of the LoRAs, earlier fused ones too, that make the model few-step: the trainer takes them off."""
    added = [lora for lora in loras if lora.request.strength > 0]
    names = [lora.request.path.name for lora in added if _is_few_step(lora, base)]
    if before := _of_base(base, []):
        names += before.loras
    elif not names and len(added) == 1:
        names = [added[0].request.path.name]
    return tuple(dict.fromkeys(names))


def _is_few_step(lora: LoraPlan, base: Checkpoint) -> bool:
    names, family = _names_of(lora), _family(base)
    if SCHEDULE_KEY in lora.metadata or recognise(names, family, (Kind.FEW_STEP_LORA,)):
        return True
    return looks_few_step(names, family) is not None and not recognise(names, family, (Kind.DEDISTILL,))


def _levels(schedule: Schedule) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in schedule.sigmas)


def _of_lora(lora: LoraPlan, base: Checkpoint, remarks: list[str]) -> Schedule | None:
    """The schedule that a LoRA's header states, or that it is known for."""
    if SCHEDULE_KEY in lora.metadata:
        return _stated(lora)
    name, names = lora.request.path.name, _names_of(lora)
    found = recognise(names, _family(base), (Kind.FEW_STEP_LORA, Kind.DEDISTILL))
    few = [its for its in found if its.known.kind is Kind.FEW_STEP_LORA]
    if few:
        return _known(few, name, remarks, lora.request.strength)
    if not found and (looks := looks_few_step(names, _family(base))):
        remarks.append(
            f"{name}: {looks[0]} has {looks[1]!r} in it, but it is no few-step LoRA that is known here, so no schedule "
            'is recorded; if it is one, say --schedule "1,0.9,0.75,0.5" with its noise levels'
        )
    return None


def _known(found: Sequence[Recognised], name: str, remarks: list[str], strength: float = 1.0) -> Schedule | None:
    """The schedule that a file's names mean; None where they mean several."""
    if len(found) > 1:
        texts = " and ".join(f"{its.known.title}, {its.steps} steps ({its.where})" for its in found)
        remarks.append(f"{name}: its names mean {texts}; no few-step schedule is recorded, {_OVERRIDE}")
        return None
    known, steps = found[0].known, found[0].steps
    schedule = Schedule(
        sigmas=known.sigmas(steps),
        guidance_scale=known.guidance_scale,
        source=f"{name} ({known.title})",
        scheduler=dict(known.scheduler),
    )
    size = ", at 1024x1024" if known.depends_on_size else ""
    remarks.append(
        f"{name} is {known.title}, by {found[0].where}: {steps} steps at {_levels(schedule)}{size}, guidance "
        f"{known.guidance_scale:g} ({known.source}); {_OVERRIDE}"
    )
    if known.kind is Kind.FEW_STEP_LORA and 0 < strength != known.strength:
        remarks.append(f"note: {known.title} is made for strength {known.strength:g}, and is fused at {strength:g}")
    return schedule


def _of_base(base: Checkpoint, remarks: list[str]) -> Schedule | None:
    """The schedule of the base: that of its manifest, where it was fused, or the one that it is known for."""
    manifest: Manifest | None = base_manifest(base)
    if manifest:
        return manifest.schedule
    found = recognise(_names_of_base(base), _family(base), (Kind.FEW_STEP_BASE,))
    name = base.origin.repo if base.origin else base.root.absolute().name
    return _known(found, name, remarks) if found else None


def _names_of_base(base: Checkpoint) -> dict[str, str]:
    names = {"the name of the base": base.root.absolute().name.removesuffix(".safetensors")}
    if base.origin:
        names["its name on the hub"] = f"{base.origin.repo}/{base.origin.path}"
    if base.form is Form.FILE:
        return names
    folder = base.root / base.component if base.component else base.root
    name = (read_json(folder / "config.json") or {}).get("_name_or_path")
    if isinstance(name, str) and name:
        names["its config.json"] = name
    if base.form is Form.PIPELINE and (read_json(base.root / "model_index.json") or {}).get("is_distilled") is True:
        names["is_distilled in its model_index.json"] = "is-distilled"
    return names


def _stated(lora: LoraPlan) -> Schedule:
    name = lora.request.path.name
    try:
        stated = json.loads(lora.metadata[SCHEDULE_KEY])
        return checked_schedule(stated["sigmas"], float(stated.get("guidance_scale", 1.0)), name)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{name}: its header's {SCHEDULE_KEY} is no schedule ({error}); say it with --schedule, or --schedule none"
        ) from error
