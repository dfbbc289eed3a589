"""python -m benchmarks.check compare --base BASE --reference REFERENCE --out OUT

Whether a program did the work: rows of a few tensors against lorafuse's, and lorafuse's against fp64 arithmetic.
It shares no code with lorafuse, and does without torch, which takes seconds to import.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]
"""bf16 numbers as they are stored."""
Sample = Mapping[str, Bits]

EDITED = ("attn.to_q.weight", "attn.add_k_proj.weight", "img_mlp.net.2.weight", "txt_mlp.net.0.proj.weight")
UNTOUCHED = ("attn.to_q.bias", "img_mod.1.weight", "txt_mod.1.weight", "attn.norm_q.weight")
"""Of the first and the last block."""
_ENDS = 64
"""Rows from either end of a tensor."""
_MOST_ERROR = 0.5
"""Distance to the reference, relative to what the LoRAs changed. bf16 arithmetic comes to 0.03, and 0.2 where several
LoRAs are rounded one by one; who leaves one of two out comes to 0.7."""


class _Tensor(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def _tensors(path: Path) -> Iterator[tuple[str, _Tensor]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield name, _Tensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])


def _rows(tensor: _Tensor, first: int, last: int) -> Bits:
    """Rows of a bf16 tensor."""
    if tensor.dtype != "BF16":
        raise ValueError(f"{tensor.path}: {tensor.dtype} where bf16 was expected")
    row = int(np.prod(tensor.shape[1:]))
    offset, count = tensor.start + 2 * row * first, row * (last - first)
    return np.fromfile(tensor.path, np.uint16, count, offset=offset).reshape(last - first, *tensor.shape[1:])


def _ends(tensor: _Tensor) -> Bits:
    """The first and last rows."""
    rows = tensor.shape[0]
    return np.concatenate([_rows(tensor, 0, min(_ENDS, rows)), _rows(tensor, max(_ENDS, rows - _ENDS), rows)])


def read_sample(folder: Path) -> dict[str, Bits]:
    """The first and last rows of the tensors that are looked at."""
    places = dict(pair for path in sorted(folder.glob("*.safetensors")) for pair in _tensors(path))
    last = max(int(found[1]) for name in places if (found := re.match(r"transformer_blocks\.(\d+)\.", name)))
    names = [f"transformer_blocks.{block}.{end}" for block in sorted({0, last}) for end in (*EDITED, *UNTOUCHED)]
    return {name: _ends(places[name]) for name in names}


def _load(path: Path, base: Sample) -> dict[str, Bits]:
    """A sample that was kept, of the same tensors as the base's."""
    parts = np.split(np.load(path), np.cumsum([bits.size for bits in base.values()])[:-1])
    return {name: part.reshape(bits.shape) for (name, bits), part in zip(base.items(), parts, strict=True)}


def exact_sample(base: Sample, loras: Sequence[Path]) -> dict[str, Bits]:
    """What the sample should be: summed in fp64, rounded once."""
    exact = {name: numbers(rows) for name, rows in base.items()}
    for path in loras:
        lora = dict(_tensors(path))
        for name in exact:
            stem = name.removesuffix(".weight")
            if (place := lora.get(f"{stem}.lora_down.weight")) is not None:
                down, up = numbers(_rows(place, 0, place.shape[0])), numbers(_ends(lora[f"{stem}.lora_up.weight"]))
                alpha = np.fromfile(path, "<f4", 1, offset=lora[f"{stem}.alpha"].start)[0]
                exact[name] = exact[name] + float(alpha) / len(down) * (up @ down)
    return {name: rounded(values) for name, values in exact.items()}


def numbers(bits: Bits) -> NDArray[np.float64]:
    """What bf16 bits stand for: they are the upper half of an fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(values: NDArray[np.float64]) -> Bits:
    """The nearest bf16 numbers, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def compare(base: Sample, reference: Sample, found: Sample) -> dict[str, object]:
    """How far a fused sample is from the reference; `ok` says that the program did the same work."""
    untouched = [name for name in base if name.endswith(UNTOUCHED)]
    edited = [name for name in base if name not in untouched]
    ulp = max(float(_ulps(base[name], reference[name], found[name]).max()) for name in edited)
    off = sum(int((reference[name] != found[name]).sum()) for name in edited)
    error = max(_distance(found[name], reference[name]) / _distance(reference[name], base[name]) for name in edited)
    same = all(np.array_equal(base[name], found[name]) for name in untouched)
    return {
        "max_ulp": ulp,
        "off_share": off / sum(base[name].size for name in edited),
        "error_to_delta": error,
        "untouched_equal": same,
        "ok": same and error <= _MOST_ERROR,
    }


def compare_copy(base: Sample, found: Sample) -> dict[str, object]:
    """Whether a sample is the base's."""
    same = all(np.array_equal(base[name], found[name]) for name in base)
    return {"untouched_equal": same, "ok": same}


def _ulps(base: Bits, reference: Bits, found: Bits) -> NDArray[np.float64]:
    """Differences in units in the last place of bf16 at the largest of the numbers: a sum that cancels is no error."""
    largest = np.max([np.abs(numbers(bits)) for bits in (base, reference, found)], axis=0)
    unit: NDArray[np.float64] = np.ldexp(1.0, np.frexp(largest)[1] - 8)
    return np.abs(numbers(found) - numbers(reference)) / unit


def _distance(left: Bits, right: Bits) -> float:
    return float(np.linalg.norm(numbers(left) - numbers(right)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("reference", "keep the sample of a lorafuse result, and compare it with fp64 arithmetic"),
        ("compare", "compare a fused result with the reference"),
        ("copy", "compare a copy with the base"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("--base", type=Path, required=True, help="the checkpoint that was fused into")
        command.add_argument("--out", type=Path, required=True, help="the folder with the result")
        command.add_argument("--reference", type=Path, required=True, help="the .npy file that the sample is kept in")
        command.add_argument("--lora", type=Path, action="append", default=[], help="of a reference; repeatable")
    args = parser.parse_args()
    base, found = read_sample(args.base), read_sample(args.out)
    if args.command == "reference":
        np.save(args.reference, np.concatenate([bits.ravel() for bits in found.values()]))
        result = compare(base, exact_sample(base, args.lora), found)
    elif args.command == "compare":
        result = compare(base, _load(args.reference, base), found)
    else:
        result = compare_copy(base, found)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
