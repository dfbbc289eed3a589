"""Wan 2.2's two experts in one command, and FLUX.1's control LoRAs, which widen the input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import write_lora
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from lorafuse_common.dialects.comfy import COMFY
from lorafuse_common.dialects.diffusers import DIFFUSERS
from lorafuse_common.manifest import read_manifest
from lorafuse_fuse.asking import parse_lora, with_alphas
from lorafuse_fuse.choices import LoraRequest

Run = Callable[..., tuple[int, str, str]]
Q = "blocks.0.attn1.to_q"


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """A Wan 2.2 pipeline folder as far as a fuse looks at one."""
    root = tmp_path / "wan"
    for seed, component in enumerate(("transformer", "transformer_2")):
        torch.manual_seed(seed)
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2,
        ).save_pretrained(root / component)  # fmt: skip
    (root / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (root / "vae").mkdir()
    (root / "vae" / "model.safetensors").write_bytes(b"v")
    return root


def factors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 24, generator=generator), torch.randn(24, 2, generator=generator)


def weight(root: Path, component: str) -> torch.Tensor:
    return load_file(root / component / "diffusion_pytorch_model.safetensors")[f"{Q}.weight"]


def test_both_experts_in_one_command(run: Run, wan: Path, tmp_path: Path) -> None:
    high = write_lora(tmp_path / "high_noise.safetensors", {Q: factors(1)}, DIFFUSERS)
    low = write_lora(tmp_path / "low_noise.safetensors", {"blocks.0.self_attn.q": factors(2)}, COMFY)
    loras = ["--lora", f"{high}@transformer", "--lora", f"{low}:0.5@transformer_2"]
    code, out, err = run("fuse", wan, *loras, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert "note" not in err
    for component, seed, strength in (("transformer", 1, 1.0), ("transformer_2", 2, 0.5)):
        down, up = factors(seed)
        expected = weight(wan, component) + strength * up @ down
        torch.testing.assert_close(weight(tmp_path / "out", component), expected)
    assert [lora["component"] for lora in json.loads(out)["loras"]] == ["transformer", "transformer_2"]
    manifest = read_manifest(tmp_path / "out")
    assert manifest
    assert manifest.component == "transformer"
    assert [(lora.component, lora.strength) for lora in manifest.loras] == [("transformer", 1), ("transformer_2", 0.5)]
    assert {change.component for change in manifest.changes} == {"transformer", "transformer_2"}
    assert (tmp_path / "out" / "vae" / "model.safetensors").read_bytes() == b"v"
    again = run("fuse", wan, *loras, "--out", tmp_path / "out")
    assert again[0] == 0
    assert "up to date" in again[2]
    swapped = ["--lora", f"{low}:0.5@transformer_2", "--lora", f"{high}@transformer_2"]
    assert run("fuse", wan, *swapped, "--out", tmp_path / "out")[0] == 1


def test_a_name_of_the_other_expert_is_pointed_out(run: Run, wan: Path, tmp_path: Path) -> None:
    high = write_lora(tmp_path / "Wan2.2-HIGH-style.safetensors", {Q: factors(1)}, DIFFUSERS)
    code, _, err = run("fuse", wan, "--lora", f"{high}@transformer_2", "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "its name says high noise, and it is fused into the low-noise expert" in err
    highlight = write_lora(tmp_path / "highlights.safetensors", {Q: factors(1)}, DIFFUSERS)
    assert (
        "noise" not in run("fuse", wan, "--lora", f"{highlight}@transformer_2", "--out", tmp_path / "o", "--dry-run")[2]
    )


def test_one_file_for_both_experts(run: Run, wan: Path, tmp_path: Path) -> None:
    """diffusers saves both into one file; it is fused into each with its own modules and its own scale."""
    tensors: dict[str, torch.Tensor] = {}
    for prefix, seed in (("transformer", 1), ("transformer_2", 2)):
        down, up = factors(seed)
        tensors |= {f"{prefix}.{Q}.lora_A.weight": down, f"{prefix}.{Q}.lora_B.weight": up}
    config = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer_2.r": 2, "transformer_2.lora_alpha": 1}
    both = tmp_path / "both.safetensors"
    save_file(tensors, both, {"lora_adapter_metadata": json.dumps(config)})
    code, _, err = run("fuse", wan, "--lora", both, "--out", tmp_path / "out")
    assert code == 1
    assert "OTHER_COMPONENT" in err
    assert "belongs to the transformer_2" in err
    code, _, err = run("fuse", wan, "--lora", f"{both}@transformer_2", "--out", tmp_path / "out")
    assert code == 1
    assert "belongs to the transformer." in err
    loras = ["--lora", f"{both}@transformer", "--lora", f"{both}@transformer_2"]
    code, _, err = run("fuse", wan, *loras, "--out", tmp_path / "out")
    assert code == 0, err
    for component, seed, scale in (("transformer", 1, 1.0), ("transformer_2", 2, 0.5)):
        down, up = factors(seed)
        torch.testing.assert_close(weight(tmp_path / "out", component), weight(wan, component) + scale * up @ down)


def test_components_that_are_not_there(run: Run, wan: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "x.safetensors", {Q: factors(1)}, DIFFUSERS)
    code, _, err = run("fuse", wan, "--lora", f"{lora}@transformer_3", "--out", tmp_path / "out")
    assert code == 1
    assert "no folder 'transformer_3'" in err
    code, _, err = run("fuse", wan / "transformer", "--lora", f"{lora}@transformer", "--out", tmp_path / "out")
    assert code == 1
    assert "no component 'transformer' to choose" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", LoraRequest(Path("a.safetensors"))),
        ("a.safetensors@transformer_2", LoraRequest(Path("a.safetensors"), 1.0, "transformer_2")),
        ("d@e/a.safetensors:0.5@transformer", LoraRequest(Path("d@e/a.safetensors"), 0.5, "transformer")),
        ("a.safetensors@transformer:-1", LoraRequest(Path("a.safetensors"), -1.0, "transformer")),
    ],
)
def test_how_a_lora_is_asked_for(text: str, expected: LoraRequest) -> None:
    assert parse_lora(text) == expected


def test_names_of_files_are_left_whole(tmp_path: Path) -> None:
    odd = tmp_path / "a@b"
    odd.write_bytes(b"")
    assert parse_lora(str(odd)) == LoraRequest(odd)
    assert parse_lora(f"{odd}:0.5@transformer") == LoraRequest(odd, 0.5, "transformer")


def test_alphas_on_the_command_line(run: Run, wan: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "x.safetensors", {Q: factors(1)}, DIFFUSERS)
    command = ["fuse", wan, "--lora", lora, "--out", tmp_path / "out"]
    assert run(*command, "--alpha", "x.safetensors=1")[0] == 0
    down, up = factors(1)
    torch.testing.assert_close(weight(tmp_path / "out", "transformer"), weight(wan, "transformer") + 0.5 * up @ down)
    for bad in ("y.safetensors=1", "x.safetensors=-1", "x.safetensors", "x.safetensors=nan"):
        code, _, err = run(*command, "--alpha", bad)
        assert code == 1
        assert "expected FILE=ALPHA with one of x.safetensors and a positive number" in err
    assert with_alphas([LoraRequest(lora)], [f"{lora}=3"])[0].alpha == 3


@pytest.fixture(scope="module")
def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def control_lora(path: Path, flux: FluxTransformer2DModel) -> Path:
    """As BFL writes them: original names, twice the input channels, biases, norms replaced."""
    torch.manual_seed(1)
    qkv, norm = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.norm.query_norm.scale"
    sizes = {"img_in": (16, 32), qkv: (32, 96), "final_layer.adaLN_modulation.1": (32, 64)}
    tensors = {norm: torch.rand(16)}
    for module, (columns, rows) in sizes.items():
        tensors |= {f"{module}.lora_A.weight": torch.randn(4, columns), f"{module}.lora_B.weight": torch.randn(rows, 4)}
        tensors[f"{module}.lora_B.bias"] = torch.randn(rows)
    save_file(tensors, path)
    return path


def test_control_loras_widen_the_input(run: Run, tmp_path: Path, flux: FluxTransformer2DModel) -> None:
    """Sharded or not, the fused folder loads in diffusers with its new number of channels, and is base + LoRA."""
    lora = control_lora(tmp_path / "control.safetensors", flux)
    style_in = (torch.randn(2, 8), torch.randn(32, 2))
    style = write_lora(tmp_path / "style.safetensors", {"x_embedder": style_in}, DIFFUSERS)
    flux.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    command = ["fuse", tmp_path / "base", "--lora", style, "--lora", lora, "--out", tmp_path / "out"]
    code, _, err = run(*command, "--dry-run")
    assert code == 0, err
    assert "writing it needs --widen-inputs" in err
    code, _, err = run(*command)
    assert code == 1
    assert "would widen x_embedder.weight to [32, 16]" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run(*command, "--widen-inputs")
    assert code == 0, err
    wide = FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    assert (wide.config.in_channels, wide.config.out_channels) == (16, 8)
    before, after, delta = flux.state_dict(), wide.state_dict(), load_file(lora)

    def product(module: str) -> torch.Tensor:
        return delta[f"{module}.lora_B.weight"] @ delta[f"{module}.lora_A.weight"]

    expected = torch.nn.functional.pad(before["x_embedder.weight"] + style_in[1] @ style_in[0], (0, 8))
    torch.testing.assert_close(after["x_embedder.weight"], expected + product("img_in"))
    torch.testing.assert_close(after["x_embedder.bias"], before["x_embedder.bias"] + delta["img_in.lora_B.bias"])
    for index, name in enumerate("qkv"):
        rows = slice(32 * index, 32 * (index + 1))
        module = f"transformer_blocks.0.attn.to_{name}"
        qkv = product("double_blocks.0.img_attn.qkv")[rows]
        torch.testing.assert_close(after[f"{module}.weight"], before[f"{module}.weight"] + qkv)
        bias = delta["double_blocks.0.img_attn.qkv.lora_B.bias"][rows]
        torch.testing.assert_close(after[f"{module}.bias"], before[f"{module}.bias"] + bias)
    norm = delta["double_blocks.0.img_attn.norm.query_norm.scale"]
    assert torch.equal(after["transformer_blocks.0.attn.norm_q.weight"], norm)
    swapped = product("final_layer.adaLN_modulation.1").roll(32, 0)
    torch.testing.assert_close(after["norm_out.linear.weight"], before["norm_out.linear.weight"] + swapped)
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    total = sum(value.nbytes for value in after.values())
    assert index["metadata"]["total_size"] == total
    assert run(*command, "--widen-inputs")[0] == 0  # up to date
