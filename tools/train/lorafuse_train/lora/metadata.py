"""The header of a LoRA file: what diffusers loads by, what other programs show, and what it was made from and how.

No clocks, hosts or paths: the same run gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafuse_common import __version__
from lorafuse_common.errors import ConfigError
from lorafuse_common.manifest import Role, weights_sha256
from lorafuse_common.scale import METADATA_KEY
from lorafuse_train.base import Base, fused_loras
from lorafuse_train.lora.adapter import PREFIX
from lorafuse_train.lora.base_match import KEY
from lorafuse_train.lora.ranks import adapter_arguments, module_strengths
from lorafuse_train.options.entry import CACHE, OUTPUT, RESULT
from lorafuse_train.options.options import OPTIONS, plain_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorafuse_train.dataset.data import Sample
    from lorafuse_train.options.config import TrainConfig
    from lorafuse_train.plan import Plan

LIBRARIES = ("torch", "diffusers", "peft", "accelerate", "transformers", "safetensors")
"""Whose versions may change what a training gives."""
DYNAMIC = "Dynamic"
"""kohya's word where a file has no one rank."""


@dataclass(frozen=True, slots=True)
class Names:
    """What programs call a family."""

    architecture: Callable[[Mapping[str, Any]], str]
    """`modelspec.architecture` without `/lora`, of the transformer with a config.json."""
    repository: str
    """`modelspec.implementation` of files in its original names."""
    network: str
    """`ss_network_module`."""
    version: str
    """`ss_base_model_version`."""


def _flux(config: Mapping[str, Any]) -> str:
    return "flux-1-dev" if config.get("guidance_embeds") else "flux-1-schnell"


def _flux2(config: Mapping[str, Any]) -> str:
    sizes = {5: "Flux.2-klein-4b", 8: "Flux.2-dev" if config.get("num_single_layers") == 48 else "Flux.2-klein-9b"}
    return sizes.get(int(config.get("num_layers") or 0), "Flux.2-dev")


def _sd3(config: Mapping[str, Any]) -> str:
    if config.get("dual_attention_layers"):
        return "stable-diffusion-v3.5-medium"
    return "stable-diffusion-v3.5-large" if config.get("num_layers") == 38 else "stable-diffusion-v3-medium"


def _wan(config: Mapping[str, Any]) -> str:
    if config.get("in_channels") == 48:
        return "wan-2_2-ti2v-5b"
    size = "1_3b" if config.get("num_attention_heads") == 12 else "14b"
    return f"wan-2_1-{'image2video' if config.get('in_channels') == 36 else 'text2video'}-{size}"


NAMES: Mapping[str, Names] = {
    "qwen_image": Names(
        lambda config: "qwen-image", "https://github.com/QwenLM/Qwen-Image", "networks.lora_qwen_image", "qwen_image"
    ),
    "flux": Names(_flux, "https://github.com/black-forest-labs/flux", "networks.lora_flux", "flux1"),
    "flux2": Names(_flux2, "https://github.com/black-forest-labs/flux2", "networks.lora_flux_2", "flux2"),
    "sd3": Names(_sd3, "https://github.com/Stability-AI/sd3.5", "networks.lora_sd3", "sd3"),
    "z_image": Names(
        lambda config: "z-image", "https://github.com/Tongyi-MAI/Z-Image", "networks.lora_zimage", "z_image"
    ),
    "wan": Names(_wan, "https://github.com/Wan-Video/Wan2.2", "networks.lora_wan", "wan"),
}
"""By the family's name; the architectures are those by which SwarmUI and kohya's tools know them."""


def names_of(base: Base) -> Names:
    """What programs call the base's family; names of its own where none is known."""
    own = base.family.name
    return NAMES.get(own) or Names(lambda config: own.replace("_", "-"), own, "networks.lora", own)


def lora_header(plan: Plan, steps: int) -> dict[str, str]:
    """The header of the diffusers file of a LoRA that was trained for so many steps."""
    strengths = module_strengths(plan.targets, plan.config)
    factor = 2 if plan.config.starts_from_components else 1
    ranks = {module: strength.rank * factor for module, strength in strengths.items()}
    return {
        "format": "pt",
        METADATA_KEY: _adapter(plan, ranks),
        KEY: json.dumps(_record(plan, steps), sort_keys=True, ensure_ascii=False),
        **_modelspec(plan),
        **_kohya(plan, steps),
        **rank_entries(ranks.values()),
    }


def _adapter(plan: Plan, ranks: Mapping[str, int]) -> str:
    """PEFT's settings as diffusers reads them; alphas are ranks, for the scale is in B."""
    arguments = adapter_arguments(plan.targets, ranks, {module: float(rank) for module, rank in ranks.items()})
    if plan.config.use_dora:
        arguments["use_dora"] = True
    return json.dumps({f"{PREFIX}{name}": value for name, value in arguments.items() if value}, sort_keys=True)


def rank_entries(ranks: Iterable[int]) -> dict[str, str]:
    """kohya's entries for a file whose modules have these ranks, and alphas that equal them."""
    found = {*ranks}
    rank = str(found.pop()) if len(found) == 1 else DYNAMIC
    return {"ss_network_dim": rank, "ss_network_alpha": rank}


def require_trigger(config: TrainConfig, samples: Sequence[Sample]) -> None:
    """Make sure that `--trigger_phrase` was there to be learned.

    Raises:
        ConfigError: no caption has it.
    """
    phrase = config.trigger_phrase
    if phrase and not any(phrase in sample.caption for sample in samples):
        first = samples[0].caption if samples else ""
        raise ConfigError(
            f"--trigger_phrase {phrase!r}: none of the {len(samples)} captions has it (the first: {first!r}); write it "
            "into the captions, or leave it out"
        )


def title_of(plan: Plan) -> str:
    """`--lora_name`, or what it is for."""
    return plan.config.lora_name or f"LoRA for {plan.base.family.title}"


def resolution_of(samples: Sequence[Sample]) -> tuple[int, int]:
    """The (width, height) that most pictures train at."""
    height, width = Counter(sample.size for sample in samples).most_common(1)[0][0]
    return width, height


def usage_hint(plan: Plan) -> str:
    """In a line, how pictures are drawn with it."""
    manifest = plan.base.manifest
    few = manifest.schedule if manifest else None
    if manifest is None:
        return ""
    loras = ", ".join(f"{lora.name} at {lora.strength:g}" for lora in fused_loras(manifest))
    if manifest.role is Role.SCAFFOLD:
        return f"For the original model, without {loras or 'anything'}, which only helped in training."
    steps = f"; {len(few.sigmas)} steps, guidance {few.guidance_scale:g}" if few else ""
    return f"For the model with {loras or 'nothing'} fused{steps}."


def _modelspec(plan: Plan) -> dict[str, str]:
    """https://github.com/Stability-AI/ModelSpec, 1.0.1; the hash is added when the tensors are written."""
    size, config = resolution_of(plan.samples), plan.config
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{names_of(plan.base).architecture(plan.base.config)}/lora",
        "implementation": "diffusers",
        "title": title_of(plan),
        "resolution": f"{size[0]}x{size[1]}",
        "prediction_type": "flow",
        "usage_hint": usage_hint(plan),
        "trigger_phrase": config.trigger_phrase or "",
    }
    return {f"modelspec.{name}": value for name, value in found.items() if value}


def _kohya(plan: Plan, steps: int) -> dict[str, str]:
    """The entries that A1111, Forge, ComfyUI's LoRA managers and kohya's tools show."""
    config, names, manifest = plan.config, names_of(plan.base), plan.base.manifest
    size = resolution_of(plan.samples)
    origin = manifest.origin if manifest else None
    found: dict[str, object] = {
        "output_name": config.lora_name,
        "network_module": names.network,
        "base_model_version": names.version,
        "sd_model_name": origin.repo if origin else None,
        "learning_rate": config.peak_learning_rate,
        "lr_scheduler": config.lr_scheduler,
        "optimizer": config.optimizer,
        "seed": config.seed,
        "steps": steps,
        "num_train_images": len(plan.samples),
        "batch_size_per_device": config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "resolution": size,
        "training_comment": usage_hint(plan),
    }
    if config.trigger_phrase:
        count = sum(config.trigger_phrase in sample.caption for sample in plan.samples)
        found["tag_frequency"] = json.dumps({"dataset": {config.trigger_phrase: count}}, ensure_ascii=False)
    return {f"ss_{name}": str(value) for name, value in found.items() if value not in (None, "")}


def _record(plan: Plan, steps: int) -> dict[str, Any]:
    """What `lorafuse inspect` shows, and by which a LoRA is matched with its base."""
    base, manifest = plan.base, plan.base.manifest
    return {
        "version": __version__,
        "family": base.family.name,
        "fused_sha256": base.fused_sha256,
        "component": base.component,
        "noise_levels": [plan.levels.low, plan.levels.high],
        "fused_loras": [_fused(lora) for lora in (fused_loras(manifest) if manifest else ())],
        "base": _direct_base(base),
        "role": manifest.role.value if manifest else None,
        "schedule": dataclasses.asdict(manifest.schedule) if manifest and manifest.schedule else None,
        "started_from": plan.start.record if plan.start else None,
        "steps": steps,
        "few_step": {
            **plan.objective.identity,
            "preserve_weight": plan.preserving.weight if plan.preserving else 0.0,
        },
        "dataset": {"sha256": dataset_sha256(plan.samples), "pictures": len(plan.samples)},
        # How a run was split up says nothing about the LoRA, and paths are of one machine.
        "config": {
            name: plain_value(plan.config, name)
            for name, option in OPTIONS.items()
            if option.kind is not Path and option.entry.panel not in (CACHE, OUTPUT, RESULT)
        },
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _fused(lora: Any) -> dict[str, Any]:
    return {"name": lora.name, "sha256": lora.sha256, "strength": lora.strength}


def _direct_base(base: Base) -> dict[str, Any] | None:
    """What the last fuse started from: the original model, or another fused one, whose own recipe is `fused_loras`."""
    manifest = base.manifest
    if manifest is None:
        return None
    return {
        "sha256": weights_sha256(manifest.base, base.component if manifest.component else None),
        "is_original": manifest.parent is None,
        "origin": manifest.origin.uri if manifest.origin else None,
    }


def dataset_sha256(samples: Iterable[Sample]) -> str:
    """Of contents, captions, control pictures and training sizes, in their order; names and places do not matter."""
    facts = [sample.identity for sample in samples]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
