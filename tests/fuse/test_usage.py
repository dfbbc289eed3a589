"""Role and few-step schedule: what is recorded of them, what is said, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_factors, save_model, write_lora
from fuse.test_convert_readers import tiny_flux
from safetensors import safe_open
from train import tiny_z_image

from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_common.dialects.diffusers import DIFFUSERS
from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.manifest import MANIFEST_NAME, Manifest, Origin, Role, read_manifest
from lorafuse_fuse.commands import fuse_command
from lorafuse_fuse.usage import choose_usage

Run = Callable[..., tuple[int, str, str]]
FOUR = (1.0, 0.9, 0.75, 0.5)
LIGHTNING_NAME = "Qwen-Image-Lightning-4steps-V1.0.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base")


def lora(path: Path, seed: int = 1, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    return write_lora(path, make_factors(seed=seed), LIGHTNING, 2.0, metadata)


def fused(run: Run, base: Path, out: Path, *args: object) -> tuple[Manifest, str]:
    code, _, err = run("fuse", base, "--out", out, *args)
    assert code == 0, err
    manifest = read_manifest(out)
    assert manifest
    return manifest, err


def refusal(run: Run, base: Path, out: Path, *args: object) -> str:
    code, _, err = run("fuse", base, "--out", out, *args)
    assert code == 1, err
    assert not out.exists()
    return err


def levels(manifest: Manifest) -> tuple[float, ...]:
    assert manifest.schedule
    return tuple(round(sigma, 12) for sigma in manifest.schedule.sigmas)


def test_a_known_lora_is_recognised_and_said(run: Run, base: Path, tmp_path: Path) -> None:
    known = lora(tmp_path / LIGHTNING_NAME)
    manifest, err = fused(run, base, tmp_path / "out", "--lora", known)
    assert levels(manifest) == FOUR
    assert manifest.schedule
    assert (manifest.role, manifest.schedule.guidance_scale, manifest.schedule.steps) == (Role.DEPLOY, 1.0, 4)
    assert manifest.schedule.scheduler
    assert manifest.schedule.scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert f"{LIGHTNING_NAME} is Qwen-Image-Lightning, by its file name: 4 steps at 1, 0.9, 0.75, 0.5" in err
    assert "--schedule" in err
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        recipe = json.loads(file.metadata()["lorafuse"])
    assert recipe["role"] == "deploy"
    assert recipe["schedule"]["sigmas"] == list(manifest.schedule.sigmas)
    assert run("fuse", base, "--out", tmp_path / "out", "--lora", known)[0] == 0


@pytest.mark.parametrize(("asked", "wanted"), [("none", None), ("1,0.6", (1.0, 0.6))])
def test_what_is_asked_for_wins(
    run: Run, base: Path, tmp_path: Path, asked: str, wanted: tuple[float, ...] | None
) -> None:
    known = lora(tmp_path / LIGHTNING_NAME)
    manifest, err = fused(run, base, tmp_path / "out", "--lora", known, "--schedule", asked)
    assert (manifest.schedule.sigmas if manifest.schedule else None) == wanted
    assert "is Qwen-Image-Lightning" not in err


def test_recognised_by_the_header_and_by_the_folder(run: Run, base: Path, tmp_path: Path) -> None:
    titled = lora(tmp_path / "mine.safetensors", metadata={"modelspec.title": "Qwen-Image-Lightning 8 steps"})
    manifest, err = fused(run, base, tmp_path / "a", "--lora", titled)
    assert len(levels(manifest)) == 8
    assert "by its header's modelspec.title" in err
    common = lora(tmp_path / "Qwen-Image-Lightning-4steps" / "pytorch_lora_weights.safetensors")
    manifest, err = fused(run, base, tmp_path / "b", "--lora", common)
    assert levels(manifest) == FOUR
    assert "by the name of its folder" in err
    other = lora(tmp_path / "Qwen-Image-Lightning-4steps" / "style.safetensors")
    assert fused(run, base, tmp_path / "c", "--lora", other)[0].schedule is None


def test_what_only_looks_few_step_is_said_and_not_recorded(run: Run, base: Path, tmp_path: Path) -> None:
    manifest, err = fused(run, base, tmp_path / "out", "--lora", lora(tmp_path / "my-lightning-v3.safetensors"))
    assert manifest.schedule is None
    assert "its file name has 'lightning' in it, but it is no few-step LoRA that is known here" in err
    _, err = fused(run, base, tmp_path / "plain", "--lora", lora(tmp_path / "style.safetensors"))
    assert "few-step" not in err


def test_names_that_contradict_each_other(run: Run, base: Path, tmp_path: Path) -> None:
    both = lora(tmp_path / LIGHTNING_NAME, metadata={"modelspec.title": "Qwen-Image-Lightning-8steps"})
    manifest, err = fused(run, base, tmp_path / "out", "--lora", both)
    assert manifest.schedule is None
    assert "4 steps (its file name) and Qwen-Image-Lightning, 8 steps (its header's modelspec.title)" in err


def test_loras_that_want_different_schedules(run: Run, base: Path, tmp_path: Path) -> None:
    four, eight = lora(tmp_path / LIGHTNING_NAME), lora(tmp_path / "Qwen-Image-Lightning-8steps-V2.0.safetensors", 2)
    err = refusal(run, base, tmp_path / "out", "--lora", four, "--lora", eight)
    assert "the LoRAs want different few-step schedules" in err
    assert "choose with --schedule" in err


def test_a_lora_at_an_unusual_strength(run: Run, base: Path, tmp_path: Path) -> None:
    _, err = fused(run, base, tmp_path / "out", "--lora", f"{lora(tmp_path / LIGHTNING_NAME)}:0.7")
    assert "is made for strength 1, and is fused at 0.7" in err


def test_the_parents_schedule_is_inherited_until_its_lora_is_taken_out(run: Run, base: Path, tmp_path: Path) -> None:
    known, style = lora(tmp_path / LIGHTNING_NAME), lora(tmp_path / "style.safetensors", 2)
    fused(run, base, tmp_path / "one", "--lora", known)
    assert levels(fused(run, tmp_path / "one", tmp_path / "two", "--lora", style)[0]) == FOUR
    manifest, err = fused(run, tmp_path / "two", tmp_path / "three", "--lora", f"{known}:-1")
    assert manifest.schedule is None
    assert "is taken out of the base (negative strength)" in err


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@pytest.mark.parametrize(
    ("value", "steps", "wanted", "guidance"),
    [
        ({"sigmas": [1, 0.5], "guidance_scale": 2}, "", (1.0, 0.5), 2.0),
        ({"steps": 4, "scheduler": SCHEDULER}, "", FOUR, 1.0),
        (SCHEDULER, ":4", FOUR, 1.0),
        ({"sigmas": [0.9], "scheduler": {"anything": [1]}}, ":1", (0.9,), 1.0),
    ],
)
def test_a_file(
    run: Run, base: Path, tmp_path: Path, value: Any, steps: str, wanted: tuple[float, ...], guidance: float
) -> None:
    path = write(tmp_path / "few.json", value)
    style = lora(tmp_path / "style.safetensors")
    manifest, _ = fused(run, base, tmp_path / "out", "--lora", style, "--schedule", f"{path}{steps}")
    assert levels(manifest) == wanted
    assert manifest.schedule
    assert (manifest.schedule.guidance_scale, manifest.schedule.source) == (guidance, f"--schedule few.json{steps}")
    code, _, err = run("fuse", base, "--out", tmp_path / "out", "--lora", style, "--schedule", f"{path}{steps}")
    assert (code, "is up to date" in err) == (0, True)


@pytest.mark.parametrize(
    ("value", "steps", "message"),
    [
        (SCHEDULER, "", "says nothing of the number of steps"),
        ({"steps": 4}, "", "has steps but neither sigmas nor scheduler"),
        ({"steps": 0, "scheduler": SCHEDULER}, "", "says nothing of the number of steps, or no sensible one"),
        ({"steps": True, "scheduler": SCHEDULER}, "", "no sensible one"),
        ({"sigmas": [1, 0.5]}, ":3", "it has 2 noise levels, not 3"),
        ({"sigmas": [0.5, 1]}, "", "is no schedule"),
        ({"sigmas": "1"}, "", "sigmas is no list"),
        ({"sigmas": [1], "guidance_scale": "x"}, "", "guidance_scale is 'x'"),
        ({"sigmas": [1], "scheduler": 3}, "", "scheduler is no JSON object"),
        ({"levels": [1]}, "", "unknown entries ['levels']"),
        ([1, 0.5], "", "expected a JSON object, found list"),
        ({**SCHEDULER, "use_dynamic_shifting": True}, ":4", "depend on the size of the picture"),
        ({"_class_name": "UniPCMultistepScheduler"}, ":4", "the noise levels of a UniPCMultistepScheduler"),
    ],
)
def test_files_that_are_no_schedule(run: Run, base: Path, tmp_path: Path, value: Any, steps: str, message: str) -> None:
    path = write(tmp_path / "few.json", value)
    style = lora(tmp_path / "style.safetensors")
    assert message in refusal(run, base, tmp_path / "out", "--lora", style, "--schedule", f"{path}{steps}")
    assert "no such file" in refusal(run, base, tmp_path / "out", "--lora", style, "--schedule", tmp_path / "no.json")


def test_numbers_that_json_does_not_have(run: Run, base: Path, tmp_path: Path) -> None:
    (tmp_path / "few.json").write_text('{"sigmas": [1, NaN]}')
    style = lora(tmp_path / "style.safetensors")
    err = refusal(run, base, tmp_path / "out", "--lora", style, "--schedule", tmp_path / "few.json")
    assert "NaN is no JSON number" in err


@pytest.mark.parametrize("guidance", ["NaN", "1e999", '"x"'])
def test_a_header_whose_guidance_is_no_number(run: Run, base: Path, tmp_path: Path, guidance: str) -> None:
    stated = {"few_step_schedule": f'{{"sigmas": [1, 0.5], "guidance_scale": {guidance}}}'}
    path = lora(tmp_path / "style.safetensors", metadata=stated)
    assert "error: style.safetensors: " in refusal(run, base, tmp_path / "out", "--lora", path)
    manifest, _ = fused(run, base, tmp_path / "none", "--lora", path, "--schedule", "none")
    assert manifest.schedule is None


def test_a_scaffold_is_asked_for(run: Run, base: Path, tmp_path: Path) -> None:
    """A few-step LoRA that is a scaffold says nothing of how the original is sampled."""
    known = lora(tmp_path / LIGHTNING_NAME)
    manifest, err = fused(run, base, tmp_path / "out", "--lora", known, "--role", "scaffold")
    assert (manifest.role, manifest.schedule) == (Role.SCAFFOLD, None)
    assert "its schedule is not recorded: it is a scaffold" in err
    assert "role scaffold: a LoRA trained on it is for the model that the LoRAs were fused into" in err
    code, _, err = run("fuse", base, "--out", tmp_path / "out", "--lora", known)
    assert (code, "what differs: role" in err) == (1, True)


def test_a_scaffold_keeps_the_schedule_of_its_base(run: Run, base: Path, tmp_path: Path) -> None:
    fused(run, base, tmp_path / "one", "--lora", lora(tmp_path / LIGHTNING_NAME))
    style = lora(tmp_path / "style.safetensors", 2)
    manifest, _ = fused(run, tmp_path / "one", tmp_path / "two", "--lora", style, "--role", "scaffold")
    assert levels(manifest) == FOUR
    assert [(role, [its.name for its in loras]) for role, loras in manifest.lineage] == [
        (Role.SCAFFOLD, ["style.safetensors"]),
        (Role.DEPLOY, [LIGHTNING_NAME]),
    ]


def test_a_header_that_says_scaffold(run: Run, base: Path, tmp_path: Path) -> None:
    adapter = lora(tmp_path / "adapter.safetensors", metadata={"lorafuse.role": "scaffold"})
    manifest, err = fused(run, base, tmp_path / "out", "--lora", adapter)
    assert manifest.role is Role.SCAFFOLD
    assert "role scaffold: the header of adapter.safetensors says so" in err
    style = lora(tmp_path / "style.safetensors", 2)
    err = refusal(run, base, tmp_path / "both", "--lora", adapter, "--lora", style)
    assert "adapter.safetensors is for training only" in err
    assert "style.safetensors is not" in err
    manifest, err = fused(run, base, tmp_path / "deploy", "--lora", adapter, "--lora", style, "--role", "deploy")
    assert manifest.role is Role.DEPLOY
    assert "is to stay at inference (--role deploy)" in err


def test_what_made_it_few_step_is_recorded(run: Run, base: Path, tmp_path: Path) -> None:
    """Of several LoRAs those that are known, state a schedule or look like it; alone any; and through a chain."""
    known, fast = lora(tmp_path / LIGHTNING_NAME), lora(tmp_path / "my-lightning.safetensors", 2)
    style, plain = lora(tmp_path / "style.safetensors", 3), lora(tmp_path / "plain.safetensors", 4)
    stated = lora(tmp_path / "s.safetensors", 5, {"few_step_schedule": json.dumps({"sigmas": FOUR})})
    levels = ("--schedule", "1,0.9,0.75,0.5")
    for number, (files, more, names) in enumerate([
        ((known, style), (), [known]), ((style, fast), levels, [fast]), ((stated, style), (), [stated]),
        ((known, stated), (), [known, stated]), ((plain,), levels, [plain]), ((plain, style), levels, []),
        ((fast,), (*levels, "--role", "scaffold"), []),
    ]):  # fmt: skip
        given = [part for file in files for part in ("--lora", file)]
        manifest, _ = fused(run, base, tmp_path / f"out-{number}", *given, *more)
        assert manifest.schedule
        assert manifest.schedule.loras == tuple(path.name for path in names), number
    for number, more in enumerate([(), levels]):
        manifest, _ = fused(run, tmp_path / "out-4", tmp_path / f"chain-{number}", "--lora", style, *more)
        assert manifest.schedule
        assert manifest.schedule.loras == ("plain.safetensors",)


def test_manifests_of_the_last_schema_are_read(run: Run, base: Path, tmp_path: Path) -> None:
    """What they did not know has the meaning that it had then."""
    fused(run, base, tmp_path / "one", "--lora", lora(tmp_path / "style.safetensors"))
    raw = json.loads((tmp_path / "one" / MANIFEST_NAME).read_text())
    del raw["role"], raw["loras"][0]["file"]
    (tmp_path / "one" / MANIFEST_NAME).write_text(json.dumps(raw | {"schema": 2}))
    manifest = read_manifest(tmp_path / "one")
    assert manifest
    assert (manifest.schema, manifest.role, manifest.loras[0].file) == (2, Role.DEPLOY, None)
    two, _ = fused(run, tmp_path / "one", tmp_path / "two", "--lora", lora(tmp_path / "other.safetensors", 2))
    assert two.parent
    assert (two.schema, two.parent.role, two.parent.loras[0].file) == (3, Role.DEPLOY, None)
    for name, value in (("role", "x"), ("role", None), ("schedule", {"sigmas": [1], "guidance_scale": 1, "source": 1})):
        (tmp_path / "one" / MANIFEST_NAME).write_text(json.dumps(raw | {name: value}))
        code, _, err = run("inspect", tmp_path / "one")
        assert (code, "broken" in err) == (1, True)


FAMILIES = [("FLUX.1-schnell", 4), ("FLUX.1-schnell-dedistilled", 0), ("other", 0)]


@pytest.mark.parametrize(("name", "steps"), FAMILIES)
def test_a_few_step_base(run: Run, tmp_path: Path, name: str, steps: int) -> None:
    tiny_flux().save_pretrained(tmp_path / name)
    factors = {"transformer_blocks.0.attn.to_q": (torch.randn(2, 16), torch.randn(16, 2))}
    style = write_lora(tmp_path / "style.safetensors", factors, DIFFUSERS)
    manifest, err = fused(run, tmp_path / name, tmp_path / "out", "--lora", style)
    assert (manifest.schedule.steps if manifest.schedule else 0) == steps
    assert ("is FLUX.1-schnell, by the name of the base" in err) == bool(steps)


def test_what_a_base_is_called(tmp_path: Path) -> None:
    """By its name on the hub, whose cache calls it by its commit; and names that contradict each other are said."""
    folder = tmp_path / ("0" * 40)
    tiny_flux().save_pretrained(folder)
    base = replace(open_checkpoint(folder, None), origin=Origin("black-forest-labs/FLUX.1-schnell", "0" * 40, ""))
    usage = choose_usage(None, "auto", (), base)
    assert usage.schedule
    assert usage.schedule.source == "black-forest-labs/FLUX.1-schnell (FLUX.1-schnell)"
    assert "0000" not in usage.remarks[0]
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": "Tongyi-MAI/Z-Image-Turbo"}
    (folder / "config.json").write_text(json.dumps(config))
    usage = choose_usage(None, "auto", (), replace(base, family=None))
    assert usage.schedule is None
    assert "FLUX.1-schnell, 4 steps (its name on the hub) and Z-Image-Turbo, 8 steps (its config" in usage.remarks[0]


def test_a_known_adapter_on_a_known_base(run: Run, tmp_path: Path) -> None:
    """ostris' adapter for Z-Image-Turbo: a scaffold, and the schedule is that of Turbo."""
    tiny_z_image.pipeline().transformer.save_pretrained(tmp_path / "Z-Image-Turbo")
    name = "layers.0.attention.to_q"
    factors = {name: (torch.randn(2, 32), torch.randn(32, 2))}
    adapter = write_lora(tmp_path / "zimage_turbo_training_adapter_v2.safetensors", factors, DIFFUSERS)
    manifest, err = fused(run, tmp_path / "Z-Image-Turbo", tmp_path / "out", "--lora", adapter)
    assert manifest.role is Role.SCAFFOLD
    assert levels(manifest) == pytest.approx([3 * u / (1 + 2 * u) for u in (1 - k / 8 for k in range(8))])
    assert "is ostris' training adapter for Z-Image-Turbo, by its file name; it is dropped at inference" in err
    assert "Z-Image-Turbo is Z-Image-Turbo, by the name of the base: 8 steps" in err
    manifest, err = fused(run, tmp_path / "Z-Image-Turbo", tmp_path / "kept", "--lora", adapter, "--role", "deploy")
    assert (manifest.role, manifest.schedule) == (Role.DEPLOY, None)
    assert "the result needs many steps" in err
    assert "--role deploy" in fuse_command(manifest)  # without it, it would be a scaffold again
