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
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafuse_common import __version__
from lorafuse_common.errors import LorafuseError
from lorafuse_common.tensorfile import encode_header, read_header

from .atomic import write_atomically
from .base import Base, fused_loras
from .config import TrainConfig
from .entry import OUTPUT
from .options import OPTIONS, plain_value
from .pissa import INITIAL, balanced, freeze_initial, start_from_components
from .ranks import adapter_arguments, module_strengths
from .targets import Targets

FILE_NAME = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
"""What diffusers puts before the names of a LoRA for a pipeline's transformer."""
ADAPTER = "default"


def attach(transformer: Any, targets: Targets, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Add a LoRA that changes nothing yet, with fp32 weights; returns its parameters, the only trainable ones."""
    strengths = module_strengths(targets, config)
    arguments = adapter_arguments(
        targets,
        {module: strength.rank for module, strength in strengths.items()},
        {module: strength.alpha for module, strength in strengths.items()},
    )
    init: bool | str = config.init_lora_weights
    if config.init_lora_weights == "true" or config.starts_from_components or config.lora_checkpoint:
        init = True
    lora = LoraConfig(
        **arguments,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        init_lora_weights=init,
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        transformer.add_adapter(lora, ADAPTER)
        if config.starts_from_components:
            start_from_components(transformer, ADAPTER, lora, config.init_lora_weights)
        parameters = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
        for parameter in parameters.values():  # PEFT gives them the base's dtype; bf16 would lose small updates
            parameter.data = parameter.data.float()
        _start_exactly(transformer, config)
    expected = (3 if config.use_dora else 2) * len(targets.modules)
    assert len(parameters) == expected, "PEFT matched other modules than we named"
    transformer.eval()  # PEFT's new layers would drop inputs in samples, too
    return parameters


@torch.no_grad()
def _start_exactly(transformer: Any, config: TrainConfig) -> None:
    """Repeat in fp32 what PEFT rounds to the base's dtype, where that would change what the model predicts."""
    for module in transformer.modules():
        if not isinstance(module, LoraLayer):
            continue
        weight, a, b = module.get_base_layer().weight, module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        if config.init_lora_weights == "orthogonal" and weight.dtype != torch.float32:
            for factor, value in zip((a, b), orthogonal_factors(len(b), a.shape[1], len(a)), strict=True):
                factor.copy_(value)
        if config.use_dora:
            dora, delta = module.lora_magnitude_vector[ADAPTER], (b.flatten(1) @ a.flatten(1)).view_as(weight)
            dora.weight.data = dora.get_weight_norm(weight.float(), delta, module.scaling[ADAPTER])


def orthogonal_factors(rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    """A and B whose rows and columns lie in two halves of the ranks' space, so that B A = 0, as PEFT makes them."""
    q, _ = torch.linalg.qr(torch.randn(rank, rank))
    a = torch.randn(columns, rank // 2).mm(q[0::2]).T / 10.0
    b = torch.randn(rank // 2, rows).T.mm(q[1::2]) / 10.0
    return a, b


@contextmanager
def without(transformer: Any) -> Iterator[None]:
    """Within it, the transformer is the bare base."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
        freeze_initial(transformer)


def adapter_parameters(transformer: Any) -> dict[str, nn.Parameter]:
    """All that a training has in memory besides the base: what is trained, and what it started from."""
    marks = (f".{ADAPTER}.", f".{INITIAL}.")
    return {name: value for name, value in transformer.named_parameters() if any(mark in name for mark in marks)}


@contextmanager
def dropout(transformer: Any, share: float, seed: int) -> Iterator[None]:
    """Within it, which must hold the backward pass too, the LoRA layers leave out inputs, drawn from `seed`."""
    layers = [m.lora_dropout[ADAPTER] for m in transformer.modules() if isinstance(m, LoraLayer)] if share else []
    if layers:
        torch.manual_seed(seed)
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


def lora_state(transformer: Any) -> dict[str, Tensor]:
    """The LoRA as diffusers names it: `transformer.X.lora_A.weight` (r, in) and `lora_B` (out, r), fp32, on the CPU.

    Its scale is in B, so that readers who know no alpha, or take it for the rank, apply it as it was trained.
    """
    scales = {name: m.scaling[ADAPTER] for name, m in transformer.named_modules() if isinstance(m, LoraLayer)}
    trained = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    found = {name: tensor.detach().float() for name, tensor in sorted(trained.items())}
    for module, scale in scales.items():
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if scale != 1:
            found[b] = found[b] * scale
    if INITIAL in transformer.peft_config:
        initial = get_peft_model_state_dict(transformer, adapter_name=INITIAL)
        for module, scale in scales.items():
            a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            rows, columns = torch.cat([found[a], initial[a]]), torch.cat([found[b], scale * initial[b]], 1)
            found[a], found[b] = balanced(rows, columns)
    return {f"{PREFIX}{name}": tensor.cpu().contiguous() for name, tensor in found.items()}


def save_lora(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA file whole; the same LoRA gives the same bytes."""

    def write(file: Path) -> None:
        save_file(dict(state), file)
        plain = read_header(file)
        tensors = file.read_bytes()[plain.data_start :]
        # `save_file` would write the metadata in an order that changes from run to run.
        file.write_bytes(encode_header(plain, metadata) + tensors)

    write_atomically(path, write)


def lora_metadata(
    base: Base, targets: Targets, config: TrainConfig, steps: int, start: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The header of the LoRA file: what diffusers needs to load it, and what it was trained on.

    Its alphas are its ranks, for the scale is in B. `start` is the record of the LoRA that it started from. No clocks,
    hosts or paths: the same run gives the same bytes.
    """
    manifest = base.manifest
    ranks = {
        module: strength.rank * (2 if config.starts_from_components else 1)
        for module, strength in module_strengths(targets, config).items()
    }
    arguments = adapter_arguments(targets, ranks, {module: float(rank) for module, rank in ranks.items()})
    if config.use_dora:
        arguments["use_dora"] = True
    adapter = {f"{PREFIX}{name}": value for name, value in arguments.items() if value}
    ours = {
        "version": __version__,
        "family": base.family.name,
        "fused_sha256": base.fused_sha256,
        "fused_loras": [
            {"name": lora.name, "sha256": lora.sha256, "strength": lora.strength}
            for lora in (fused_loras(manifest) if manifest else ())
        ],
        "schedule": dataclasses.asdict(manifest.schedule) if manifest and manifest.schedule else None,
        "started_from": start,
        "steps": steps,
        # Paths say where things lie on one machine, and how a run was split up says nothing about the LoRA either.
        "config": {
            name: plain_value(config, name)
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
        f"{PREFIX}{name.replace(f'.{ADAPTER}.', '.').replace('vector.weight', 'vector')}": parameter
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
