"""One picture file: opened as upright RGB whatever its format, and cut to the size it trains at."""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .config import TrainConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
UNDECODABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow's many decoders raise on a damaged file."""
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


@dataclass(frozen=True, slots=True)
class Geometry:
    """How pictures become sizes that the family can encode."""

    multiple: int
    """Both sides must be multiples of it."""
    max_pixels: int
    fixed: tuple[int, int] | None
    """(height, width) of every picture, where the user chose one."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) a picture trains at; 0 where it is too small for one multiple."""
        if self.fixed:
            return self.fixed
        scale = min(1.0, math.sqrt(self.max_pixels / (height * width)))
        # The epsilon keeps 64 * sqrt(1/4) = 31.999... at 32.
        return (self._whole(height * scale + 1e-6), self._whole(width * scale + 1e-6))

    def _whole(self, side: float) -> int:
        return int(side) // self.multiple * self.multiple


def geometry(config: TrainConfig, multiple: int) -> Geometry:
    """The geometry that the options ask for."""
    fixed = (config.height, config.width) if config.height and config.width else None
    return Geometry(multiple, config.max_pixels, fixed)


def open_picture(raw: bytes) -> Image.Image:
    """Decode all of a file's bytes: EXIF rotation applied, transparency on white, grey and 16 bit widened to RGB.

    Raises:
        ValueError: the bytes are no picture, end early, or have pixels without a known range.
    """
    try:
        with Image.open(io.BytesIO(raw)) as file:
            file.load()
            upright = ImageOps.exif_transpose(file)
    except UNDECODABLE as error:
        raise ValueError(f"cannot be decoded ({error})") from error
    return _rgb(upright)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
        values = np.asarray(picture).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"has pixels from {values.min():g} to {values.max():g}; expected 8 or 16 bit")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("has floating-point pixels; expected 8 or 16 bit")
    if picture.mode in WITH_ALPHA or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


def to_pixels(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Scale a picture until it covers `size` (height, width), cut its centre out: (3, H, W) in -1..1, fp32."""
    fitted = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in -1..1 -> an 8-bit picture; values outside are clipped."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())
