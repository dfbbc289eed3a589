"""Noise levels against diffusers' scheduler and pipelines, and names that are recognised or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import retrieve_timesteps
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from lorafuse_common.errors import ConfigError
from lorafuse_fuse.few_step import FLUX2, FLUX_DEV, KNOWN, QWEN_LIGHTNING, Kind, looks_few_step, recognise
from lorafuse_fuse.sigmas import klein_mu, scheduler_sigmas

ALL = (Kind.FEW_STEP_LORA, Kind.FEW_STEP_BASE, Kind.DEDISTILL)
QWEN_IMAGE = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}  # fmt: skip
SCHNELL, WAN, Z_IMAGE = {"shift": 1.0}, {"shift": 5.0}, {"shift": 3.0}
LINEAR = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 1.0, "max_shift": 2.0}


def of_pipeline(config: Any, steps: int, tokens: int, sigmas: list[float] | None = None) -> torch.Tensor:
    """What diffusers' Qwen-Image and FLUX pipelines make of a scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    its = scheduler.config
    mu = calculate_shift(tokens, its.base_image_seq_len, its.max_image_seq_len, its.base_shift, its.max_shift)
    even = sigmas or np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=even, mu=mu if its.use_dynamic_shifting else None)
    found: torch.Tensor = scheduler.sigmas[:-1]
    return found


@pytest.mark.parametrize("config", [QWEN_LIGHTNING, QWEN_IMAGE, FLUX_DEV, SCHNELL, WAN, Z_IMAGE, LINEAR])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6889])
def test_noise_levels_are_the_schedulers(config: dict[str, Any], steps: int, tokens: int) -> None:
    if steps == 1 and config is QWEN_IMAGE:
        return  # stretching one level to its end divides by zero there
    ours = torch.tensor(scheduler_sigmas(config, steps, tokens))
    assert torch.allclose(ours, of_pipeline(config, steps, tokens), atol=2e-6)


def test_lightning_has_the_same_levels_at_every_size() -> None:
    assert scheduler_sigmas(QWEN_LIGHTNING, 4, 100) == pytest.approx([1, 0.9, 0.75, 0.5])
    assert scheduler_sigmas(QWEN_LIGHTNING, 8, 9000) == pytest.approx([1, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3])


def test_z_image_turbos_levels_are_its_pipelines() -> None:
    turbo = next(known for known in KNOWN if known.title == "Z-Image-Turbo")
    theirs = of_pipeline(Z_IMAGE, 8, 4096, get_default_z_image_sigmas(8))
    assert torch.allclose(torch.tensor(turbo.sigmas(8)), theirs, atol=2e-6)


@pytest.mark.parametrize("tokens", [256, 4096, 8000])
@pytest.mark.parametrize("steps", [4, 50])
def test_kleins_shift_is_its_pipelines(tokens: int, steps: int) -> None:
    assert klein_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


def test_kleins_levels_are_its_pipelines() -> None:
    klein = next(known for known in KNOWN if known.family == "flux2")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(FLUX2))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4), mu=compute_empirical_mu(4096, 4))
    assert torch.allclose(torch.tensor(klein.sigmas(4)), scheduler.sigmas[:-1], atol=2e-6)


def test_sd3_turbos_levels_are_its_pipelines() -> None:
    """StableDiffusion3Pipeline leaves the levels to the scheduler."""
    turbo = next(known for known in KNOWN if known.family == "sd3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for steps in (1, 4, 28):
        retrieve_timesteps(scheduler, steps, "cpu", sigmas=None)
        assert torch.allclose(torch.tensor(turbo.sigmas(steps)), scheduler.sigmas[:-1], atol=2e-6)


def test_wans_levels_are_lightx2vs() -> None:
    """Steps 1000, 750, 500, 250 of 1000, shifted by 5."""
    levels = [5 * u / (1 + 4 * u) for u in (1.0, 0.75, 0.5, 0.25)]
    for known in KNOWN:
        if known.family == "wan":
            assert known.sigmas(4) == pytest.approx(levels)


@pytest.mark.parametrize(
    "config",
    [{"_class_name": "UniPCMultistepScheduler"}, {"use_karras_sigmas": True}, {"invert_sigmas": True},
     {"shift": "3"}, {"shift": True}, {"shift": float("nan")}],
)  # fmt: skip
def test_other_schedulers_are_not_guessed(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        scheduler_sigmas(config, 4)


@pytest.mark.parametrize(
    ("family", "name", "title", "steps"),
    [
        ("qwen_image", "Qwen-Image-Lightning-4steps-V1.0", "Qwen-Image-Lightning", 4),
        ("qwen_image", "Qwen-Image-Lightning-8steps-V1.1-bf16", "Qwen-Image-Lightning", 8),
        ("qwen_image", "Qwen-Image-Lightning-4steps-V2.0", "Qwen-Image-Lightning", 4),
        ("qwen_image", "Qwen-Image-2512-Lightning-4steps-V1.0-fp32", "Qwen-Image-Lightning", 4),
        ("qwen_image", "Qwen-Image-fp8-e4m3fn-Lightning-4steps-V1.0-fp32", "Qwen-Image-Lightning", 4),
        ("qwen_image", "Qwen-Image-Edit-Lightning-8steps-V1.0", "Qwen-Image-Edit-Lightning", 8),
        ("qwen_image", "Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16", "Qwen-Image-Edit-Lightning", 4),
        ("qwen_image", "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-fp32", "Qwen-Image-Edit-Lightning", 4),
        ("wan", "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/high_noise_model", "Wan2.2-Lightning", 4),
        ("wan", "Wan2.2-Lightning_I2V-A14B-4steps-lora_HIGH_fp16", "Wan2.2-Lightning", 4),
        ("wan", "Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank128_fp16", "Wan2.2-Lightning", 4),
        ("wan", "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise", "Wan2.2-Lightning", 4),
        ("wan", "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32", "lightx2v's step-distilled Wan 2.1", 4),
        ("wan", "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16_", "lightx2v's step-distilled Wan 2.1", 4),
        ("wan", "Wan2.1-I2V-14B-480P-StepDistill-CfgDistill-Lightx2v", "lightx2v's step-distilled Wan 2.1", 4),
        ("flux", "Hyper-FLUX.1-dev-8steps-lora", "Hyper-FLUX.1-dev", 8),
        ("flux", "Hyper-FLUX.1-dev-16steps-lora", "Hyper-FLUX.1-dev", 16),
        ("flux", "FLUX.1-Turbo-Alpha/diffusion_pytorch_model", "FLUX.1-Turbo-Alpha", 8),
        ("flux", "black-forest-labs/FLUX.1-schnell", "FLUX.1-schnell", 4),
        ("flux", "flux1-schnell", "FLUX.1-schnell", 4),
        ("flux2", "FLUX.2-klein-4B", "FLUX.2 klein, distilled", 4),
        ("z_image", "Z-Image-Turbo", "Z-Image-Turbo", 8),
        ("z_image", "z_image_turbo_bf16", "Z-Image-Turbo", 8),
        ("sd3", "stable-diffusion-3.5-large-turbo", "Stable Diffusion 3.5 Large Turbo", 4),
        ("sd3", "sd3.5_large_turbo", "Stable Diffusion 3.5 Large Turbo", 4),
    ],
)
def test_published_names_are_recognised(family: str, name: str, title: str, steps: int) -> None:
    found = recognise({"its name": name}, family, (Kind.FEW_STEP_LORA, Kind.FEW_STEP_BASE))
    assert [(its.known.title, its.steps) for its in found] == [(title, steps)]
    assert recognise({"its name": name}, "mochi", ALL) == ()


@pytest.mark.parametrize(
    ("family", "name"),
    [("z_image", "zimage_turbo_training_adapter_v1"), ("z_image", "zimage_turbo_training_adapter_v2"),
     ("flux", "FLUX.1-schnell-training-adapter/pytorch_lora_weights")],
)  # fmt: skip
def test_de_distill_adapters_are_recognised(family: str, name: str) -> None:
    assert [its.known.kind for its in recognise({"its name": name}, family, (Kind.DEDISTILL,))] == [Kind.DEDISTILL]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen_image", "lightning"), ("qwen_image", "Qwen-Image"), ("qwen_image", "Qwen-Image-Lightning-V1.0"),
        ("qwen_image", "Qwen-Image-Lightning-14steps"), ("flux", "FLUX.1-dev"), ("flux", "my-flux-style"),
        ("flux2", "FLUX.2-klein-base-4B"), ("z_image", "Z-Image"), ("z_image", "Z-Image-De-Turbo"),
        ("flux", "FLUX.1-schnell-dedistilled"), ("flux", "flux.1-schnell-de-distilled"), ("wan", "Wan2.2-T2V-A14B"),
        ("sd3", "stable-diffusion-3.5-large"), ("flux", "Hyper-FLUX.1-dev-lora"),
    ],
)  # fmt: skip
def test_other_names_are_not(family: str, name: str) -> None:
    assert recognise({"its name": name}, family, ALL) == ()


def test_what_looks_few_step() -> None:
    assert looks_few_step({"a": "my_Lightning_v3"}, "flux") == ("a", "lightning")
    assert looks_few_step({"a": "style", "b": "x-4-steps"}, None) == ("b", "4-steps")
    assert looks_few_step({"a": "z_image_turbo_anime"}, "z_image") is None
    assert looks_few_step({"a": "turbo_anime"}, "flux") == ("a", "turbo")
    assert looks_few_step({"a": "enlightninged style", "b": "hyperreal"}, "flux") is None


def test_names_without_end_are_read_in_no_time() -> None:
    assert recognise({"a": "qwen-image" + "-a" * 100000 + "-lightning"}, "qwen_image", ALL) == ()
