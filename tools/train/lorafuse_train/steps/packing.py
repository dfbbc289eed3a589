"""Nested state with tensors in it, as JSON and a flat dictionary of tensors, and back without a bit of difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TENSOR, TUPLE, PAIRS = "tensor", "tuple", "pairs"
"""Keys of the one-entry objects that stand for what JSON does not know."""


def pack(tree: Any, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """`tree` as what JSON can say, and its tensors, on the CPU, under names that begin with `prefix`.

    Raises:
        TypeError: it holds something else than tensors, numbers, texts and containers of them.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    return _pack(tree, prefix, tensors, names), tensors


def _pack(tree: Any, prefix: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    if isinstance(tree, Tensor):
        # A tensor may occur twice (bitsandbytes' tables do); the copy is needed, because views share their storage.
        name = names.setdefault(id(tree), f"{prefix}.{len(names)}")
        tensors.setdefault(name, tree.detach().to("cpu", copy=True).contiguous())
        return {TENSOR: name}
    if isinstance(tree, list):
        return [_pack(item, prefix, tensors, names) for item in tree]
    if isinstance(tree, tuple):
        return {TUPLE: [_pack(item, prefix, tensors, names) for item in tree]}
    if isinstance(tree, Mapping):
        return {PAIRS: [[_plain(key), _pack(value, prefix, tensors, names)] for key, value in tree.items()]}
    return _plain(tree)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} {value!r}"[:200])


def unpack(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `pack` made these of."""
    if isinstance(plain, list):
        return [unpack(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == TENSOR:
        return tensors[content]
    if kind == TUPLE:
        return tuple(unpack(item, tensors) for item in content)
    return {key: unpack(value, tensors) for key, value in content}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load a `state_dict`, and undo what torch does to it: tensors cast to the parameter's dtype, texts broken."""
    optimizer.load_state_dict(dict(saved))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in saved["state"].items():
        own = optimizer.state[parameters[index]]
        for name, value in values.items():
            loaded = own.get(name)
            if not pack(value, "")[1]:
                own[name] = value
            elif isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                own[name] = value.to(loaded.device, copy=True)
