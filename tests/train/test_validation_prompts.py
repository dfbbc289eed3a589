"""Validation prompts: every form of file, every fault with its line, and what becomes a column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorafuse_common.errors import ConfigError
from lorafuse_train.dataset.data import Control, Prompt, Sample
from lorafuse_train.dataset.pictures import ControlRule, Geometry
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.recipes.qwen_image import QwenImage
from lorafuse_train.samples.drawn_prompts import choose_shape, plan_prompts, unrelated
from lorafuse_train.samples.prompts import EDITS, MOVING, STILL, measured, preserved, unrelated_prompts
from lorafuse_train.samples.validation_prompts import ValidationPrompt, read_prompts

TEXTS = Geometry(multiple=8, max_pixels=1 << 20, fixed=None)


def config(**options: Any) -> TrainConfig:
    return TrainConfig(fused_model=Path("x"), dataset_base_path=Path("x"), output_path=Path("x"), **options)


def samples(*captions: str, size: tuple[int, int] = (8, 8)) -> list[Sample]:
    return [Sample(Path("x"), caption, "", size) for caption in captions]


FULL = ValidationPrompt("a, b", 7, 64, 32, 20, 2.5, "blurry")
FORMS = {
    "lines.txt": "\ufeffa cat\n\n  a dog  \n",
    "list.json": '["a cat", {"prompt": "a, b", "seed": 7, "height": 64, "width": 32, "steps": 20, '
    '"guidance_scale": 2.5, "negative_prompt": "blurry"}]',
    "list.jsonl": '"a cat"\n\n{"prompt": "a, b", "seed": 7, "height": 64, "width": 32, "steps": 20, '
    '"guidance_scale": 2.5, "negative_prompt": "blurry"}\n',
    "list.yaml": "- a cat\n- prompt: a, b\n  seed: 7\n  height: 64\n  width: 32\n  steps: 20\n  guidance_scale: 2.5\n"
    "  negative_prompt: blurry\n",
    "table.csv": "prompt,seed,height,width,steps,guidance_scale,negative_prompt\na cat,,,,,,\n"
    '"a, b",7,64,32,20,2.5,blurry\n',
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_says_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(FORMS[name], encoding="utf-8")
    second = ValidationPrompt("a dog") if name == "lines.txt" else FULL
    assert read_prompts(path) == (ValidationPrompt("a cat"), second)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_line_ends_where_the_file_says(tmp_path: Path, name: str) -> None:
    text = "one\u2028prompt\x85 of it"
    line = text if name == "p.txt" else json.dumps({"prompt": text}, ensure_ascii=False)
    (tmp_path / name).write_text(f"{line}\r\n{line}\n", encoding="utf-8")
    assert read_prompts(tmp_path / name) == (ValidationPrompt(text),) * 2


def test_pictures_lie_beside_the_file(tmp_path: Path) -> None:
    for name in ("a.png", "b c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    both = (tmp_path / "a.png", tmp_path / "b c.png")
    (tmp_path / "p.yaml").write_text("- {prompt: x, edit_image: [a.png, b c.png]}\n- {prompt: y, edit_image: a.png}\n")
    (tmp_path / "p.csv").write_text('prompt,edit_image\nx,"[""a.png"", ""b c.png""]"\ny,a.png\n')
    for name in ("p.yaml", "p.csv"):
        assert [prompt.controls for prompt in read_prompts(tmp_path / name)] == [both, both[:1]]


def test_all_faults_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "- good\n"
        "- {prompt: '', seed: -1}\n"
        "- {prompt: x, height: 64}\n"
        "- {prompt: x, prmpt: y, steps: 0, guidance_scale: 0.5}\n"
        "- 7\n"
        "- {prompt: x, edit_image: gone.png}\n"
        "- {prompt: x, seed: true, negative_prompt: [a]}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"--validation_prompts {path}: 6 faults:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [f"line {n}" for n in (2, 3, 4, 5, 6, 7)]
    for number, parts in {
        1: ("no prompt", "seed: found -1"),
        2: ("height and width belong together",),
        3: ("unknown prmpt", "steps: found 0", "guidance_scale: found 0.5"),
        4: ("found a int",),
        5: (f"{tmp_path / 'gone.png'}: no such file",),
        6: ("seed: found True", "negative_prompt: found ['a'], expected a text"),
    }.items():
        assert all(part in lines[number] for part in parts), lines[number]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "text\nx\n", "no column 'prompt'; found ['text']"),
        ("p.csv", "prompt,seed\na cat, black,3\n", "line 2: more values than columns"),
        ("p.json", "{}", "expected a list, found a dict"),
        ("p.json", "[", "not JSON"),
        ("p.jsonl", '{"prompt": "x"}\n{', "line 2: not JSON"),
        ("p.yaml", "a: [", "not YAML"),
        ("p.yaml", "a: b", "expected a list"),
        ("p.txt", " \n", "holds no prompt"),
        ("p.doc", "x", "expected a file that ends with .txt"),
        ("p.csv", 'prompt\n"open', "not CSV"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_prompts(tmp_path / name)
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "gone.txt")


def test_columns_of_file_and_options_with_the_datasets_size() -> None:
    drawn = plan_prompts(config(validation_prompt=("mine",)), samples("a", "b", size=(16, 8)), TEXTS)
    assert [(each.prompt, each.negative.caption) for each in drawn] == [(Prompt("mine", (), (1, 16, 8)), " ")]
    captions = [f"caption {number // 2}" for number in range(64)]
    columns = plan_prompts(config(), samples(*captions), TEXTS)
    assert [each.prompt.caption for each in columns] == [f"caption {number}" for number in range(0, 32, 4)]
    mixed = [*samples("a", size=(8, 16)), *samples("b", "c"), *samples("d", size=(16, 8))]
    assert choose_shape(mixed) == (1, 8, 8)


def test_a_file_goes_before_the_options_and_keeps_its_own_sizes(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "height": 24, "width": 40, "negative_prompt": "bad"}\n')
    drawn = plan_prompts(config(validation_prompts=path, validation_prompt=("y",)), samples("a"), TEXTS)
    assert [each.prompt.shape for each in drawn] == [(1, 24, 40), (1, 8, 8)]
    assert [each.negative.caption for each in drawn] == ["bad", " "]
    path.write_text('{"prompt": "x", "height": 20, "width": 40}\n{"prompt": "y", "height": 8, "width": 9}\n')
    with pytest.raises(ConfigError) as caught:
        plan_prompts(config(validation_prompts=path), samples("a"), TEXTS)
    assert "'x': is 40x20; both sides must be multiples of 8" in str(caught.value)
    assert "'y': is 9x8" in str(caught.value)


def test_edit_models_start_from_the_datasets_pictures_where_none_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 8)).save(tmp_path / name)
    rule = ControlRule("EditPipeline", 1, 1, size=lambda picture, target: (picture[0] * 2, target[1]))
    geometry = Geometry(multiple=8, max_pixels=1 << 20, fixed=None, controls=rule)
    shown = Control(tmp_path / "a.png", "hash", (16, 8))
    rows = [Sample(tmp_path / "t.png", "caption", "", (8, 8), controls=(shown,))]
    path = tmp_path / "p.jsonl"
    path.write_text(
        '"as shown"\n{"prompt": "its own", "edit_image": "b.png"}\n{"prompt": "wide", "height": 8, "width": 24}\n'
    )
    same, own, wide = plan_prompts(config(validation_prompts=path), rows, geometry)
    assert same.prompt.controls == (shown,)
    assert (own.prompt.controls[0].path, own.prompt.controls[0].size) == (tmp_path / "b.png", (16, 8))
    assert (wide.prompt.controls[0].path, wide.prompt.controls[0].size) == (tmp_path / "a.png", (16, 24))
    assert wide.negative.controls == wide.prompt.controls
    path.write_text('{"prompt": "two", "edit_image": ["a.png", "b.png"]}\n')
    with pytest.raises(ConfigError, match="has 2 control pictures; a EditPipeline takes 1"):
        plan_prompts(config(validation_prompts=path), rows, geometry)


def test_unrelated_prompts_measured_are_never_practised(tmp_path: Path) -> None:
    for prompts in (STILL, MOVING, EDITS):
        assert len(set(prompts)) == len(prompts) >= 32
        assert set(measured(prompts)) | set(preserved(prompts)) == set(prompts)
        assert not set(measured(prompts)) & set(preserved(prompts))
    assert len(STILL) == 64
    assert len(measured(STILL)) == 8
    assert unrelated_prompts("wan", None) == MOVING
    assert unrelated_prompts("qwen_image", None, edits=True) == EDITS
    path = tmp_path / "p.txt"
    path.write_text("a\nb\na\n\n", encoding="utf-8")
    assert unrelated_prompts("qwen_image", path) == ("a", "b")
    assert (measured(("a", "b")), preserved(("a", "b"))) == (("b",), ("a",))
    path.write_text("a\na\n")
    with pytest.raises(ConfigError, match="holds 1 prompts; expected at least 2"):
        unrelated_prompts("qwen_image", path)
    chosen = unrelated(config(), QwenImage(), samples("a"))
    assert chosen == tuple(Prompt(text) for text in measured(STILL))
