"""What a picture file's header says, without decoding it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass(frozen=True, slots=True)
class Header:
    """A picture that is known to be good."""

    format: str
    """Pillow's name of it: JPEG, PNG, ..."""
    pixels: str
    """What its pixels are, in words."""
    nbytes: int
    """Of the file."""


PIXELS = {
    "1": "black and white",
    "L": "grey",
    "P": "palette",
    "CMYK": "CMYK",
    "YCbCr": "colour",
    "RGB": "colour",
    "RGBA": "colour with transparency",
    "LA": "grey with transparency",
    "PA": "palette with transparency",
}
"""By Pillow's modes; those of 16 bit begin with I."""


def read_header(path: Path) -> Header:
    """The header of a picture that can be decoded."""
    with Image.open(path) as file:
        pixels = PIXELS.get(file.mode, "16-bit grey" if file.mode.startswith("I") else file.mode)
        if "transparency" in file.info and "transparency" not in pixels:
            pixels += " with transparency"
        return Header(file.format or "?", pixels, path.stat().st_size)
