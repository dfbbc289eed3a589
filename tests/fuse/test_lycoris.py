"""Every update rule of LyCORIS against its own modules, with random values in all factors and alpha != rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from rules import applied, fused

from lorafuse_common.dialects import split_key


class Lycoris(NamedTuple):
    """A module of LyCORIS to be trained on a layer."""

    kind: type[torch.nn.Module]
    layer: str
    options: Mapping[str, Any]
    linear: bool = True
    """Whether its multiplier interpolates the weight, as our strength always does."""


COLUMNS = {"weight_decompose": True, "wd_on_out": False}
LYCORIS = {
    "lora": Lycoris(LoConModule, "linear", {}),
    "locon": Lycoris(LoConModule, "conv", {}),
    "locon-tucker": Lycoris(LoConModule, "conv", {"use_tucker": True}),
    "loha": Lycoris(LohaModule, "linear", {}),
    "loha-conv": Lycoris(LohaModule, "conv", {}),
    "loha-tucker": Lycoris(LohaModule, "conv", {"use_tucker": True}),
    "lokr": Lycoris(LokrModule, "linear", {"lora_dim": 1}),
    "lokr-both": Lycoris(LokrModule, "linear", {"lora_dim": 1, "decompose_both": True}),
    "lokr-conv": Lycoris(LokrModule, "conv", {"lora_dim": 1}),
    "lokr-tucker": Lycoris(LokrModule, "conv", {"lora_dim": 1, "use_tucker": True}),
    "lokr-full": Lycoris(LokrModule, "conv", {"full_matrix": True}),
    "dora": Lycoris(LoConModule, "linear", {"weight_decompose": True}, linear=False),
    "dora-conv": Lycoris(LoConModule, "conv", {"weight_decompose": True}, linear=False),
    "dora-columns": Lycoris(LoConModule, "linear", COLUMNS, linear=False),
    "dora-conv-columns": Lycoris(LoConModule, "conv", COLUMNS, linear=False),
    "dora-tucker-columns": Lycoris(LoConModule, "conv", {"use_tucker": True, **COLUMNS}, linear=False),
    "doha": Lycoris(LohaModule, "linear", {"weight_decompose": True}, linear=False),
    "doha-conv-columns": Lycoris(LohaModule, "conv", COLUMNS, linear=False),
    "dokr": Lycoris(LokrModule, "linear", {"lora_dim": 1, "weight_decompose": True}, linear=False),
    "dokr-full-columns": Lycoris(LokrModule, "linear", {"full_matrix": True, **COLUMNS}, linear=False),
    "glora": Lycoris(GLoRAModule, "linear", {}),
    "glora-square": Lycoris(GLoRAModule, "square", {}),
    "glora-conv": Lycoris(GLoRAModule, "conv", {}),
    "oft": Lycoris(DiagOFTModule, "linear", {"lora_dim": 4}),
    "oft-conv": Lycoris(DiagOFTModule, "conv", {"lora_dim": 4, "constraint": 0.125}),
    "oft-rescaled": Lycoris(DiagOFTModule, "conv", {"lora_dim": 4, "rescaled": True}, linear=False),
    "boft": Lycoris(ButterflyOFTModule, "linear", {"lora_dim": 6, "constraint": 0.0625}, linear=False),
    "boft-conv": Lycoris(ButterflyOFTModule, "conv", {"lora_dim": 2, "rescaled": True}, linear=False),
}


def trained(case: Lycoris) -> Any:
    """A module with random values in all factors, on a layer of its own."""
    torch.manual_seed(7)
    layers = {"linear": (12, 24), "square": (12, 12)}
    layer: torch.nn.Module = torch.nn.Conv2d(6, 8, 3, bias=False)
    if case.layer in layers:
        layer = torch.nn.Linear(*layers[case.layer], bias=False)
    module = case.kind("m", layer, **{"lora_dim": 3, "alpha": 2, **case.options})
    for name, value in module.named_parameters():
        near_one = name in ("dora_scale", "rescale")
        value.data = value.data * (0.5 + torch.rand_like(value)) if near_one else torch.randn_like(value) / 2
    return module


def merged(module: Any, strength: float) -> torch.Tensor:
    """The weight that LyCORIS trains with; its `get_merged_weight` scales LoHa and LoKr twice (4.1.3)."""
    changes: list[torch.Tensor] = []

    def remember(_: torch.Tensor, weight: torch.Tensor, *args: object, **kwargs: object) -> float:
        changes.append(weight.detach())
        return 0.0

    module.op, module.multiplier = remember, strength
    width = module.org_weight.shape[1]
    module(torch.zeros(1, width, 3, 3) if module.org_weight.dim() > 2 else torch.zeros(1, width))
    return torch.as_tensor(module.org_weight.detach() + changes[0])


@pytest.mark.parametrize("case", LYCORIS.values(), ids=LYCORIS)
def test_equals_what_lycoris_trains(case: Lycoris) -> None:
    """At full strength, and at half of it, in blocks of rows."""
    module = trained(case)
    factors, alpha = {}, None
    for suffix, value in module.state_dict().items():
        key = split_key(f"m.{suffix}")
        assert key and key.stem == "m"
        if key.role == "alpha":
            alpha = float(value)
        else:
            factors[key.role] = value.detach().clone()
    base = module.org_weight.detach().clone()
    full = merged(module, 1.0)
    assert (full - base).abs().max() > 1e-2
    torch.testing.assert_close(applied(factors, base, alpha, 1.0), full)
    half = merged(module, 0.5) if case.linear else base + 0.5 * (full - base)
    torch.testing.assert_close(applied(factors, base, alpha, 0.5, cuts=(1, 5)), half)


@pytest.mark.parametrize("case", LYCORIS.values(), ids=LYCORIS)
def test_files_of_lycoris(tmp_path: Path, case: Lycoris) -> None:
    """The same from a file in its spelling; the strength interpolates between the base and LyCORIS' merge."""
    module = trained(case)
    base = module.org_weight.detach().clone()
    lora = {f"lycoris_m_0.{suffix}": value for suffix, value in module.state_dict().items()}
    result = fused(tmp_path, {"m.0.weight": base}, lora)
    torch.testing.assert_close(result["m.0.weight"], base + 0.5 * (merged(module, 1.0) - base))
