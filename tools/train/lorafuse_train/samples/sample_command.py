"""`lorafuse-train sample`: pictures from a fused base, without and with LoRAs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lorafuse_common.errors import LorafuseError, OutputError
from lorafuse_common.hashing import sha256_of
from lorafuse_train.atomic import write_atomically
from lorafuse_train.base import load_transformer
from lorafuse_train.console import only_errors, quiet_libraries, say, ticking
from lorafuse_train.dataset.data import Prompt
from lorafuse_train.encoding.encode import control_pictures, free
from lorafuse_train.experts import both
from lorafuse_train.lora.loaded_lora import add_loras
from lorafuse_train.precision import Precision, choose_precision
from lorafuse_train.recipes.recipe import Encoded, latent_shape
from lorafuse_train.samples.film import USUAL_RATE, write_film
from lorafuse_train.samples.gallery import shown
from lorafuse_train.samples.grid import LabelledRow, draw_grid
from lorafuse_train.samples.sample import Column, draw_row, noise_from, steps_of_row
from lorafuse_train.samples.sample_options import SampleConfig
from lorafuse_train.samples.sample_plan import Request, as_training, choose_schedule, plan_sample

GRID = "grid.png"


def run_sample(config: SampleConfig) -> None:
    """Draw, and write a PNG for each picture and a grid of all.

    Raises:
        LorafuseError: whatever is wrong with what the user gave.
    """
    quiet_libraries()
    request = plan_sample(config)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    precision = choose_precision(as_training(config), request.base.dtype, device)
    columns = _columns(request, device)
    try:
        with torch.no_grad():
            rows = _draw(request, columns, precision)
            _write(request, columns, rows, device)
    except torch.OutOfMemoryError as error:
        raise LorafuseError(f"{device}: out of memory; try a smaller --height and --width ({error})") from error


def _columns(request: Request, device: torch.device) -> list[Column]:
    """Encode prompts and pictures; neither VAE nor text encoder stays in memory."""
    recipe, pipeline, config = request.recipe, request.base.pipeline, request.config
    negatives = [
        replace(prompt, caption=config.negative_prompt if asked.negative_prompt is None else asked.negative_prompt)
        for asked, prompt in request.prompts
    ]
    encoded = _encode(request, [*(prompt for _, prompt in request.prompts), *negatives], device)
    columns = []
    for (asked, prompt), negative in zip(request.prompts, negatives, strict=True):
        latent = latent_shape(recipe, pipeline, prompt.shape)
        columns.append(
            Column(
                prompt.caption,
                encoded[prompt],
                encoded[negative],
                noise_from(config.seed if asked.seed is None else asked.seed, latent),
                (choose_schedule(request, asked, latent),),
                tuple(control.size for control in prompt.controls),
                tuple(seen.picture for seen in control_pictures(prompt)),
            )
        )
    return columns


def _encode(request: Request, prompts: Sequence[Prompt], device: torch.device) -> dict[Prompt, Encoded]:
    recipe, pipeline = request.recipe, request.base.pipeline
    say("loading the text encoder")
    encoder = recipe.load_text_encoder(pipeline, device)
    found: dict[Prompt, Encoded] = {}
    for prompt in dict.fromkeys(prompts):
        seen = control_pictures(prompt) if recipe.text_sees_controls else ()
        with only_errors():
            found[prompt] = recipe.encode_text(encoder, prompt.caption, seen)
    del encoder
    free(device)
    if any(prompt.controls for prompt in found):
        vae = recipe.load_vae(pipeline, device)
        for prompt, told in found.items():
            if prompt.controls:
                found[prompt] = {**told, **recipe.encode_controls(vae, control_pictures(prompt), prompt.shape)}
        del vae
        free(device)
    return found


def _draw(request: Request, columns: Sequence[Column], precision: Precision) -> dict[str, list[Tensor]]:
    """Name of a row -> x0 of its columns."""
    base, recipe = request.base, request.recipe
    say(f"loading the transformer; drawing {len(columns)} prompts, {_described(columns)}, on {precision.device}")
    transformer = load_transformer(base, base.transformer, precision.device).eval()
    parts = {base.component: transformer}
    if base.expert:
        parts[base.expert.other.name] = load_transformer(base, base.expert.other, torch.device("cpu")).eval()
    for component, loras in request.loras.items():
        add_loras(parts[component], loras)
    with_loras = [parts[component] for component in request.loras]
    rows: dict[str, list[Tensor]] = {}
    total = steps_of_row(columns, 0) * (2 if with_loras else 1)
    other = next((part for name, part in parts.items() if name != base.component), None)
    with both(base.expert, transformer, precision.device, lambda: other) as model, ticking(total, "drawing") as tick:
        for part in with_loras:
            part.disable_adapters()
        rows["base"] = draw_row(recipe, model, columns, 0, precision, tick)
        if with_loras:
            for part in with_loras:
                part.enable_adapters()
            rows["lora"] = draw_row(recipe, model, columns, 0, precision, tick)
    return rows


def _described(columns: Sequence[Column]) -> str:
    different = dict.fromkeys(str(column.schedules[0]) for column in columns)
    return " or ".join(different)


def _write(request: Request, columns: Sequence[Column], rows: Mapping[str, list[Tensor]], device: torch.device) -> None:
    out, recipe, base = request.config.output_path, request.recipe, request.base
    vae = recipe.load_vae(base.pipeline, device)
    labels = {
        "base": "fused base" if base.manifest else "base",
        "lora": "\n+ ".join(["fused base" if base.manifest else "base", *map(str, request.all_loras)]),
    }
    sheet = []
    try:
        for kind, latents in rows.items():
            pictures = []
            for number, (column, x0) in enumerate(zip(columns, latents, strict=True), 1):
                pixels = recipe.decode(vae, x0)
                pictures.append(shown(pixels))
                name = out / f"{number:02}-{kind}.png"
                _save(name, pictures[-1], _facts(request, number - 1, column, kind == "lora"))
                if pixels.ndim == 4 and pixels.shape[1] > 1:
                    write_film(name.with_suffix(".mp4"), [pixels], USUAL_RATE)
            sheet.append(LabelledRow(f"{labels[kind]}\n{_described(columns)}", pictures))
        write_atomically(out / GRID, draw_grid([column.text for column in columns], sheet).save)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error})") from error
    say(f"drawn: {out / GRID}, and {len(rows) * len(columns)} pictures beside it")


def _facts(request: Request, index: int, column: Column, with_loras: bool) -> dict[str, Any]:
    """What a picture was made of; no clocks, hosts or paths."""
    asked, prompt = request.prompts[index]
    schedule = column.schedules[0]
    return {
        "prompt": prompt.caption,
        "seed": request.config.seed if asked.seed is None else asked.seed,
        "size": [*prompt.shape[:0:-1]],
        "sigmas": [*schedule.sigmas],
        "guidance_scale": schedule.guidance_scale,
        "fused_sha256": request.base.fused_sha256,
        "loras": [
            {"name": lora.wanted.path.name, "sha256": sha256_of(lora.wanted.path), "strength": lora.wanted.strength}
            for lora in (request.all_loras if with_loras else ())
        ],
    }


def _save(path: Path, picture: Image.Image, facts: Mapping[str, Any]) -> None:
    info = PngInfo()
    info.add_itxt("lorafuse", json.dumps(facts, ensure_ascii=False))
    write_atomically(path, lambda file: picture.save(file, pnginfo=info))
