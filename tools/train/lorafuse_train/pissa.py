"""A LoRA that starts from the principal components of each weight (PiSSA, https://arxiv.org/abs/2404.02948).

    W x = (W - s B0 A0) x + s B0 A0 x        A and B start as A0 and B0

PEFT takes s B0 A0 off the weight, which rounds it anew in bf16 and leaves no model without the LoRA to compare with.
Here the weight stays as it is, and a second, frozen adapter holds A0 and -B0: the same function, and exactly the base
where both are off. The file holds the difference, an ordinary LoRA of twice the rank for the base as it is.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor

INITIAL = "initial"
"""The frozen adapter."""


def start_from_components(transformer: Any, trained: str, config: LoraConfig, init: str) -> None:
    """Set the adapter `trained` to the components of each weight, and add the frozen one that takes them off."""
    frozen = copy.deepcopy(config)
    frozen.lora_dropout = 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is what is meant
        transformer.add_adapter(frozen, INITIAL)
    transformer.set_adapter([trained, INITIAL])
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            a, b = components(module.get_base_layer().weight, module.r[trained], module.scaling[trained], init)
            for adapter, sign in ((trained, 1), (INITIAL, -1)):
                module.lora_A[adapter].weight.data = a.clone()
                module.lora_B[adapter].weight.data = sign * b
    freeze_initial(transformer)


def freeze_initial(transformer: Any) -> None:
    """PEFT lets all active adapters learn whenever it switches them on; this one must not."""
    for name, parameter in transformer.named_parameters():
        if f".{INITIAL}." in name:
            parameter.requires_grad_(False)


@torch.no_grad()
def components(weight: Tensor, rank: int, scale: float, init: str) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) with s B0 A0 = U_r S_r V_r^T, fp32, as `peft.tuners.lora.layer.pissa_init`."""
    whole = weight.float()
    _, _, niter = init.partition("_niter_")
    if niter:
        u, s, v = torch.svd_lowrank(whole, rank, niter=int(niter))
        vh = v.t()
    else:
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
