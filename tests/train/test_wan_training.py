"""Trainings of tiny Wans from start to end: from text, from first frames, and of each of two experts."""

from __future__ import annotations

import csv
import itertools
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from safetensors.torch import load_file
from train import tiny_wan
from train.runs import run, step_rows

import lorafuse_fuse.cli
from lorafuse_common.errors import CheckpointError, DatasetError
from lorafuse_common.tensorfile import read_header
from lorafuse_train.base import open_base
from lorafuse_train.dataset.order import seed_for
from lorafuse_train.dataset.pictures import to_pixels
from lorafuse_train.dataset.video import read_frames
from lorafuse_train.experts import Expert, both, find_expert, is_above
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.options.options import resolve_config
from lorafuse_train.steps.timesteps import choose_levels

SCHEDULE = "1,0.9375,0.8333,0.625"
"""lightx2v's four steps: on both sides of A14B's boundary."""


def world(root: Path, kind: str, *, schedule: str = SCHEDULE) -> Path:
    """`base`, `fused` with a few-step schedule, and `data` with videos."""
    tiny_wan.save_pipeline(root / "base", **tiny_wan.KINDS[kind])
    lora = str(tiny_wan.save_lightning(root / "lightning.safetensors"))
    parts = ("transformer", "transformer_2") if "boundary" in tiny_wan.KINDS[kind] else ("transformer",)
    loras = [text for part in parts for text in ("--lora", f"{lora}@{part}")]
    arguments = ["fuse", str(root / "base"), *loras, "--schedule", schedule, "--out", str(root / "fused")]
    lorafuse_fuse.cli.app(arguments, standalone_mode=False)
    tiny_wan.save_dataset(root / "data")
    return root


def losses(out: Path) -> list[float]:
    return [float(row["loss"]) for row in step_rows(out)]


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_header(out / FILE_NAME).metadata["lorafuse"])
    return found


def execute(printed: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the code that a training prints for its LoRA; its names."""
    monkeypatch.chdir(folder)
    tiny_wan.frames(1)[0].save("first_frame.png")
    scope: dict[str, Any] = {}
    lines = itertools.takewhile(lambda line: line.startswith("  "), printed.split("use it:\n")[1].splitlines())
    exec(textwrap.dedent("\n".join(lines)), scope)
    return scope


def tiny_run(root: Path, out: str, *more: str, **named: Any) -> Path:
    chosen = {"max_train_steps": 2, "preserve_weight": 0, "objective_base": "fused", **named}
    return run(root, root / out, *more, **chosen)


@pytest.mark.parametrize("kind", ["t2v", "i2v 2.1", "ti2v 5b i2v"])
def test_a_training_from_start_to_end(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = world(tmp_path, kind)
    out = tiny_run(root, "out", max_train_steps=3, validation_prompt=None)
    printed = capsys.readouterr().out
    assert all(loss > 0 for loss in losses(out))
    assert len(load_file(out / FILE_NAME)) == 2 * 20
    assert "3 of 32x32x9" in printed
    assert "1 of 32x32x5" in printed
    assert (out / "samples.png").is_file()
    films = sorted(path.name for path in out.glob("samples-*.mp4"))
    assert films == ["samples-1.mp4", "samples-2.mp4"] if kind == "t2v" else len(films) == 4
    film = [*read_frames(out / "samples-1.mp4", 81)]
    assert len(film) in (5, 9)
    assert film[0].size == (4 * 32, 32)  # two schedules, without the LoRA and with it
    scope = execute(printed, tmp_path, monkeypatch)
    assert len(scope["frames"]) == 9
    assert scope["frames"][0].size == (32, 32)
    steps = [round(float(sigma), 4) for sigma in scope["pipe"].scheduler.sigmas]
    assert steps == [1, 0.9375, 0.8333, 0.625, 0]
    with Image.open(tmp_path / "video.webp") as made:
        assert getattr(made, "n_frames", 1) > 1


@pytest.mark.parametrize("kind", ["t2v a14b", "i2v a14b"])
@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_each_expert_is_trained_on_its_noise_levels(
    tmp_path: Path, kind: str, component: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = world(tmp_path, kind)
    out = tiny_run(root, "out", component=component, validation_inference_steps=4)
    printed = capsys.readouterr().out
    is_high, boundary = component == "transformer", tiny_wan.KINDS[kind]["boundary"]
    noise = "high" if is_high else "low"
    assert f"training {component}, the {noise}-noise expert" in printed
    assert f"from {boundary:g} to 1" if is_high else f"from 0 to {boundary:g}" in printed
    assert f"loading {'transformer_2' if is_high else 'transformer'}, which is not trained" in printed
    assert ("load_into_transformer_2=True" in printed) != is_high
    assert record(out)["component"] == component
    assert record(out)["noise_levels"] == ([boundary, 1.0] if is_high else [0.0, boundary])
    saved = load_file(out / FILE_NAME)
    assert all(name.startswith("transformer.blocks.") for name in saved)
    pipe = execute(printed, tmp_path, monkeypatch)["pipe"]
    loaded, other = pipe.transformer, pipe.transformer_2
    if not is_high:
        loaded, other = other, loaded
    state = loaded.state_dict()
    for name, tensor in saved.items():
        name = name.removeprefix("transformer.").replace(".weight", ".default_0.weight")
        assert torch.equal(state[name], tensor)
    assert not any("lora" in name for name in other.state_dict())


def test_the_trained_expert_is_asked_for_its_own_levels_when_drawing(tmp_path: Path) -> None:
    """A grid's rows without the new LoRA are the fused pipeline's own videos."""
    sigmas = [1.0, 0.9, 0.4]  # the first two are the other expert's
    root = world(tmp_path, "t2v a14b", schedule="1,0.9,0.4")
    out = tiny_run(root, "out", component="transformer_2", validation_prompt="a red star", validation_seed=3)
    pipe = DiffusionPipeline.from_pretrained(root / "fused")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    set_timesteps = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda *_, device=None: set_timesteps(sigmas=sigmas, device=device)
    start = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed_for("sample", 3, 0)))
    call: dict[str, Any] = {
        "height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 1,
        "latents": start[None], "output_type": "pt",
    }  # fmt: skip
    video = pipe("a red star", **call).frames[0]
    shown = [frame.crop((0, 0, 32, 32)) for frame in read_frames(out / "samples-1.mp4", 81)]
    film = torch.stack([to_pixels(frame, (32, 32)) for frame in shown])
    luma = torch.tensor([0.299, 0.587, 0.114])  # a film halves its colours' resolution
    ours, theirs = (torch.einsum("fchw,c->fhw", each, luma) for each in (film, 2 * video - 1))
    alone = WanPipeline.from_pretrained(root / "fused", transformer=pipe.transformer_2, scheduler=pipe.scheduler)
    alone.set_progress_bar_config(disable=True)
    other = torch.einsum("fchw,c->fhw", 2 * alone("a red star", **call).frames[0] - 1, luma)
    assert (ours - theirs).abs().mean() < 0.02
    assert 2 * (ours - theirs).abs().mean() < (other - theirs).abs().mean()


def test_a_boundary_belongs_to_the_high_noise_expert(tmp_path: Path) -> None:
    assert is_above(0.9, 0.9)
    assert is_above(1.0, 0.9)
    assert not is_above(0.8999, 0.9)
    root = world(tmp_path, "i2v a14b", schedule="1,0.9,0.5")
    given = {"fused_model": str(root / "fused"), "dataset_base_path": "x", "output_path": "x"}
    for component, few, limits in (("transformer", (1.0, 0.9), (0.9, 1.0)), ("transformer_2", (0.5,), (0.0, 0.9))):
        config = resolve_config({**given, "component": component, "timestep_sampling": "manifest"})
        levels = choose_levels(config, open_base(config))
        assert levels.few == few
        assert (levels.low, levels.high) == limits
    config = resolve_config({**given, "min_timestep": "950"})
    levels = choose_levels(config, open_base(config))
    assert (levels.low, levels.high) == (0.95, 1.0)


def test_identities_of_two_experts_differ(tmp_path: Path) -> None:
    root = world(tmp_path, "t2v a14b")
    given = {"fused_model": str(root / "fused"), "dataset_base_path": "x", "output_path": "x"}
    high, low = (open_base(resolve_config({**given, **more})) for more in ({}, {"component": "transformer_2"}))
    assert high.fused_sha256 != low.fused_sha256
    assert (high.transformer.name, low.transformer.name) == ("transformer", "transformer_2")
    assert high.expert == Expert("transformer", root / "fused" / "transformer_2", 0.875)


def test_what_has_one_transformer_has_no_experts(tmp_path: Path) -> None:
    tiny_wan.save_pipeline(tmp_path / "base")
    assert find_expert(tmp_path / "base", "transformer") is None
    given = {"fused_model": str(tmp_path / "base"), "dataset_base_path": "x", "output_path": "x"}
    config = resolve_config({**given, "allow_unfused_base": True, "component": "transformer_2"})
    with pytest.raises(CheckpointError, match="no folder 'transformer_2'"):
        open_base(config)


def test_pictures_are_videos_of_one_frame(tmp_path: Path) -> None:
    root = world(tmp_path, "t2v")
    data = root / "pictures"
    data.mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (32, 32), colour).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text(colour)
    out = tiny_run(root, "out", dataset_base_path=data)
    assert all(loss > 0 for loss in losses(out))


def test_image_to_video_takes_other_first_frames_where_they_are_named(tmp_path: Path) -> None:
    root = world(tmp_path, "i2v a14b")
    rows = [*csv.reader((root / "data" / "metadata.csv").open())]
    tiny_wan.frames(1, number=2)[0].save(root / "data" / "start.png")
    with (root / "data" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[*rows[0], "edit_image"], *([*row, "start.png"] for row in rows[1:])])
    other = tiny_run(root, "other")
    plain = tiny_run(root, "plain", data_file_keys="video")
    assert losses(other) != losses(plain)
    Image.new("RGB", (32, 32)).save(root / "data" / "picture.png")
    with (root / "data" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "prompt"], ["picture.png", "a"]])
    with pytest.raises(DatasetError, match="draws nothing without"):
        tiny_run(root, "refused")


def test_a_lora_without_the_image_modules_loads_into_2_1(tmp_path: Path) -> None:
    """diffusers adds zeros for CLIP's keys and values where a text-to-video LoRA has none; nothing is made of them."""
    root = world(tmp_path, "i2v 2.1")
    out = tiny_run(root, "out", lora_target_modules="attn2.to_k,attn2.to_v")
    assert len(load_file(out / FILE_NAME)) == 2 * 4
    out = tiny_run(root, "both", lora_target_modules="attn2.to_k,attn2.add_k_proj,attn2.add_v_proj")
    assert len(load_file(out / FILE_NAME)) == 2 * 6


def test_a_bare_expert_is_trained_beside_its_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed code puts it where it belongs, which `DiffusionPipeline.from_pretrained` would not do."""
    base = tiny_wan.save_pipeline(tmp_path / "base", boundary=0.875)
    lora = tiny_wan.save_lightning(tmp_path / "lightning.safetensors")
    fused = str(tmp_path / "fused")
    arguments = ["fuse", str(base / "transformer_2"), "--lora", str(lora), "--out", fused]
    lorafuse_fuse.cli.app(arguments, standalone_mode=False)
    tiny_wan.save_dataset(tmp_path / "data")
    tiny_run(tmp_path, "out", pretrained_model_name_or_path=base, component="transformer_2")
    pipe = execute(capsys.readouterr().out, tmp_path, monkeypatch)["pipe"]
    name = "blocks.0.attn1.to_q"
    written = load_file(tmp_path / "fused" / "diffusion_pytorch_model.safetensors")[f"{name}.weight"]
    assert torch.equal(pipe.transformer_2.get_submodule(name).base_layer.weight, written)


def test_ti2v_learns_from_first_frames_where_rows_name_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = world(tmp_path, "ti2v 5b")
    rows = [*csv.reader((root / "data" / "metadata.csv").open())]
    tiny_wan.frames(1, number=2)[0].save(root / "data" / "start.png")
    with (root / "data" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[*rows[0], "edit_image"], *([*row, "start.png"] for row in rows[1:])])
    out = tiny_run(root, "out")
    assert all(loss > 0 for loss in losses(out))
    printed = capsys.readouterr().out
    assert "control pictures: 1 for 4" in printed
    scope = execute(printed, tmp_path, monkeypatch)
    assert type(scope["pipe"]).__name__ == "WanImageToVideoPipeline"
    assert len(scope["frames"]) == 9


class Weights:
    """Stands for a model, and notes where it is put."""

    def __init__(self) -> None:
        self.place = "cpu"

    def to(self, device: Any) -> None:
        self.place = str(device)


def test_one_expert_at_a_time_is_on_the_device() -> None:
    trained, frozen, loaded = Weights(), Weights(), 0
    trained.place = "cuda"

    def load() -> Weights:
        nonlocal loaded
        loaded += 1
        return frozen

    expert = Expert("transformer_2", Path("transformer"), 0.9)
    for _ in range(2):
        with both(expert, trained, torch.device("cuda"), load) as model:
            for sigma in (0.5, 1.0, 0.9, 0.89):
                chosen = model.at(sigma)
                assert chosen is (frozen if sigma >= 0.9 else trained)
                assert chosen.place == "cuda"
                assert {trained.place, frozen.place} == {"cuda", "cpu"}
            model.at(1.0)
        assert (trained.place, frozen.place) == ("cuda", "cpu")
    with both(expert, trained, torch.device("cuda"), load) as model:
        model.at(0.1)
    assert loaded == 2, "not loaded where it is not needed"
    with both(None, trained, torch.device("cuda"), load) as model:
        assert model is trained


def test_a_training_on_videos_is_resumed_exactly(tmp_path: Path) -> None:
    root = world(tmp_path, "i2v a14b")
    whole = tiny_run(root, "whole", component="transformer_2", max_train_steps=4)
    tiny_run(root, "parts", component="transformer_2", checkpointing_steps=2)
    named = {"component": "transformer_2", "max_train_steps": 4, "resume_from_checkpoint": "latest"}
    parts = tiny_run(root, "parts", **named)
    written = [
        {name: tensor.numpy().tobytes() for name, tensor in load_file(out / FILE_NAME).items()}
        for out in (whole, parts)
    ]
    assert written[0] == written[1]
