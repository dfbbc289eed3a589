"""Moves pictures between the drawing code, torch and PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import drawing
import numpy as np
import torch
from PIL import Image
from torch import Tensor


def tensor_from(pictures: drawing.Floats) -> Tensor:
    """(n, h, w, 3) in 0..1 to (n, 3, h, w) in -1..1, the range of the VAE."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2 - 1


def drawn(count: int, rng: np.random.Generator, style: str = "plain") -> tuple[Tensor, drawing.Scenes]:
    scenes = drawing.random_scenes(count, rng)
    return tensor_from(drawing.draw(scenes, style)), scenes


def save_grid(rows: Sequence[Tensor], path: Path, scale: int = 2, gap: int = 2) -> None:
    """Writes a PNG with one row of pictures per tensor."""
    height, width = rows[0].shape[-2:]
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for number, row in enumerate(rows):
        pixels = ((row.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for column, picture in enumerate(pixels):
            top, left = gap + number * (height + gap), gap + column * (width + gap)
            canvas[top : top + height, left : left + width] = picture
    image = Image.fromarray(canvas)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)
