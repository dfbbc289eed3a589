"""diffusers' models as both layouts name and shape them, at full width and without weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch

from lorafuse_common.families import FAMILIES
from lorafuse_common.naming import Family, Layout, Parts

GOLDEN = Path(__file__).parent / "golden"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """One of diffusers' models, of few blocks but full width."""

    family: Family
    class_name: str
    options: str
    has_converter: bool
    """Whether diffusers' single-file converter knows all of its modules."""

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """diffusers' and the one that the converter converts from, which may be the same."""
        return self.family.layouts[0], self.family.layouts[1 if len(self.family.layouts) > 1 else 0]


MODELS = [
    Model(family, spec["class"], json.dumps(spec["options"]), spec.get("converter", True))
    for family in FAMILIES
    for spec in json.loads((GOLDEN / "models.json").read_text())[family.name]
]
CONVERTED = [model for model in MODELS if model.has_converter]
NAMESAKES = ("SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel")
"""Classes whose modules are all Wan's; counting their rows is enough."""
CROSSED = [m for m in CONVERTED if m.layouts[0] is not m.layouts[1] and m.class_name not in NAMESAKES]


def title(model: Model) -> str:
    return f"{model.family.name}-{MODELS.index(model)}"


@cache
def shapes_of(model: Model) -> dict[str, Shape]:
    """Parameter -> shape."""
    with torch.device("meta"):
        built = getattr(diffusers, model.class_name)(**json.loads(model.options))
    return {name: tuple(value.shape) for name, value in built.named_parameters()}


class Entry(NamedTuple):
    """A tensor of a model, as a layout names it."""

    name: str
    module: str
    parameter: str
    """`weight` or `bias`."""
    parts: Parts
    shape: Shape

    @property
    def is_matrix(self) -> bool:
        """Whether a LoRA has factors for it, and not a full difference as of biases, norms and bare parameters."""
        return len(self.shape) > 1 and self.name.endswith(".weight")


def entries(model: Model, layout: Layout) -> Iterator[Entry]:
    """Every tensor of a layout's table that the model has; of aliases the first, of many blocks the two at the ends."""
    shapes = shapes_of(model)
    blocks = 1 + max(int(n) for name in shapes for n in re.findall(r"(?<=\.)\d+(?=\.\w+\.)", name))
    table = model.family.layouts[0].expand(blocks)
    rows: dict[tuple[str, str], tuple[Shape, bool]] = {}
    for module, its in table.items():
        for parameter in ("weight", "bias"):
            is_bare = parameter == "weight" and module in shapes
            shape = shapes.get(module if is_bare else f"{module}.{parameter}")
            for part, _, count in (its.rows(shape[0]) or ()) if shape else ():
                rows[part, parameter] = ((count, *shape[1:]) if shape else (), is_bare)
    seen = set()
    for module, its in layout.expand(blocks).items():
        block = re.search(r"blocks\.(\d+)\.", module)
        if block and blocks > 8 and 0 < int(block[1]) < blocks - 1:
            continue  # Mochi's: its converter counts to 48, however many there are
        for parameter in ("weight", "bias"):
            found = [rows[part, parameter] for part in its.names if (part, parameter) in rows]
            if len(found) < len(its.names) or (its.names, parameter) in seen:
                continue
            is_bare = found[0][1] or (parameter == "weight" and module.endswith(".scale"))
            name = module if is_bare else f"{module}.{parameter}"
            if layout is model.family.layouts[0] and name not in shapes:
                continue  # another version's name for the same
            seen.add((its.names, parameter))
            shape = (sum(shape[0] for shape, _ in found), *found[0][0][1:])
            yield Entry(name, module, parameter, its, shape)
