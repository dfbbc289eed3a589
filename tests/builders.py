"""Tiny real models and LoRA files for the tests: diffusers' own classes with small configs, weights made here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file

from lorafuse_common.dialects import Dialect

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Module name -> (A, B), shapes (r, in) and (out, r)."""

MODULES = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.1.attn.add_k_proj",
    "transformer_blocks.1.img_mlp.net.2",
    "transformer_blocks.1.img_mod.1",
)


def tiny_transformer(seed: int = 0) -> QwenImageTransformer2DModel:
    """A Qwen-Image transformer of two blocks, 48 wide, fp32."""
    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def save_model(folder: Path, dtype: torch.dtype = torch.bfloat16, *, sharded: bool = False, seed: int = 0) -> Path:
    """A diffusers model folder, with several shards and an index where asked for."""
    tiny_transformer(seed).to(dtype).save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    return folder


def make_factors(
    modules: tuple[str, ...] = MODULES,
    rank: int = 4,
    seed: int = 1,
    size: float = 0.05,
    dtype: torch.dtype = torch.float32,
) -> Factors:
    """Random factors that fit `tiny_transformer`."""
    shapes = {name: param.shape for name, param in tiny_transformer().named_parameters()}
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    return {m: (draw(rank, shapes[f"{m}.weight"][1]), draw(shapes[f"{m}.weight"][0], rank)) for m in modules}


def write_lora(
    path: Path,
    factors: Factors,
    dialect: Dialect,
    alpha: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A LoRA file as `dialect` spells it; `alpha` goes into every module."""
    tensors = {}
    for module, (down, up) in factors.items():
        stem = dialect.spell(module)
        tensors[stem + dialect.roles["down"]] = down.contiguous()
        tensors[stem + dialect.roles["up"]] = up.contiguous()
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    return path


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    """A safetensors file with a true header and a hole for data, as large as the real one but without its disk use."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * 2
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    return path
