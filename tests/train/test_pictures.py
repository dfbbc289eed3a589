"""Odd picture files: each is either read as it is meant, or refused with the reason."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorafuse_train.dataset.headers import read_header
from lorafuse_train.dataset.picture_faults import quiet_pillow, similar_name
from lorafuse_train.dataset.pictures import open_picture, upright_size

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    raw = io.BytesIO()
    image.save(raw, form, **options)
    return raw.getvalue()


def frames(count: int) -> list[Image.Image]:
    return [Image.fromarray(np.roll(NOISE, 7 * index, 1)) for index in range(count)]


UPRIGHT: dict[int, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, 1),
}
"""EXIF's eight orientations, by what has to be done to the stored pixels (TIFF 6.0, tag 274)."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_every_exif_orientation(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(Image.fromarray(NOISE), form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    expected, found = UPRIGHT[orientation](NOISE), np.asarray(open_picture(raw))
    assert upright_size(raw) == expected.shape[:2]
    if form == "JPEG":
        plain = np.asarray(open_picture(encoded(Image.fromarray(NOISE), form)))
        expected = UPRIGHT[orientation](plain)
    assert np.array_equal(found, expected)


def test_transparency_of_every_kind_lies_on_white() -> None:
    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((1, 0), (0, 0))
    assert np.asarray(open_picture(encoded(grey)))[0, :, 0].tolist() == [0, 255]
    keyed = Image.new("L", (2, 1), 0)
    keyed.putpixel((1, 0), 9)
    assert np.asarray(open_picture(encoded(keyed, transparency=9)))[0, :, 0].tolist() == [0, 255]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 200, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    shown = open_picture(encoded(palette, transparency=bytes([255, 128])))
    assert shown.getpixel((0, 0)) == (0, 0, 200)
    assert shown.getpixel((1, 0)) == (127, 227, 127)


def test_sixteen_bit_colour_keeps_its_brightness() -> None:
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pixels = struct.pack(">6H", 0, 32896, 65535, 257, 514, 771)
    raw = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" + pixels))
        + chunk(b"IEND", b"")
    )
    assert np.asarray(open_picture(raw))[0].tolist() == [[0, 128, 255], [1, 2, 3]]


@pytest.mark.parametrize(
    ("form", "options"),
    [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})],
)
def test_animations_and_pages_are_refused(form: str, options: dict[str, Any]) -> None:
    first, *rest = frames(3)
    many = encoded(first, form, save_all=True, append_images=rest, **options)
    with pytest.raises(ValueError, match="has 3 frames or pages"):
        open_picture(many)
    assert open_picture(encoded(first, form, **options)).size == (64, 48)


def test_a_photograph_with_a_preview_is_no_animation() -> None:
    first, second = frames(2)
    raw = encoded(first, "MPO", save_all=True, append_images=[second], quality=100, subsampling=0)
    assert Image.open(io.BytesIO(raw)).n_frames == 2  # type: ignore[attr-defined]
    difference = np.abs(np.asarray(open_picture(raw)).astype(int) - np.asarray(first).astype(int))
    assert difference.mean() < 3


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 90, "progressive": True}),
        ("WEBP", {"quality": 90}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
    ],
)
def test_a_file_cut_anywhere_is_refused_or_whole(form: str, options: dict[str, Any]) -> None:
    """No half-grey picture: what is accepted has every pixel of the whole file."""
    raw = encoded(Image.fromarray(NOISE), form, **options)
    whole = np.asarray(open_picture(raw))
    refused = 0
    for length in sorted({*range(0, len(raw), max(1, len(raw) // 60)), *range(max(0, len(raw) - 12), len(raw))}):
        try:
            with quiet_pillow():
                found = open_picture(raw[:length])
        except ValueError as error:
            refused += 1
            assert "cannot be decoded" in str(error)
            assert "0x" not in str(error)  # the address of a buffer tells nobody anything
            with quiet_pillow(), pytest.raises(ValueError, match="cannot be decoded"):
                upright_size(raw[:length])
        else:
            assert np.array_equal(np.asarray(found), whole), f"{length} of {len(raw)} bytes"
            assert upright_size(raw[:length]) == whole.shape[:2]
    assert refused > 50


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "HEIC"),
        (b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00", "video"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"8BPS\x00\x01", "Photoshop"),
        (b"just some text", r"begins with b'just som'"),
    ],
)
def test_files_of_other_kinds_are_named(raw: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        open_picture(raw)


def test_huge_pictures(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="more than 0 megapixels: reduce it"):
        open_picture(encoded(Image.new("RGB", (50, 50))))
    with quiet_pillow():
        assert open_picture(encoded(Image.new("RGB", (40, 40)))).size == (40, 40)
    assert not recwarn.list


def test_headers(tmp_path: Path) -> None:
    for name, image, expected in (
        ("a.png", Image.new("RGBA", (4, 4)), ("PNG", "colour with transparency")),
        ("b.jpg", Image.new("CMYK", (4, 4)), ("JPEG", "CMYK")),
        ("c.png", Image.fromarray(np.zeros((4, 4), np.uint16)), ("PNG", "16-bit grey")),
        ("d.gif", Image.new("L", (4, 4)), ("GIF", "palette")),
    ):
        image.save(tmp_path / name)
        found = read_header(tmp_path / name)
        assert (found.format, found.pixels) == expected
        assert found.nbytes == (tmp_path / name).stat().st_size


def test_similar_names(tmp_path: Path) -> None:
    (tmp_path / "Caf\u00e9.PNG").touch()
    (tmp_path / "b.jpeg").touch()
    assert similar_name(tmp_path / "cafe\u0301.png") == " (there is 'Caf\u00e9.PNG')"
    assert similar_name(tmp_path / "b.jpg") == " (there is 'b.jpeg')"
    assert similar_name(tmp_path / "sub\\b.jpeg") == " (write / between folders, not \\)"
    assert similar_name(tmp_path / "z.png") == ""
    (tmp_path / "link.png").symlink_to("gone.png")
    assert similar_name(tmp_path / "link.png") == " (it is a link to what is not there)"
    assert "'absent'" in similar_name(tmp_path / "absent" / "z.png")
