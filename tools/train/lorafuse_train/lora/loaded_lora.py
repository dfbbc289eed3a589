"""LoRA files of any spelling, added to a transformer that is only to draw."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafuse_common.errors import ConfigError, LorafuseError
from lorafuse_train.lora.adapter import PREFIX
from lorafuse_train.lora.lora_file import LOADING_FAILS, read_as_diffusers
from lorafuse_train.samples.sample_options import WantedLora


@dataclass(frozen=True, slots=True)
class LoadedLora:
    """A LoRA as diffusers spells it, its own scale within B."""

    wanted: WantedLora
    tensors: dict[str, Tensor]
    left_out: str
    """What of the file is not used, as the end of a message."""

    def __str__(self) -> str:
        return f"{self.wanted.path.name} x {self.wanted.strength:g}"


def read_adapter(wanted: WantedLora, transformer: Path) -> LoadedLora:
    """Read a LoRA as one of the transformer in that folder.

    Raises:
        ConfigError: it is for another model, or of a kind that is not loaded as it is.
    """
    try:
        tensors, left_out = read_as_diffusers(wanted.path, transformer, leaves_others=True)
    except LorafuseError as error:
        raise ConfigError(
            f"--lora {wanted.path}: cannot be loaded ({error}). What is no LoRA or DoRA can be fused: "
            f"`lorafuse fuse BASE --lora {wanted.path} --out DIR`"
        ) from error
    counted = ", ".join(f"{count} modules ({reason})" for reason, count in left_out.items())
    return LoadedLora(wanted, tensors, f"; left out: {counted}" if counted else "")


def add_loras(transformer: Any, loras: Sequence[LoadedLora]) -> None:
    """Load LoRAs into a transformer, and switch them on at their strengths; in its own precision, as diffusers does.

    Raises:
        LorafuseError: diffusers does not load one.
    """
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        try:
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # there may be several
            transformer.load_lora_adapter(lora.tensors, prefix=PREFIX.removesuffix("."), adapter_name=name)
        except LOADING_FAILS as error:
            raise LorafuseError(f"--lora {lora.wanted.path}: diffusers does not load it ({error})") from error
    if names:
        transformer.set_adapters(names, [lora.wanted.strength for lora in loras])
