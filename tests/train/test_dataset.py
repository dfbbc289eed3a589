"""The dataset: every form, every odd picture, and every fault in one message."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorafuse_common.errors import DatasetError
from lorafuse_train.dataset.data import Sample, read_dataset
from lorafuse_train.dataset.pictures import Geometry, open_picture, to_picture, to_pixels
from lorafuse_train.options.config import TrainConfig


def read(folder: Path, multiple: int = 8, **options: Any) -> list[Sample]:
    config = TrainConfig(fused_model=folder, output_path=folder, dataset_base_path=folder, **options)
    fixed = (config.height, config.width) if config.height and config.width else None
    return read_dataset(config, Geometry(multiple, config.max_pixels, fixed))


def picture(folder: Path, name: str, size: tuple[int, int] = (32, 16)) -> None:
    Image.new("RGB", size, "teal").save(folder / name)


def test_all_forms_give_the_same_samples(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    picture(tmp_path, "b.jpg", (40, 40))
    rows = [{"image": "a.png", "prompt": 'a "quoted", comma'}, {"image": "b.jpg", "prompt": "zwei\u00df"}]
    contents = {
        "metadata.csv": '\ufeffimage,prompt,extra\na.png,"a ""quoted"", comma",1\nb.jpg,zwei\u00df,2\n',
        "metadata.json": json.dumps(rows),
        "metadata.jsonl": "\n\n".join(map(json.dumps, rows)),
    }
    found = []
    for name, text in contents.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        found.append(read(tmp_path))
        elsewhere = (tmp_path / name).rename(tmp_path / f"my-{name}")
        found.append(read(tmp_path, dataset_metadata_path=elsewhere))
    for row in rows:
        (tmp_path / row["image"]).with_suffix(".txt").write_text(row["prompt"] + "\n", encoding="utf-8")
    found.append(read(tmp_path))
    assert all(samples == found[0] for samples in found)
    assert [(s.path.name, s.caption, s.size) for s in found[0]] == [
        ("a.png", 'a "quoted", comma', (16, 32)),
        ("b.jpg", "zwei\u00df", (40, 40)),
    ]


def test_every_fault_is_listed_with_its_row(tmp_path: Path) -> None:
    picture(tmp_path, "good.png")
    picture(tmp_path, "small.png", (4, 64))
    raw = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(raw, "PNG")
    (tmp_path / "cut.png").write_bytes(raw.getvalue()[:-900])
    (tmp_path / "text.png").write_text("not a picture")
    lines = [
        "image,prompt",
        "good.png,fine",
        "absent.png,fine",
        "cut.png,fine",
        "text.png,fine",
        "good.png,",
        "small.png,fine",
        "good.png,one, two",
        "good.png",
        "good.png,fine",
        ",fine",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(DatasetError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert "9 faults" in message
    for part in (
        f"row 2 (line 3): {tmp_path / 'absent.png'}: no such file",
        f"row 3 (line 4): {tmp_path / 'cut.png'}: cannot be decoded",
        f"row 4 (line 5): {tmp_path / 'text.png'}: cannot be decoded",
        "row 5 (line 6): the caption is empty",
        f"row 6 (line 7): {tmp_path / 'small.png'}: is 4x64 pixels; both sides need at least 8",
        "row 7 (line 8): more values than columns; put captions that contain commas in double quotes",
        "row 8 (line 9): no text under 'prompt'",
        "row 9 (line 10): repeats row 1",
        "row 10 (line 11): 'image' is empty",
    ):
        assert part in message


def test_many_faults_are_counted(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("\n".join(['{"image": 3, "prompt": "x"}'] * 30 + ["{", "[]"]))
    with pytest.raises(DatasetError, match=r"32 faults(.|\n)*and 12 more"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("metadata.csv", "picture,title\na.png,x\n", r"no column \['image', 'prompt'\].*--image_column"),
        ("metadata.csv", 'image,prompt\na.png,y\nb.png,"x\nc.png,y\n', "after line 2: not CSV"),
        ("metadata.csv", "", "no column"),
        ("metadata.json", "{}", "expected a list"),
        ("metadata.json", "[", "cannot be read"),
        ("metadata.jsonl", "", "no pictures"),
        ("notes.md", "", "no pictures"),
    ],
)
def test_metadata_that_cannot_be_read(tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=match):
        read(tmp_path)


def test_sidecars(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("a.png", "sub/b.PNG", ".hidden/c.png"):
        picture(tmp_path, name)
    (tmp_path / "sub/b.txt").write_text("b")
    with pytest.raises(DatasetError, match=r"1 fault:(.|\n)*a\.png: no caption; expected a\.txt"):
        read(tmp_path)
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"2 faults:(.|\n)* c\.png: no caption; expected c\.txt; .*decoded"):
        read(tmp_path)
    (tmp_path / "c.png").unlink()
    (tmp_path / "a.txt").write_text("a")
    assert [sample.caption for sample in read(tmp_path)] == ["a", "b"]


def test_ambiguous_or_absent_sources(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").touch()
    (tmp_path / "metadata.json").touch()
    with pytest.raises(DatasetError, match=r"metadata\.csv and metadata\.json"):
        read(tmp_path)
    with pytest.raises(DatasetError, match="no such file"):
        read(tmp_path, dataset_metadata_path=tmp_path / "x.csv")
    with pytest.raises(DatasetError, match="no such folder"):
        read(tmp_path / "x")


def test_sizes_that_do_not_suit_are_listed_beside_the_rest(tmp_path: Path) -> None:
    picture(tmp_path, "wide.png", (1000, 20))
    (tmp_path / "metadata.csv").write_text("image,prompt\nwide.png,x\nabsent.png,x\n")
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, height=12, width=16, max_pixels=1024)
    message = str(caught.value)
    assert "3 faults:\n  --height 12 --width 16: both must be multiples of 8" in message
    assert "is 1000x20 pixels and is reduced to --max_pixels 1024; both sides need at least 8" in message
    assert "absent.png: no such file" in message


@pytest.mark.parametrize(
    ("height", "width", "max_pixels", "expected"),
    [
        (1024, 1024, 1024 * 1024, (1024, 1024)),
        (2048, 1024, 1024 * 512, (1024, 512)),
        (64, 64, 32 * 32, (32, 32)),
        (100, 50, 10**6, (96, 48)),
        (1000, 10, 100, (96, 0)),
    ],
)
def test_sizes_keep_the_shape(height: int, width: int, max_pixels: int, expected: tuple[int, int]) -> None:
    assert Geometry(8, max_pixels, None).size(height, width) == expected
    assert Geometry(8, max_pixels, (32, 16)).size(height, width) == (32, 16)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    raw = io.BytesIO()
    image.save(raw, form, **options)
    return raw.getvalue()


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the left half comes on top
    upright = np.asarray(open_picture(encoded(image, exif=exif)))
    assert upright.shape == (16, 8, 3)
    assert upright[:8].min() == 255
    assert upright[8:].max() == 0


def test_transparency_lies_on_white() -> None:
    layer = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    layer.putpixel((1, 0), (0, 0, 255, 128))
    shown = open_picture(encoded(layer))
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert shown.getpixel((1, 0)) == (127, 127, 255)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    assert open_picture(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_grey_sixteen_bit_and_cmyk() -> None:
    deep = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    assert np.asarray(open_picture(encoded(deep)))[0, :, 0].tolist() == [0, 1, 255]
    assert open_picture(encoded(Image.new("L", (1, 1), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert open_picture(encoded(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = np.asarray(open_picture(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))[0, 0]
    assert red > 250
    assert max(green, blue) < 5
    with pytest.raises(ValueError, match="floating-point"):
        open_picture(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


def test_pixels_are_the_centre_in_minus_one_to_one() -> None:
    image = Image.new("RGB", (32, 8), "black")
    image.paste("white", (12, 0, 20, 8))
    pixels = to_pixels(image, (8, 8))
    assert pixels.shape == (3, 8, 8)
    assert pixels.min() == 1
    assert to_pixels(Image.new("RGB", (16, 16), "black"), (8, 8)).max() == -1
    assert np.array_equal(np.asarray(to_picture(to_pixels(image, (8, 32)))), np.asarray(image))
