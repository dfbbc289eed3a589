"""The small files of a model that say how large its tensors are, after some came out larger or in another dtype."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafuse_common.checkpoint import read_json

from .plan import ComponentPlan


def adjusted_files(components: Sequence[ComponentPlan]) -> dict[Path, str]:
    """`config.json` and the shards' index of every such transformer: path in the model's folder -> new text."""
    found = {}
    for component in components:
        base = component.base
        folder = base.root / (base.component or "")
        if component.widened and (config := read_json(folder / "config.json")) is not None:
            path = (folder / "config.json").relative_to(base.root)
            found[path] = _dump(_widened_config(component, config))
        if component.stored and base.index and (index := read_json(base.index)):
            total = index.get("metadata", {}).get("total_size")
            if total is not None:
                index["metadata"]["total_size"] = total + component.added_bytes
            found[base.index.relative_to(base.root)] = _dump(index)
    return found


def _widened_config(component: ComponentPlan, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the new number of input channels; what it counts as output channels stays."""
    keys = component.base.family.widenable.values() if component.base.family else ()
    columns = next(iter(component.widened.values()))[1]
    for key in keys:
        if config.get("out_channels") is None and key == "in_channels":
            config["out_channels"] = config.get(key)  # diffusers takes a missing one to be as many as go in
        config[key] = columns
    return config


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
