"""The Wan recipes against diffusers' own pipelines: from text, and from a first frame told in three ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image, ImageOps
from torch import Tensor
from train import tiny_wan
from train.recipe_checks import CPU, gap_to_neighbours, losses_on_one_latent, noise, silent_modules

from lorafuse_common.errors import CheckpointError
from lorafuse_common.families.wan import WAN
from lorafuse_train.dataset.pictures import to_pixels
from lorafuse_train.experts import Experts
from lorafuse_train.lora.targets import meta_model, resolve_targets
from lorafuse_train.precision import Precision
from lorafuse_train.recipes import recipe_for
from lorafuse_train.recipes.recipe import ControlPicture, Encoded, Guidance, Recipe
from lorafuse_train.recipes.wan import LONGEST_PROMPT, Wan, WanImage
from lorafuse_train.samples.sample import Column, Schedule, draw_row

CAPTIONS = ("a red star", "ink sketch of a blue circle on a navy background")
SHAPE = (9, 32, 48)
"""Frames, height and width: 3 latent frames."""
PICTURE = tiny_wan.frames(1, (80, 50), 1)[0]
"""Of another size and shape than the video."""


@pytest.fixture(scope="module", params=tiny_wan.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("wan") / "base", **tiny_wan.KINDS[kind])


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return recipe_for("wan", folder)


class World:
    """Encoders of a pipeline, and what they say of a caption."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.vae: Any = recipe.load_vae(folder, CPU.device)
        self.encoder: Any = recipe.load_text_encoder(folder, CPU.device)
        self.is_told = isinstance(recipe, WanImage)

    def condition(self, caption: str, shape: tuple[int, int, int] = SHAPE) -> Encoded:
        controls = []
        if self.is_told:
            size = self.recipe.control_size(self.folder, PICTURE.size, shape[1:], 0)
            controls = [ControlPicture(fitted(*shape[1:]), size)]
        return {
            **self.recipe.encode_text(self.encoder, caption, controls),
            **self.recipe.encode_controls(self.vae, controls, shape),
        }

    def latent(self, shape: tuple[int, int, int] = SHAPE) -> tuple[int, ...]:
        frames, height, width = shape
        return self.recipe.latent_shape(self.folder, height, width, frames)


@pytest.fixture(scope="module")
def world(recipe: Recipe, folder: Path) -> World:
    return World(recipe, folder)


def model(pipeline: Any, *, trains_high: bool = True) -> Any:
    """Both experts where there are two."""
    if pipeline.config.boundary_ratio is None:
        return pipeline.transformer
    own, other = (pipeline.transformer, pipeline.transformer_2)[:: 1 if trains_high else -1]
    return Experts(own, trains_high, pipeline.config.boundary_ratio, lambda: other, CPU.device)


def call(pipeline: Any, captions: tuple[str, ...], shape: tuple[int, int, int], **more: Any) -> Tensor:
    frames, height, width = shape
    seen = {} if "ImageToVideo" not in type(pipeline).__name__ else {"image": fitted(height, width)}
    found: Tensor = pipeline(
        prompt=list(captions), height=height, width=width, num_frames=frames, num_inference_steps=4, **seen, **more
    ).frames
    return found


def fitted(height: int, width: int) -> Any:
    """What the pipeline is given: it would stretch a picture of another shape, where we cut."""
    return ImageOps.fit(PICTURE, (width, height), Image.Resampling.LANCZOS)


@pytest.mark.parametrize(("shape", "batch", "guidance"), [(SHAPE, 2, 4.5), (SHAPE, 1, 1.0), ((5, 48, 32), 1, 3.0)])
def test_sampling_gives_the_pipelines_videos(
    world: World, pipeline: Any, shape: tuple[int, int, int], batch: int, guidance: float
) -> None:
    """Pins sign, timestep scale, shift, guidance, text, both ways to tell a frame, and where experts change."""
    recipe, latent = world.recipe, world.latent(shape)
    schedule = Schedule(recipe.sigmas(world.folder, 4, latent), guidance)
    start = noise(batch, *latent)
    texts = CAPTIONS[:batch]
    negative = world.condition("", shape)
    columns = [
        Column(text, world.condition(text, shape), negative, eps, (schedule,))
        for text, eps in zip(texts, start, strict=True)
    ]
    drawn = model(pipeline, trains_high=batch == 1)
    ours = torch.stack(draw_row(recipe, drawn, columns, 0, CPU))
    theirs = call(pipeline, texts, shape, latents=start, guidance_scale=guidance, output_type="latent")
    assert torch.allclose(ours, theirs, atol=1e-4)
    shown = call(pipeline, texts, shape, latents=start, guidance_scale=guidance, output_type="pt")
    decoded = torch.stack([recipe.decode(world.vae, x0) for x0 in ours])  # (B, 3, F, H, W)
    assert decoded.shape[2:] == shape
    assert torch.allclose((decoded / 2 + 0.5).clamp(0, 1), shown.transpose(1, 2), atol=1e-4)
    assert recipe.guidance(world.folder, pipeline.transformer.config) is Guidance.CFG
    if isinstance(drawn, Experts):
        asked = [drawn.at(sigma) is pipeline.transformer for sigma in schedule.sigmas]
        assert sorted({*asked}) == [False, True], "the schedule must cross the boundary"
        drawn.rest()
        assert drawn.at(1.0 if drawn.trains_high else 0.0) is drawn.trained


def test_captions_are_the_pipelines(world: World, pipeline: Any) -> None:
    long = "a red star " * 300
    texts = (*CAPTIONS, "", "  a &amp; b\n c ", long)
    encoded = [world.recipe.encode_text(world.encoder, text) for text in texts]
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(list(texts), None, False, max_sequence_length=LONGEST_PROMPT)
    assert torch.allclose(world.recipe.collate(encoded)["embeds"], embeds, atol=1e-5)
    assert [world.recipe.is_cut(one) for one in encoded] == [False, False, False, False, True]
    assert len(encoded[0]["embeds"]) < 20
    assert len(encoded[2]["embeds"]) == 1  # the end


def test_a_prediction_does_not_depend_on_its_neighbours(world: World, pipeline: Any) -> None:
    captions = [world.condition(text) for text in (*CAPTIONS, "")]
    assert gap_to_neighbours(world.recipe, pipeline.transformer, captions, world.latent()) < 1e-5


def test_encoding_is_normalised_and_inverted_by_decoding(world: World, pipeline: Any) -> None:
    recipe, frames = world.recipe, tiny_wan.frames(9, (48, 32))
    pixels = torch.stack([to_pixels(frame, (32, 48)) for frame in frames], 1)
    x0 = recipe.encode_image(world.vae, pixels)
    assert tuple(x0.shape) == world.latent()
    assert x0.shape[1:] == ((3, 4, 6) if pipeline.config.expand_timesteps else (3, 8, 12))
    assert recipe.pixel_multiple(world.folder) == 16
    config = pipeline.vae.config
    with torch.no_grad():
        z = pipeline.vae.encode(pixels[None]).latent_dist.mode()[0]
        shown = pipeline.vae.decode(z[None]).sample[0]
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (config.latents_mean, config.latents_std))
    assert torch.allclose(x0, (z - mean) / std, atol=1e-5)
    assert torch.allclose(recipe.decode(world.vae, x0), shown, atol=1e-4)
    still = recipe.encode_image(world.vae, pixels[:, 0])
    assert torch.allclose(still, recipe.encode_image(world.vae, pixels[:, :1]))
    assert still.shape[1] == 1


def test_bf16_weights_keep_latents_and_predictions_in_fp32(world: World, folder: Path, pipeline: Any) -> None:
    half = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    x, sigma = noise(1, *world.latent()), torch.tensor([0.5])
    condition = world.recipe.collate([world.condition(CAPTIONS[0])])
    with torch.no_grad():
        exact = world.recipe.predict(pipeline.transformer, x, sigma, condition)
        for autocast in (False, True):
            with Precision(CPU.device, autocast, "").compute():
                rounded = world.recipe.predict(half, x, sigma, condition)
            assert rounded.dtype == torch.float32
            assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_it_learns_one_latent(world: World, kind: str) -> None:
    transformer = tiny_wan.pipeline(**tiny_wan.KINDS[kind]).transformer
    told = world.condition(CAPTIONS[0])
    if kind == "ti2v 5b i2v":  # the first frame is the video's own
        told = {**told, "first": noise(1, *world.latent(), seed=9)[0]}
    losses = losses_on_one_latent(world.recipe, transformer, WAN, told, world.latent(), steps=120)
    assert losses[-1] < 0.5 * losses[0]  # the frozen last layer leaves a rest


def test_the_preset_trains_what_hears_of_the_loss(world: World, kind: str) -> None:
    transformer = tiny_wan.pipeline(**tiny_wan.KINDS[kind]).transformer
    targets = resolve_targets(transformer, WAN, "preset")
    silent = silent_modules(world.recipe, transformer, world.condition(CAPTIONS[0]), world.latent())
    assert not silent & {*targets.modules}
    assert len(targets.modules) == 2 * 10
    assert all(targets.counts.values())


def test_the_preset_fits_the_real_models() -> None:
    large = meta_model("WanTransformer3DModel", {"num_layers": 40})
    assert len(resolve_targets(large, WAN, "preset").modules) == 40 * 10


def test_a_first_frame_at_noise_level_0_is_kept(tmp_path: Path) -> None:
    """TI2V-5B: whatever the model says of the first latent frame, sampling ends at it and training has no error."""
    folder = tiny_wan.save_pipeline(tmp_path / "base", image=True, expand=True)
    world = World(WanImage(), folder)
    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer")
    size = (32, 48)
    first = to_pixels(PICTURE, size)
    video = torch.stack([first, *torch.rand(8, 3, *size)], 1)
    x0 = world.recipe.encode_image(world.vae, video)[None]
    condition = world.recipe.collate([world.condition(CAPTIONS[0])])
    eps = noise(1, *world.latent())
    for sigma in (1.0, 0.5, 0.01):
        x = (1 - sigma) * x0 + sigma * eps
        with torch.no_grad():
            v = world.recipe.predict(transformer, x, torch.tensor([sigma]), condition)
        assert torch.allclose(v[:, :, 0], (eps - x0)[:, :, 0], atol=1e-3)
        assert not torch.allclose(v[:, :, 1:], (eps - x0)[:, :, 1:], atol=0.1)
        assert torch.allclose((x - sigma * v)[:, :, 0], condition["first"][:, :, 0], atol=1e-5)


def test_ti2v_takes_a_first_frame_where_there_is_one(tmp_path: Path) -> None:
    """The same weights as a text-to-video pipeline; a model for text alone refuses."""
    folder = tiny_wan.save_pipeline(tmp_path / "ti2v", expand=True)
    recipe = recipe_for("wan", folder)
    assert recipe.controls == (0, 1)
    assert recipe.control_size(folder, (50, 80), (32, 48), 0) == (32, 48)
    vae: Any = recipe.load_vae(folder, CPU.device)
    found = recipe.encode_controls(vae, [ControlPicture(PICTURE, (32, 48))], SHAPE)
    whole = WanImage().encode_controls(vae, [ControlPicture(PICTURE, (32, 48))], SHAPE)
    assert torch.allclose(found["first"], whole["first"][:, :1])
    assert recipe.encode_controls(vae, [], SHAPE) == {}
    plain = tiny_wan.save_pipeline(tmp_path / "t2v")
    with pytest.raises(CheckpointError, match="is for text to video, and the dataset has control pictures"):
        recipe_for("wan", plain).control_size(plain, (50, 80), (32, 48), 0)


@pytest.mark.parametrize("unipc", [True, False])
def test_noise_levels_are_the_schedulers(tmp_path: Path, unipc: bool) -> None:
    folder = tiny_wan.save_pipeline(tmp_path / "base", unipc=unipc)
    scheduler = DiffusionPipeline.from_pretrained(folder).scheduler
    scheduler.set_timesteps(6)
    sigmas = Wan().sigmas(folder, 6, (4, 3, 8, 12))
    assert sigmas == pytest.approx(scheduler.sigmas[:-1].tolist())
    assert torch.allclose(1000 * torch.tensor(sigmas), scheduler.timesteps.float(), atol=1)  # UniPC rounds
    shift = Wan().shift(folder, (4, 3, 8, 12))
    assert shift == 3.0
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    euler.set_timesteps(sigmas=[0.8, 0.5, 0.2])
    u = torch.tensor([0.8, 0.5, 0.2])
    assert torch.allclose(shift * u / (1 + (shift - 1) * u), euler.sigmas[:-1], atol=1e-6)


def test_a_scheduler_of_another_path_is_refused(tmp_path: Path) -> None:
    made = tiny_wan.pipeline()
    made.scheduler = type(tiny_wan.pipeline(unipc=True).scheduler)()
    made.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="UniPCMultistepScheduler without flow matching"):
        Wan().sigmas(tmp_path / "base", 4, (4, 3, 8, 12))


def test_a_model_for_a_last_frame_too_is_refused(tmp_path: Path) -> None:
    made = tiny_wan.pipeline(image=True, clip=True)
    made.transformer.register_to_config(pos_embed_seq_len=6)
    made.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="between a first and a last frame"):
        WanImage().control_size(tmp_path / "base", (50, 80), (32, 48), 0)
