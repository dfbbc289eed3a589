"""The new LoRA: attached to the frozen transformer, and read from it as diffusers names its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from lorafuse_train.lora.pissa import INITIAL, balanced, freeze_initial, start_from_components
from lorafuse_train.lora.ranks import adapter_arguments, module_strengths
from lorafuse_train.lora.targets import Targets
from lorafuse_train.options.config import TrainConfig

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


def spare_casts(transformer: Any) -> None:
    """Under autocast, keep PEFT from widening every layer's input to fp32, which autocast rounds back at once.

    Predictions stay the same; a GPU that waits for its next kernel has thousands fewer of them to wait for. DoRA is
    left out, for it computes norms in the input's precision.
    """
    for module in transformer.modules():
        if isinstance(module, LoraLayer) and not any(module.use_dora.values()):
            module.cast_input_dtype_enabled = False


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
