"""The new LoRA: attached to the frozen transformer, written in diffusers' layout, and proven to load."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafuse_common import __version__
from lorafuse_common.errors import LorafuseError
from lorafuse_common.tensorfile import encode_header, read_header

from .atomic import write_atomically
from .base import Base, fused_loras
from .config import OUTPUT, TrainConfig
from .options import OPTIONS
from .targets import Targets

FILE_NAME = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
"""What diffusers puts before the names of a LoRA for a pipeline's transformer."""
ADAPTER = "default"


def attach(transformer: Any, targets: Targets, config: TrainConfig) -> list[nn.Parameter]:
    """Add a fresh LoRA (A random, B zero) with fp32 weights; returns its parameters, the only trainable ones."""
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.alpha,
        target_modules=list(targets.modules),
        init_lora_weights=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        transformer.add_adapter(lora, ADAPTER)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert len(parameters) == 2 * len(targets.modules), "PEFT matched other modules than we named"
    for parameter in parameters:  # PEFT gives them the base's dtype; bf16 would lose small updates
        parameter.data = parameter.data.float()
    return parameters


@contextmanager
def without(transformer: Any) -> Iterator[None]:
    """Within it, the transformer is the bare base."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def lora_state(transformer: Any) -> dict[str, Tensor]:
    """The LoRA as diffusers names it: `transformer.X.lora_A.weight` (r, in) and `lora_B` (out, r), fp32, on the CPU."""
    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    return {f"{PREFIX}{name}": tensor.detach().float().cpu().contiguous() for name, tensor in sorted(state.items())}


def save_lora(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA file whole; the same LoRA gives the same bytes."""

    def write(file: Path) -> None:
        save_file(dict(state), file)
        plain = read_header(file)
        tensors = file.read_bytes()[plain.data_start :]
        # `save_file` would write the metadata in an order that changes from run to run.
        file.write_bytes(encode_header(plain, metadata) + tensors)

    write_atomically(path, write)


def lora_metadata(base: Base, targets: Targets, config: TrainConfig, steps: int) -> dict[str, str]:
    """The header of the LoRA file: what diffusers needs to scale it, and what it was trained on.

    Without `lora_adapter_metadata` diffusers takes alpha = rank, at the wrong strength and without a word. No clocks,
    hosts or paths: the same run gives the same bytes.
    """
    manifest = base.manifest
    adapter = {
        f"{PREFIX}r": config.lora_rank,
        f"{PREFIX}lora_alpha": config.alpha,
        f"{PREFIX}target_modules": list(targets.modules),
    }
    ours = {
        "version": __version__,
        "family": base.family.name,
        "fused_sha256": base.fused_sha256,
        "fused_loras": [
            {"name": lora.name, "sha256": lora.sha256, "strength": lora.strength}
            for lora in (fused_loras(manifest) if manifest else ())
        ],
        "schedule": dataclasses.asdict(manifest.schedule) if manifest and manifest.schedule else None,
        "steps": steps,
        # Paths say where things lie on one machine, and how a run was split up says nothing about the LoRA either.
        "config": {
            name: getattr(config, name)
            for name, option in OPTIONS.items()
            if option.kind is not Path and option.entry.panel != OUTPUT
        },
    }
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, sort_keys=True),
        "lorafuse": json.dumps(ours, sort_keys=True),
    }


def load_back(transformer: Any, pipeline: Path, file: Path) -> None:
    """Drop the trained LoRA and load `file` in its place, as a user would: through the pipeline's class.

    The pipeline is given this transformer and nothing else, so there is no second copy of the weights. diffusers rounds
    a LoRA to the base's precision; it is widened again to what the file holds, so that what is compared next is the
    loading and not the rounding.

    Raises:
        LorafuseError: diffusers loads other keys or other values than the file holds.
    """
    import diffusers

    saved = load_file(file)
    transformer.unload_lora()
    index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    absent = dict.fromkeys(name for name, part in index.items() if isinstance(part, list) and name != "transformer")
    loaded = getattr(diffusers, index["_class_name"])(transformer=transformer, **absent)
    try:
        loaded.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise LorafuseError(f"{file}: diffusers does not load the new LoRA ({error})") from error
    found = lora_parameters(transformer)
    wrong = {*saved} ^ {*found}
    wrong |= {name for name in {*saved} & {*found} if not _rounds_to(saved[name], found[name])}
    if wrong:
        raise LorafuseError(
            f"{file}: {len(wrong)} of {len(saved)} tensors are not what diffusers loads from it (first: {min(wrong)})"
        )
    for name, parameter in found.items():
        parameter.requires_grad_(False)
        parameter.data = saved[name].to(parameter.device)


def lora_parameters(transformer: Any) -> dict[str, nn.Parameter]:
    """The LoRA's own parameters, under the names they have in a file."""
    return {
        f"{PREFIX}{name.replace(f'.{ADAPTER}.', '.')}": parameter
        for name, parameter in transformer.named_parameters()
        if f".{ADAPTER}." in name
    }


def _rounds_to(saved: Tensor, found: Tensor) -> bool:
    return saved.shape == found.shape and bool(saved.to(found.dtype).equal(found.detach().cpu()))


def compare_effects(file: Path, bare: Tensor, trained: Tensor, loaded: Tensor) -> None:
    """Compare predictions of the base alone, with the trained LoRA, and with the LoRA as loaded from `file`.

    Raises:
        LorafuseError: the LoRA changes nothing, or has another effect once loaded.
    """
    effect = (trained - bare).norm().item()
    if effect == 0:
        raise LorafuseError(
            f"{file}: the new LoRA changes nothing that the model predicts; train for more steps or at a higher "
            "--learning_rate (the steps of the warm-up hardly count)"
        )
    gap = (loaded - trained).norm().item()
    if not gap <= 0.01 * effect:
        raise LorafuseError(
            f"{file}: loaded through diffusers it predicts something else than it did in training "
            f"(off by {gap / effect:.1%} of its effect)"
        )
