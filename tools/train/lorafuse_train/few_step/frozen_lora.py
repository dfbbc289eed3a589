"""LoRAs that are not trained: added to the base, or taken off it, within a context.

    y = W x + s B (A x)        s = -1 for what was fused, the strength for `--train_adapter`

Done by hooks on the base's own layers, and not by a second adapter of PEFT's: what trains, is switched off, saved and
loaded back there is the new LoRA alone, whatever kind it is. The factors need no gradient, so autograd keeps no more
activations than without them. The context must hold the backward pass, too: gradient checkpointing computes the
forward pass again in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.conversion import Conversion, plan_conversion
from lorafuse_common.conversion.factors import Stored
from lorafuse_common.conversion.spelling import respelled
from lorafuse_common.dialects.diffusers import DIFFUSERS
from lorafuse_common.errors import ConfigError, LorafuseError
from lorafuse_common.lora import LoraFile, read_lora
from lorafuse_common.scale import ScaleSources
from lorafuse_common.tensorfile import FLOAT_DTYPES, TensorRef, read_tensor

A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class LoraSource:
    """A LoRA file, looked up in the base but not read."""

    path: Path
    sha256: str
    strength: float
    conversion: Conversion

    @property
    def modules(self) -> tuple[str, ...]:
        """The base's modules that it changes."""
        return tuple(dict.fromkeys(output.module for output in self.conversion.outputs))

    @property
    def numel(self) -> int:
        """The numbers in its factors."""
        return sum(
            ref.numel for output in self.conversion.outputs for s in output.slices if s.module
            for ref in s.module.factors.values()
        )  # fmt: skip


def find_modules(
    path: Path, sha256: str, strength: float, base: Checkpoint, *, alpha: float | None = None
) -> LoraSource:
    """Look a LoRA's modules up in the base, from its header.

    `alpha` is that of all its modules, whatever the file says.

    Raises:
        ConfigError: it is more than low-rank differences of linear layers' weights, or does not fit the base.
    """
    try:
        lora = read_lora(path)
        if alpha is not None:
            lora = _with_alpha(lora, alpha)
        conversion = plan_conversion(lora, DIFFUSERS, base=base, leaves_others=True)
    except LorafuseError as error:
        raise ConfigError(str(error)) from error
    others = sorted(
        output.module
        for output in conversion.outputs
        if output.parameter != "weight"
        or any(s.module and s.module.factors.keys() - {"down", "up"} for s in output.slices)
    )
    if others:
        raise ConfigError(f"{path}: {len(others)} of its modules are no plain LoRA (first: {others[0]})")
    return LoraSource(path, sha256, strength, conversion)


def _with_alpha(lora: LoraFile, alpha: float) -> LoraFile:
    modules = tuple(dataclasses.replace(module, alpha=alpha) for module in lora.modules)
    return dataclasses.replace(lora, modules=modules, scale_sources=ScaleSources())


def read_factors(source: LoraSource) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A (r, in) and B (out, r), fp32, with B A the delta at the source's strength."""
    tensors, _, _ = respelled(source.conversion)
    prefix = DIFFUSERS.prefixes[0]
    found = {}
    for name, down in tensors.items():
        if name.endswith(A):
            module = name.removesuffix(A)
            up = _tensor(tensors[module + B]).float()
            found[module.removeprefix(prefix)] = _tensor(down).float().flatten(1), source.strength * up.flatten(1)
    return found


def _tensor(stored: Stored) -> Tensor:
    if isinstance(stored.data, TensorRef):
        return read_tensor(stored.data).view(stored.shape)
    dtype: torch.dtype = getattr(torch, FLOAT_DTYPES[stored.dtype])
    return torch.frombuffer(bytearray(stored.data), dtype=dtype).view(stored.shape)


def joined(parts: Sequence[Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Several LoRAs as one: [B1 B2] [A1; A2] = B1 A1 + B2 A2."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for part in parts:
        for module, (a, b) in part.items():
            if module in found:
                a, b = torch.cat([found[module][0], a]), torch.cat([found[module][1], b], 1)
            found[module] = a, b
    return found


@dataclass
class FrozenLora:
    """Differences B A of some layers' weights, in the base's precision and on its device."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Module -> A (r, in) and B (out, r), at strength 1."""
    _strength: float = field(default=0.0, init=False)

    def attach(self, transformer: Any) -> None:
        """Put the hooks on the layers; before PEFT wraps them, so that the names are the base's own.

        Raises:
            ConfigError: one of the layers is not linear.
        """
        layers = dict(transformer.named_modules())
        for name, (a, b) in self.factors.items():
            if not isinstance(layers[name], nn.Linear):
                raise ConfigError(f"{name}: is a {type(layers[name]).__name__}; only LoRAs of linear layers are added")
            layers[name].register_forward_hook(self._hook(a, b))

    def _hook(self, a: Tensor, b: Tensor) -> Any:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._strength:
                return None
            x = inputs[0].to(a.dtype)
            delta = nn.functional.linear(nn.functional.linear(x, a), b)
            return output + (self._strength * delta).to(output.dtype)

        return add

    @contextmanager
    def added(self, strength: float) -> Iterator[None]:
        """Within it, `strength` times the differences are added to the weights."""
        before, self._strength = self._strength, strength
        try:
            yield
        finally:
            self._strength = before

    @property
    def nbytes(self) -> int:
        """Of the factors."""
        return sum(a.nbytes + b.nbytes for a, b in self.factors.values())


def load_frozen(sources: Sequence[LoraSource], dtype: torch.dtype, device: torch.device) -> FrozenLora:
    """Read LoRAs, whose strengths go into B; products are computed in `dtype`."""
    factors = joined([read_factors(source) for source in sources])
    return FrozenLora({module: (a.to(device, dtype), b.to(device, dtype)) for module, (a, b) in factors.items()})
