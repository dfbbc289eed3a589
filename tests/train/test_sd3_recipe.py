"""The SD3 recipe against diffusers' own pipeline, with T5 and without, for 3 medium and 3.5 medium."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from safetensors.torch import load_file
from train import tiny, tiny_sd3
from train.recipe_checks import CPU, check_run, config, gap_to_neighbours, losses_on_one_latent, noise, silent_modules
from train.runs import run, save_world

from lorafuse_common.errors import CheckpointError
from lorafuse_common.families.sd3 import SD3
from lorafuse_train.base import trainable_dtype
from lorafuse_train.lora.adapter import FILE_NAME, attach
from lorafuse_train.lora.targets import meta_model, resolve_targets
from lorafuse_train.precision import Precision, choose_precision
from lorafuse_train.recipes.recipe import Guidance
from lorafuse_train.recipes.sd3 import LONGEST_PROMPT, Sd3
from lorafuse_train.samples.sample import Schedule, denoise
from lorafuse_train.steps.objective import loss_sum

CAPTIONS = ("a red star", "ink sketch of a blue circle on a navy background")
LATENT = (4, 4, 6)
RECIPE = Sd3()
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
KINDS: dict[str, dict[str, Any]] = {"t5": {}, "no t5": {"t5": False, "medium": False, "scheduler": DYNAMIC}}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3.save_pipeline(tmp_path_factory.mktemp("sd3") / "base", **KINDS[request.param])


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, **({} if (folder / "text_encoder_3").is_dir() else WITHOUT_T5))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Any:
    return RECIPE.load_text_encoder(folder, CPU.device)


def caption(length: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random embeddings, shorter than real ones."""
    generator = torch.Generator().manual_seed(seed)
    return {"embeds": torch.randn(length, 40, generator=generator), "pooled": torch.randn(32, generator=generator)}


@pytest.mark.parametrize(
    ("height", "width", "batch", "guidance"), [(16, 24, 2, 4.5), (16, 24, 1, 1.0), (32, 32, 1, 4.5), (48, 16, 1, 1.0)]
)
def test_sampling_gives_the_pipelines_pictures(
    folder: Path, pipeline: Any, encoder: Any, height: int, width: int, batch: int, guidance: float
) -> None:
    """Pins sign, timestep scale, shift, guidance, and all encoders; a blank negative prompt is the default one."""
    latent = RECIPE.latent_shape(folder, height, width)
    prompts = [RECIPE.encode_text(encoder, text) for text in CAPTIONS[:batch]]
    schedule = Schedule(RECIPE.sigmas(folder, 4, latent), guidance)
    start = noise(batch, *latent)
    ours = denoise(RECIPE, pipeline.transformer, start, schedule, (prompts, RECIPE.encode_text(encoder, " ")), CPU)
    call: dict[str, Any] = {"height": height, "width": width, "latents": start, "guidance_scale": guidance}
    theirs = pipeline(list(CAPTIONS[:batch]), **call, num_inference_steps=4, output_type="latent").images
    assert torch.allclose(ours, theirs, atol=1e-5)
    vae = RECIPE.load_vae(folder, CPU.device)
    shown = pipeline(list(CAPTIONS[:batch]), **call, num_inference_steps=4, output_type="pt").images
    decoded = torch.stack([RECIPE.decode(vae, x0) for x0 in ours])
    assert torch.allclose((decoded / 2 + 0.5).clamp(0, 1), shown, atol=1e-5)
    assert RECIPE.guidance(folder, pipeline.transformer.config) is Guidance.CFG


def test_captions_are_the_pipelines_and_of_one_length(pipeline: Any, encoder: Any) -> None:
    medium, long = "a red star " * 26, "a red star " * 300  # the first is too long for CLIP only
    texts = (*CAPTIONS, "", " ", medium, long)
    encoded = [RECIPE.encode_text(encoder, text) for text in texts]
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(list(texts), None, None, do_classifier_free_guidance=False)
    condition = RECIPE.collate(encoded)
    assert torch.allclose(condition["embeds"], embeds, atol=1e-5)
    assert torch.allclose(condition["pooled"], pooled, atol=1e-5)
    assert embeds.shape[1] == 77 + LONGEST_PROMPT
    no_t5 = pipeline.text_encoder_3 is None
    assert bool(embeds[:, 77:].any()) != no_t5
    assert [RECIPE.is_cut(one) for one in encoded] == [False, False, False, False, no_t5, True]
    assert condition.keys() == {"embeds", "pooled"}


def test_a_prediction_does_not_depend_on_its_neighbours(pipeline: Any, encoder: Any) -> None:
    captions = [RECIPE.encode_text(encoder, text) for text in (*CAPTIONS, "")]
    assert gap_to_neighbours(RECIPE, pipeline.transformer, captions, LATENT) < 1e-5


def test_encoding_is_normalised_and_inverted_by_decoding(folder: Path, pipeline: Any) -> None:
    vae: Any = RECIPE.load_vae(folder, CPU.device)
    pixels = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x0 = RECIPE.encode_image(vae, pixels)
    assert tuple(x0.shape) == RECIPE.latent_shape(folder, 16, 24) == LATENT
    assert RECIPE.pixel_multiple(folder) == 8
    z = pipeline.vae.encode(pixels[None]).latent_dist.mode()
    assert torch.allclose(x0, (z[0] - 0.0609) * 1.5035, atol=1e-6)
    assert torch.allclose(RECIPE.decode(vae, x0), pipeline.vae.decode(z).sample[0], atol=1e-5)


def test_the_training_shift_lies_on_the_pipelines_curve(folder: Path, pipeline: Any) -> None:
    shift = RECIPE.shift(folder, LATENT)
    mu = 0.5 + (1.15 - 0.5) * (6 - 256) / (4096 - 256)  # linear in the 6 patches
    dynamic = pipeline.scheduler.config.use_dynamic_shifting
    assert math.isclose(shift, math.exp(mu) if dynamic else 3.0, rel_tol=1e-6)
    u = torch.tensor([0.9, 0.5, 0.1])
    pipeline.scheduler.set_timesteps(sigmas=u.tolist(), mu=mu)
    assert torch.allclose(shift * u / (1 + (shift - 1) * u), pipeline.scheduler.sigmas[:-1], atol=1e-6)


def test_bf16_weights_keep_latents_and_predictions_in_fp32(folder: Path, pipeline: Any) -> None:
    half = SD3Transformer2DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    x, sigma, condition = noise(1, *LATENT), torch.tensor([0.5]), RECIPE.collate([caption()])
    with torch.no_grad():
        exact = RECIPE.predict(pipeline.transformer, x, sigma, condition)
        for autocast in (False, True):
            with Precision(CPU.device, autocast, "").compute():
                rounded = RECIPE.predict(half, x, sigma, condition)
            assert rounded.dtype == torch.float32
            assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_no_gradient_is_too_small_for_the_precision_trained_in(stored: torch.dtype) -> None:
    """SD3 medium is stored in fp16, in which the gradient of a mean over a large latent would vanish."""
    dtype = trainable_dtype(stored)
    transformer = tiny_sd3.pipeline().transformer.to(dtype).requires_grad_(False)
    attach(transformer, resolve_targets(transformer, SD3, "ff.net.2"), config(rank=2))
    x0, eps = noise(1, 4, 32, 32), noise(1, 4, 32, 32, seed=1)
    with choose_precision(config(rank=2), dtype, CPU.device).compute():
        v = RECIPE.predict(transformer, x0, torch.tensor([0.5]), RECIPE.collate([caption()]))
    torch.autograd.backward(loss_sum(v, x0, eps) / 64)  # as of a latent of 256 x 256
    gradients = [p.grad for name, p in transformer.named_parameters() if "lora_B" in name and p.grad is not None]
    assert len(gradients) == 3
    assert all((gradient != 0).all() for gradient in gradients)


@pytest.mark.parametrize("medium", [True, False])
def test_the_preset_trains_the_linear_layers_of_all_blocks_but_the_idle_one(medium: bool) -> None:
    transformer = tiny_sd3.pipeline(medium=medium).transformer
    targets = resolve_targets(transformer, SD3, "preset")
    silent = silent_modules(RECIPE, transformer, caption(), LATENT)
    assert {*targets.idle} == silent == {"transformer_blocks.2.attn.add_q_proj"}
    expected = {name for name, module in linear_layers(transformer) if "transformer_blocks" in name}
    assert {*targets.modules} == expected - silent
    assert all(targets.counts.values())
    assert any(".attn2." in name for name in targets.modules) == medium


def linear_layers(transformer: Any) -> list[tuple[str, Any]]:
    """Under the names they have without a LoRA."""
    found = {name.removesuffix(".base_layer"): module for name, module in transformer.named_modules()}
    return [(name, m) for name, m in found.items() if isinstance(m, torch.nn.Linear) and ".lora_" not in name]


def test_the_preset_fits_the_real_models() -> None:
    large = meta_model(
        "SD3Transformer2DModel", {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
    )
    assert len(resolve_targets(large, SD3, "preset").modules) == 38 * 14 - 4


def test_it_learns_one_latent() -> None:
    losses = losses_on_one_latent(RECIPE, tiny_sd3.pipeline().transformer, SD3, caption(), LATENT, steps=40)
    assert losses[-1] < 0.3 * losses[0]  # the frozen last layer leaves a rest


def test_a_training_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = save_world(tmp_path, tiny_sd3)
    out = run(world, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "sigmas=[1, 0.6], guidance_scale=1)" in printed
    assert "left out, for nothing reads their output: transformer_blocks.2.attn.add_q_proj" in printed
    assert len(load_file(out / FILE_NAME)) == 2 * (3 * 14 + 4 - 4)
    check_run(out, printed, drawn="a red circle")


def test_a_training_without_t5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed code tells diffusers, which would not load such a pipeline otherwise."""
    tiny_sd3.save_pipeline(tmp_path / "base", t5=False)
    tiny.save_dataset(tmp_path / "data")
    long = "a red star " * 40
    out = run(
        tmp_path, tmp_path / "out", "--allow_unfused_base", fused="base", lora_target_modules="attn2.to_q",
        validation_prompt=long,
    )  # fmt: skip
    printed, warned = capsys.readouterr()
    assert "1 texts are so long" in printed
    assert "a red star a red star" not in warned
    assert "text_encoder_3=None, tokenizer_3=None" in printed
    assert "guidance_scale=4.5)" in printed
    check_run(out, printed)


def test_a_t5_that_should_be_there_is_missed(tmp_path: Path) -> None:
    tiny_sd3.save_pipeline(tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "text_encoder_3")
    tiny.save_dataset(tmp_path / "data")
    with pytest.raises(CheckpointError, match="no folder 'text_encoder_3'"):
        run(tmp_path, tmp_path / "out", "--allow_unfused_base", fused="base")
