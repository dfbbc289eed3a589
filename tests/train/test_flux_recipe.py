"""The FLUX.1 recipe against diffusers' own pipeline, for dev and schnell."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from train import tiny_flux
from train.recipe_checks import (
    CPU,
    check_run,
    config,
    gap_to_neighbours,
    losses_on_one_latent,
    noise,
    silent_modules,
    told_timesteps,
)
from train.runs import run, save_world

from lorafuse_common import manifest
from lorafuse_common.families.flux import FLUX
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.lora.targets import meta_model, resolve_targets
from lorafuse_train.precision import Precision
from lorafuse_train.recipes.flux import LONGEST_PROMPT, Flux, pack, unpack
from lorafuse_train.recipes.recipe import Guidance
from lorafuse_train.samples.gallery import choose_schedules
from lorafuse_train.samples.sample import Schedule, denoise

CAPTIONS = ("a red star", "ink sketch of a blue circle on a navy background")
LATENT = (4, 4, 6)
RECIPE = Flux()


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.save_pipeline(tmp_path_factory.mktemp("flux") / "base", dev=request.param)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Any:
    return RECIPE.load_text_encoder(folder, CPU.device)


def caption(length: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random embeddings, shorter than real ones."""
    generator = torch.Generator().manual_seed(seed)
    return {"embeds": torch.randn(length, 24, generator=generator), "pooled": torch.randn(16, generator=generator)}


@pytest.mark.parametrize(("height", "width", "batch"), [(16, 24, 2), (32, 32, 1), (48, 16, 1)])
def test_sampling_gives_the_pipelines_pictures(
    folder: Path, pipeline: Any, encoder: Any, height: int, width: int, batch: int
) -> None:
    """Pins packing, sign, timestep scale, positions, shift, embedded guidance, and both encoders."""
    latent = RECIPE.latent_shape(folder, height, width)
    prompts = [RECIPE.encode_text(encoder, text) for text in CAPTIONS[:batch]]
    embedded = RECIPE.guidance(folder, pipeline.transformer.config) is Guidance.EMBEDDED
    schedule = Schedule(RECIPE.sigmas(folder, 4, latent), 3.5 if embedded else 1.0, embedded)
    start = noise(batch, *latent)
    ours = denoise(RECIPE, pipeline.transformer, start, schedule, (prompts, prompts[0]), CPU)
    call: dict[str, Any] = {"height": height, "width": width, "latents": pack(start), "num_inference_steps": 4}
    theirs = pipeline(list(CAPTIONS[:batch]), **call, output_type="latent").images  # guidance 3.5 is its default
    assert torch.allclose(ours, unpack(theirs, *latent[1:]), atol=1e-5)
    vae = RECIPE.load_vae(folder, CPU.device)
    shown = pipeline(list(CAPTIONS[:batch]), **call, output_type="pt").images
    decoded = torch.stack([RECIPE.decode(vae, x0) for x0 in ours])
    assert torch.allclose((decoded / 2 + 0.5).clamp(0, 1), shown, atol=1e-5)


def test_two_predictions_are_combined_as_by_the_pipelines_true_guidance(
    folder: Path, pipeline: Any, encoder: Any
) -> None:
    prompts, negative = [RECIPE.encode_text(encoder, CAPTIONS[0])], RECIPE.encode_text(encoder, CAPTIONS[1])
    start = noise(1, *LATENT)
    schedule = Schedule(RECIPE.sigmas(folder, 2, LATENT), 3.0)
    ours = denoise(RECIPE, pipeline.transformer, start, schedule, (prompts, negative), CPU)
    theirs = pipeline(
        CAPTIONS[0], negative_prompt=CAPTIONS[1], true_cfg_scale=3.0, guidance_scale=1.0, height=16, width=24,
        latents=pack(start), num_inference_steps=2, output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(ours, unpack(theirs, *LATENT[1:]), atol=1e-5)


def test_captions_are_the_pipelines_and_of_one_length(pipeline: Any, encoder: Any) -> None:
    texts = (*CAPTIONS, "", " ", "a red star " * 300)
    encoded = [RECIPE.encode_text(encoder, text) for text in texts]
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(list(texts), max_sequence_length=512)
    condition = RECIPE.collate(encoded)
    assert torch.allclose(condition["embeds"], embeds, atol=1e-5)
    assert torch.allclose(condition["pooled"], pooled, atol=1e-5)
    assert embeds.shape[1] == LONGEST_PROMPT
    assert [RECIPE.is_cut(one) for one in encoded] == [False, False, False, False, True]
    assert condition.keys() == {"embeds", "pooled"}


def test_a_prediction_does_not_depend_on_its_neighbours(pipeline: Any, encoder: Any) -> None:
    captions = [RECIPE.encode_text(encoder, text) for text in (*CAPTIONS, "")]
    assert gap_to_neighbours(RECIPE, pipeline.transformer, captions, LATENT) < 1e-5


def test_a_model_with_a_guidance_embedder_learns_at_guidance_1(folder: Path, pipeline: Any) -> None:
    x, sigma, untold = noise(1, *LATENT), torch.tensor([0.5]), RECIPE.collate([caption()])
    stored = json.loads((folder / "transformer" / "config.json").read_text())
    with torch.no_grad():
        plain, one, more = (
            RECIPE.predict(pipeline.transformer, x, sigma, {**untold, **told})
            for told in ({}, {"guidance": torch.tensor([1.0])}, {"guidance": torch.tensor([3.5])})
        )
    assert plain.equal(one)
    assert plain.equal(more) == (RECIPE.guidance(folder, stored) is Guidance.NONE)


def test_encoding_is_normalised_and_inverted_by_decoding(folder: Path, pipeline: Any) -> None:
    vae: Any = RECIPE.load_vae(folder, CPU.device)
    pixels = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x0 = RECIPE.encode_image(vae, pixels)
    assert tuple(x0.shape) == RECIPE.latent_shape(folder, 16, 24) == LATENT
    assert RECIPE.pixel_multiple(folder) == 8
    z = pipeline.vae.encode(pixels[None]).latent_dist.mode()
    assert torch.allclose(x0, (z[0] - 0.0609) * 1.5035, atol=1e-6)
    assert torch.allclose(RECIPE.decode(vae, x0), pipeline.vae.decode(z).sample[0], atol=1e-5)


@pytest.mark.parametrize("latent", [LATENT, (4, 128, 128), (4, 64, 96)])
def test_the_training_shift_lies_on_the_pipelines_curve(
    folder: Path, pipeline: Any, latent: tuple[int, int, int]
) -> None:
    shift = RECIPE.shift(folder, latent)
    scheduler = pipeline.scheduler
    mu = 0.5 + (1.15 - 0.5) * (latent[1] * latent[2] / 4 - 256) / (4096 - 256)  # linear in the packed tokens
    assert math.isclose(shift, math.exp(mu) if scheduler.config.use_dynamic_shifting else 1.0, rel_tol=1e-6)
    u = torch.tensor([0.9, 0.5, 0.1])
    scheduler.set_timesteps(sigmas=u.tolist(), mu=mu)
    assert torch.allclose(shift * u / (1 + (shift - 1) * u), scheduler.sigmas[:-1], atol=1e-6)


def test_packing_is_undone_by_unpacking() -> None:
    x = torch.arange(2 * 4 * 4 * 6.0).view(2, 4, 4, 6)
    assert pack(x).shape == (2, 6, 16)
    assert unpack(pack(x), 4, 6).equal(x)


def test_bf16_weights_keep_latents_and_predictions_in_fp32(folder: Path, pipeline: Any) -> None:
    half = FluxTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    x, sigma, condition = noise(1, *LATENT), torch.tensor([0.5]), RECIPE.collate([caption()])
    with torch.no_grad():
        exact = RECIPE.predict(pipeline.transformer, x, sigma, condition)
        for autocast in (False, True):
            with Precision(CPU.device, autocast, "").compute():
                rounded = RECIPE.predict(half, x, sigma, condition)
            assert rounded.dtype == torch.float32
            assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_timesteps_are_rounded_as_by_the_pipeline(folder: Path) -> None:
    half, text = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16), caption()
    call = {"prompt_embeds": text["embeds"][None].bfloat16(), "pooled_prompt_embeds": text["pooled"][None].bfloat16()}
    ours, theirs = told_timesteps(RECIPE, half, text, noise(1, *LATENT), {**call, "height": 16, "width": 24})
    assert ours == theirs


def test_the_preset_trains_the_linear_layers_of_all_blocks() -> None:
    """By name: all but the embedders and the two after the last block; by autograd: none of them is idle."""
    transformer = tiny_flux.pipeline().transformer
    targets = resolve_targets(transformer, FLUX, "preset")
    expected = {
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name
    }
    assert {*targets.modules} == expected
    assert all(targets.counts.values())
    assert not targets.idle
    assert not silent_modules(RECIPE, transformer, caption(), LATENT)
    real = meta_model("FluxTransformer2DModel", {"guidance_embeds": True})
    assert len(resolve_targets(real, FLUX, "preset").modules) == 19 * 14 + 38 * 6


def test_it_learns_one_latent() -> None:
    losses = losses_on_one_latent(RECIPE, tiny_flux.pipeline().transformer, FLUX, caption(), LATENT, steps=40)
    assert losses[-1] < 0.3 * losses[0]  # the frozen last layer leaves a rest


def test_a_few_step_schedule_leaves_the_embedded_guidance_to_the_options(folder: Path, pipeline: Any) -> None:
    """A manifest's 1 is no classifier-free guidance, which dev and schnell both are; only dev is told another scale."""
    fused = SimpleNamespace(schedule=manifest.Schedule((1.0, 0.6), 1.0, "--schedule"))
    base: Any = SimpleNamespace(pipeline=folder, config=pipeline.transformer.config, manifest=fused)
    asked = dataclasses.replace(config(rank=1), validation_guidance_scale=3.5, validation_inference_steps=8)
    schedules = choose_schedules(asked, base, RECIPE, LATENT)
    guidance = "guidance 3.5" if pipeline.transformer.config.guidance_embeds else "no CFG"
    assert [str(schedule) for schedule in schedules] == [f"2 steps, {guidance}", f"8 steps, {guidance}"]


def test_a_training_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = save_world(tmp_path, tiny_flux)
    out = run(world, tmp_path / "out", "--use_gradient_checkpointing", validation_guidance_scale=3.5)
    printed = capsys.readouterr().out
    assert "sigmas=[1, 0.6], guidance_scale=3.5)" in printed
    assert len(load_file(out / FILE_NAME)) == 2 * (2 * 14 + 2 * 6)
    check_run(out, printed, drawn="a red circle")
