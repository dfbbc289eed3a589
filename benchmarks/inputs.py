"""Which checkpoint and LoRAs a benchmark needs, where they lie, and how large they are; imports no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.workspace import require_space

HEAD_WIDTH = 128
TEXT_WIDTH = 3584
PATCH_CHANNELS = 64
FULL_HEADS = 24
"""Attention heads of Qwen-Image."""
_NARROWER_HEADS = (12, 6, 3, 1)
ROOT = Path(__file__).parent.parent
_SMALL_BYTES = 64 << 20
"""For all that is not weights."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a Qwen-Image transformer."""

    blocks: int
    heads: int

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.heads * HEAD_WIDTH

    @property
    def nbytes(self) -> int:
        """Of its weights in bf16."""
        width = self.width
        square, bias = 36 * width * width, 30 * width + 4 * HEAD_WIDTH  # 8 of attention, 2 x 8 of MLPs, 2 x 6 of mods
        ends = width * (256 + width + TEXT_WIDTH + 2 * width + 2 * PATCH_CHANNELS) + 6 * width + TEXT_WIDTH
        return 2 * (self.blocks * (square + bias) + ends + PATCH_CHANNELS)

    @property
    def name(self) -> str:
        """For file names."""
        return f"b{self.blocks}-h{self.heads}"


@dataclass(frozen=True, slots=True)
class LoraShape:
    """One of several LoRAs of a rank."""

    base: Shape
    rank: int
    index: int

    @property
    def nbytes(self) -> int:
        """Of its factors in bf16: 8 of attention, 4 of MLPs in each block."""
        return 2 * self.base.blocks * self.rank * self.base.width * (8 * 2 + 4 * 5)

    @property
    def name(self) -> str:
        """For file names."""
        return f"{self.base.name}-r{self.rank}-{self.index}"


def shape_for(size_gb: float) -> Shape:
    """As many blocks as come nearest to `size_gb`: of full width, or narrower where one would be too large."""
    for heads in (FULL_HEADS, *_NARROWER_HEADS):
        block = Shape(2, heads).nbytes - Shape(1, heads).nbytes
        blocks = round((size_gb * 1e9 - Shape(0, heads).nbytes) / block)
        if blocks >= (1 if heads == FULL_HEADS else 2):
            return Shape(blocks, heads)
    return Shape(2, _NARROWER_HEADS[-1])


def base_path(folder: Path, shape: Shape, *, sparse: bool = False) -> Path:
    """Where the checkpoint of a shape lies, or the one that has its headers but no data."""
    return folder / f"base-{shape.name}{'-sparse' * sparse}"


def lora_path(folder: Path, lora: LoraShape) -> Path:
    """Where a LoRA lies in the Lightning format."""
    return folder / f"lora-{lora.name}.safetensors"


def peft_path(folder: Path, lora: LoraShape) -> Path:
    """Where the same LoRA lies as a PEFT adapter folder."""
    return folder / f"peft-{lora.name}"


def make_inputs(
    folder: Path, size_gb: float, counts: Mapping[int, int], *, peft: bool = False, sparse: bool = False
) -> Shape:
    """Make what is not there yet: a checkpoint, and of each rank so many LoRAs, with `peft` in both forms.

    It is done in a process of its own: this one has to stay small (`measure`).

    Raises:
        BenchmarkError: the disk has no room for it and for one result.
        subprocess.CalledProcessError: it failed, and has said why.
    """
    shape = shape_for(size_gb)
    base = base_path(folder, shape, sparse=sparse)
    loras = [LoraShape(shape, rank, index) for rank, count in counts.items() for index in range(count)]
    places = [(place(folder, lora), lora) for lora in loras for place in (lora_path, *([peft_path] if peft else []))]
    absent = [(path, lora) for path, lora in places if not path.exists()]
    missing = sum(lora.nbytes for _, lora in absent) + shape.nbytes * (not base.exists() and not sparse)
    require_space(
        folder, missing + shape.nbytes * (not sparse) + _SMALL_BYTES, f"a benchmark of {shape.nbytes / 1e9:.1f} GB"
    )
    if absent or not base.exists():
        texts = [f"{rank}x{count}" for rank, count in counts.items()]
        print(f"making a checkpoint of {shape.nbytes / 1e9:.2f} GB, LoRAs {' '.join(texts)}", file=sys.stderr)
        command = [sys.executable, "-m", "benchmarks.synthetic", "--folder", str(folder), "--size", str(size_gb)]
        command += [*(["--peft"] if peft else []), *(["--sparse"] if sparse else []), "--loras", *texts]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return shape
