"""Pushing to the hub, against a small one on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from train.runs import run, save_world
from train.upload_hub import TOKEN, UploadHub, serving

from lorafuse_common.errors import ConfigError, HubError
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.lora.push import check_hub, push


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def config(out: Path, **options: Any) -> Any:
    from lorafuse_train.options.options import resolve_config

    asked = {"push_to_hub": "yes", "hub_model_id": "somebody/lora", **options}
    return resolve_config({"fused_model": "x", "dataset_base_path": "x", "output_path": out, **asked})


def test_what_belongs_to_the_lora_is_pushed_and_nothing_else(
    world: Path, tmp_path: Path, hub: UploadHub, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(
        world, tmp_path / "out", "--push_to_hub", "--hub_private", hub_model_id="somebody/my-lora", max_train_steps=1,
        export="peft", checkpointing_steps=1,
    )  # fmt: skip
    pushed = hub.repos["somebody/my-lora"]
    assert sorted(pushed) == [
        "README.md", "health.png", "images/0.png", "peft/adapter_config.json", "peft/adapter_model.safetensors",
        FILE_NAME, "samples.png",
    ]  # fmt: skip
    for name, content in pushed.items():
        assert (out / name).read_bytes() == content
    assert hub.private == {"somebody/my-lora"}
    assert 'pipe.load_lora_weights("somebody/my-lora"' in pushed["README.md"].decode()
    assert "pushed 7 files to" in capsys.readouterr().out


def test_a_push_that_fails_loses_nothing(world: Path, tmp_path: Path, hub: UploadHub) -> None:
    hub.forbidden = "/commit/"
    with pytest.raises(HubError) as caught:
        run(world, tmp_path / "out", "--push_to_hub", hub_model_id="somebody/my-lora", max_train_steps=1)
    for part in (
        "somebody/my-lora was not updated",
        "(403)",
        "hf upload somebody/my-lora",
        "Everything is complete in",
    ):
        assert part in str(caught.value)
    assert {FILE_NAME, "README.md", "samples.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    hub.forbidden = None
    push(config(tmp_path / "out", hub_model_id="my-lora"), [FILE_NAME])
    assert [*hub.repos["somebody/my-lora"]] == [FILE_NAME]


def test_what_cannot_be_pushed_is_said_before_the_training(
    world: Path, tmp_path: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_hub(config(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    with pytest.raises(ConfigError, match=r"refuses your token .401"):
        run(world, tmp_path / "out", "--push_to_hub", hub_model_id="a/b")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="there is no token; set HF_TOKEN"):
        check_hub(config(tmp_path))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="cannot be reached"):
        check_hub(config(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE=1 forbids it"):
        check_hub(config(tmp_path))
    assert not (tmp_path / "out").exists()


def test_contradictions(tmp_path: Path) -> None:
    faults: dict[str, dict[str, Any]] = {
        "hub_model_id, push_to_hub: say where to": {"hub_model_id": None},
        "hub_model_id, push_to_hub: is for --push_to_hub": {"push_to_hub": None},
        "hub_private, push_to_hub: is for --push_to_hub": {"push_to_hub": "no", "hub_private": "yes"},
        "hub_model_id: found 'a/b/c', expected owner/name": {"hub_model_id": "a/b/c"},
    }
    for message, options in faults.items():
        with pytest.raises(ConfigError) as caught:
            config(tmp_path, **options)
        assert message in str(caught.value)
