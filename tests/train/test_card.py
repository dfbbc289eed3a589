"""The model card: valid whatever users write, true about the LoRA, and never written over somebody's edits."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from train import tiny, tiny_sd3
from train.runs import run, save_world

import lorafuse_fuse.cli
from lorafuse_common.manifest import read_manifest
from lorafuse_train.lora import markdown
from lorafuse_train.lora.card import CARD, is_ours, marked
from lorafuse_train.lora.fuse_commands import fuse_commands, target_sha256

HOSTILE = "a | \"b\": 'c' `d` ``e`` <script> *f* [g](h) # i ---\n- x: {y} & \\z 日本 🟥"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_world(tmp_path_factory.mktemp("world"))
    table = root / "data" / "metadata.csv"
    table.write_text(table.read_text() + f'5.png,"{HOSTILE.replace(chr(34), chr(34) * 2)}"\n'.replace("5.png", "6.png"))
    Image.new("RGB", (32, 32), "red").save(root / "data" / "6.png")
    return root


@pytest.fixture(scope="module")
def out(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(
        world, tmp_path_factory.mktemp("run") / "out", "--validation_prompt", HOSTILE, "--validation_prompt", "plain",
        lora_name=HOSTILE, trigger_phrase=HOSTILE, max_train_steps=12, validation_prompt=None, export="comfyui",
        validation_negative_prompt=HOSTILE,
    )  # fmt: skip


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, as GitHub splits them: at bars that are not escaped."""
    blocks = re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()] for block in blocks]


def test_the_hub_reads_its_head(out: Path) -> None:
    loaded = ModelCard.load(out / CARD)
    facts = loaded.data.to_dict()
    assert facts["library_name"] == "diffusers"
    assert {"lora", "template:sd-lora", "text-to-image"} <= {*facts["tags"]}
    assert facts["instance_prompt"] == HOSTILE
    assert facts["pipeline_tag"] == "text-to-image"
    assert [entry["text"] for entry in facts["widget"]] == [HOSTILE, "plain"]
    for entry in facts["widget"]:
        with Image.open(out / entry["output"]["url"]) as picture:
            assert picture.size == (32, 32)
    assert "base_model" not in facts  # nobody said where it came from
    assert "<Gallery />" in loaded.text


def test_tables_and_code_stay_whole(out: Path) -> None:
    text = (out / CARD).read_text()
    found = tables(text)
    assert len(found) == 5  # fused, options, loss, health, files
    for table in found:
        assert {len(row) for row in table} == {len(table[0])}
        assert all(set(cell.strip()) == {"-"} for cell in table[1])
    options = {row[0].strip(): row[1].strip() for row in found[1]}
    assert options["`--lora_rank`"] == "`4`"
    assert "`--output_path`" not in options and "`--seed`" not in options
    assert "<script>" not in re.sub(r"(`+).+?\1", "", text.split("\n---\n", 1)[1])
    assert str(out.parent) not in text


def test_it_names_what_was_fused_with_strength_and_hash(out: Path, world: Path) -> None:
    manifest = read_manifest(world / "fused")
    assert manifest
    row = tables((out / CARD).read_text())[0][2]
    assert [cell.strip() for cell in row] == ["`lightning.safetensors`", "1", "deploy", f"`{manifest.loras[0].sha256}`"]


def test_its_code_makes_the_base_and_draws(out: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell lines give the same weights, and the Python lines draw a picture with them."""
    text = (out / CARD).read_text()
    monkeypatch.chdir(world)
    (world / "models").mkdir()
    (world / "models" / "base").symlink_to(world / "base")
    (world / "this-folder").symlink_to(out)
    (line,) = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].strip().splitlines()  # type: ignore[index]
    lorafuse_fuse.cli.app(shlex.split(line)[1:], standalone_mode=False)
    made, meant = read_manifest(world / "models" / "fused"), read_manifest(world / "fused")
    assert made and meant
    assert made.fused_sha256 == meant.fused_sha256
    assert f"`{meant.fused_sha256}`" in text
    assert made.schedule and meant.schedule and made.schedule.sigmas == meant.schedule.sigmas
    scope: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)  # type: ignore[index]
    assert scope["image"].size == (32, 32)


def test_a_longer_lineage_is_told_from_its_start(world: Path, tmp_path: Path) -> None:
    again = ["fuse", str(world / "fused"), "--lora", f"{world / 'lightning.safetensors'}:0.5", "--out"]
    lorafuse_fuse.cli.app([*again, str(tmp_path / "twice")], standalone_mode=False)
    manifest = read_manifest(tmp_path / "twice")
    assert manifest
    assert fuse_commands(manifest) == [
        "lorafuse fuse models/base --lora lightning.safetensors --out models/fused-1",
        "lorafuse fuse models/fused-1 --lora lightning.safetensors:0.5 --schedule 1.0,0.6 --out models/fused",
    ]


def test_a_scaffold_is_left_out(world: Path, tmp_path: Path) -> None:
    lora = str(tiny.save_lightning(tmp_path / "helper.safetensors", seed=2))
    for base, out in (("base", "alone"), ("fused", "on top")):
        arguments = ["fuse", str(world / base), "--lora", lora, "--role", "scaffold", "--out", str(tmp_path / out)]
        lorafuse_fuse.cli.app(arguments, standalone_mode=False)
    text = (run(tmp_path, tmp_path / "out", fused="alone", dataset_base_path=world / "data") / CARD).read_text()
    assert "A LoRA for Qwen-Image, trained" in text
    assert "Leave out `helper.safetensors`, which only helped in training." in text
    assert 'from_pretrained("models/base"' in text
    assert "```bash" not in text
    manifest, fused = read_manifest(tmp_path / "on top"), read_manifest(world / "fused")
    assert manifest and fused
    assert target_sha256(manifest) == fused.fused_sha256
    (command,) = fuse_commands(manifest)
    assert command.startswith("lorafuse fuse models/base --lora lightning.safetensors") and "scaffold" not in command


@pytest.mark.parametrize("made", [tiny, tiny_sd3], ids=["qwen_image", "sd3"])
def test_its_command_makes_comfyuis_file(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SD3's last block is another; which one that is only the model tells."""
    world = save_world(tmp_path, made)
    out = run(world, tmp_path / "out", max_train_steps=1)
    command = re.search(r"make it with `(.*?)`", (out / CARD).read_text())
    assert command
    assert ("--base models/fused" in command[1]) == (made is tiny_sd3)
    (out / "models").mkdir()
    (out / "models" / "fused").symlink_to(world / "fused")
    monkeypatch.chdir(out)
    lorafuse_fuse.cli.app(shlex.split(command[1])[1:], standalone_mode=False)
    assert any(name.startswith("diffusion_model.") for name in load_file("comfyui.safetensors"))


def test_edits_are_left_alone(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(world, tmp_path / "out", max_train_steps=1)
    first = (out / CARD).read_text()
    assert is_ours(out / CARD)
    run(world, out, "--overwrite_output_dir", max_train_steps=2)
    second = (out / CARD).read_text()
    assert second != first
    (out / CARD).write_text(second.replace("# LoRA for", "# My LoRA for"))
    capsys.readouterr()
    run(world, out, "--overwrite_output_dir", max_train_steps=1)
    assert (out / CARD).read_text() == second.replace("# LoRA for", "# My LoRA for")
    assert f"{out / CARD}: was not written by lorafuse, or edited since; left as it is" in capsys.readouterr().out
    (out / CARD).write_bytes(b"\xff")
    assert not is_ours(out / CARD)


def test_the_same_run_gives_the_same_card(world: Path, tmp_path: Path) -> None:
    cards = [(run(world, tmp_path / name, max_train_steps=2) / CARD).read_text() for name in ("a", "b")]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("text", ["plain", "`", "``a`", "a|b", "\\|", "`a", "", "a\nb", "--", "日本"])
def test_inline_code_holds_any_text(text: str) -> None:
    found = markdown.code(text)
    fence = re.match(r"`+", found)
    assert fence
    inner = found[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall(r"`+", inner)
    assert inner.strip() == " ".join(text.split())
    assert "\n" not in found


def test_front_matter_is_read_back() -> None:
    facts = {"a": HOSTILE, "b": [HOSTILE, "---"], "c": {"d": "yes"}, "e": None, "f": ""}
    text = markdown.front_matter(facts)
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n")) == {k: facts[k] for k in "abc"}
    assert marked(text + "\nbody\n").startswith(text[:-1] + "\n<!-- lorafuse")
