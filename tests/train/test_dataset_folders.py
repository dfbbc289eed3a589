"""Image folders of the `datasets` library, and data sets that it loads."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorafuse_common.errors import ConfigError, DatasetError
from lorafuse_train.dataset import unpack
from lorafuse_train.dataset.data import Sample, read_dataset
from lorafuse_train.dataset.pictures import Geometry
from lorafuse_train.options.config import TrainConfig


def read(folder: Path, **options: Any) -> list[Sample]:
    config = TrainConfig(fused_model=folder, output_path=folder, dataset_base_path=folder, **options)
    return read_dataset(config, Geometry(8, config.max_pixels, None))


def picture(path: Path, colour: str = "teal") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)
    return path


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def lack_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library were not installed."""
    importing = importlib.import_module

    def lacking(name: str) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return importing(name)

    monkeypatch.setattr(importlib, "import_module", lacking)


@pytest.mark.parametrize("caption", ["text", "caption", "prompt"])
def test_columns_of_image_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], caption: str) -> None:
    picture(tmp_path / "a.png")
    table(tmp_path / "metadata.csv", f"file_name,{caption}", "a.png,a fox")
    (sample,) = read(tmp_path)
    assert (sample.path, sample.caption) == (tmp_path / "a.png", "a fox")
    said = capsys.readouterr().out
    assert "'file_name' as image" in said
    assert (f"{caption!r} as prompt" in said) == (caption != "prompt")


def test_our_own_columns_are_read_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "a.png")
    table(tmp_path / "metadata.csv", "image,prompt,text,file_name", "a.png,a fox,no fox,b.png")
    assert read(tmp_path)[0].caption == "a fox"
    assert capsys.readouterr().out == ""


def test_chosen_columns(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    table(tmp_path / "metadata.csv", "image,prompt,title,where", "b.png,a fox,a vixen,a.png")
    (sample,) = read(tmp_path, image_column="where", caption_column="title")
    assert (sample.path.name, sample.caption) == ("a.png", "a vixen")
    with pytest.raises(DatasetError, match="no column 'name', which --caption_column names"):
        read(tmp_path, caption_column="name")


def test_two_captions_are_not_guessed_between(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a", "caption": "b"}\n')
    with pytest.raises(DatasetError, match="columns 'text' and 'caption'; choose with --caption_column"):
        read(tmp_path)
    assert read(tmp_path, caption_column="caption")[0].caption == "b"


def test_a_train_split_is_found_and_others_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "validation"):
        picture(tmp_path / split / "sub" / "a.png", "red" if split == "train" else "blue")
        table(tmp_path / split / "metadata.csv", "file_name,text", f"sub/a.png,{split}")
    (sample,) = read(tmp_path)
    assert (sample.path, sample.caption) == (tmp_path / "train" / "sub" / "a.png", "train")
    assert "not validation" in capsys.readouterr().out
    (sample,) = read(tmp_path, dataset_metadata_path=tmp_path / "validation" / "metadata.csv")
    assert (sample.path, sample.caption) == (tmp_path / "validation" / "sub" / "a.png", "validation")


def test_metadata_in_another_folder_has_to_be_chosen(tmp_path: Path) -> None:
    picture(tmp_path / "mine" / "a.png")
    table(tmp_path / "mine" / "metadata.csv", "image,prompt", "mine/a.png,a fox")
    with pytest.raises(DatasetError, match=r"has mine/metadata\.csv; choose with --dataset_metadata_path"):
        read(tmp_path)
    # `image` is relative to --dataset_base_path, as in DiffSynth-Studio; `file_name` to its own file, as in `datasets`.
    assert read(tmp_path, dataset_metadata_path=tmp_path / "mine" / "metadata.csv")[0].caption == "a fox"
    table(tmp_path / "mine" / "metadata.csv", "file_name,text", "a.png,a fox")
    assert read(tmp_path, dataset_metadata_path=tmp_path / "mine" / "metadata.csv")[0].caption == "a fox"


def test_without_the_library_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lack_datasets(monkeypatch)
    with pytest.raises(ConfigError, match=r"pip install 'lorafuse\[datasets\]'"):
        read(tmp_path / "new", dataset_name="owner/name")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_in_use_is_not_unpacked_into(tmp_path: Path) -> None:
    picture(tmp_path / "mine.png")
    with pytest.raises(DatasetError, match="is not empty"):
        read(tmp_path, dataset_name="owner/name")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What `save_to_disk` wrote of three pictures."""
    datasets = pytest.importorskip("datasets")
    paths = [picture(tmp_path / "from" / f"{colour}.jpg", colour) for colour in ("red", "green", "blue")]
    rows = {
        "image": [str(path) for path in paths],
        "text": ["a red", "a green, \u4e2d", "a blue\nline"],
        "n": [1, 2, 3],
    }
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_what_save_to_disk_wrote(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    originals = [(tmp_path / "from" / f"{colour}.jpg").read_bytes() for colour in ("red", "green", "blue")]
    samples = read(tmp_path / "data", dataset_name=str(saved))
    assert [sample.caption for sample in samples] == ["a red", "a green, \u4e2d", "a blue\nline"]
    assert [sample.path.read_bytes() for sample in samples] == originals
    assert [sample.path.suffix for sample in samples] == [".jpg"] * 3
    times = [path.stat().st_mtime_ns for path in (tmp_path / "data" / "pictures").iterdir()]

    lack_datasets(monkeypatch)  # not needed a second time
    assert read(tmp_path / "data", dataset_name=str(saved)) == samples
    assert [path.stat().st_mtime_ns for path in (tmp_path / "data" / "pictures").iterdir()] == times
    with pytest.raises(DatasetError, match="give a new folder or delete it"):
        read(tmp_path / "data", dataset_name=str(saved), dataset_split="test")


def test_unpacking_goes_on_after_an_interruption(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing = unpack._write_picture

    def dying(folder: Path, number: int, value: Any) -> str:
        if number == 2:
            raise KeyboardInterrupt
        return writing(folder, number, value)

    monkeypatch.setattr(unpack, "_write_picture", dying)
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path / "data", dataset_name=str(saved))
    monkeypatch.setattr(unpack, "_write_picture", writing)
    assert len(read(tmp_path / "data", dataset_name=str(saved))) == 3


def test_splits_parquet_and_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = picture(tmp_path / "from" / "red.png", "red")
    made = datasets.Dataset.from_dict({"picture": [str(path)], "caption": ["a"], "other": ["b"]})
    made = made.cast_column("picture", datasets.Image())
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DatasetError, match="has the splits train, test"):
        read(tmp_path / "a", dataset_name=str(tmp_path / "both"), dataset_split="validation")
    with pytest.raises(DatasetError, match="has the columns picture, caption, other"):
        read(tmp_path / "b", dataset_name=str(tmp_path / "both"))
    with pytest.raises(DatasetError, match=r"holds .*string.*expected pictures"):
        read(tmp_path / "b2", dataset_name=str(tmp_path / "both"), image_column="other")
    (sample,) = read(tmp_path / "c", dataset_name=str(tmp_path / "both"), image_column="picture", dataset_split="test")
    assert sample.caption == "a"
    (tmp_path / "shards").mkdir()
    made.to_parquet(str(tmp_path / "shards" / "train-00000-of-00001.parquet"))
    (sample,) = read(tmp_path / "d", dataset_name=str(tmp_path / "shards"), image_column="picture")
    assert sample.path.read_bytes() == path.read_bytes()
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(DatasetError, match=r"--dataset_name .*absent: cannot be loaded"):
        read(tmp_path / "d", dataset_name=str(tmp_path / "absent"))


def test_a_faulty_picture_in_it_is_a_fault_of_its_row(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    value = [{"bytes": b"no picture", "path": None}, None]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": value, "text": ["a", None]}, features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DatasetError) as caught:
        read(tmp_path / "data", dataset_name=str(tmp_path / "saved"))
    assert "line 1" in str(caught.value)
    assert "line 2" in str(caught.value)
    record = json.loads((tmp_path / "data" / unpack.RECORD).read_text())
    assert record["complete"] is True
