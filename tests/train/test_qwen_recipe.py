"""The Qwen-Image recipe against diffusers' own pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from train import tiny
from train.recipe_checks import CPU, check_run, gap_to_neighbours, noise, told_timesteps
from train.runs import run, save_world

from lorafuse_train.precision import Precision
from lorafuse_train.recipes.qwen_image import QwenImage, pack, unpack
from lorafuse_train.samples.sample import Schedule, denoise

CAPTION, LONGER = "a red star", "ink sketch of a blue circle on a navy background"
LATENT = (4, 4, 6)
HEIGHT, WIDTH = 16, 24
RECIPE = QwenImage()


@pytest.fixture(scope="module", params=[{"shift": 2.0}, tiny.DYNAMIC_SCHEDULER], ids=["static", "dynamic"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("qwen") / "base", scheduler=request.param)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_sampling_gives_the_pipelines_pictures(folder: Path, pipeline: Any, guidance: float) -> None:
    """Pins packing, sign, timestep scale, positions, masks, shift, guidance, and both encoders."""
    encoder = RECIPE.load_text_encoder(folder, CPU.device)
    prompts = [RECIPE.encode_text(encoder, text) for text in (CAPTION, LONGER)]
    negative = RECIPE.encode_text(encoder, " ")
    noise = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0))
    schedule = Schedule(RECIPE.sigmas(folder, 4, LATENT), guidance)
    ours = denoise(RECIPE, pipeline.transformer, noise, schedule, (prompts, negative), CPU)
    call: dict[str, Any] = {"prompt": [CAPTION, LONGER], "height": HEIGHT, "width": WIDTH, "latents": pack(noise)}
    if guidance != 1:
        call["negative_prompt"] = [" ", " "]
    theirs = pipeline(num_inference_steps=4, true_cfg_scale=guidance, output_type="latent", **call).images
    assert torch.allclose(ours, unpack(theirs, *LATENT[1:]), atol=1e-5)
    vae = RECIPE.load_vae(folder, CPU.device)
    shown = pipeline(num_inference_steps=4, true_cfg_scale=guidance, output_type="pt", **call).images
    decoded = torch.stack([RECIPE.decode(vae, x0) for x0 in ours])
    assert torch.allclose((decoded / 2 + 0.5).clamp(0, 1), shown, atol=1e-5)


def test_few_steps_work_as_the_summary_tells_users(folder: Path, pipeline: Any) -> None:
    """The manifest's sigmas are final; the scheduler must not shift them again."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(1))
    embeds, _ = pipeline.encode_prompt(CAPTION)
    schedule = Schedule((1.0, 0.9, 0.5), 1.0)
    encoded = [{"embeds": embeds[0]}]
    ours = denoise(RECIPE, pipeline.transformer, noise, schedule, (encoded, encoded[0]), CPU)
    few = type(pipeline)(**pipeline.components)
    few.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    few.set_progress_bar_config(disable=True)
    theirs = few(
        CAPTION, sigmas=[1.0, 0.9, 0.5], num_inference_steps=3, true_cfg_scale=1, height=HEIGHT, width=WIDTH,
        latents=pack(noise), output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(ours, unpack(theirs, *LATENT[1:]), atol=1e-5)


def test_a_prediction_does_not_depend_on_its_neighbours(pipeline: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    captions = [{"embeds": torch.randn(length, 16, generator=generator)} for length in (3, 9, 6)]
    assert gap_to_neighbours(RECIPE, pipeline.transformer, captions, LATENT) < 1e-5
    assert RECIPE.collate(captions)["mask"].sum(dim=1).tolist() == [3, 9, 6]


def test_a_long_caption_is_cut_where_the_pipeline_cuts_it(folder: Path, pipeline: Any) -> None:
    encoder = RECIPE.load_text_encoder(folder, CPU.device)
    long, short = RECIPE.encode_text(encoder, "a red star " * 300), RECIPE.encode_text(encoder, CAPTION)
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt("a red star " * 300, max_sequence_length=512)
    assert torch.allclose(long["embeds"], theirs[0], atol=1e-6)
    assert (RECIPE.is_cut(long), RECIPE.is_cut(short)) == (True, False)


def test_encoding_is_normalised_and_inverted_by_decoding(folder: Path, pipeline: Any) -> None:
    vae: Any = RECIPE.load_vae(folder, CPU.device)
    pixels = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x0 = RECIPE.encode_image(vae, pixels)
    assert tuple(x0.shape) == RECIPE.latent_shape(folder, HEIGHT, WIDTH) == LATENT
    z = pipeline.vae.encode(pixels[None, :, None]).latent_dist.mode()[0, :, 0]
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    assert torch.allclose(x0, (z - mean[:, None, None]) / std[:, None, None], atol=1e-6)
    assert torch.allclose(RECIPE.decode(vae, x0), pipeline.vae.decode(z[None, :, None]).sample[0, :, 0], atol=1e-5)


def test_the_training_shift_lies_on_the_pipelines_curve(folder: Path, pipeline: Any) -> None:
    """Undo the scheduler's stretch to its last sigma, which training leaves out, and compare."""
    shift = RECIPE.shift(folder, LATENT)
    u = torch.tensor([0.9, 0.5, 0.1])
    ours = shift * u / (1 + (shift - 1) * u)
    config = pipeline.scheduler.config
    if config.use_dynamic_shifting:
        mu = 0.5 + (0.9 - 0.5) * (6 - 256) / (8192 - 256)  # linear in the 6 packed tokens
        assert math.isclose(shift, math.exp(mu), rel_tol=1e-6)
        theirs = pipeline.scheduler.time_shift(mu, 1.0, u)
    else:
        pipeline.scheduler.set_timesteps(sigmas=u.tolist())
        theirs = pipeline.scheduler.sigmas[:-1]
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_packing_is_undone_by_unpacking() -> None:
    x = torch.arange(2 * 4 * 4 * 6.0).view(2, 4, 4, 6)
    assert pack(x).shape == (2, 6, 16)
    assert unpack(pack(x), 4, 6).equal(x)


def test_bf16_weights_keep_latents_and_predictions_in_fp32(folder: Path, pipeline: Any) -> None:
    from diffusers import QwenImageTransformer2DModel

    half = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    x, sigma = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    caption = RECIPE.collate([{"embeds": torch.randn(4, 16, generator=torch.Generator().manual_seed(1))}])
    with torch.no_grad():
        exact = RECIPE.predict(pipeline.transformer, x, sigma, caption)
        for autocast in (False, True):
            with Precision(torch.device("cpu"), autocast, "").compute():
                rounded = RECIPE.predict(half, x, sigma, caption)
            assert rounded.dtype == torch.float32
            assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_timesteps_are_rounded_as_by_the_pipeline(folder: Path) -> None:
    """Which rounds 1000 sigma to bf16: of 0.75 it tells the model 0.7539."""
    half = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    embeds = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    call = {"prompt_embeds": embeds, "true_cfg_scale": 1, "height": HEIGHT, "width": WIDTH}
    ours, theirs = told_timesteps(RECIPE, half, {"embeds": embeds[0]}, noise(1, *LATENT), call)
    assert ours == theirs


def test_a_training_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(save_world(tmp_path), tmp_path / "out", learning_rate=0.1)
    check_run(out, capsys.readouterr().out, drawn="a red circle")
