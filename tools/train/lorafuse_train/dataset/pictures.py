"""One picture file: opened as upright RGB whatever its format, and cut to the size it trains at."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lorafuse_train.dataset.picture_faults import count_pictures, undecodable
from lorafuse_train.options.config import TrainConfig

if TYPE_CHECKING:
    from lorafuse_train.recipes.recipe import Recipe

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
UNDECODABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow's many decoders raise on a damaged file."""
JPEG = b"\xff\xd8\xff"
"""How the files begin; MPO, which is one with previews behind it, too."""
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)
"""The EXIF tag, and its values under which a picture's sides change places."""
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


@dataclass(frozen=True, slots=True)
class ControlRule:
    """How many control pictures a sample may have, and in which sizes they are seen."""

    pipeline: str = "pipeline that draws from text"
    """What takes them, for messages: a class in a model_index.json."""
    least: int = 0
    most: int = 0
    first_frame: bool = False
    """Whether a video without controls has its first frame for one."""
    size: Callable[[tuple[int, int], tuple[int, int]], tuple[int, int]] = lambda picture, target: target
    """(height, width) of a control picture and of what is drawn -> that in which the VAE sees the control."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How pictures become sizes that the family can encode."""

    multiple: int
    """Both sides must be multiples of it."""
    max_pixels: int
    fixed: tuple[int, int] | None
    """(height, width) of every picture, where the user chose one."""
    frame_step: int = 0
    """`Recipe.frame_step`."""
    controls: ControlRule = ControlRule()

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) a picture trains at; 0 where it is too small for one multiple."""
        if self.fixed:
            return self.fixed
        scale = min(1.0, math.sqrt(self.max_pixels / (height * width)))
        # The epsilon keeps 64 * sqrt(1/4) = 31.999... at 32.
        return (self._whole(height * scale + 1e-6), self._whole(width * scale + 1e-6))

    def _whole(self, side: float) -> int:
        return int(side) // self.multiple * self.multiple


def geometry(config: TrainConfig, recipe: Recipe, pipeline: Path) -> Geometry:
    """The geometry that the options ask for, of the family and its pipeline folder."""
    fixed = (config.height, config.width) if config.height and config.width else None
    least, most = recipe.controls
    rule = ControlRule(
        recipe.pipelines[0],
        least,
        most,
        recipe.first_frame_control,
        lambda picture, target: recipe.control_size(pipeline, picture, target, config.max_pixels),
    )
    return Geometry(recipe.pixel_multiple(pipeline), config.max_pixels, fixed, recipe.frame_step, rule)


def open_picture(raw: bytes) -> Image.Image:
    """Decode all of a file's bytes: EXIF rotation applied, transparency on white, grey and 16 bit widened to RGB.

    Raises:
        ValueError: the bytes are no picture, end early, or have pixels without a known range.
    """
    try:
        with Image.open(io.BytesIO(raw)) as file:
            count = count_pictures(file)
            file.load()
            upright = ImageOps.exif_transpose(file)
    except UNDECODABLE as error:
        raise ValueError(f"cannot be decoded ({undecodable(raw, error)})") from error
    if count > 1:
        raise ValueError(f"has {count} frames or pages; save the one that is meant as a file of its own")
    return _rgb(upright)


def upright_size(raw: bytes) -> tuple[int, int]:
    """(height, width) of what `open_picture` makes of a file; all its bytes are decoded too, but JPEG much smaller.

    Raises:
        ValueError: as `open_picture` does.
    """
    if not raw.startswith(JPEG):
        picture = open_picture(raw)
        return picture.height, picture.width
    try:
        with Image.open(io.BytesIO(raw)) as file:
            width, height = file.size
            file.draft(None, (width // 8, height // 8))
            file.load()
            turned = file.getexif().get(ORIENTATION) in TURNED
    except UNDECODABLE as error:
        raise ValueError(f"cannot be decoded ({undecodable(raw, error)})") from error
    return (width, height) if turned else (height, width)


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
    return _pixels(ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS))


def stretched(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """The whole picture in `size` (height, width), whatever becomes of its shape: (3, H, W) in -1..1, fp32."""
    return _pixels(picture.resize((size[1], size[0]), Image.Resampling.LANCZOS))


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in -1..1 -> an 8-bit picture; values outside are clipped."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())
