"""python -m benchmarks.synthetic --folder build/bench/work --size 6 --loras 64x1

Makes a Qwen-Image-shaped checkpoint and Lightning-style LoRAs of any size: the same bytes for the same parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import FULL_HEADS, LoraShape, Shape, base_path, lora_path, peft_path, shape_for

WEIGHT_STD = 0.02
DELTA_STD = 0.01 * WEIGHT_STD
SCALE = 8 / 64
"""alpha / rank of Qwen-Image-Lightning."""
SHARD_BYTES = 5_000_000_000
"""As in Qwen/Qwen-Image on the hub."""
LORA_TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")),
)
"""The modules of a block that Qwen-Image-Lightning changes: two thirds of its weights."""
_POOL_ELEMENTS = (1 << 24) + 1_299_709  # no multiple of a row, so that no two rows of a tensor are the same


class NormalBytes:
    """Normally distributed bf16 numbers from one pool, which a tensor enters at a place that its name decides."""

    def __init__(self, std: float) -> None:
        numbers = torch.randn(_POOL_ELEMENTS, generator=torch.Generator().manual_seed(0))
        self._pool = memoryview((numbers * std).to(torch.bfloat16).view(torch.uint8).numpy().tobytes())

    def pieces(self, name: str, count: int) -> Iterable[memoryview]:
        """`count` bytes for the tensor `name`."""
        at = zlib.crc32(name.encode()) % _POOL_ELEMENTS * 2
        while count:
            piece = self._pool[at : at + count]
            yield piece
            count, at = count - len(piece), 0


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    source: NormalBytes | None,
    scalars: Mapping[str, float] | None = None,
) -> None:
    """Write bf16 tensors piece by piece, in the order of their names, and fp32 scalars before them.

    Without a source the tensors are a hole, which takes no room. The file appears under its name when it is whole.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ordered, at = sorted(shapes), 0
    for name in sorted(scalars or {}):
        header[name] = {"dtype": "F32", "shape": [], "data_offsets": [at, at + 4]}
        at += 4
    for name in ordered:
        stop = at + 2 * math.prod(shapes[name])
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, stop]}
        at = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    unfinished = path.with_name(f".{path.name}.tmp")
    with unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.writelines(struct.pack("<f", value) for _, value in sorted((scalars or {}).items()))
        if source is not None:
            for name in ordered:
                file.writelines(source.pieces(f"{path.name}/{name}", 2 * math.prod(shapes[name])))
        file.truncate(8 + len(raw) + at)
    unfinished.replace(path)


def build_base(folder: Path, shape: Shape, *, sparse: bool = False) -> Path:
    """The checkpoint as a diffusers model folder; one that is there already is taken as it is."""
    out = base_path(folder, shape, sparse=sparse)
    if out.exists():
        return out
    from huggingface_hub import split_torch_state_dict_into_shards

    model = _model_without_weights(shape)
    tensors = {name: torch.empty_like(tensor, dtype=torch.bfloat16) for name, tensor in model.state_dict().items()}
    nbytes = sum(2 * tensor.numel() for tensor in tensors.values())
    split = split_torch_state_dict_into_shards(
        tensors,
        max_shard_size=min(SHARD_BYTES, nbytes * 6 // 10),
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
    )
    building = folder / f".{out.name}.tmp"
    building.mkdir(parents=True, exist_ok=True)
    model.save_config(building)
    source = None if sparse else NormalBytes(WEIGHT_STD)
    for filename, names in split.filename_to_tensors.items():
        write_safetensors(building / filename, {name: tuple(tensors[name].shape) for name in names}, source)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (building / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )
    building.replace(out)
    return out


def _model_without_weights(shape: Shape) -> Any:
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        return QwenImageTransformer2DModel(num_layers=shape.blocks, num_attention_heads=shape.heads)


def lora_shapes(shape: Shape, rank: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Module -> the shapes of its factors down (rank, in) and up (out, rank)."""
    width = shape.width
    found = {}
    for block in range(shape.blocks):
        for target in LORA_TARGETS:
            rows = 4 * width if target.endswith("0.proj") else width
            columns = 4 * width if target.endswith("net.2") else width
            found[f"transformer_blocks.{block}.{target}"] = ((rank, columns), (rows, rank))
    return found


def build_lora(folder: Path, lora: LoraShape) -> Path:
    """One LoRA as Lightning writes it, with an alpha for each module."""
    out = lora_path(folder, lora)
    if not out.exists():
        shapes: dict[str, tuple[int, ...]] = {}
        for module, (down, up) in lora_shapes(lora.base, lora.rank).items():
            shapes |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        alphas = {f"{module}.alpha": SCALE * lora.rank for module in lora_shapes(lora.base, lora.rank)}
        factor_std = math.sqrt(DELTA_STD / SCALE / math.sqrt(lora.rank))  # the delta is 1 % of the weight
        write_safetensors(out, shapes, NormalBytes(factor_std), alphas)
    return out


def build_peft(folder: Path, lora: LoraShape) -> Path:
    """The same LoRA as a PEFT adapter folder."""
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    out = peft_path(folder, lora)
    if out.exists():
        return out
    building = folder / f".{out.name}.tmp"
    modules = list(lora_shapes(lora.base, lora.rank))
    config = LoraConfig(r=lora.rank, lora_alpha=SCALE * lora.rank, target_modules=modules, inference_mode=True)
    config.save_pretrained(building)
    names = {"lora_down": "lora_A", "lora_up": "lora_B"}
    tensors = {
        f"base_model.model.{name.replace(kind, names[kind])}": tensor
        for name, tensor in load_file(lora_path(folder, lora)).items()
        for kind in names
        if kind in name
    }
    save_file(tensors, building / "adapter_model.safetensors", metadata={"format": "pt"})
    building.replace(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to put them")
    parser.add_argument("--size", type=float, required=True, help="GB of the checkpoint, as near as blocks allow")
    parser.add_argument("--loras", nargs="*", default=[], metavar="RANKxCOUNT", help="64x2 for two of rank 64")
    parser.add_argument("--peft", action="store_true", help="make PEFT adapter folders of them, too")
    parser.add_argument("--sparse", action="store_true", help="a checkpoint with headers but without data")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    shape = shape_for(args.size)
    build_base(args.folder, shape, sparse=args.sparse)
    counts = [map(int, text.split("x")) for text in args.loras]
    for lora in [LoraShape(shape, rank, index) for rank, count in counts for index in range(count)]:
        build_lora(args.folder, lora)
        if args.peft:
            build_peft(args.folder, lora)
    width = "full width" if shape.heads == FULL_HEADS else f"{shape.width} wide"
    print(f"{shape.blocks} blocks, {width}, {shape.nbytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
