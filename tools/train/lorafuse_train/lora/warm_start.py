"""A training that starts from a LoRA file: its modules found in the base, its scale kept, its ranks compared."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lorafuse_common.errors import ConfigError, LorafuseError
from lorafuse_common.hashing import sha256_of
from lorafuse_train.base import Base
from lorafuse_train.lora.adapter import ADAPTER, PREFIX
from lorafuse_train.lora.lora_file import read_as_diffusers
from lorafuse_train.lora.ranks import module_strengths
from lorafuse_train.lora.targets import Targets
from lorafuse_train.options.config import TrainConfig

A, B, MAGNITUDE = "A.weight", "B.weight", "magnitude_vector"
"""The factors of a module, as they are called after `.lora_`."""
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Start:
    """The LoRA that a training starts from."""

    path: Path
    sha256: str
    factors: Mapping[str, Mapping[str, Tensor]]
    """Target module -> factor -> its values, at scale 1."""
    left_out: str
    """What of the file is not trained, as the end of a message."""

    @property
    def record(self) -> dict[str, str]:
        """What the new LoRA's header says of it."""
        return {"name": self.path.name, "sha256": self.sha256}


def read_start(path: Path, base: Base, targets: Targets, config: TrainConfig) -> Start:
    """Read a LoRA in any dialect as one of the target modules, and make sure that it fits them.

    Raises:
        ConfigError: listing all that does not fit, and what to do.
    """
    found = _read(path, base)
    idle = sorted(module for module in found if module in targets.idle)
    modules = {module: factors for module, factors in found.items() if module not in idle}
    faults = _misfits(modules, targets, config)
    if faults:
        raise ConfigError(f"--lora_checkpoint {path}:\n" + "\n".join(f"  {fault}" for fault in faults))
    left_out = f"; left out, for nothing reads their output: {', '.join(idle)}" if idle else ""
    return Start(path, sha256_of(path), modules, left_out)


def _read(path: Path, base: Base) -> dict[str, dict[str, Tensor]]:
    """Module -> factor -> values, spelled as diffusers does, which puts the scale into B."""
    try:
        tensors, _ = read_as_diffusers(path, base.transformer)
    except LorafuseError as error:
        raise ConfigError(f"--lora_checkpoint {path}: cannot be a start ({error})") from error
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.removeprefix(PREFIX).rpartition(".lora_" if ".lora_" in name else ".")
        found.setdefault(module, {})[factor] = tensor
    return found


def _misfits(found: Mapping[str, Mapping[str, Tensor]], targets: Targets, config: TrainConfig) -> list[str]:
    faults = []
    strange = sorted(set(found) - set(targets.modules))
    absent = sorted(set(targets.modules) - set(found))
    if strange or absent:
        endings = ",".join(sorted({_ending(module) for module in found}))
        faults.append(
            f"its modules are not the target modules{_some('it has', strange)}{_some('it lacks', absent)}; "
            f"its own: --lora_target_modules {endings}"
        )
    dora = [module for module, factors in found.items() if MAGNITUDE in factors]
    if dora and not config.use_dora:
        faults.append("is a DoRA; give --use_dora")
    elif config.use_dora and len(dora) < len(found):
        faults.append("is no DoRA; leave --use_dora out")
    others = sorted({factor for factors in found.values() for factor in factors} - {A, B, MAGNITUDE})
    plain = {module: factors for module, factors in found.items() if {A, B} <= set(factors)}
    if others or len(plain) < len(found):
        faults.append(f"is no plain LoRA, which alone is trained here; it holds {', '.join(others) or 'halves'}")
    common = {module: factors for module, factors in plain.items() if module in targets.modules}
    return [*faults, *_other_ranks(common, targets, config)]


def _other_ranks(found: Mapping[str, Mapping[str, Tensor]], targets: Targets, config: TrainConfig) -> list[str]:
    strengths = module_strengths(targets, config)
    ranks = {module: len(factors[A]) for module, factors in found.items()}
    wrong = [module for module, rank in ranks.items() if rank != strengths[module].rank]
    if not wrong:
        return []
    first = min(wrong)
    (most, _), *others = Counter(ranks.values()).most_common()
    advice = f"--lora_rank {most}"
    for rank, _ in others:
        advice += "".join(f" --rank_pattern {module}={rank}" for module in sorted(ranks) if ranks[module] == rank)
    if len(others) > SHOWN or len(advice) > 400:
        advice = f"--lora_rank {most} and a --rank_pattern for every other rank that it has: {_counts(ranks)}"
    return [
        f"has another rank in {len(wrong)} modules (first: {first}, {ranks[first]} there, "
        f"{strengths[first].rank} here); give {advice}"
    ]


def _counts(ranks: Mapping[str, int]) -> str:
    return ", ".join(f"{rank} in {count} modules" for rank, count in sorted(Counter(ranks.values()).items()))


def _ending(module: str) -> str:
    """What follows the last number between dots that is a block's."""
    return re.split(r"\.\d+\.(?=[a-z_]+)", module, maxsplit=1)[-1] if re.search(r"\.\d+\.", module) else module


def _some(what: str, modules: list[str]) -> str:
    if not modules:
        return ""
    more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
    return f"; {what} {', '.join(modules[:SHOWN])}{more}"


@torch.no_grad()
def start_from(start: Start, transformer: Any) -> None:
    """Give the attached LoRA the values of the file: B is divided by the scale that it is multiplied with later."""
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            factors = start.factors[name]
            module.lora_A[ADAPTER].weight.copy_(factors[A])
            module.lora_B[ADAPTER].weight.copy_(factors[B].float() / module.scaling[ADAPTER])
            if MAGNITUDE in factors:
                vector = module.lora_magnitude_vector[ADAPTER].weight
                vector.copy_(factors[MAGNITUDE].view_as(vector))
