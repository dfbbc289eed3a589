"""The shipped demo: loads offline, fuses as diffusers does, and shows its point."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from diffusers import DiffusionPipeline
from safetensors import safe_open

from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_fuse.choices import LoraRequest
from lorafuse_fuse.fuse import FuseOptions, fuse, require_clean
from lorafuse_fuse.plan import plan_fuse
from lorafuse_fuse.usage import choose_usage

DEMO = ROOT / "examples" / "shapes"
BASE, LIGHTNING, NIGHT = DEMO / "base", DEMO / "lightning.safetensors", DEMO / "night.safetensors"
PROMPTS = ["a red star on a white background", "a blue heart on a sand background", "a green ring on a gray background"]

Make = Callable[[dict[Path, float]], Path]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def make(loras: dict[Path, float]) -> Path:
        out = tmp_path_factory.mktemp("demo") / "fused"
        plan = plan_fuse(open_checkpoint(BASE), [LoraRequest(path, strength) for path, strength in loras.items()])
        require_clean(plan, ())
        fuse(plan, FuseOptions(out, schedule=choose_usage(None, "auto", plan.loras, plan.base).schedule))
        return out

    return make


@pytest.mark.parametrize("loras", [{LIGHTNING: 1.0}, {NIGHT: 1.0}, {LIGHTNING: 1.0, NIGHT: 0.8}], ids=len)
def test_equals_diffusers_own_fuse(fused: Make, loras: dict[Path, float]) -> None:
    """The same weights as `load_lora_weights` + `fuse_lora` in fp32, after one rounding to bf16."""
    ours = DiffusionPipeline.from_pretrained(fused(loras), dtype=torch.bfloat16).transformer.state_dict()
    pipeline = DiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    for path, strength in loras.items():
        pipeline.load_lora_weights(str(path))
        pipeline.fuse_lora(lora_scale=strength)
        pipeline.unload_lora_weights()
    for name, value in pipeline.transformer.state_dict().items():
        off = ours[name] != value.to(torch.bfloat16)
        assert off.float().mean() < 2e-3, name  # sums that fall on a rounding boundary may take the other side
        torch.testing.assert_close(ours[name].float(), value, rtol=2**-7, atol=1e-4)


def test_lightning_layout() -> None:
    with safe_open(LIGHTNING, "pt") as file:
        keys = list(file.keys())
        assert {re.sub(r".*?\.(lora_down\.weight|lora_up\.weight|alpha)$", r"\1", key) for key in keys} == {
            "lora_down.weight", "lora_up.weight", "alpha",
        }  # fmt: skip
        for key in keys:
            if key.endswith(".alpha"):
                assert file.get_tensor(key).item() != file.get_tensor(f"{key[:-6]}.lora_down.weight").shape[0]
        assert json.loads(file.metadata()["few_step_schedule"])["sigmas"][0] == 1.0


def test_standard_layout() -> None:
    with safe_open(NIGHT, "pt") as file:
        assert {re.sub(r".*(lora_[AB]\.default\.weight)$", r"\1", key) for key in file.keys()} == {  # noqa: SIM118
            "lora_A.default.weight", "lora_B.default.weight",
        }  # fmt: skip


def test_the_fused_base_draws_in_two_steps_what_the_base_draws_in_many(fused: Make) -> None:
    """From the same noise, the fused base at 2 steps comes much nearer to 16 guided steps than the base does."""
    base = DiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    quick = DiffusionPipeline.from_pretrained(fused({LIGHTNING: 1.0}), dtype=torch.float32)

    def draw(pipeline: DiffusionPipeline, steps: int, scale: float) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        images: torch.Tensor = pipeline(
            PROMPTS, negative_prompt=[" "] * len(PROMPTS), true_cfg_scale=scale, num_inference_steps=steps,
            height=64, width=64, generator=torch.Generator().manual_seed(0), output_type="pt",
        ).images  # fmt: skip
        return images

    many = draw(base, 16, 2.0)
    from_base = (draw(base, 2, 1.0) - many).square().mean()
    from_fused = (draw(quick, 2, 1.0) - many).square().mean()
    assert from_fused < 0.6 * from_base


def test_assets_hold_no_paths() -> None:
    for path in BASE.rglob("*.json"):
        if path.name != "tokenizer.json":
            assert not re.search(r'"(/|[A-Z]:\\)', path.read_text()), path
