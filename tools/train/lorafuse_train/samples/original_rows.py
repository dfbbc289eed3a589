"""The original base's weights, kept in main memory and swapped in to draw with the new LoRA, without a second model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_common.errors import ConfigError
from lorafuse_common.tensorfile import read_tensor


@dataclass(frozen=True, slots=True)
class HostWeights:
    """The tensors that the fuse changed, as they were before it, on the CPU."""

    pairs: Sequence[tuple[nn.Parameter, Tensor]]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within it, the model computes with them; afterwards its weights are, bit for bit, what they were."""
        fused = [parameter.data.cpu() for parameter, _ in self.pairs]
        try:
            for parameter, original in self.pairs:
                parameter.data = original.to(parameter.device)
            yield
        finally:
            for (parameter, _), data in zip(self.pairs, fused, strict=True):
                parameter.data = data.to(parameter.device)


def original_on_host(folder: Path, transformer: Any) -> HostWeights:
    """What differs in the original's transformer folder; to be called before the new LoRA is attached.

    Raises:
        ConfigError: it is not what was fused into.
    """
    tensors, pairs, faults = open_checkpoint(folder).tensors, [], []
    for name, parameter in transformer.named_parameters():
        if name not in tensors or tuple(tensors[name].shape) != tuple(parameter.shape):
            faults.append(name)
            continue
        original = read_tensor(tensors[name]).to(parameter.dtype)
        if not original.equal(parameter.data.cpu()):
            pairs.append((parameter, original))
    if faults:
        raise ConfigError(
            f"--original_model {folder}: is not what was fused into: {len(faults)} tensors are missing or have another "
            f"shape there (first: {faults[0]})"
        )
    return HostWeights(pairs)
