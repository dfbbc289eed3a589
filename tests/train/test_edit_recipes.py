"""The recipes that are shown pictures, Qwen-Image-Edit's and FLUX.1 Kontext's, against diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from torch import Tensor
from train import tiny_edit
from train.recipe_checks import CPU, gap_to_neighbours, losses_on_one_latent, noise, silent_modules

from lorafuse_common.errors import CheckpointError
from lorafuse_common.families.flux import FLUX
from lorafuse_common.families.qwen_image import QWEN_IMAGE
from lorafuse_train.recipes import flux, qwen_image, recipe_for
from lorafuse_train.recipes.flux_kontext import FluxKontext
from lorafuse_train.recipes.qwen_image_edit import QwenImageEdit, QwenImageEditPlus
from lorafuse_train.recipes.recipe import ControlPicture, Encoded, Guidance, Recipe
from lorafuse_train.samples.sample import Schedule, denoise

CAPTIONS = ("a red star", "ink sketch of a blue circle on a navy background")
HEIGHT, WIDTH, LATENT = 16, 24, (4, 4, 6)
PICTURES = {
    "edit": [(40, 24)],
    "plus": [(40, 24), (24, 60)],
    "2511": [(40, 24), (24, 60), (90, 90)],
    "kontext": [(40, 24)],
}
"""(width, height) of what each is shown."""


@pytest.fixture(scope="module", params=tiny_edit.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_edit.save_pipeline(tmp_path_factory.mktemp("edit") / "base", kind)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipe = tiny_edit.load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def recipe(kind: str, folder: Path) -> Recipe:
    return recipe_for("flux" if kind == "kontext" else "qwen_image", folder)


@pytest.fixture(scope="module")
def encoder(recipe: Recipe, folder: Path) -> Any:
    return recipe.load_text_encoder(folder, CPU.device)


@pytest.fixture(scope="module")
def vae(recipe: Recipe, folder: Path) -> Any:
    return recipe.load_vae(folder, CPU.device)


def shown(kind: str, seed: int = 0) -> list[Image.Image]:
    return [tiny_edit.picture(seed + index, *size) for index, size in enumerate(PICTURES[kind])]


def sized(recipe: Recipe, folder: Path, pictures: Sequence[Image.Image]) -> list[ControlPicture]:
    return [
        ControlPicture(each, recipe.control_size(folder, (each.height, each.width), (HEIGHT, WIDTH), tiny_edit.AREA))
        for each in pictures
    ]


def told(recipe: Recipe, encoder: Any, vae: Any, caption: str, controls: Sequence[ControlPicture]) -> Encoded:
    encoded = recipe.encode_text(encoder, caption, controls if recipe.text_sees_controls else ())
    return {**encoded, **recipe.encode_controls(vae, controls, (1, HEIGHT, WIDTH))}


def random_told(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Random embeddings and control latents of two sizes."""
    generator = torch.Generator().manual_seed(seed)
    text = {"embeds": torch.randn(5 + seed, 16, generator=generator)}
    if kind == "kontext":
        text = {"embeds": torch.randn(5, 24, generator=generator), "pooled": torch.randn(16, generator=generator)}
    sizes = [(4, 8), (8, 4)][: len(PICTURES[kind])]
    controls = {f"control_{index}": torch.randn(4, *size, generator=generator) for index, size in enumerate(sizes)}
    return {**text, **controls}


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_sampling_gives_the_pipelines_edits(
    kind: str, folder: Path, pipeline: Any, recipe: Recipe, encoder: Any, vae: Any, scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Pins where controls stand, their positions, sizes and scaling, what the text encoder sees, and the slice."""
    tiny_edit.shrink_pipelines(monkeypatch)
    pictures = [shown(kind), shown(kind, seed=10)]
    controls = [sized(recipe, folder, each) for each in pictures]
    embedded = recipe.guidance(folder, pipeline.transformer.config) is Guidance.EMBEDDED
    prompts = [told(recipe, encoder, vae, text, each) for text, each in zip(CAPTIONS, controls, strict=True)]
    negatives = [told(recipe, encoder, vae, " ", each) for each in controls]
    start, schedule = noise(2, *LATENT), Schedule(recipe.sigmas(folder, 4, LATENT), scale, embedded)
    ours = denoise(recipe, pipeline.transformer, start, schedule, (prompts, negatives), CPU)
    packing = flux if kind == "kontext" else qwen_image
    for index, (caption, each) in enumerate(zip(CAPTIONS, pictures, strict=True)):
        call: dict[str, Any] = eval(f"dict({recipe.guidance_arguments(scale)})")
        if kind == "kontext":
            call["max_area"] = HEIGHT * WIDTH
        theirs = pipeline(
            image=each if kind in ("plus", "2511") else each[0], prompt=caption, height=HEIGHT, width=WIDTH,
            latents=packing.pack(start[index : index + 1]), num_inference_steps=4, output_type="latent", **call,
        ).images  # fmt: skip
        assert torch.allclose(ours[index], packing.unpack(theirs, *LATENT[1:])[0], atol=2e-5)


def test_another_control_gives_another_edit(
    kind: str, folder: Path, pipeline: Any, recipe: Recipe, encoder: Any, vae: Any
) -> None:
    one, other = (told(recipe, encoder, vae, "x", sized(recipe, folder, shown(kind, seed))) for seed in (0, 10))
    x, sigma = noise(1, *LATENT), torch.tensor([0.5])
    with torch.no_grad():
        first, second = (
            recipe.predict(pipeline.transformer, x, sigma, recipe.collate([each])) for each in (one, other)
        )
        mixed = recipe.collate([{**other, **{name: one[name] for name in one if name.startswith("control")}}])
        third = recipe.predict(pipeline.transformer, x, sigma, mixed)
    assert not torch.allclose(first, second, atol=1e-3)
    assert not torch.allclose(third, second, atol=1e-3)  # the latents count
    assert torch.allclose(third, first, atol=1e-5) != recipe.text_sees_controls  # and so does what the text sees


def test_a_prediction_does_not_depend_on_its_neighbours(
    kind: str, folder: Path, pipeline: Any, recipe: Recipe, encoder: Any, vae: Any
) -> None:
    texts = (*CAPTIONS, "")
    samples = [
        told(recipe, encoder, vae, text, sized(recipe, folder, shown(kind, seed))) for seed, text in enumerate(texts)
    ]
    assert gap_to_neighbours(recipe, pipeline.transformer, samples, LATENT) < 2e-5


def test_controls_are_as_large_as_in_the_pipelines() -> None:
    sizes = [(300, 200), (1024, 1024), (2000, 333), (57, 64), (1, 100)]
    for width, height in sizes:
        expected = calculate_dimensions(1024 * 1024, width / height)[:2]
        for recipe in (QwenImageEdit(), QwenImageEditPlus()):
            for max_pixels in (1024 * 1024, 5_000_000):  # no more than the pipeline's
                assert recipe.control_size(Path(), (height, width), (64, 64), max_pixels) == expected[::-1]
    assert QwenImageEdit().control_size(Path(), (500, 500), (64, 64), 512 * 512) == (512, 512)
    for height, max_pixels in ((101, 1024 * 1024), (100, 160 * 160)):
        with pytest.raises(ValueError, match=rf"is 1x{height} pixels; one side is too short"):
            QwenImageEdit().control_size(Path(), (height, 1), (64, 64), max_pixels - 1)


@pytest.mark.parametrize("kind", ["edit", "plus"], indirect=True)
def test_the_longest_picture_can_be_read(kind: str, folder: Path, recipe: Recipe, encoder: Any) -> None:
    control = ControlPicture(tiny_edit.picture(0, 500, 5), recipe.control_size(folder, (5, 500), (64, 64), 500 * 500))
    assert len(recipe.encode_text(encoder, CAPTIONS[0], [control])["embeds"]) > 10


def test_kontext_knows_seventeen_sizes(tmp_path: Path) -> None:
    folder, recipe = tiny_edit.save_pipeline(tmp_path / "base", "kontext"), FluxKontext()
    for width, height in PREFERRED_KONTEXT_RESOLUTIONS:
        assert recipe.control_size(folder, (height, width), (64, 64), 1024 * 1024) == (height, width)
        assert recipe.control_size(folder, (3 * height, 3 * width), (64, 64), 9**9) == (height, width)
    assert recipe.control_size(folder, (500, 510), (64, 64), 512 * 512) == (512, 512)
    with pytest.raises(ValueError, match="leaves nothing"):
        recipe.control_size(folder, (500, 500), (64, 64), 16)


def test_a_2511_transformer_tells_controls_from_noise(kind: str, pipeline: Any) -> None:
    assert bool(pipeline.transformer.config.get("zero_cond_t", False)) == (kind == "2511")


def test_the_preset_has_no_idle_module(kind: str, recipe: Recipe) -> None:
    transformer = tiny_edit.pipeline(kind).transformer
    silent = silent_modules(recipe, transformer, random_told(kind), LATENT)
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}"
    unread = {name for name in silent if not name.startswith((last, "norm_out"))}
    assert not unread


def test_it_learns_one_latent(kind: str, recipe: Recipe) -> None:
    family = FLUX if kind == "kontext" else QWEN_IMAGE
    transformer = tiny_edit.pipeline(kind).transformer
    losses = losses_on_one_latent(recipe, transformer, family, random_told(kind), LATENT, steps=40)
    assert losses[-1] < 0.3 * losses[0]


def test_the_pipelines_class_chooses_the_recipe(tmp_path: Path) -> None:
    names = {"QwenImagePipeline": "qwen_image", "QwenImageEditPipeline": "qwen_image_edit"}
    names |= {"QwenImageEditPlusPipeline": "qwen_image_edit_plus"}
    index = tmp_path / "model_index.json"
    for pipeline_class, name in names.items():
        index.write_text(f'{{"_class_name": "{pipeline_class}"}}')
        assert recipe_for("qwen_image", tmp_path).name == name
    index.write_text('{"_class_name": "FluxFillPipeline"}')
    with pytest.raises(CheckpointError, match="names a FluxFillPipeline; this family is trained for FluxPipeline, Flu"):
        recipe_for("flux", tmp_path)
