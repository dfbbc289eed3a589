"""The Z-Image recipe against diffusers' own pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from train import tiny_z_image
from train.recipe_checks import CPU, check_run, gap_to_neighbours, losses_on_one_latent, noise, silent_modules
from train.runs import run, save_world

from lorafuse_common.families.z_image import Z_IMAGE
from lorafuse_train.lora.targets import resolve_targets
from lorafuse_train.precision import Precision
from lorafuse_train.recipes.z_image import ZImage
from lorafuse_train.samples.sample import Schedule, denoise

CAPTION = "a red star"
LONGER = "ink sketch of a blue circle and a green square on a navy background, " * 3
"""More than the 32 tokens to whose multiples the model pads."""
LATENT = (4, 4, 6)
RECIPE = ZImage()
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_z_image.save_pipeline(tmp_path_factory.mktemp("z_image") / "turbo")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Any:
    return RECIPE.load_text_encoder(folder, CPU.device)


def random_caption(length: int) -> dict[str, torch.Tensor]:
    return {"embeds": torch.randn(length, 16, generator=torch.Generator().manual_seed(length))}


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(("count", "height", "width"), [(1, 64, 32), (2, 16, 24)])
def test_sampling_gives_the_pipelines_pictures(
    folder: Path, pipeline: Any, encoder: Any, count: int, height: int, width: int, scale: float
) -> None:
    """Pins lists, sign, time, positions, masks, shift, guidance, and both encoders; 64 x 32 needs no padding."""
    texts = [CAPTION, LONGER][-count:]
    start = noise(count, *RECIPE.latent_shape(folder, height, width))
    schedule = Schedule(RECIPE.sigmas(folder, 4, LATENT), scale)
    prompts = [RECIPE.encode_text(encoder, text) for text in texts], RECIPE.encode_text(encoder, " ")
    ours = denoise(RECIPE, pipeline.transformer, start, schedule, prompts, CPU)
    call = eval(f"dict({RECIPE.guidance_arguments(scale)})")
    call |= {"height": height, "width": width, "latents": start, "num_inference_steps": 4}

    def theirs(output_type: str) -> torch.Tensor:  # fresh lists, for the pipeline writes its template into them
        lists = {"prompt": list(texts), "negative_prompt": [call.get("negative_prompt", "")] * count}
        drawn: torch.Tensor = pipeline(**{**call, **lists}, output_type=output_type).images
        return drawn

    assert torch.allclose(ours, theirs("latent"), atol=1e-5)
    vae = RECIPE.load_vae(folder, CPU.device)
    decoded = torch.stack([RECIPE.decode(vae, x0) for x0 in ours])
    assert torch.allclose((decoded / 2 + 0.5).clamp(0, 1), theirs("pt"), atol=1e-5)


def test_few_steps_work_as_the_summary_tells_users(pipeline: Any, encoder: Any) -> None:
    """The manifest's sigmas are final; the scheduler must not shift them again."""
    schedule, encoded = Schedule((1.0, 0.9, 0.5), 1.0), RECIPE.encode_text(encoder, CAPTION)
    ours = denoise(RECIPE, pipeline.transformer, noise(1, *LATENT), schedule, ([encoded], encoded), CPU)
    few = type(pipeline)(**{**pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0)})
    few.set_progress_bar_config(disable=True)
    theirs = few(
        CAPTION, sigmas=[1.0, 0.9, 0.5], num_inference_steps=3, guidance_scale=0, height=16, width=24,
        latents=noise(1, *LATENT), output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_prediction_does_not_depend_on_its_neighbours(pipeline: Any) -> None:
    captions = [random_caption(length) for length in (3, 70, 33)]
    assert gap_to_neighbours(RECIPE, pipeline.transformer, captions, LATENT) < 1e-5
    assert RECIPE.collate(captions)["embeds"].shape == (3, 70, 16)


def test_captions_are_the_pipelines_embeddings(pipeline: Any, encoder: Any) -> None:
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt([CAPTION, LONGER, CAPTION * 300], do_classifier_free_guidance=False)
    ours = [RECIPE.encode_text(encoder, text) for text in (CAPTION, LONGER, CAPTION * 300)]
    assert all(torch.allclose(mine["embeds"], its, atol=1e-6) for mine, its in zip(ours, theirs, strict=True))
    assert [RECIPE.is_cut(encoded) for encoded in ours] == [False, False, True]


def test_encoding_is_normalised_and_inverted_by_decoding(folder: Path, pipeline: Any) -> None:
    vae: Any = RECIPE.load_vae(folder, CPU.device)
    pixels = noise(1, 3, 16, 24)[0].clamp(-1, 1)
    x0 = RECIPE.encode_image(vae, pixels)
    assert tuple(x0.shape) == RECIPE.latent_shape(folder, 16, 24) == LATENT
    assert RECIPE.pixel_multiple(folder) == pipeline.image_processor.config.vae_scale_factor == 8
    z = pipeline.vae.encode(pixels[None]).latent_dist.mode()
    assert torch.allclose(x0, (z[0] - 0.0609) * 1.5035, atol=1e-6)
    assert torch.allclose(RECIPE.decode(vae, x0), pipeline.vae.decode(z).sample[0], atol=1e-5)


@pytest.mark.parametrize("scheduler", [{"shift": 3.0}, {"shift": 6.0}, DYNAMIC], ids=["turbo", "base", "dynamic"])
def test_the_training_shift_lies_on_the_pipelines_curve(scheduler: dict[str, Any], tmp_path: Path) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(**scheduler)
    theirs.save_pretrained(tmp_path / "scheduler")
    mu = 0.5 + (1.15 - 0.5) * (6 - 256) / (4096 - 256)  # linear in the 6 patches
    shift = RECIPE.shift(tmp_path, LATENT)
    assert math.isclose(shift, scheduler.get("shift", math.exp(mu)), rel_tol=1e-6)
    u = torch.tensor([1, 0.75, 0.5, 0.25])
    theirs.set_timesteps(sigmas=u.tolist(), mu=mu)
    assert torch.allclose(shift * u / (1 + (shift - 1) * u), theirs.sigmas[:-1], atol=1e-6)
    assert RECIPE.sigmas(tmp_path, 4, LATENT) == tuple(theirs.sigmas[:-1].tolist())


def test_bf16_weights_keep_latents_and_predictions_in_fp32(folder: Path, pipeline: Any) -> None:
    half = ZImageTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    condition, sigma = RECIPE.collate([random_caption(9)]), torch.tensor([0.5])
    with torch.no_grad():
        exact = RECIPE.predict(pipeline.transformer, noise(1, *LATENT), sigma, condition)
        for autocast in (False, True):
            with Precision(CPU.device, autocast, "").compute():
                rounded = RECIPE.predict(half, noise(1, *LATENT), sigma, condition)
            assert rounded.dtype == torch.float32
            assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_no_linear_layer_is_idle() -> None:
    transformer = tiny_z_image.pipeline().transformer
    counts = resolve_targets(transformer, Z_IMAGE, "preset").counts
    assert set(counts.values()) == {4}  # two layers and two refiners
    assert silent_modules(RECIPE, transformer, random_caption(9), LATENT) == set(Z_IMAGE.idle_modules) == set()


def test_it_learns_one_latent() -> None:
    transformer = tiny_z_image.pipeline().transformer
    losses = losses_on_one_latent(RECIPE, transformer, Z_IMAGE, random_caption(9), LATENT, steps=25)
    assert losses[-1] < 0.3 * losses[0]  # the frozen last layer leaves a rest


def test_a_training_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = save_world(tmp_path, tiny_z_image)
    out = run(world, tmp_path / "out", "--use_gradient_checkpointing", original_model=world / "base")
    printed = capsys.readouterr().out
    assert "guidance_scale=0" in printed
    check_run(out, printed, drawn="a red circle")
