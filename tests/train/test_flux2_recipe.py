"""The FLUX.2 recipe against diffusers' own pipelines, dev's and klein's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from PIL import Image
from torch import Tensor
from train import tiny_edit, tiny_flux2
from train.recipe_checks import (
    CPU,
    check_run,
    gap_to_neighbours,
    losses_on_one_latent,
    noise,
    silent_modules,
    told_timesteps,
)
from train.runs import run, save_world

from lorafuse_common.errors import CheckpointError
from lorafuse_common.families.flux2 import FLUX2
from lorafuse_train.lora.targets import resolve_targets
from lorafuse_train.precision import Precision
from lorafuse_train.recipes import recipe_for
from lorafuse_train.recipes.flux2 import Flux2, patchify, unpatchify
from lorafuse_train.recipes.kl import MANY_STEPS
from lorafuse_train.recipes.recipe import ControlPicture, Guidance
from lorafuse_train.samples.sample import Schedule, denoise

CAPTION, LONGER = "a red star", "ink sketch of a blue circle on a navy background"
LATENT = (4, 4, 6)
RECIPE = Flux2()
VARIANTS: dict[str, dict[str, bool]] = {"dev": {}, "klein": {"klein": True}}


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux2.save_pipeline(tmp_path_factory.mktemp("flux2") / "base", **VARIANTS[request.param])


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Any:
    return RECIPE.load_text_encoder(folder, CPU.device)


def random_caption(seed: int) -> dict[str, Tensor]:
    return {"embeds": torch.randn(32, 48, generator=torch.Generator().manual_seed(seed))}


def statistics(pipeline: Any) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation that the pipeline gives to patches (B, 4C, h/2, w/2)."""
    bn = pipeline.vae.bn
    return bn.running_mean[:, None, None], (bn.running_var[:, None, None] + 1e-4).sqrt()


def normalised(pipeline: Any, latents: Tensor, height: int) -> Tensor:
    """x0 of what the pipeline returns as latents: dev's are packed, klein's are not normalised any more."""
    if isinstance(pipeline, Flux2Pipeline):
        count, tokens, channels = latents.shape
        return unpatchify(latents.transpose(1, 2).reshape(count, channels, height // 2, 2 * tokens // height))
    mean, std = statistics(pipeline)
    return unpatchify((patchify(latents) - mean) / std)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(("count", "height", "width"), [(1, 32, 16), (2, 16, 24)])
def test_sampling_gives_the_pipelines_pictures(
    folder: Path, pipeline: Any, encoder: Any, count: int, height: int, width: int, scale: float
) -> None:
    """Pins patches, ids, timestep, shift, both kinds of guidance, and both encoders."""
    latent, texts = RECIPE.latent_shape(folder, height, width), [CAPTION, LONGER][-count:]
    start = noise(count, *latent)
    embedded = RECIPE.guidance(folder, pipeline.transformer.config) is Guidance.EMBEDDED
    schedule = Schedule(RECIPE.sigmas(folder, 4, latent), scale, embedded)
    prompts = [RECIPE.encode_text(encoder, text) for text in texts], RECIPE.encode_text(encoder, "")
    ours = denoise(RECIPE, pipeline.transformer, start, schedule, prompts, CPU)
    call = eval(f"dict({RECIPE.guidance_arguments(scale)})")
    call |= {"prompt": texts, "height": height, "width": width, "latents": patchify(start), "num_inference_steps": 4}
    theirs = pipeline(**call, output_type="latent").images
    assert torch.allclose(ours, normalised(pipeline, theirs, latent[1]), atol=1e-5)
    vae = RECIPE.load_vae(folder, CPU.device)
    decoded = torch.stack([RECIPE.decode(vae, x0) for x0 in ours])
    assert torch.allclose((decoded / 2 + 0.5).clamp(0, 1), pipeline(**call, output_type="pt").images, atol=1e-5)


def test_few_steps_work_as_the_summary_tells_users(folder: Path, pipeline: Any, encoder: Any) -> None:
    """The manifest's sigmas are final; the scheduler must not shift them again, whatever mu the pipeline finds."""
    embedded = RECIPE.guidance(folder, pipeline.transformer.config) is Guidance.EMBEDDED
    schedule, encoded = Schedule((1.0, 0.9, 0.5), 1.0, embedded), RECIPE.encode_text(encoder, CAPTION)
    ours = denoise(RECIPE, pipeline.transformer, noise(1, *LATENT), schedule, ([encoded], encoded), CPU)
    few = type(pipeline)(**{**pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0)})
    few.set_progress_bar_config(disable=True)
    theirs = few(
        prompt=CAPTION, sigmas=[1.0, 0.9, 0.5], num_inference_steps=3, guidance_scale=1, height=16, width=24,
        latents=patchify(noise(1, *LATENT)), output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(ours, normalised(pipeline, theirs, LATENT[1]), atol=1e-5)


def test_guidance_is_embedded_by_two_predictions_or_none(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline"}))
    assert RECIPE.guidance(tmp_path, {"guidance_embeds": True}) is Guidance.EMBEDDED
    assert RECIPE.guidance(tmp_path, {"guidance_embeds": False}) is Guidance.CFG
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline", "is_distilled": true}')
    assert RECIPE.guidance(tmp_path, {"guidance_embeds": False}) is Guidance.NONE


def test_training_tells_dev_a_guidance_of_one(pipeline: Any) -> None:
    condition, sigma = RECIPE.collate([random_caption(0)] * 2), torch.tensor([0.3, 0.8])

    def told(scale: float) -> Tensor:
        return RECIPE.predict(
            pipeline.transformer, noise(2, *LATENT), sigma, {**condition, "guidance": torch.full((2,), scale)}
        )

    with torch.no_grad():
        untold = RECIPE.predict(pipeline.transformer, noise(2, *LATENT), sigma, condition)
        assert told(1.0).equal(untold)
        assert told(4.0).equal(untold) == (not pipeline.transformer.config.guidance_embeds)


def test_a_prediction_does_not_depend_on_its_neighbours(pipeline: Any) -> None:
    assert gap_to_neighbours(RECIPE, pipeline.transformer, [random_caption(seed) for seed in range(3)], LATENT) < 1e-5


def test_captions_are_the_pipelines_embeddings(pipeline: Any, encoder: Any) -> None:
    texts = [CAPTION, LONGER, CAPTION * 300]
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(texts)
    ours = [RECIPE.encode_text(encoder, text) for text in texts]
    assert torch.allclose(RECIPE.collate(ours)["embeds"], theirs, atol=1e-5)
    assert theirs.isfinite().all()
    assert [RECIPE.is_cut(encoded) for encoded in ours] == [False, False, True]
    assert ours[0]["tokens"] < ours[1]["tokens"]


def test_devs_processor_may_be_one_that_needs_torchvision(tmp_path: Path) -> None:
    """As the published model_index.json has it; its tokenizer alone is asked for."""
    folder = tiny_flux2.save_pipeline(tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    half = tiny_flux2.pipeline().text_encoder.bfloat16()
    half.save_pretrained(folder / "text_encoder")
    encoded = RECIPE.encode_text(RECIPE.load_text_encoder(folder, CPU.device), CAPTION)
    assert encoded["embeds"].shape == (512, 48)
    assert encoded["embeds"].dtype == torch.bfloat16


def test_another_pipeline_of_the_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinKVPipeline"}')
    with pytest.raises(CheckpointError, match=r"a Flux2KleinKVPipeline; .* for Flux2Pipeline, Flux2KleinPipeline"):
        recipe_for("flux2", tmp_path)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_references_are_shown_as_by_the_pipelines(folder: Path, pipeline: Any, encoder: Any, scale: float) -> None:
    """Pins their order, positions, crops, and the slice; the text encoder does not see them."""
    vae, sizes = RECIPE.load_vae(folder, CPU.device), [(72, 80), (101, 67)]
    pictures = [tiny_edit.picture(number, *size) for number, size in enumerate(sizes)]
    controls = [
        ControlPicture(each, RECIPE.control_size(folder, (each.height, each.width), (16, 24), 1024 * 1024))
        for each in pictures
    ]
    assert [control.size for control in controls] == [(80, 72), (64, 96)]
    shown = RECIPE.encode_controls(vae, controls, (1, 16, 24))
    start, embedded = noise(1, *LATENT), RECIPE.guidance(folder, pipeline.transformer.config) is Guidance.EMBEDDED
    prompt, negative = ({**RECIPE.encode_text(encoder, text), **shown} for text in (CAPTION, ""))
    schedule = Schedule(RECIPE.sigmas(folder, 3, LATENT), scale, embedded)
    ours = denoise(RECIPE, pipeline.transformer, start, schedule, ([prompt], negative), CPU)
    call = eval(f"dict({RECIPE.guidance_arguments(scale)})")
    theirs = pipeline(
        image=pictures, prompt=CAPTION, height=16, width=24, latents=patchify(start), num_inference_steps=3,
        output_type="latent", **call,
    ).images  # fmt: skip
    assert torch.allclose(ours, normalised(pipeline, theirs, LATENT[1]), atol=1e-5)
    batch = [{**random_caption(seed), **shown} for seed in range(3)]
    assert gap_to_neighbours(RECIPE, pipeline.transformer, batch, LATENT) < 1e-5


def test_references_keep_their_size_up_to_a_megapixel(folder: Path, pipeline: Any) -> None:
    """As the pipelines cut them; the tiny one's patches are of 8 pixels."""
    for width, height in ((2000, 1500), (1025, 1024), (700, 100), (64, 511)):
        picture = Image.new("RGB", (width, height))
        if width * height > 1024 * 1024:
            picture = pipeline.image_processor._resize_to_target_area(picture, 1024 * 1024)
        expected = (picture.height // 8 * 8, picture.width // 8 * 8)
        assert RECIPE.control_size(folder, (height, width), (64, 64), 9**9) == expected
    assert RECIPE.control_size(folder, (1000, 1000), (64, 64), 500 * 500) == (496, 496)
    for width, height in ((63, 100), (900, 100)):
        with pytest.raises(ValueError, match=r"Image too small|Aspect ratio"):
            pipeline.image_processor.check_image_input(Image.new("RGB", (width, height)))
        with pytest.raises(ValueError, match=r"FLUX\.2 takes 64"):
            RECIPE.control_size(folder, (height, width), (64, 64), 9**9)


def test_encoding_is_normalised_and_inverted_by_decoding(folder: Path, pipeline: Any) -> None:
    vae: Any = RECIPE.load_vae(folder, CPU.device)
    pixels = noise(1, 3, 16, 24).clamp(-1, 1)
    x0 = RECIPE.encode_image(vae, pixels[0])
    assert tuple(x0.shape) == RECIPE.latent_shape(folder, 16, 24) == LATENT
    assert RECIPE.pixel_multiple(folder) == pipeline.image_processor.config.vae_scale_factor == 8
    assert torch.allclose(patchify(x0[None]), pipeline._encode_vae_image(pixels, None), atol=1e-6)
    z = pipeline.vae.encode(pixels).latent_dist.mode()
    assert torch.allclose(RECIPE.decode(vae, x0), pipeline.vae.decode(z).sample[0], atol=1e-5)


def test_patches_are_put_back() -> None:
    x = torch.arange(2 * 4 * 4 * 6.0).view(2, 4, 4, 6)
    assert patchify(x).shape == (2, 16, 2, 3)
    assert unpatchify(patchify(x)).equal(x)


def test_the_training_shift_lies_on_the_pipelines_curve(tmp_path: Path) -> None:
    """That of many steps, which is FLUX.1's, and that of any number for pictures of more than 4300 patches."""
    scheduler = FlowMatchEulerDiscreteScheduler(**tiny_flux2.DYNAMIC_SCHEDULER)
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert math.isclose(RECIPE.shift(tmp_path, (32, 32, 32)), math.exp(0.5), rel_tol=1e-4)
    assert math.isclose(RECIPE.shift(tmp_path, (32, 128, 128)), math.exp(1.15), rel_tol=1e-4)
    for steps, latent in ((MANY_STEPS, LATENT), (4, (32, 128, 160))):
        shift = RECIPE.shift(tmp_path, latent)
        even = torch.linspace(1, 1 / steps, steps)
        shifted = shift * even / (1 + (shift - 1) * even)
        assert torch.allclose(shifted, torch.tensor(RECIPE.sigmas(tmp_path, steps, latent)), atol=1e-6)
    FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(tmp_path / "scheduler")
    assert RECIPE.shift(tmp_path, LATENT) == 2


def test_bf16_weights_keep_latents_and_predictions_in_fp32(folder: Path, pipeline: Any) -> None:
    half = Flux2Transformer2DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    condition, sigma = RECIPE.collate([random_caption(0)]), torch.tensor([0.5])
    with torch.no_grad():
        exact = RECIPE.predict(pipeline.transformer, noise(1, *LATENT), sigma, condition)
        for autocast in (False, True):
            with Precision(CPU.device, autocast, "").compute():
                rounded = RECIPE.predict(half, noise(1, *LATENT), sigma, condition)
            assert rounded.dtype == torch.float32
            assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_timesteps_are_rounded_as_by_the_pipelines(folder: Path) -> None:
    half, text = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16), random_caption(0)
    call = {"prompt_embeds": text["embeds"][None].bfloat16(), "guidance_scale": 1, "height": 16, "width": 24}
    ours, theirs = told_timesteps(RECIPE, half, text, noise(1, *LATENT), call)
    assert ours == theirs


@pytest.mark.parametrize("klein", [False, True], ids=["dev", "klein"])
def test_no_linear_layer_is_idle(klein: bool) -> None:
    transformer = tiny_flux2.pipeline(klein=klein).transformer
    counts = resolve_targets(transformer, FLUX2, "preset").counts
    assert {name: count for name, count in counts.items() if count != 2} == {"linear_in": 4, "linear_out": 4}
    assert silent_modules(RECIPE, transformer, random_caption(0), LATENT) == set(FLUX2.idle_modules) == set()


def test_it_learns_one_latent() -> None:
    transformer = tiny_flux2.pipeline().transformer
    losses = losses_on_one_latent(RECIPE, transformer, FLUX2, random_caption(0), LATENT, steps=25)
    assert losses[-1] < 0.3 * losses[0]  # the frozen last layer leaves a rest


@pytest.mark.parametrize("variant", [{}, {"klein": True, "distilled": True}], ids=["dev", "klein"])
def test_a_training_from_start_to_end(
    variant: dict[str, bool], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = save_world(tmp_path, tiny_flux2, **variant)
    out = run(world, tmp_path / "out", "--use_gradient_checkpointing", original_model=world / "base")
    printed = capsys.readouterr().out
    assert ("guidance_scale=1)" if variant else "guidance_scale=4)") in printed
    check_run(out, printed)
