"""The model card: `README.md` beside a LoRA, for the hub and for whoever finds the folder.

It holds no times and no paths of this machine. A card that somebody has edited is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafuse_common import __version__
from lorafuse_common.conversion import plan_conversion
from lorafuse_common.errors import ConvertError
from lorafuse_common.lora import read_lora
from lorafuse_common.manifest import Manifest, Role
from lorafuse_train.atomic import write_atomically
from lorafuse_train.base import Base
from lorafuse_train.console import say
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.lora.export import PLACES, dialect_of
from lorafuse_train.lora.fuse_commands import fuse_commands, target_sha256
from lorafuse_train.lora.markdown import block, code, front_matter, plain, table
from lorafuse_train.lora.metadata import dataset_sha256, title_of
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.config_output import COMFYUI, PEFT
from lorafuse_train.options.entry import OUTPUT, RESULT
from lorafuse_train.options.options import OPTIONS, plain_value
from lorafuse_train.samples.health import PLOT_NAME, describe, read_health
from lorafuse_train.samples.sample import Schedule
from lorafuse_train.steps.log import JSONL
from lorafuse_train.summary import Places, usage

if TYPE_CHECKING:
    from lorafuse_train.plan import Plan

CARD, SHEET = "README.md", "samples.png"
_MARK = re.compile(r"<!-- lorafuse wrote this, and writes it anew while nobody has edited it: ([0-9a-f]{64}) -->\n")
PARTS_OF_A_CURVE = 5
LONGEST_VALUE = 200


@dataclass(frozen=True, slots=True)
class Shown:
    """What a card shows of a run besides its plan."""

    schedule: Schedule
    """The one that it is meant to be drawn with."""
    size: tuple[int, int]
    """(height, width) of a picture."""
    steps: int
    pictures: Mapping[str, str]
    """File within the output folder -> the prompt that it was drawn for."""


def write_card(plan: Plan, shown: Shown) -> None:
    """Write the card into the output folder, unless somebody has edited the one that is there.

    Raises:
        OutputError: it cannot be written.
    """
    path = plan.config.output_path / CARD
    if path.exists() and not is_ours(path):
        say(f"{path}: was not written by lorafuse, or edited since; left as it is")
        return
    text = marked(card(plan, shown))
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    say(f"model card: {path}")


def is_ours(path: Path) -> bool:
    """Whether a card is as it was written."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _sha256(_MARK.sub("", text))


def marked(text: str) -> str:
    """A card with the line by which `is_ours` knows it, behind its front matter."""
    head, end, body = text.partition("\n---\n")
    mark = f"<!-- lorafuse wrote this, and writes it anew while nobody has edited it: {_sha256(text)} -->\n"
    return f"{head}{end}{mark}{body}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def card(plan: Plan, shown: Shown) -> str:
    """The whole text, without the mark."""
    sections = (
        _introduction(plan),
        _use(plan, shown),
        _base(plan.base),
        _training(plan, shown.steps),
        _curve(plan.config.output_path),
        _health(plan.config.output_path),
        _files(plan.config),
    )
    return front_matter(_facts(plan, shown)) + "\n" + "\n\n".join(section for section in sections if section) + "\n"


def _facts(plan: Plan, shown: Shown) -> dict[str, Any]:
    """What the hub reads."""
    manifest, recipe = plan.base.manifest, plan.recipe
    origin = manifest.origin if manifest else None
    task = f"{'image' if recipe.controls[0] else 'text'}-to-{'video' if recipe.frame_step else 'image'}"
    return {
        "base_model": origin.repo if origin else None,
        "base_model_relation": "adapter" if origin else None,
        "library_name": "diffusers",
        "pipeline_tag": task,
        "tags": [task, "diffusers", "lora", "template:sd-lora", "lorafuse"],
        "instance_prompt": plan.config.trigger_phrase,
        "widget": [{"text": prompt or " ", "output": {"url": file}} for file, prompt in shown.pictures.items()],
    }


def _introduction(plan: Plan) -> str:
    config, manifest = plan.config, plan.base.manifest
    lines = [f"# {plain(title_of(plan))}\n", "<Gallery />\n"]
    fused = f" with {_names(plan.base)} fused into it" if manifest and fuse_commands(manifest) else ""
    lines.append(f"A LoRA for {plain(plan.base.family.title)}{fused}, trained with lorafuse {__version__}.")
    if plan.base.expert:
        lines.append(f"It is for {plain(str(plan.base.expert))}.")
    if config.trigger_phrase:
        lines.append(f"Write {code(config.trigger_phrase)} into the prompt to call what it has learned.")
    lines.append(f"\n![samples]({SHEET})\n\nThe same noise in each column; the rows say which model drew them.")
    return "\n".join(lines)


def _names(base: Base) -> str:
    lineage = base.manifest.lineage if base.manifest else ()
    if base.manifest and base.manifest.role is Role.SCAFFOLD:
        lineage = lineage[1:]
    loras = [lora for _, loras in lineage for lora in loras]
    return ", ".join(f"{code(lora.name)} at {lora.strength:g}" for lora in loras) or "nothing"


def _use(plan: Plan, shown: Shown) -> str:
    config, manifest = plan.config, plan.base.manifest
    commands = fuse_commands(manifest) if manifest else []
    pipeline = "models/fused" if commands else _original(manifest)
    where = config.hub_model_id if config.push_to_hub and "/" in (config.hub_model_id or "") else "this-folder"
    sections = ["## Use"]
    if commands:
        identity = f"fused\\_sha256 `{target_sha256(manifest)}`" if manifest else ""
        sections.append(
            f"It belongs on the fused model. Make that once; the same inputs give the same bytes ({identity}):\n\n"
            f"{block(commands, 'bash')}"
        )
    if manifest and manifest.role is Role.SCAFFOLD:
        helped = ", ".join(code(lora.name) for lora in manifest.loras)
        sections.append(f"Leave out {helped}, which only helped in training.")
    whole = pipeline if plan.base.pipeline == plan.base.folder else "models/pipeline"
    lines = usage(plan, shown.schedule, shown.size, Places(whole, pipeline, str(where)))
    here = " (`this-folder` is where this file lies)" if where == "this-folder" else ""
    sections.append(f"With diffusers{here}:\n\n{block(lines, 'python')}")
    sections.append(_comfyui(plan, shown.schedule, pipeline))
    return "\n\n".join(sections)


def _original(manifest: Manifest | None) -> str:
    return manifest.origin.repo if manifest and manifest.origin else "models/base"


def _comfyui(plan: Plan, schedule: Schedule, pipeline: str) -> str:
    manifest, config = plan.base.manifest, plan.config
    file = code(PLACES[COMFYUI])
    if COMFYUI not in config.dialects:
        file += f" (make it with {code(_conversion(plan, pipeline))})"
    base = "the model"
    if manifest and fuse_commands(manifest):
        base = f"the fused model, or of the original one with {_names(plan.base)} loaded before it"
    scale = "cfg 1" if schedule.embedded or schedule.guidance_scale == 1 else f"cfg {schedule.guidance_scale:g}"
    if schedule.embedded:
        scale += f", FluxGuidance {schedule.guidance_scale:g}"
    sigmas = ""
    if manifest and manifest.schedule:
        sigmas = f", noise levels {', '.join(f'{sigma:.6g}' for sigma in schedule.sigmas)}, 0 (ManualSigmas)"
    return (
        f"With ComfyUI: put {file} into `models/loras` and load it with LoraLoaderModelOnly at strength 1, on top of "
        f"{base}. Sampler euler, {len(schedule.sigmas)} steps, {scale}{sigmas}."
    )


def _conversion(plan: Plan, pipeline: str) -> str:
    """The command that writes ComfyUI's file; it looks at the model where names alone do not tell, as of SD3."""
    try:
        plan_conversion(read_lora(plan.config.output_path / FILE_NAME), dialect_of(COMFYUI))
        where = ""
    except ConvertError:
        where = f" --base {pipeline}"
    return f"lorafuse convert {FILE_NAME} --to comfyui{where} --out {PLACES[COMFYUI]}"


def _base(base: Base) -> str:
    if base.manifest is None:
        return f"## Base\n\nAn unfused model; its weights have the sha256 `{base.fused_sha256}`."
    rows = [
        (code(lora.name), f"{lora.strength:g}", role.value, f"`{lora.sha256}`")
        for role, loras in base.manifest.lineage
        for lora in loras
    ]
    few = base.manifest.schedule
    text = f"## What was fused\n\n{table(('LoRA', 'strength', 'role', 'sha256'), rows)}"
    if few:
        sigmas = ", ".join(f"{sigma:.6g}" for sigma in few.sigmas)
        text += f"\n\nDrawn in {len(few.sigmas)} steps, at the noise levels {sigmas}; guidance {few.guidance_scale:g}."
    return text


def _training(plan: Plan, steps: int) -> str:
    samples = plan.samples
    said = (
        f"{steps} steps on {len(samples)} samples (sha256 of the data set: `{dataset_sha256(samples)}`), "
        f"{len(plan.targets.modules)} modules, rank {plan.config.lora_rank}."
    )
    rows = list(changed_options(plan.config))
    options = f"\n\nOptions that differ from their defaults:\n\n{table(('option', 'value'), rows)}" if rows else ""
    return f"## Training\n\n{said}{options}"


def changed_options(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Options that were chosen, without paths and what only says where things go."""
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        if option.kind is Path or option.entry.panel in (OUTPUT, RESULT) or value == option.default:
            continue
        text = json.dumps(plain_value(config, name), ensure_ascii=False)
        yield f"`--{name}`", code(text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} ...")


def _curve(out: Path) -> str:
    """The mean loss of a few stretches."""
    try:
        rows = [json.loads(line) for line in (out / JSONL).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return ""
    losses = [(int(row["step"]), float(row["loss"])) for row in rows if isinstance(row.get("loss"), float)]
    parts = min(PARTS_OF_A_CURVE, len(losses))
    cut = [losses[k * len(losses) // parts : (k + 1) * len(losses) // parts] for k in range(parts)]
    if not cut:
        return ""
    found = [(f"{part[0][0]} to {part[-1][0]}", f"{statistics.fmean(loss for _, loss in part):.4f}") for part in cut]
    return f"## Loss\n\n{table(('steps', 'mean loss'), found)}"


def _health(out: Path) -> str:
    found = read_health(out)
    if not found:
        return ""
    rows = [(str(h.step), f"{h.agreement:.3f}", f"{h.sharpness:.3f}") for h in found]
    words = plain(describe(found[-1]))
    plot = f"\n\n![the same as curves]({PLOT_NAME})" if (out / PLOT_NAME).is_file() else ""
    return f"## Few-step health\n\n{table(('step', 'agreement', 'sharpness'), rows)}\n\n{words}{plot}"


def _files(config: TrainConfig) -> str:
    whose = {PEFT: "PEFT (`PeftModel.from_pretrained`), with its `adapter_config.json`", COMFYUI: "ComfyUI"}
    rows = [(f"`{FILE_NAME}`", "diffusers (`load_lora_weights`)")]
    rows += [(f"`{PLACES[name]}`", whose.get(name, "kohya's and musubi's tools")) for name in config.dialects[1:]]
    return f"## Files\n\n{table(('file', 'for'), rows)}"
