"""fp8 bases: scaled ones are dequantised, updated and requantised; what cannot be edited is refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import write_lora
from safetensors.torch import load_file, save_file

from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_common.dialects.comfy import COMFY
from lorafuse_common.errors import CheckpointError, PlanError
from lorafuse_common.manifest import read_manifest
from lorafuse_fuse import blocks
from lorafuse_fuse.choices import LoraRequest, ProblemKind
from lorafuse_fuse.fuse import FuseOptions, fuse, require_clean
from lorafuse_fuse.plan import open_bases, plan_fuse

MODULE = "transformer_blocks.0.attn.to_q"
PREFIX = "model.diffusion_model."


def grouped(weight: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The largest magnitude in each part of a weight that one element of a scale of `shape` stands for."""
    rows = shape[0] if shape else 1
    columns = shape[1] if len(shape) > 1 else 1
    height, width = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    padded = torch.zeros(rows * height, columns * width).double()
    padded[: weight.shape[0], : weight.shape[1]] = weight.abs()
    return padded.view(rows, height, columns, width).amax((1, 3)).view(shape)


def spread(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A scale for every element of a weight."""
    grid = scale.reshape(scale.shape[0] if scale.dim() else 1, -1)
    height, width = -(-weight.shape[0] // grid.shape[0]), -(-weight.shape[1] // grid.shape[1])
    return grid.repeat_interleave(height, 0).repeat_interleave(width, 1)[: weight.shape[0], : weight.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize(
    ("suffix", "shape"),
    [
        ("scale_weight", ()),
        ("scale_weight", (1,)),
        ("weight_scale", (40,)),
        ("weight_scale", (40, 1)),
        ("weight_scale_inv", (5, 4)),
        ("weight_scale_inv", (3, 2)),
    ],
)
def test_scaled_fp8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, suffix: str, shape: tuple[int, ...]
) -> None:
    """Against the formula in fp64, with each new scale taking its part's largest magnitude to the dtype's end."""
    monkeypatch.setattr(blocks, "EDIT_BLOCK_ELEMENTS", 7 * 24)  # blocks of rows that no scale's borders share
    torch.manual_seed(0)
    largest = torch.finfo(dtype).max
    exact = torch.randn(40, 24).double()
    scale = (grouped(exact, shape) / largest).float()
    stored = (exact / spread(scale, exact)).clamp(-largest, largest).to(dtype)
    name = f"{PREFIX}{MODULE}"
    tensors = {
        f"{name}.weight": stored,
        f"{name}.{suffix}": scale,
        f"{name}.bias": torch.randn(40),
        f"{PREFIX}scaled_fp8": torch.empty(2, dtype=dtype),
        "vae.weight": torch.randn(3),
    }
    save_file(tensors, tmp_path / "base.safetensors")
    down, up = torch.randn(2, 24), torch.randn(40, 2)
    lora = write_lora(tmp_path / "x.safetensors", {MODULE: (down, up)}, COMFY)
    plan = plan_fuse(open_bases(tmp_path / "base.safetensors", None, [LoraRequest(lora)]), [LoraRequest(lora, 0.5)])
    require_clean(plan, ())
    fuse(plan, FuseOptions(tmp_path / "out"))
    result = load_file(tmp_path / "out" / "base.safetensors")
    before = stored.double() * spread(scale, exact).double()
    wanted = before + 0.5 * up.double() @ down.double()
    new_scale = result[f"{name}.{suffix}"]
    torch.testing.assert_close(new_scale.double(), grouped(wanted, shape) / largest, rtol=1e-6, atol=0)
    made = result[f"{name}.weight"]
    assert (made.dtype, new_scale.dtype) == (dtype, torch.float32)
    expected = (wanted.float() / spread(new_scale, wanted)).clamp(-largest, largest).to(dtype)
    steps = (made.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()
    assert int(steps.max()) <= 1  # fp32 against fp64 may fall on the other side of a tie
    assert float((steps > 0).float().mean()) < 0.01
    for untouched in (f"{name}.bias", "vae.weight"):
        assert torch.equal(result[untouched], tensors[untouched])
    manifest = read_manifest(tmp_path / "out")
    assert manifest
    arrived = made.double() * spread(new_scale, wanted).double() - before
    delta = 0.5 * up.double() @ down.double()
    assert manifest.changes[0].gain == pytest.approx(float((arrived * delta).sum() / (delta * delta).sum()), abs=1e-3)


def plain(folder: Path) -> tuple[Path, Path]:
    weight = torch.randn(8, 8).to(torch.float8_e4m3fn)
    save_file({f"{MODULE}.weight": weight}, folder / "base.safetensors")
    lora = write_lora(folder / "x.safetensors", {MODULE: (torch.randn(2, 8), torch.randn(8, 2))}, COMFY)
    return folder / "base.safetensors", lora


def test_plain_fp8_is_edited_only_where_that_is_said(tmp_path: Path) -> None:
    base, lora = plain(tmp_path)
    plan = plan_fuse(open_checkpoint(base), [LoraRequest(lora)])
    assert plan.problems[0].kind is ProblemKind.UNEDITABLE_DTYPE
    with pytest.raises(PlanError, match=r"keeps 3 bits.*--plain-fp8"):
        require_clean(plan, ())
    plan = plan_fuse(open_checkpoint(base), [LoraRequest(lora)], plain_fp8=True)
    require_clean(plan, ())
    fuse(plan, FuseOptions(tmp_path / "out"))
    tensors, factors = load_file(base), load_file(lora)
    delta = factors[f"diffusion_model.{MODULE}.lora_B.weight"] @ factors[f"diffusion_model.{MODULE}.lora_A.weight"]
    expected = (tensors[f"{MODULE}.weight"].float() + delta).to(torch.float8_e4m3fn)
    made = load_file(tmp_path / "out" / "base.safetensors")[f"{MODULE}.weight"]
    assert torch.equal(made.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    ("extra", "format_name"),
    [
        ({f"{MODULE}.weight.absmax": torch.ones(2)}, "bitsandbytes"),
        ({f"{MODULE}.qweight": torch.ones(2, dtype=torch.int32)}, "GPTQ, AWQ or Nunchaku"),
        ({f"{MODULE}.weight": torch.ones(8, 4, dtype=torch.uint8)}, "weights of dtype U8"),
    ],
)
def test_packed_bases_are_refused(tmp_path: Path, extra: dict[str, torch.Tensor], format_name: str) -> None:
    base, lora = plain(tmp_path)
    save_file({"norm_out.linear.weight": torch.ones(2, 2)} | extra, base)
    with pytest.raises(CheckpointError, match=rf"quantised \({format_name}\).*bf16 or fp16 checkpoint"):
        open_bases(base, None, [LoraRequest(lora)])


def test_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"GGUF.*bf16 or fp16 checkpoint"):
        open_checkpoint(tmp_path / "base.gguf")
