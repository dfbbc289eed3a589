"""A LoRA that starts from the principal components of each weight (PiSSA, https://arxiv.org/abs/2404.02948).

    W x = (W - s B0 A0) x + s B0 A0 x        A and B start as A0 and B0

PEFT takes s B0 A0 off the weight, which rounds it anew in bf16 and leaves no model without the LoRA to compare with.
Here the weight stays as it is, and a second, frozen adapter holds A0 and -B0: the same function, and exactly the base
where both are off. The file holds the difference, an ordinary LoRA of twice the rank for the base as it is.

A small difference of large products: it is computed in fp32 though the rest be bf16, and its factors in the file are
of its own size, not A, A0, B and B0 themselves, which a reader's bf16 would round by more than they differ.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

INITIAL = "initial"
"""The frozen adapter."""


class Exact(nn.Linear):
    """A linear layer without bias that computes in fp32, whatever autocast says."""

    def __init__(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T."""
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), self.weight)


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
                module.lora_A[adapter] = Exact(a.clone())
                module.lora_B[adapter] = Exact(sign * b)
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


@torch.no_grad()
def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of b a, of the same shapes, that share its singular values, so that neither is larger than it must be."""
    q, r = torch.linalg.qr(b.double().cpu())
    p, t = torch.linalg.qr(a.double().cpu().t())
    u, s, vh = torch.linalg.svd(r @ t.t(), full_matrices=False)  # b a = q r t^T p^T
    root, more = s.sqrt(), len(a) - len(s)  # more ranks than the weight has stay zero
    rows, columns = root[:, None] * vh @ p.t(), q @ u * root
    return nn.functional.pad(rows, (0, 0, 0, more)).float(), nn.functional.pad(columns, (0, more)).float()


def compute_exactly(transformer: Any, adapter: str) -> None:
    """Let an adapter that was loaded compute as the one that was trained, so that the two can be compared."""
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            for factor in (module.lora_A, module.lora_B):
                factor[adapter] = Exact(factor[adapter].weight.data)
