"""Captions as people have them: any language, line breaks, quotes, encodings; and their length in tokens."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from train import tiny, tiny_flux, tiny_flux2, tiny_sd3, tiny_z_image

from lorafuse_common.errors import DatasetError
from lorafuse_train.dataset.captions import measure_captions
from lorafuse_train.dataset.data import Sample, read_dataset
from lorafuse_train.dataset.pictures import Geometry
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.recipes import RECIPES, flux, flux2, qwen_image, sd3, z_image

CAPTIONS = (
    'one, two, "three"; four\tfive',
    "two\nlines\r\nand a third",
    "ein Stra\u00dfenschild, \u00fcber M\u00fcnchen",
    "\u4e00\u53ea\u7ea2\u8272\u7684\u72d0\u72f8\uff0c\u6c34\u5f69\u753b",
    "\u0642\u0637\u0629 \u0632\u0631\u0642\u0627\u0621",
    "\u05d7\u05ea\u05d5\u05dc \u05db\u05d7\u05d5\u05dc",
    "\U0001f98a\U0001f3fd\u200d\U0001f3a8 \u2028 a line separator \x85 and another",
    "it's a \\ backslash, 100 % \u201cquoted\u201d",
    "=SUM(A1)",
)


def read(folder: Path, **options: Any) -> list[Sample]:
    config = TrainConfig(fused_model=folder, output_path=folder, dataset_base_path=folder, **options)
    return read_dataset(config, Geometry(8, config.max_pixels, None))


def pictures(folder: Path, count: int) -> list[str]:
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / name)
    return names


@pytest.mark.parametrize("form", ["csv", "json", "jsonl", "jsonl escaped", "txt"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_captions_arrive_as_they_were_written(tmp_path: Path, form: str, mark: str) -> None:
    rows = [
        {"image": name, "prompt": text} for name, text in zip(pictures(tmp_path, len(CAPTIONS)), CAPTIONS, strict=True)
    ]
    if form == "csv":
        with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            file.write(mark)
            writer = csv.DictWriter(file, ["image", "prompt"])
            writer.writeheader()
            writer.writerows(rows)
    elif form == "json":
        text = mark + json.dumps(rows, ensure_ascii=False)
        (tmp_path / "metadata.json").write_text(text, encoding="utf-8", newline="")
    elif form == "txt":
        for row in rows:
            path = (tmp_path / row["image"]).with_suffix(".txt")
            path.write_bytes((mark + row["prompt"] + "\n").encode())
    else:
        lines = [json.dumps(row, ensure_ascii=form.endswith("escaped")) for row in rows]
        (tmp_path / "metadata.jsonl").write_bytes((mark + "\r\n".join(lines)).encode())
    # In a text file, which a CSV file is too, \r\n is one line break.
    expected = [text.replace("\r\n", "\n") if form in ("txt", "csv") else text for text in CAPTIONS]
    assert [sample.caption for sample in read(tmp_path)] == expected


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (
            "image,prompt\n0.png,\u00fcber\n".encode("latin-1"),
            r"metadata\.csv: line 2: is not UTF-8 .*save it as UTF-8",
        ),
        ("image,prompt\n0.png,x\n".encode("utf-16"), "looks like UTF-16"),
        (b"image;prompt\n0.png;x\n", "separated by semicolons"),
        (b"image\tprompt\n0.png\tx\n", "separated by tabs"),
        (b"image,prompt,prompt\n0.png,x,y\n", "'prompt' more than once"),
        (b"image, prompt\n0.png,x\n", r"no column \['prompt'\]; its first line has \['image', ' prompt'\]"),
        (b'image,prompt\n0.png,"x\n', "not CSV"),
    ],
)
def test_tables_that_were_saved_otherwise(tmp_path: Path, raw: bytes, match: str) -> None:
    pictures(tmp_path, 1)
    (tmp_path / "metadata.csv").write_bytes(raw)
    with pytest.raises(DatasetError, match=match):
        read(tmp_path)


def test_ragged_rows_are_listed_together(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    (tmp_path / "metadata.csv").write_text('image,prompt,x\n0.png\n1.png,a,b,c\n\n2.png,"a\nb"\n')
    with pytest.raises(DatasetError) as caught:
        read(tmp_path)
    assert "2 faults" in str(caught.value)
    assert "row 1 (line 2): no text under 'prompt'" in str(caught.value)
    assert "row 2 (line 3): more values than columns" in str(caught.value)


def test_sidecars_in_another_encoding(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "0.txt").write_bytes("\u00fcber".encode("latin-1"))
    (tmp_path / "1.txt").write_bytes("x".encode("utf-16"))
    with pytest.raises(DatasetError) as caught:
        read(tmp_path)
    assert "0.txt: is not UTF-8; save it as UTF-8" in str(caught.value)
    assert "1.txt: is not UTF-8; it looks like UTF-16; save it as UTF-8" in str(caught.value)


def test_a_very_long_caption_in_a_table(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    (tmp_path / "metadata.csv").write_text(f'image,prompt\n0.png,"{"word " * 50_000}"\n')
    assert len(read(tmp_path)[0].caption) == 5 * 50_000 - 1


@pytest.mark.parametrize(
    ("made", "longest"),
    [
        (tiny, qwen_image.LONGEST_PROMPT),
        (tiny_flux, flux.LONGEST_PROMPT),
        (tiny_flux2, flux2.LONGEST_PROMPT),
        (tiny_sd3, sd3.LONGEST_PROMPT),
        (tiny_z_image, z_image.LONGEST_PROMPT),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_lengths_are_those_that_the_encoder_cuts_at(tmp_path: Path, made: Any, longest: int) -> None:
    """The recipe, asked with the text encoder, sees one token more as cut, and two less as whole."""
    made.save_pipeline(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())["_class_name"]
    recipe = next(recipe for recipe in RECIPES if index in recipe.pipelines)
    encoder = recipe.load_text_encoder(tmp_path, torch.device("cpu"))

    words = [f"a red star{' a' * number}" for number in range(longest)]
    lengths = measure_captions(words, tmp_path)
    assert (lengths.unit, lengths.longest) == ("tokens", longest)
    for tokens, cut in ((longest + 1, True), (longest - 2, False)):
        caption = words[lengths.counts.index(tokens)]
        assert recipe.is_cut(recipe.encode_text(encoder, caption)) is cut


def test_without_a_tokenizer_characters_are_counted() -> None:
    assert measure_captions(["abc", ""], None).counts == (3, 0)
    assert measure_captions(["abc"], None).unit == "characters"
