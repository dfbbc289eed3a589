"""`lorafuse-train check`: every fault at once, numbers that are true, and nothing changed."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from train import tiny, tiny_edit, tiny_wan
from train.runs import run as train_run
from train.runs import save_world
from typer.testing import CliRunner

from lorafuse_common.errors import DatasetError
from lorafuse_train import cli
from lorafuse_train.dataset.captions import Lengths
from lorafuse_train.dataset.data import Sample
from lorafuse_train.dataset.dataset_statistics import crop, enlargement, gather_statistics
from lorafuse_train.dataset.pictures import Geometry


def check(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout, and the message of the error."""
    result = CliRunner().invoke(cli.app, ["check", *map(str, arguments)])
    error = str(result.exception) if result.exception and not isinstance(result.exception, SystemExit) else ""
    return result.exit_code, result.stdout, error


def noise(path: Path, size: tuple[int, int], seed: int, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_table(folder: Path, rows: list[tuple[str, str]]) -> Path:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "prompt"), *rows])
    return folder


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file."""
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def planted(folder: Path) -> Path:
    """A dataset with every kind of fault, and more than 20 of them."""
    good = noise(folder / "good.png", (64, 48), 0)
    (folder / "copy.png").write_bytes(good.read_bytes())
    noise(folder / "x" / "same.png", (64, 64), 1)
    noise(folder / "y" / "same.png", (64, 64), 2)
    noise(folder / "small.png", (8, 64), 3)
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes(noise(folder / "whole.jpg", (64, 64), 4).read_bytes()[:-700])
    frames = [Image.new("RGB", (32, 32), (index, 0, 0)) for index in range(0, 250, 50)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    rows = [
        ("good.png", "a, b\nand c"),
        ("copy.png", "the same bytes"),
        ("x/same.png", "one name"),
        ("y/same.png", "one name"),
        ("small.png", "too small"),
        ("empty.png", "no bytes"),
        ("cut.jpg", "half"),
        ("moving.gif", "animated"),
        ("good.png", "  "),
        ("good.png", "a, b\nand c"),
        ("Good.PNG", "wrong case"),
        *((f"absent-{number}.png", "x") for number in range(20)),
    ]
    return write_table(folder, rows)


def test_all_faults_are_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    folder = planted(tmp_path / "data")
    before = snapshot(folder)
    status, printed, error = check("--dataset_base_path", folder)
    assert status == 1
    assert snapshot(folder) == before
    assert "27 faults" in error
    assert "\n  and " not in error
    for part in (
        "row 5 (line 7): " + str(folder / "small.png") + ": is 8x64 pixels",
        "empty.png: cannot be decoded (it is empty)",
        "row 7 (line 9): " + str(folder / "cut.jpg"),
        "moving.gif: has 5 frames or pages",
        "row 9 (line 11): the caption is empty",
        "row 10 (line 13): repeats row 1",
        "Good.PNG: no such file (there is 'good.png')",
        *(f"absent-{number}.png: no such file" for number in range(20)),
    ):
        assert part in error
    assert "good.png, copy.png" in printed
    assert "'one name': x/same.png, y/same.png" in printed
    assert "several folders, which is fine here: 1" in printed
    assert ".heic files, which are not read" in printed
    assert "1 .jpg files that are in no row" in printed


def test_pictures_and_captions_with_a_fault_are_in_the_dataset(tmp_path: Path) -> None:
    for name in ("good", "latin", "without"):
        noise(tmp_path / f"{name}.png", (64, 64), 0)
    (tmp_path / "good.txt").write_text("a caption")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "orphan.txt").write_text("of no picture")
    status, printed, error = check("--dataset_base_path", tmp_path)
    assert status == 1
    assert "2 faults" in error
    assert printed.splitlines()[-1] == "not in the dataset: 1 .txt files without a picture"
    assert "in no row" not in printed


def test_json_is_all_that_is_on_stdout(tmp_path: Path) -> None:
    folder = planted(tmp_path / "data")
    status, printed, _ = check("--dataset_base_path", folder, "--json")
    found = json.loads(printed)
    assert status == 1
    assert len(found["faults"]) == 27
    assert found["rows"] == 31
    assert found["samples"] == 5  # the row that repeats another is good in itself
    assert found["same_bytes"] == [{"what": "", "files": ["good.png", "copy.png"]}]
    assert found["same_name"] == [{"what": "same.png", "files": ["x/same.png", "y/same.png"]}]
    assert sum(bucket["samples"] for bucket in found["buckets"]) == 5
    assert found["captions"]["unit"] == "characters"


def test_a_good_dataset_ends_with_0(tmp_path: Path) -> None:
    folder = tiny.save_dataset(tmp_path / "data", ((64, 64), (64, 32), (200, 100)))
    status, printed, _ = check("--dataset_base_path", folder, "--max_pixels", 4096, "--train_batch_size", 2)
    assert status == 0
    assert "samples: 3" in printed
    assert "buckets at --max_pixels 4096: 3" in printed
    assert "1 of 80x32: 1 reduced, 1 lose more than 5% of their area" in printed
    assert "an epoch in batches of 2: 0 full, 3 smaller" in printed
    assert f"{folder / 'metadata.csv'}: no faults" in printed


def test_the_family_tells_sizes_and_tokens(tmp_path: Path) -> None:
    base = tiny.save_pipeline(tmp_path / "base")  # unfused: `check` reads no weights, and asks for no manifest
    folder = tiny.save_dataset(tmp_path / "data", ((40, 40), (40, 40)))
    words = " ".join(["a red star"] * 600)
    rows = [("0.png", "short"), ("1.png", words)]
    write_table(folder, rows)
    _, printed, _ = check("--dataset_base_path", folder, "--fused_model", base)
    assert "2 of 40x40" in printed  # multiples of 8, where most families need 16
    assert "tokens" in printed
    assert "1 are longer than the 512 tokens that the family reads" in printed
    assert "1.png" in printed
    _, printed, _ = check("--dataset_base_path", folder)
    assert "2 of 32x32" in printed
    assert "characters" in printed


def test_small_pictures_are_not_enlarged_in_silence(tmp_path: Path) -> None:
    folder = tiny.save_dataset(tmp_path / "data", ((32, 32), (128, 128)))
    _, printed, _ = check("--dataset_base_path", folder, "--height", 64, "--width", 64)
    assert "1 samples are smaller than what they train at and are enlarged, up to 2.00 times" in printed
    _, printed, _ = check("--dataset_base_path", folder)
    assert "enlarged" not in printed


def test_train_says_the_same_in_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = save_world(tmp_path)
    (world / "data" / "0.png").write_bytes((world / "data" / "1.png").read_bytes())
    train_run(world, tmp_path / "out", height=64, width=64, max_train_steps=1)
    printed = capsys.readouterr().out
    assert "6 samples are smaller than what they train at and are enlarged, up to 2.67 times" in printed
    assert "2 files hold the bytes of another, such as 0.png, 1.png" in printed


def test_a_config_file_of_a_training_will_do(tmp_path: Path) -> None:
    folder = tiny.save_dataset(tmp_path / "data")
    base = tiny.save_pipeline(tmp_path / "base")
    config = tmp_path / "train.yaml"
    config.write_text(
        f"fused_model: {base}\ndataset_base_path: {folder}\noutput_path: {tmp_path / 'out'}\nlora_rank: 4\n"
    )
    assert check("--config", config)[0] == 0
    assert not (tmp_path / "out").exists()


def test_a_thousand_pictures_take_seconds(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    raw = noise(folder / "first.jpg", (512, 512), 0, quality=85).read_bytes()
    rows = []
    for number in range(1000):
        (folder / f"{number}.jpg").write_bytes(raw + number.to_bytes(4, "big"))  # the same pixels, other bytes
        rows.append((f"{number}.jpg", f"picture {number}"))
    write_table(folder, rows)
    start, cpu = time.monotonic(), os.times()
    status, printed, error = check("--dataset_base_path", folder)
    spent = os.times()
    assert status == 0, error
    assert "samples: 1000" in printed
    # Of processor time, as others may be using the machine; a picture takes some 5 ms.
    assert spent.user + spent.system - cpu.user - cpu.system < 40, time.monotonic() - start


def sample(name: str, source: tuple[int, int], size: tuple[int, int], caption: str = "x") -> Sample:
    return Sample(Path("data") / name, caption, name, size, source=source)


def test_the_numbers() -> None:
    """Against sums done by hand."""
    assert enlargement(sample("a", (50, 100), (100, 100))) == 2.0
    assert crop(sample("a", (50, 100), (100, 100))) == 0.5  # 100 x 200 once enlarged
    assert enlargement(sample("a", (200, 200), (100, 100))) == 1.0
    assert crop(sample("a", (200, 200), (100, 100))) == pytest.approx(0)
    samples = [
        sample("a", (64, 64), (64, 64), "one"),
        sample("b", (128, 128), (64, 64), "one"),
        sample("c", (32, 32), (64, 64), "two"),
        sample("d", (64, 128), (64, 128), "three"),
    ]
    alike = [sample("e.png", (8, 8), (8, 8)), sample("e.jpg", (8, 8), (8, 8))]
    endings = gather_statistics(alike, (), Lengths((1, 1), "tokens"), Path("data"), 1, 1)
    assert [group.files for group in endings.same_stem] == [("e.png", "e.jpg")]
    found = gather_statistics(samples, (), Lengths((3, 3, 9, 5), "tokens", 8), Path("data"), 2, 3)
    assert (found.full_batches, found.incomplete_batches) == (4 + 1, 1 + 1)  # of 9 and of 3 samples an epoch
    first, second = found.buckets
    assert (first.samples, first.reduced, first.enlarged, first.cropped) == (3, 1, 1, 0)
    assert (second.height, second.width, second.samples) == (64, 128, 1)
    assert (found.smallest, found.largest, found.largest_enlargement) == ((32, 32), (128, 128), 2.0)
    assert found.captions is not None
    assert (found.captions.shortest, found.captions.median, found.captions.longest) == (3, 4.0, 9)
    assert found.captions.cut == ("c",)
    assert [group.files for group in found.same_caption] == [("a", "b")]


def test_the_size_of_a_picture_is_the_one_it_trains_at() -> None:
    """What `check` calls cropped is what `to_pixels` cuts off."""
    shape = Geometry(16, 64 * 64, None)
    for height, width in ((64, 64), (100, 37), (1000, 999), (17, 250)):
        size = shape.size(height, width)
        assert size[0] * size[1] <= 64 * 64
        assert enlargement(sample("a", (height, width), size)) == 1.0
        assert 0 <= crop(sample("a", (height, width), size)) < 1


def test_what_only_a_training_would_find(tmp_path: Path) -> None:
    folder = tiny.save_dataset(tmp_path / "data")
    status, _, error = check("--dataset_base_path", folder, "--trigger_phrase", "ohwx", "--validation_split", 9)
    assert status == 1
    assert "2 faults" in error
    assert "none of the 4 captions has it" in error
    assert "leaves nothing to train on" in error
    assert check("--dataset_base_path", folder, "--trigger_phrase", "circle", "--validation_split", 1)[0] == 0


def test_what_only_a_training_would_find_is_all_listed_beside_faulty_rows(tmp_path: Path) -> None:
    """Also without a base, and each fault on a line of its own, however many they are."""
    folder, other = tmp_path / "data", tmp_path / "other"
    other.mkdir()
    rows = [("absent.png", "x", ""), ("good.png", "x", "absent-mask.png")]
    noise(folder / "good.png", (64, 64), 0)
    for number in range(25):
        noise(folder / f"{number}.png", (64, 64), number)
        Image.new("L", (64, 64)).save(folder / f"{number}-mask.png")
        rows.append((f"{number}.png", "x", f"{number}-mask.png"))
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt", "mask"), *rows])
    write_table(other, [(f"gone-{number}.png", "x") for number in range(25)])
    options = ("--masked_loss", "mask", "--validation_dataset_path", other, "--trigger_phrase", "ohwx")
    status, _, error = check("--dataset_base_path", folder, *options)
    assert status == 1
    assert "52 faults:" in error
    assert len(error.splitlines()) == 53
    assert f"row 1 (line 2): {folder}/absent.png: no such file" in error
    assert f"row 2 (line 3): mask {folder}/absent-mask.png: no such file" in error
    for number in range(25):
        assert f"--masked_loss mask: {folder}/{number}-mask.png: is black everywhere" in error
        assert f"{other}/metadata.csv: row {number + 1} (line {number + 2}): {other}/gone" in error


def test_no_such_folder(tmp_path: Path) -> None:
    status, _, error = check("--dataset_base_path", tmp_path / "absent")
    assert status == 1
    assert "no such folder" in error
    status, _, error = check()
    assert "--dataset_base_path is missing" in error
    assert "fused_model" not in error


def test_a_fused_model_that_is_none(tmp_path: Path) -> None:
    folder = tiny.save_dataset(tmp_path / "data")
    status, _, error = check("--dataset_base_path", folder, "--fused_model", tmp_path)
    assert status == 1
    assert "no model_index.json; expected a pipeline folder" in error


def test_it_is_a_dataset_error(tmp_path: Path) -> None:
    folder = planted(tmp_path / "data")
    with pytest.raises(DatasetError):
        cli.app(["check", "--dataset_base_path", str(folder)], standalone_mode=False)


def test_pictures_to_edit_and_videos(tmp_path: Path) -> None:
    base = tiny_edit.save_pipeline(tmp_path / "edit")
    pairs = tiny_edit.save_pairs(tmp_path / "pairs", [(32, 32), (32, 32)], [[(32, 24)], [(24, 32)]])
    status, printed, error = check("--dataset_base_path", pairs, "--fused_model", base)
    assert status == 0, error
    assert "samples: 2, with 2 control pictures" in printed
    assert printed.count("1 of 32x32 with controls ") == 2
    assert "characters" in printed  # the text encoder sees the pictures, which are tokens too
    assert "in no row" not in printed
    videos = tiny_wan.save_dataset(tmp_path / "videos", (9, 9, 5))
    status, printed, error = check("--dataset_base_path", videos)
    assert status == 0, error
    assert "samples: 3, 3 of them videos" in printed
    assert "2 of 9 frames of 32x32" in printed
    status, _, error = check("--dataset_base_path", videos, "--fused_model", base)
    assert status == 1
    assert error.count("is a video; a QwenImageEditPipeline draws pictures") == 3
    assert "no row has a control picture" in error
