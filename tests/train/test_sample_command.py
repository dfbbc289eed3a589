"""`lorafuse-train sample` against diffusers' own pipeline with the same LoRAs, noise and noise levels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from train import tiny
from train.runs import run, save_world

from lorafuse_common.errors import ConfigError, OutputError
from lorafuse_common.tensorfile import read_header
from lorafuse_train import cli
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.samples.sample_options import WantedLora, parse_lora, resolve_sample


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def lora(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(world, tmp_path_factory.mktemp("run") / "out") / FILE_NAME


def draw(world: Path, out: Path, *more: object, fused: str = "fused", size: int | None = 32) -> Path:
    sides = ["--height", size, "--width", size] if size else []
    arguments = ["sample", "--fused_model", world / fused, "--output_path", out, *sides, *more]
    cli.app([*map(str, arguments)], standalone_mode=False)
    return out


def pixels(path: Path) -> Any:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def facts(path: Path) -> Any:
    with Image.open(path) as picture:
        return json.loads(picture.text["lorafuse"])  # type: ignore[attr-defined]


def reference(world: Path, prompt: str, seed: int, *loras: tuple[Path, float], **call: Any) -> Any:
    """The picture by diffusers alone, in few steps unless `call` says otherwise."""
    pipe = DiffusionPipeline.from_pretrained(world / "fused")
    pipe.set_progress_bar_config(disable=True)
    for number, (path, _) in enumerate(loras):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=str(number))
    if loras:
        pipe.set_adapters([str(number) for number in range(len(loras))], [strength for _, strength in loras])
    if not call:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        call = {"num_inference_steps": 2, "sigmas": [1.0, 0.6], "true_cfg_scale": 1}
    picture = pipe(prompt, height=32, width=32, generator=torch.Generator().manual_seed(seed), **call).images[0]
    return np.asarray(picture).astype(int)


def test_pictures_equal_the_pipelines(world: Path, lora: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.safetensors"
    tiny.save_lightning(second, seed=3)
    out = draw(
        world, tmp_path / "out", "--lora", f"{lora}:0.5", "--lora", f"{second}:-0.25", "--prompt", "a red circle",
        "--prompt", "a blue star", "--seed", 7,
    )  # fmt: skip
    names = sorted(path.name for path in out.iterdir())
    assert names == ["01-base.png", "01-lora.png", "02-base.png", "02-lora.png", "grid.png"]
    loras = ((lora, 0.5), (second, -0.25))
    for number, prompt in enumerate(("a red circle", "a blue star"), 1):
        bare, both = (pixels(out / f"0{number}-{kind}.png") for kind in ("base", "lora"))
        assert abs(bare - reference(world, prompt, 7)).max() <= 1
        assert abs(both - reference(world, prompt, 7, *loras)).max() <= 1
        assert abs(both - bare).max() > 3
    said = facts(out / "02-lora.png")
    assert (said["prompt"], said["seed"], said["size"]) == ("a blue star", 7, [32, 32])
    assert (said["sigmas"], said["guidance_scale"]) == ([1.0, 0.6], 1)
    assert [(item["name"], item["strength"]) for item in said["loras"]] == [(FILE_NAME, 0.5), (second.name, -0.25)]
    assert facts(out / "02-base.png")["loras"] == []
    assert str(tmp_path) not in json.dumps(said)


def test_steps_and_guidance_as_the_pipeline_has_them(world: Path, tmp_path: Path) -> None:
    out = draw(
        world, tmp_path / "out", "--prompt", "a red circle", "--steps", 3, "--guidance_scale", 2,
        "--negative_prompt", "blue",
    )  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == ["01-base.png", "grid.png"]
    call = {"num_inference_steps": 3, "true_cfg_scale": 2.0, "negative_prompt": "blue"}
    assert abs(pixels(out / "01-base.png") - reference(world, "a red circle", 0, **call)).max() <= 1
    assert facts(out / "01-base.png")["guidance_scale"] == 2
    draw(world, out, "--prompt", "a red circle", "--steps", 3)
    assert facts(out / "01-base.png")["guidance_scale"] == 4  # the family's
    draw(world, out, "--prompt", "a red circle", "--steps", 2)
    assert facts(out / "01-base.png")["sigmas"] == [1.0, 0.6]


def test_prompts_from_a_file_and_the_size_a_lora_was_trained_at(world: Path, lora: Path, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("- {prompt: a red circle, seed: 3}\n- {prompt: b, height: 16, width: 40}\n")
    out = draw(world, tmp_path / "out", "--prompts_file", tmp_path / "p.yaml", "--lora", lora, size=None)
    assert pixels(out / "01-base.png").shape == (32, 32, 3)
    assert pixels(out / "02-base.png").shape == (16, 40, 3)
    assert abs(pixels(out / "01-base.png") - reference(world, "a red circle", 3)).max() <= 1


def test_any_spelling_is_read(world: Path, lora: Path, tmp_path: Path) -> None:
    kohya = {}
    for name, tensor in load_file(lora).items():
        module, _, factor = name.removeprefix("transformer.").partition(".lora_")
        stem = f"lora_unet_{module.replace('.', '_')}"
        kohya[f"{stem}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = tensor
        kohya[f"{stem}.alpha"] = torch.tensor(4.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    arguments = ("--prompt", "a red circle")
    one = draw(world, tmp_path / "one", "--lora", lora, *arguments)
    two = draw(world, tmp_path / "two", "--lora", tmp_path / "kohya.safetensors", *arguments)
    assert abs(pixels(one / "01-lora.png") - pixels(two / "01-lora.png")).max() <= 1


def test_a_lora_of_another_base_is_refused_unless_allowed(world: Path, lora: Path, tmp_path: Path) -> None:
    metadata = read_header(lora).metadata
    record = json.loads(metadata["lorafuse"])
    record |= {"fused_sha256": "0" * 64, "fused_loras": [{"name": "turbo.safetensors", "strength": 1.0}]}
    save_file(load_file(lora), tmp_path / "other.safetensors", {**metadata, "lorafuse": json.dumps(record)})
    arguments = ("--lora", tmp_path / "other.safetensors", "--prompt", "x")
    with pytest.raises(ConfigError) as caught:
        draw(world, tmp_path / "out", *arguments)
    for part in ("other.safetensors", "turbo.safetensors x 1", str(world / "fused"), "lightning.safetensors x 1"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()
    draw(world, tmp_path / "out", *arguments, "--allow-base-mismatch")


def test_all_that_is_wrong_is_said_before_anything_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafuse_train.samples.sample_command.load_transformer", None)
    with pytest.raises(ConfigError) as caught:
        resolve_sample({"seed": "-1", "height": "64"})
    for part in ("--seed: found -1", "--fused_model is missing", "--output_path is missing", "nothing to draw",
                 "--height, --width: give both"):  # fmt: skip
        assert part in str(caught.value)
    save_file({"lora_unet_nothing.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "no.safetensors")
    with pytest.raises(ConfigError) as caught:
        files = ("--lora", tmp_path / "gone", "--lora", tmp_path / "no.safetensors")
        draw(world, tmp_path / "out", "--prompt", "x", *files)
    assert f"no file {tmp_path / 'gone'}" in str(caught.value)
    assert f"--lora {tmp_path / 'no.safetensors'}: cannot be loaded" in str(caught.value)
    with pytest.raises(ConfigError, match="is 30x30; both sides must be multiples of 8"):
        draw(world, tmp_path / "out", "--prompt", "x", size=30)
    with pytest.raises(ConfigError, match="this family draws pictures"):
        draw(world, tmp_path / "out", "--prompt", "x", "--num_frames", 5)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        draw(world, tmp_path / "file", "--prompt", "x")
    assert not (tmp_path / "out").exists()


def test_what_follows_a_path(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b:c.safetensors", "d@e"):
        (tmp_path / name).write_text("")
    path = tmp_path / "a.safetensors"
    assert parse_lora(str(path)) == WantedLora(path)
    assert parse_lora(f"{path}:0.5") == WantedLora(path, 0.5)
    assert parse_lora(f"{path}:0.5@transformer_2") == WantedLora(path, 0.5, "transformer_2")
    assert parse_lora(f"{path}@transformer_2") == WantedLora(path, 1.0, "transformer_2")
    assert parse_lora(str(tmp_path / "d@e")) == WantedLora(tmp_path / "d@e")
    assert parse_lora(f"{tmp_path / 'b:c.safetensors'}:2") == WantedLora(tmp_path / "b:c.safetensors", 2.0)
    for text, message in ((f"{path}:x", "'x' is no strength"), (f"{path}:1e9", "out of range"), ("gone", "no file")):
        with pytest.raises(ConfigError, match=message):
            parse_lora(text)


def test_help_explains_every_option() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from lorafuse_train.cli import app; app()", "sample", "--help"],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path), "COLUMNS": "200"},
    )  # fmt: skip
    for option in ("--lora", "--prompt", "--prompts_file", "--allow_base_mismatch", "--steps", "--edit_image"):
        assert option in run.stdout
