"""`lorafuse-train cache`: what a training needs, once, by any number of processes; verified, and to be looked at."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from train import tiny, tiny_edit, tiny_wan
from train.runs import run as train_run
from train.runs import save_world

from lorafuse_common.errors import ConfigError, OutputError
from lorafuse_train import cli
from lorafuse_train.encoding import cache, contact_sheet, verify_cache
from lorafuse_train.recipes.qwen_image import QwenImage

PATHS = ":".join(map(str, (ROOT, ROOT / "tools/fuse", ROOT / "tools/train")))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny.save_dataset(tmp_path / "data", ((32, 32), (32, 24), (32, 32), (24, 32)))


def arguments(world: Path, data: Path, *more: object) -> list[str]:
    given = ["cache", "--fused_model", world / "fused", "--dataset_base_path", data]
    return [str(part) for part in (*given, "--validation_prompt", "a red circle", *more)]


def fill(world: Path, data: Path, *more: object) -> None:
    cli.app(arguments(world, data, *more), standalone_mode=False)


def counts(printed: str) -> tuple[int, int]:
    """How many entries were computed, and reused."""
    found = re.findall(r"cache: (\d+) entries computed.*?, (\d+) reused", printed)
    return int(found[-1][0]), int(found[-1][1])


def entries(data: Path) -> dict[str, bytes]:
    folder = data / ".lorafuse_cache"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def entry(data: Path, kind: str, index: int = 0) -> Path:
    return sorted((data / ".lorafuse_cache" / kind).rglob("*.safetensors"))[index]


def spoil(path: Path, scale: float) -> None:
    """Other numbers under the same key, whole and with a right digest, as another library might have made them."""
    tensors = {
        name: tensor * scale if tensor.is_floating_point() else tensor for name, tensor in cache.load(path).items()
    }
    cache.store(path, tensors)


def test_one_changed_picture_is_one_entry(world: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(world, data)
    computed, reused = counts(capsys.readouterr().out)
    assert (computed, reused) == (len(entries(data)), 0)
    fill(world, data)
    assert counts(capsys.readouterr().out) == (0, computed)
    before = entries(data)
    Image.new("RGB", (32, 32), "purple").save(data / "2.png")
    fill(world, data)
    assert counts(capsys.readouterr().out) == (1, computed - 1)
    assert before.items() <= entries(data).items()
    assert len(entries(data)) == computed + 1


def test_a_training_after_it_loads_no_text_encoder_and_encodes_nothing(
    world: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(world, data)

    def forbidden(*args: object) -> Any:
        raise AssertionError("everything was in the cache")

    monkeypatch.setattr(QwenImage, "load_text_encoder", forbidden)
    monkeypatch.setattr(QwenImage, "encode_image", forbidden)
    out = train_run(world, tmp_path / "out", dataset_base_path=data, max_train_steps=1)
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    monkeypatch.setattr(QwenImage, "load_vae", forbidden)
    fill(world, data)


def test_nothing_is_written_besides_the_cache(world: Path, data: Path, tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    fill(world, data)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert {path.name for path in data.iterdir()} - {".lorafuse_cache"} == {
        "metadata.csv",
        *(f"{n}.png" for n in range(4)),
    }


def test_verify_finds_nothing_wrong_with_what_is_right(
    world: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(world, data, "--verify", "--verify_sample", "all")
    total = len(entries(data))
    assert f"verified: {total} of {total} entries computed again" in capsys.readouterr().out
    fill(world, data, "--verify", "--verify_sample", "2")
    assert f"verified: 2 of {total} entries" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_verify_names_what_differs(world: Path, data: Path, kind: str) -> None:
    fill(world, data)
    spoil(entry(data, kind), 1.1)
    fill(world, data)  # whole as it is, nothing else would notice
    with pytest.raises(OutputError) as caught:
        fill(world, data, "--verify", "--verify_sample", "all")
    message = str(caught.value)
    assert "1 of " in message
    assert str(entry(data, kind)) in message
    assert re.search(
        r"latents of .*\d\.png: x0 differs by 0\.09" if kind == "latents" else "embeddings of '.*: ", message
    )
    entry(data, kind).unlink()
    fill(world, data, "--verify", "--verify_sample", "all")


def test_verify_forgives_what_devices_differ_by(world: Path, data: Path) -> None:
    fill(world, data)
    spoil(entry(data, "latents"), 1 + 1e-5)
    fill(world, data, "--verify", "--verify_sample", "all")


def test_verify_notices_swapped_entries(world: Path, data: Path) -> None:
    """The classical fault of caches by position: a caption that belongs to another picture."""
    fill(world, data)
    first, second = (entry(data, "text", index) for index in (0, 1))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(OutputError, match="2 of"):
        fill(world, data, "--verify", "--verify_sample", "all")


@pytest.mark.parametrize(
    ("sample", "total", "expected"), [("16", 10, 10), ("3", 10, 3), ("0.05", 100, 5), (".01", 10, 1), ("all", 7, 7)]
)
def test_how_many_are_verified(sample: str, total: int, expected: int) -> None:
    paths = [Path(f"{number:03d}") for number in range(total)]
    chosen = verify_cache.choose_entries(paths, sample)
    assert len(set(chosen)) == expected
    assert verify_cache.choose_entries(list(reversed(paths)), sample) == chosen


def test_relative_difference() -> None:
    ones = torch.ones(4)
    assert verify_cache.relative_difference(ones, ones) == 0
    assert verify_cache.relative_difference(ones, ones * 1.5) == pytest.approx(0.5)
    assert verify_cache.relative_difference(torch.zeros(4), torch.zeros(4)) == 0
    assert verify_cache.relative_difference(torch.zeros(4), ones) > 1e9
    assert verify_cache.relative_difference(ones, ones * float("nan")) == float("inf")
    assert verify_cache.relative_difference(torch.ones(0), torch.ones(0)) == 0


def test_the_contact_sheet_shows_what_is_trained_on(
    world: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each cell holds what the VAE makes of the sample's own latents, and the legend its own caption."""
    drawn: list[contact_sheet.Cell] = []

    def noting(cells: list[contact_sheet.Cell]) -> Image.Image:
        drawn.extend(cells)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(contact_sheet, "draw_sheet", noting)
    captions = ["a, b\nand c", "\u4e00\u53ea\u7ea2\u8272\u7684\u72d0\u72f8", "caf\u00e9", '"x"']
    lines = [f'{n}.png,"{text.replace(chr(34), chr(34) * 2)}"' for n, text in enumerate(captions)]
    (data / "metadata.csv").write_text("\n".join(["image,prompt", *lines]), encoding="utf-8")
    fill(world, data, "--contact_sheet", tmp_path / "sheet.png")
    legend = (tmp_path / "sheet.txt").read_text(encoding="utf-8").splitlines()
    assert legend[1].split("\t") == ["1", "0.png", "32x32", '"a, b\\nand c"']
    assert legend[2].split("\t")[3] == '"\u4e00\u53ea\u7ea2\u8272\u7684\u72d0\u72f8"'
    recipe = QwenImage()
    vae = recipe.load_vae(world / "fused", torch.device("cpu"))
    for number, cell in enumerate(drawn):
        with Image.open(data / f"{number}.png") as file:
            pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
        expected = recipe.decode(vae, recipe.encode_image(vae, pixels))
        expected_picture = Image.fromarray(
            ((expected.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        ).resize(cell.picture.size, Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(cell.picture), np.asarray(expected_picture))
        assert cell.caption == captions[number]


def test_the_sheet_itself(world: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(world, data, "--contact_sheet", tmp_path / "new" / "sheet.png", "--contact_sheet_pictures", 3)
    assert "3 of 4 samples" in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 2 * contact_sheet.CELL
        values = np.asarray(sheet.convert("L"))
    assert values.std() > 10
    assert len((tmp_path / "new" / "sheet.txt").read_text().splitlines()) == 1 + 3


def test_a_sheet_would_become_part_of_the_dataset(world: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of which it would become a part"):
        fill(world, data, "--contact_sheet", data / "sheet.png")
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        fill(world, data, "--contact_sheet", tmp_path / "sheet.jpg")
    assert not (data / ".lorafuse_cache").exists()


def start(world: Path, data: Path, *more: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lorafuse_train", *arguments(world, data, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )


def many(folder: Path, count: int) -> Path:
    made = tiny.save_dataset(folder, ((32, 32),) * 3)
    rows = ["image,prompt"]
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(made / f"{number}.png")
        rows.append(f"{number}.png,picture {number}")
    (made / "metadata.csv").write_text("\n".join(rows))
    return made


@pytest.mark.slow
def test_two_processes_share_the_work(world: Path, tmp_path: Path) -> None:
    data = many(tmp_path / "data", 40)
    alone = many(tmp_path / "alone", 40)
    processes = [start(world, data, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    fill(world, alone)
    assert entries(data) == entries(alone)
    computed, reused = counts(printed[0])
    others = re.search(r", (\d+) computed by other processes", printed[0])
    assert computed + reused + (int(others[1]) if others else 0) == len(entries(data))
    assert not list((data / ".lorafuse_cache").rglob("*.tmp*"))


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = many(tmp_path / "data", 120)
    process = start(world, data)
    folder, deadline = data / ".lorafuse_cache" / "latents", time.monotonic() + 120
    while len(list(folder.rglob("*.safetensors"))) < 10:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    fill(world, data)
    computed, reused = counts(capsys.readouterr().out)
    assert reused >= len(left) >= 10
    assert computed > 0
    assert all(path.read_bytes() == content for path, content in left.items())
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.get_tensor("x0").shape == (4, 8, 8)


def test_a_full_disk_is_one_line(world: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        fill(world, data)
    assert entries(data) == {}


def test_controls_are_verified_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_edit.save_pipeline(tmp_path / "base")
    data = tiny_edit.save_pairs(tmp_path / "data", [(32, 32), (32, 32)], [[(32, 24)], [(24, 32)]])
    options: list[object] = [
        "cache",
        "--fused_model",
        base,
        "--allow_unfused_base",
        "--dataset_base_path",
        data,
        "--verify",
    ]
    options += ["--max_pixels", 1024, "--verify_sample", "all", "--contact_sheet", tmp_path / "sheet.png"]
    arguments = [str(part) for part in options]
    cli.app(arguments, standalone_mode=False)
    printed = capsys.readouterr().out
    assert "2 of 2 samples" in printed
    assert "verified: " in printed
    assert "32x32, 1 controls" in (tmp_path / "sheet.txt").read_text()
    spoil(entry(data, "controls"), 2)
    with pytest.raises(OutputError, match=r"latents of .*\.png: .* differs"):
        cli.app(arguments, standalone_mode=False)


def test_a_video_is_shown_by_three_of_its_frames(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_wan.save_pipeline(tmp_path / "base", **tiny_wan.KINDS["t2v"])
    data = tiny_wan.save_dataset(tmp_path / "data", (9, 5))
    options: list[object] = [
        "cache",
        "--fused_model",
        base,
        "--allow_unfused_base",
        "--dataset_base_path",
        data,
        "--verify",
    ]
    cells: list[contact_sheet.Cell] = []
    drawing = contact_sheet.draw_sheet

    def noting(found: list[contact_sheet.Cell]) -> Image.Image:
        cells.extend(found)
        return drawing(found)

    monkeypatch.setattr(contact_sheet, "draw_sheet", noting)
    cli.app([str(part) for part in (*options, "--contact_sheet", tmp_path / "sheet.png")], standalone_mode=False)
    assert "verified: " in capsys.readouterr().out
    assert [cell.facts for cell in cells] == ["9 frames of 32x32", "5 frames of 32x32"]
    assert all(cell.picture.width == 3 * cell.picture.height for cell in cells)
