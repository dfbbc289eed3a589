"""Where and how precisely the model computes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from lorafuse_train.options.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Precision:
    """One device, with or without autocast; LoRA weights, losses and latents are fp32 either way."""

    device: torch.device
    autocast: bool
    """Compute matrix products in bf16."""
    reason: str
    """Why, for the log."""

    def compute(self) -> AbstractContextManager[object]:
        """The context every forward pass runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)


def choose_precision(config: TrainConfig, base_dtype: torch.dtype, device: torch.device) -> Precision:
    """`--mixed_precision` made definite."""
    if config.mixed_precision != "auto":
        return Precision(device, config.mixed_precision == "bf16", "as asked")
    stored = str(base_dtype).removeprefix("torch.")
    return Precision(device, base_dtype is torch.bfloat16, f"because the base is {stored}")
