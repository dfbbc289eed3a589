"""What the header of a LoRA says to diffusers, to other programs and to `lorafuse inspect`."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from train import runs, tiny
from train.runs import save_world

from lorafuse_common.errors import ConfigError
from lorafuse_common.manifest import read_manifest, weights_sha256
from lorafuse_fuse.provenance import provenance
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.lora.metadata import NAMES
from lorafuse_train.recipes import RECIPES


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def out(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.run(
        world, tmp_path_factory.mktemp("run") / "out", lora_name="Kreise «rund»", trigger_phrase="circle", lora_alpha=2
    )


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        found: dict[str, str] = opened.metadata()
    return found


def test_it_follows_modelspec(out: Path) -> None:
    found = header(out / FILE_NAME)
    spec = {name.removeprefix("modelspec."): value for name, value in found.items() if name.startswith("modelspec.")}
    raw = (out / FILE_NAME).read_bytes()
    tensors = raw[8 + struct.unpack("<Q", raw[:8])[0] :]
    assert spec.pop("hash_sha256") == f"0x{hashlib.sha256(tensors).hexdigest()}"
    assert spec == {
        "sai_model_spec": "1.0.1",
        "architecture": "qwen-image/lora",
        "implementation": "diffusers",
        "title": "Kreise «rund»",
        "resolution": "32x32",
        "prediction_type": "flow",
        "usage_hint": "For the model with lightning.safetensors at 1 fused; 2 steps, guidance 1.",
        "trigger_phrase": "circle",
    }
    assert found["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest()  # as A1111 and Forge look LoRAs up


def test_kohyas_entries_can_be_read_as_their_readers_do(out: Path) -> None:
    found = header(out / FILE_NAME)
    assert float(found["ss_network_alpha"]) == int(found["ss_network_dim"]) == 4  # alpha 2 is in B
    assert json.loads(found["ss_tag_frequency"]) == {"dataset": {"circle": 6}}
    assert found["ss_output_name"] == "Kreise «rund»"
    assert (found["ss_base_model_version"], found["ss_network_module"]) == ("qwen_image", "networks.lora_qwen_image")
    assert (found["ss_steps"], found["ss_num_train_images"], found["ss_resolution"]) == ("3", "6", "(32, 32)")


def test_our_record_says_what_it_was_made_of(world: Path, out: Path) -> None:
    record, manifest = json.loads(header(out / FILE_NAME)["lorafuse"]), read_manifest(world / "fused")
    assert manifest
    assert record["base"] == {
        "sha256": weights_sha256(manifest.base, "transformer"), "is_original": True, "origin": None,
    }  # fmt: skip
    assert record["role"] == "deploy"
    assert record["dataset"]["pictures"] == 6
    assert record["versions"].keys() >= {"torch", "diffusers", "peft"}
    assert record["config"]["lora_alpha"] == 2
    text = json.dumps(header(out / FILE_NAME))
    assert not any(str(folder) in text for folder in (world, out))
    assert "lora_name" not in record["config"]


def test_captions_are_part_of_the_dataset_and_names_are_not(world: Path, out: Path, tmp_path: Path) -> None:
    data = tiny.save_dataset(tmp_path / "data", ((32, 32), (32, 32), (32, 24), (32, 32), (32, 24), (32, 32)))
    for path in sorted(data.glob("*.png")):
        path.rename(data / f"renamed-{path.name}")
    table = (data / "metadata.csv").read_text()
    (data / "metadata.csv").write_text(table.replace("\n", "\nrenamed-").removesuffix("renamed-"))
    same = runs.run(world, tmp_path / "same", dataset_base_path=data, max_train_steps=1)
    (data / "metadata.csv").write_text((data / "metadata.csv").read_text().replace("a red", "one red", 1))
    other = runs.run(world, tmp_path / "other", dataset_base_path=data, max_train_steps=1)
    hashes = [json.loads(header(o / FILE_NAME)["lorafuse"])["dataset"]["sha256"] for o in (out, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_ranks_that_differ_are_no_rank(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Callable[..., Any]
) -> None:
    out = runs.run(world, tmp_path / "out", lora_target_modules="to_q,to_k", rank_pattern="to_k=2", max_train_steps=1)
    assert header(out / FILE_NAME)["ss_network_dim"] == "Dynamic"
    capsys.readouterr()
    code, stdout, _ = run("inspect", "--json", out / FILE_NAME)
    assert code == 0
    assert json.loads(stdout)["scales"] == {f"{FILE_NAME}'s header key lora_adapter_metadata = 1": 4}


def test_inspect_shows_them(out: Path, world: Path, run: Callable[..., Any]) -> None:
    manifest = read_manifest(world / "fused")
    assert manifest
    code, stdout, _ = run("inspect", out / FILE_NAME)
    assert code == 0
    lines = {line[:16].strip(): line[17:] for line in stdout.splitlines()}
    assert lines["title"] == "Kreise «rund»"
    assert lines["trained on fused"] == manifest.fused_sha256
    assert lines["fused there"] == f"lightning.safetensors x 1.0 (sha256 {manifest.loras[0].sha256})"
    assert lines["few steps"] == "2 at 1.0, 0.6, guidance 1.0"
    assert lines["trained steps"] == "3"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"base": 3, "fused_loras": {"a": 1}, "schedule": []}', '{"fused_loras": [3, null]}']
)
def test_strange_records_are_left_out(text: str) -> None:
    assert provenance({"lorafuse": text, "modelspec.title": "a"}) == {"title": "a"}


def test_every_trainable_family_has_names() -> None:
    assert {recipe.family for recipe in RECIPES} <= NAMES.keys()


def test_a_trigger_phrase_must_be_in_the_captions(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--trigger_phrase 'ohwx': none of the 6 captions has it .the first: 'a red"):
        runs.run(world, tmp_path / "out", trigger_phrase="ohwx")
    with pytest.raises(ConfigError, match="lora_name: is empty"):
        runs.run(world, tmp_path / "out", lora_name=" ")
