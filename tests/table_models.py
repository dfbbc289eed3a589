"""Small models made from the families' tables, which have all modules, and LoRAs for them in every dialect.

Every module has a few rows for each of its parts and a few columns; a part has the same rows in every layout.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lorafuse_common.checkpoint import Checkpoint, open_checkpoint
from lorafuse_common.conversion import Converted, plan_conversion, write_conversion
from lorafuse_common.dialects import DIALECTS
from lorafuse_common.lora import read_lora
from lorafuse_common.naming import Family, Layout
from lorafuse_fuse.choices import LoraRequest
from lorafuse_fuse.fuse import FuseOptions, fuse, require_clean
from lorafuse_fuse.plan import plan_fuse

Run = Callable[..., tuple[int, str, str]]
Tensors = dict[str, torch.Tensor]
ROWS, COLUMNS, BLOCKS, RANK = 6, 10, 2, 4
DIALECT = {dialect.name: dialect for dialect in DIALECTS}


def draw(name: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * 0.3


def layout_of(family: Family, dialect: str) -> Layout:
    """Whose names tools write in a dialect; some families' ComfyUI layout has only what differs from the original."""
    names = (dialect, DIALECT[dialect].layout, "diffusers")
    found = [layout for name in names for layout in family.layouts if layout.name == name]
    return next(layout for layout in found if 2 * len(layout.modules) > len(found[-1].modules))


def model(family: Family, layout: Layout) -> Tensors:
    """A checkpoint in a layout's names; a part has the same rows in every layout."""
    rows: dict[str, int] = {}
    for each in family.layouts:
        for its in each.expand(BLOCKS).values():
            rows |= {p: max(rows.get(p, 0), share * ROWS) for p, share in zip(its.names, its.shares, strict=True)}
    found: Tensors = {}
    for module, its in layout.expand(BLOCKS).items():
        columns = () if "norm" in its.names[0].rpartition(".")[2] else (COLUMNS,)
        found[f"{module}.weight"] = torch.cat([draw(part, rows[part], *columns) for part in its.names])
        found[f"{module}.bias"] = torch.cat([draw(f"{part} bias", rows[part]) for part in its.names])
    return found


def base_file(folder: Path, family: Family, dialect: str) -> Path:
    layout = layout_of(family, dialect)
    path = folder / f"base-{layout.name}.safetensors"
    if not path.exists():
        save_file(model(family, layout), path)
    return path


def lora_file(folder: Path, family: Family, dialect: str, scales: Sequence[float] = ()) -> Path:
    """A LoRA for most of the modules that have columns, of different ranks; with alphas where scales are given."""
    spelling = DIALECT[dialect]
    tensors: Tensors = {}
    for number, (name, weight) in enumerate(sorted(model(family, layout_of(family, dialect)).items())):
        if weight.dim() < 2 or number % 5 == 1:
            continue
        rank, stem = RANK + number % 3, spelling.spell(name.removesuffix(".weight"))
        tensors[stem + spelling.suffix("down")] = draw(f"{name} A", rank, COLUMNS)
        tensors[stem + spelling.suffix("up")] = draw(f"{name} B", len(weight), rank)
        if scales:
            tensors[f"{stem}.alpha"] = torch.tensor(rank * scales[number % len(scales)])
    path = folder / f"{dialect}.safetensors"
    save_file(tensors, path)
    return path


def spelled(path: Path, dialect: str, factors: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    """A file of modules and the tensors that they have by suffix."""
    stems = {module: DIALECT[dialect].spell(module) for module in factors}
    path.parent.mkdir(exist_ok=True)
    save_file({stems[m] + suffix: value for m, its in factors.items() for suffix, value in its.items()}, path)
    return path


@cache
def opened(base: Path) -> Checkpoint:
    return open_checkpoint(base)


def converted(lora: Path, to: str, out: Path, base: Path | None = None, family: Family | None = None) -> Converted:
    plan = plan_conversion(read_lora(lora), DIALECT[to], base=opened(base) if base else None, family=family)
    return write_conversion(plan, out)


def fused(base: Path, lora: Path, out: Path, strength: float = 0.7) -> Tensors:
    plan = plan_fuse(opened(base), [LoraRequest(lora, strength)])
    require_clean(plan, ())
    fuse(plan, FuseOptions(out))
    return load_file(out / base.name)


def low_rank(rows: int = ROWS, name: str = "x") -> dict[str, torch.Tensor]:
    return {".lora_down.weight": draw(f"{name} A", RANK, 8), ".lora_up.weight": draw(f"{name} B", rows, RANK)}


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(run: Run, folder: Path, *args: object) -> str:
    """What a command says that fails and leaves everything as it was."""
    before = {name: (folder / name).read_bytes() for name in files_in(folder)}
    code, out, err = run(*args)
    assert (code, out) == (1, ""), err
    assert {name: (folder / name).read_bytes() for name in files_in(folder)} == before
    return re.sub(r"\s+", " ", err)


def module_factors(rule: str, rows: int, name: str) -> Tensors:
    """What one module has under a rule, by suffix; its weight has `rows` rows and `COLUMNS` columns."""

    def make(suffix: str, *shape: int) -> Tensors:
        return {suffix: draw(name + suffix, *shape)}

    low_rank = make(".lora_down.weight", RANK, COLUMNS) | make(".lora_up.weight", rows, RANK)
    magnitude = {".dora_scale": draw(f"{name} m", rows, 1).abs() + 1}
    loha = {
        key: value
        for side in "12"
        for part in (make(f".hada_w{side}_a", rows, RANK), make(f".hada_w{side}_b", RANK, COLUMNS))
        for key, value in part.items()
    }
    return {
        "lora": low_rank,
        "lora and bias": low_rank | make(".lora_B.bias", rows),
        "lora and difference of the bias": low_rank | make(".diff_b", rows),
        "core": low_rank | make(".lora_mid.weight", RANK, RANK),
        "dora": low_rank | magnitude,
        "dora by columns": low_rank | {".dora_scale": draw(name, 1, COLUMNS).abs() + 1},
        "loha": loha,
        "loha with dora": loha | magnitude,
        "loha with cores": {k: v.T.contiguous() if k.endswith("_a") else v for k, v in loha.items()}
        | make(".hada_t1", RANK, RANK)
        | make(".hada_t2", RANK, RANK),
        "lokr": make(".lokr_w1", 2, 2) | make(".lokr_w2", rows // 2, COLUMNS // 2),
        "glora": {
            k: v
            for part in (
                make(".a1.weight", COLUMNS, 2),
                make(".a2.weight", 2, COLUMNS),
                make(".b1.weight", rows, 2),
                make(".b2.weight", 2, COLUMNS),
            )
            for k, v in part.items()
        },
        "oft": make(".oft_blocks", rows // 2, 2, 2),
        "boft": make(".oft_blocks", 1, rows // 2, 2, 2),
        "diff": make(".diff", rows, COLUMNS) | make(".diff_b", rows),
        "replace": make(".set_weight", rows, COLUMNS) | make(".set_bias", rows),
    }[rule] | ({} if rule in ("diff", "replace", "oft", "boft") else {".alpha": torch.tensor(RANK * 0.75)})


def assert_close(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], rounding: float = 3e-7) -> None:
    """Equal to about a rounding of fp32."""
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.allclose(value, wanted[name], rtol=rounding, atol=2 * rounding), name


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        assert value.equal(wanted[name]), name
