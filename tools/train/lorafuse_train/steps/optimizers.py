"""Optimizers by name or class path, tried on a small weight before the model is loaded."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorafuse_common.errors import ConfigError
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.config_training import PRODIGY
from lorafuse_train.steps.packing import pack, restore_optimizer, unpack

UNFIT = (TypeError, ValueError, RuntimeError, NotImplementedError, KeyError, AttributeError, IndexError)
"""What optimizers raise on arguments or weights that are not for them."""
SIDE = 64
"""Of the weight that is tried; bitsandbytes keeps smaller ones in 32 bit."""


@dataclass(frozen=True, slots=True)
class Named:
    """An optimizer with a name of its own."""

    path: str
    package: str | None
    """What to install for it, besides lorafuse."""
    arguments: Callable[[TrainConfig], Mapping[str, Any]]


def _adam(config: TrainConfig) -> dict[str, Any]:
    return {
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }


def _prodigy(config: TrainConfig) -> dict[str, Any]:
    # As diffusers' scripts set it up, and as its README advises with a warm-up.
    return {**_adam(config), "decouple": True, "use_bias_correction": True, "safeguard_warmup": True}


def _adafactor(config: TrainConfig) -> dict[str, Any]:
    # So that --learning_rate and --lr_scheduler mean what they say.
    return {"scale_parameter": False, "relative_step": False, "warmup_init": False}


NAMED: Mapping[str, Named] = {
    "adamw": Named("torch.optim.AdamW", None, _adam),
    "adamw8bit": Named("bitsandbytes.optim.AdamW8bit", "bitsandbytes", _adam),
    PRODIGY: Named("prodigyopt.Prodigy", "prodigyopt", _prodigy),
    "adafactor": Named("transformers.optimization.Adafactor", None, _adafactor),
}


def build_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the options describe, for `parameters`.

    Raises:
        ConfigError: there is no such class, or it does not take these arguments or these weights.
    """
    named = NAMED.get(config.optimizer)
    cls = _find(config.optimizer, named)
    arguments = {**(named.arguments(config) if named else {}), **dict(config.optimizer_args)}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Prodigy talks
            return cls(list(parameters), lr=config.peak_learning_rate, **arguments)
    except UNFIT as error:
        known = ", ".join(name for name in inspect.signature(cls).parameters if name not in ("params", "lr"))
        raise ConfigError(
            f"--optimizer {config.optimizer}: {_said(error)}. Its --optimizer_args: {known or 'none'}"
        ) from error


def _find(name: str, named: Named | None) -> Callable[..., torch.optim.Optimizer]:
    module, _, attribute = (named.path if named else name).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        package = named.package if named and named.package else (error.name or module).partition(".")[0]
        lack = f"needs a package that is not here: pip install {package}"
        if package in sys.modules:
            lack = f"there is no module {error.name}"
        raise ConfigError(f"--optimizer {name}: {lack}") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f"--optimizer {name}: {module} cannot be imported ({_said(error)})") from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        found = "has no such class" if cls is None else f"is a {type(cls).__name__}, no torch.optim.Optimizer"
        raise ConfigError(f"--optimizer {name}: {module if cls is None else name} {found}")
    return cls


def check_optimizer(config: TrainConfig, device: torch.device) -> None:
    """Train small weights with it, save and restore its state in between, and see that nothing comes of that.

    Raises:
        ConfigError: it cannot be used here; its state cannot be kept; or it does not go on from its state exactly.
    """
    shapes = [(SIDE, SIDE), (SIDE,)] if config.use_dora else [(SIDE, SIDE)]
    first = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    optimizer = build_optimizer(config, first)
    _try_step(config, optimizer, first, 1)
    try:
        plain, tensors = pack(optimizer.state_dict(), "optimizer")
    except TypeError as error:
        raise ConfigError(f"--optimizer {config.optimizer}: no checkpoint can hold its state, a {error}") from error
    second = [nn.Parameter(weight.detach().clone()) for weight in first]
    restored = build_optimizer(config, second)
    restore_optimizer(restored, unpack(plain, tensors))
    _try_step(config, optimizer, first, 2)
    _try_step(config, restored, second, 2)
    if not all(a.equal(b) for a, b in zip(first, second, strict=True)):
        raise ConfigError(
            f"--optimizer {config.optimizer}: does not go on exactly where its state_dict was taken, "
            "so that no training with it could be resumed; use another"
        )


def _try_step(
    config: TrainConfig, optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], number: int
) -> None:
    torch.manual_seed(number)
    for weight in weights:
        weight.grad = torch.linspace(-1, number, weight.numel(), device=weight.device).view_as(weight)
    try:
        optimizer.step()
    except Exception as error:  # whatever an unknown class may raise
        raise ConfigError(f"--optimizer {config.optimizer}: cannot train a LoRA here: {_said(error)}") from error


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
