"""What the readers of a dialect make of a converted file: diffusers' pipelines and PEFT, on tiny real models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import MODULES, make_factors, tiny_transformer
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from table_models import Tensors, converted, fused, spelled

from lorafuse_common.families.flux import FLUX

RANK = 4
STEMS = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.txt_mlp.2",
    "single_blocks.1.linear1",
    "single_blocks.0.linear2",
    "final_layer.linear",
)


def tiny_flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_flux().save_pretrained(tmp_path / "base")
    return tmp_path / "base" / "diffusion_pytorch_model.safetensors"


def kohya_lora(path: Path, suffixes: tuple[str, ...] = (), stems: tuple[str, ...] = STEMS) -> Path:
    """A LoRA with ranks and scales that differ, of original names; with DoRA's magnitudes where asked for."""
    rows = {"qkv": 48, "linear1": 112, "linear2": 16, "2": 16, "linear": 4}
    columns = {"qkv": 16, "linear1": 16, "linear2": 80, "2": 64, "linear": 16}
    generator = torch.Generator().manual_seed(1)
    factors: dict[str, Tensors] = {}
    for number, stem in enumerate(stems):
        rank, kind = RANK + number % 2, stem.rpartition(".")[2]
        factors[stem] = {
            ".lora_down.weight": torch.randn(rank, columns[kind], generator=generator) * 0.2,
            ".lora_up.weight": torch.randn(rows[kind], rank, generator=generator) * 0.2,
            ".alpha": torch.tensor([2.0, 3.0, 1.0][number % 3]),
        }
        if ".dora_scale" in suffixes:
            factors[stem][".dora_scale"] = torch.rand(rows[kind], 1, generator=generator) + 0.5
    return spelled(path, "kohya", factors)


def as_diffusers_loads(folder: Path) -> Tensors:
    """A model's weights after a pipeline has loaded a LoRA and added it."""
    model = tiny_flux()
    pipeline = FluxPipeline(None, None, None, None, None, None, model)
    pipeline.load_lora_weights(folder, weight_name="x.safetensors")
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    return dict(model.state_dict())


def as_peft_loads(folder: Path, model: torch.nn.Module) -> Tensors:
    loaded = PeftModel.from_pretrained(model, folder)
    return dict(loaded.merge_and_unload().state_dict())


def assert_close(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.allclose(value, wanted[name], rtol=1e-5, atol=1e-6), name


def fused_whole(base: Path, lora: Path, out: Path) -> Tensors:
    """Fused at strength 1, as readers load it."""
    return fused(base, lora, out, 1.0)


@pytest.mark.parametrize("suffixes", [(), (".dora_scale",)], ids=["lora", "dora"])
def test_diffusers_loads_what_kohya_wrote(tmp_path: Path, base: Path, suffixes: tuple[str, ...]) -> None:
    lora = kohya_lora(tmp_path / "lora.safetensors", suffixes)
    converted(lora, "diffusers", tmp_path / "out" / "x.safetensors", family=FLUX)
    assert_close(as_diffusers_loads(tmp_path / "out"), fused_whole(base, lora, tmp_path / "wanted"))


def test_mixed_ranks_are_stated_for_diffusers(tmp_path: Path) -> None:
    """Some of its versions take one module's rank for every module's alpha."""
    lora, out = kohya_lora(tmp_path / "lora.safetensors"), tmp_path / "out" / "x.safetensors"
    converted(lora, "diffusers", out, family=FLUX)
    with safe_open(out, "pt") as file:
        stated = json.loads(file.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in stated.items()})
    others = ("single_transformer_blocks.0.proj_out", "transformer_blocks.0.ff_context.net.2")
    assert config.r == config.lora_alpha == RANK
    assert config.rank_pattern == config.alpha_pattern == {f"^{name}": RANK + 1 for name in others}
    converted(kohya_lora(lora, stems=STEMS[:1]), "diffusers", tmp_path / "same" / "x.safetensors", family=FLUX)
    with safe_open(tmp_path / "same" / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("suffixes", [(), (".dora_scale",)], ids=["lora", "dora"])
def test_peft_loads_what_kohya_wrote(tmp_path: Path, base: Path, suffixes: tuple[str, ...]) -> None:
    lora, out = kohya_lora(tmp_path / "lora.safetensors", suffixes), tmp_path / "out" / "adapter_model.safetensors"
    converted(lora, "peft", out, family=FLUX)
    assert_close(as_peft_loads(out.parent, tiny_flux()), fused_whole(base, lora, tmp_path / "wanted"))
    assert_close(fused_whole(base, out, tmp_path / "found"), fused_whole(base, lora, tmp_path / "again"))


def test_peft_changes_no_module_whose_name_ends_alike(tmp_path: Path, base: Path) -> None:
    """FLUX's `proj_out` is a layer of its own, and the last word of a block's."""
    lora = kohya_lora(tmp_path / "lora.safetensors", (".dora_scale",), ("final_layer.linear",))
    out = tmp_path / "out" / "adapter_model.safetensors"
    converted(lora, "peft", out, family=FLUX)
    loaded = PeftModel.from_pretrained(tiny_flux(), out.parent)
    assert {name.split(".lora_")[0] for name in loaded.state_dict() if ".lora_" in name} == {
        "base_model.model.proj_out"
    }
    assert_close(dict(loaded.merge_and_unload().state_dict()), fused_whole(base, lora, tmp_path / "wanted"))


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_biases_of_b(tmp_path: Path, base: Path, to: str) -> None:
    """PEFT's `lora_bias` is scaled as B is; other dialects have a difference of the bias, which is not."""
    generator = torch.Generator().manual_seed(1)
    names = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    factors = {
        name: {
            ".lora_down.weight": torch.randn(RANK, 16, generator=generator),
            ".lora_up.weight": torch.randn(16, RANK, generator=generator),
            ".lora_B.bias": torch.randn(16, generator=generator),
            ".alpha": torch.tensor(3.0),
        }
        for name in names
    }
    lora = spelled(tmp_path / "lora.safetensors", "onetrainer", factors)
    wanted = fused_whole(base, lora, tmp_path / "wanted")
    name = "x.safetensors" if to == "diffusers" else "adapter_model.safetensors"
    direct, fused_names, back = (tmp_path / step / name for step in ("direct", "comfyui", "back"))
    converted(lora, to, direct, family=FLUX)
    converted(lora, "comfyui", fused_names, family=FLUX)
    assert load_file(fused_names)["diffusion_model.double_blocks.0.img_attn.qkv.diff_b"].shape == (48,)
    assert_close(fused_whole(base, fused_names, tmp_path / "fused-comfyui"), wanted)
    converted(fused_names, to, back, family=FLUX)
    for path in (direct, back):
        found = as_diffusers_loads(path.parent) if to == "diffusers" else as_peft_loads(path.parent, tiny_flux())
        assert_close(found, wanted)


def test_diffusers_and_peft_load_qwen(tmp_path: Path) -> None:
    """Scaled by 3/8 in bf16: the product is in fp32."""
    tiny_transformer().save_pretrained(tmp_path / "base")
    base = tmp_path / "base" / "diffusion_pytorch_model.safetensors"
    factors = {
        name: {".lora_down.weight": a, ".lora_up.weight": b, ".alpha": torch.tensor(1.5)}
        for name, (a, b) in make_factors(MODULES, RANK, dtype=torch.bfloat16).items()
    }
    lora = spelled(tmp_path / "lora.safetensors", "lightning", factors)
    wanted = fused_whole(base, lora, tmp_path / "wanted")
    for to, name in (("diffusers", "x.safetensors"), ("peft", "adapter_model.safetensors")):
        converted(lora, to, tmp_path / to / name)
    tensors = load_file(tmp_path / "diffusers" / "x.safetensors")
    assert {key.split(".lora_")[1]: value.dtype for key, value in tensors.items()} == {
        "A.weight": torch.bfloat16,
        "B.weight": torch.float32,
    }
    model = tiny_transformer()
    model.load_lora_adapter(tmp_path / "diffusers" / "x.safetensors")
    model.fuse_lora()
    model.unload_lora()
    assert_close(dict(model.state_dict()), wanted)
    assert_close(as_peft_loads(tmp_path / "peft", tiny_transformer()), wanted)
