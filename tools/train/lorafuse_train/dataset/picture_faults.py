"""What is wrong with a file that is no picture to train on, in words."""

from __future__ import annotations

import functools
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

BEGINNINGS: Sequence[tuple[int, bytes, str]] = (
    (0, b"version https://git-lfs", "it is a Git LFS pointer, not the picture itself: run `git lfs pull`"),
    (0, b"<!doctype html", "it is a web page, not a picture: download it again"),
    (0, b"<html", "it is a web page, not a picture: download it again"),
    (4, b"ftyphei", "it is HEIC: save it as PNG or JPEG"),
    (4, b"ftypmif1", "it is HEIC: save it as PNG or JPEG"),
    (4, b"ftypavif", "it is AVIF: save it as PNG or JPEG"),
    (4, b"ftyp", "it is a video"),
    (0, b"\x1a\x45\xdf\xa3", "it is a video"),
    (0, b"\x00\x00\x00\x0cjxl ", "it is JPEG XL: save it as PNG or JPEG"),
    (0, b"\xff\x0a", "it is JPEG XL: save it as PNG or JPEG"),
    (0, b"8bps", "it is a Photoshop document: save it as PNG or JPEG"),
    (0, b"<svg", "it is SVG: save it as PNG"),
    (0, b"%pdf", "it is PDF: save its pictures as PNG"),
)
"""Offset, bytes in lower case, and what a file is that holds them there."""
ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF", "TIFF")
"""Not MPO: those are photographs, and their further pictures are previews or depth maps."""


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Within it, Pillow does not warn: of what is wrong it also raises an error, and what is large is meant to be.

    To be entered outside of thread pools, since all threads share the filters.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def undecodable(raw: bytes, error: Exception) -> str:
    """Why a file's bytes cannot be decoded; `error` is what Pillow said."""
    if not raw:
        return "it is empty"
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        return f"it has more than {most} megapixels: reduce it, training does so anyway"
    if isinstance(error, UnidentifiedImageError):  # its text is the address of a buffer
        start = raw[:32].lower()
        known = (what for at, begins, what in BEGINNINGS if start[at:].startswith(begins))
        return next(known, f"it begins with {raw[:8]!r}, as no picture does that can be read here")
    return str(error) or type(error).__name__


def count_pictures(file: Image.Image) -> int:
    """How many frames or pages a file has that is open; the first is the current one, as before."""
    return int(getattr(file, "n_frames", 1)) if file.format in ANIMATED_FORMATS else 1


def similar_name(path: Path) -> str:
    """` (there is 'A.PNG')` where the folder has a name that differs only in case, accents' form or suffix.

    Also what else may be wrong with a `path` that leads to no file.
    """
    if path.is_symlink():
        return " (it is a link to what is not there)"
    if "\\" in path.name:
        return " (write / between folders, not \\)"
    try:
        whole, stems = _names(path.parent, path.parent.stat().st_mtime_ns)
    except (OSError, ValueError):  # the latter for names that no file can have
        return f" (nor is there a folder {path.parent.name!r})"
    found = whole.get(_plain(path.name)) or stems.get(_plain(path.stem))
    return f" (there is {found!r})" if found else ""


@functools.lru_cache(maxsize=64)
def _names(folder: Path, changed: int) -> tuple[dict[str, str], dict[str, str]]:
    """The names in a folder by their plain forms, with and without the ending."""
    names = sorted((entry.name for entry in folder.iterdir()), reverse=True)
    stems = {_plain(Path(name).stem): name for name in names if not name.endswith(".txt")}
    return {_plain(name): name for name in names}, stems


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
