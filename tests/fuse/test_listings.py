"""Every dialect on every layout of every model: LoRAs of all its matrices are planned on full-width sparse bases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import write_sparse
from models import MODELS, Model, entries, title
from safetensors.torch import save_file

from lorafuse_common.checkpoint import Checkpoint, open_checkpoint
from lorafuse_common.dialects import DIALECTS
from lorafuse_common.naming import Layout
from lorafuse_fuse.choices import LoraRequest
from lorafuse_fuse.inspection import inspect_path
from lorafuse_fuse.plan import plan_fuse

RANK = 2


def write_base(path: Path, model: Model, layout: Layout, prefix: str) -> Checkpoint:
    write_sparse(path, {prefix + entry.name: entry.shape for entry in entries(model, layout)} | {"vae.x": (1,)})
    return open_checkpoint(path)


@pytest.mark.parametrize("model", MODELS, ids=title)
def test_every_dialect_lands_on_every_layout(tmp_path: Path, model: Model) -> None:
    layouts = {layout.name: layout for layout in model.family.layouts if layout.name in ("diffusers", "original")}
    bases = [
        write_base(tmp_path / f"{layout.name}.safetensors", model, layout, prefix)
        for layout, prefix in zip(layouts.values(), ("", "model.diffusion_model."), strict=False)
    ]
    for base, layout in zip(bases, layouts.values(), strict=True):
        assert (base.family, base.layout) == (model.family, layout)
    for layout in layouts.values():
        matrices = [entry for entry in entries(model, layout) if entry.is_matrix]
        for dialect in DIALECTS:
            shapes = {}
            for entry in matrices:
                stem = dialect.spell(entry.module)
                shapes[stem + dialect.roles["down"]] = (RANK, *entry.shape[1:])
                shapes[stem + dialect.roles["up"]] = (entry.shape[0], RANK, *(1 for _ in entry.shape[2:]))
            lora = write_sparse(tmp_path / f"{layout.name}.{dialect.name}.lora.safetensors", shapes)
            for base in bases:
                plan = plan_fuse(base, [LoraRequest(lora)])
                assert plan.problems == (), (base.layout, layout.name, dialect.name, plan.problems[:2])
                assert plan.loras[0].applied == plan.loras[0].modules == len(matrices)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_inspect_names_what_it_is(tmp_path: Path, dialect: object) -> None:
    """The dialect by its spelling, the family by its names, of a LoRA whose base is not at hand."""
    chosen = next(d for d in DIALECTS if d is dialect)
    stem = chosen.spell("transformer_blocks.0.img_mlp.net.2")
    stems = {stem + chosen.roles["down"]: (4, 12288), stem + chosen.roles["up"]: (3072, 4)}
    save_file({name: torch.zeros(shape) for name, shape in stems.items()}, tmp_path / "x.safetensors")
    facts = inspect_path(tmp_path / "x.safetensors")
    assert (facts["dialect"], facts["family"], facts["layout"]) == (chosen.name, ["qwen_image"], ["diffusers"])
    assert facts["algebra"] == {"lora": 1}
    assert json.dumps(facts)
