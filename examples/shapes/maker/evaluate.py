"""Measures the shipped models and draws their sample grids."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import drawing
import numpy as np
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from maker.base import PICTURES, matmul_attention
from maker.bench import Bench
from maker.dit import Guidance, decode, encode, starting_noise, trajectory
from maker.lightning import GUIDANCE, STEPS, TEACHER_STEPS
from maker.lora import fuse
from maker.pictures import drawn, save_grid
from maker.scoring import Score
from maker.text import Context, embed
from maker.vae import psnr, reconstruct, single_frame

SAMPLES = 512
COLUMNS = 18


class Setting(NamedTuple):
    """A model with a way to sample it."""

    name: str
    model: QwenImageTransformer2DModel
    steps: int
    guided: bool = False


def grid_scenes(columns: int) -> drawing.Scenes:
    """What is on the pictures of a grid: the shapes in turn."""
    scenes = drawing.random_scenes(columns, np.random.default_rng(8))
    return scenes._replace(shape=np.arange(columns) % len(drawing.SHAPES))


def sample(bench: Bench, setting: Setting, prompts: list[str], seed: int) -> Tensor:
    context = embed(bench.tokenizer, bench.encoder, prompts)
    guidance = Guidance(GUIDANCE, bench.empty()) if setting.guided else None
    noise, vae, pictures = starting_noise(len(prompts), seed), bench.vae(), []
    for rows in torch.split(torch.arange(len(prompts)), 128):
        part = Context(*(values[rows] for values in context))
        with matmul_attention(), torch.autocast("cpu", torch.bfloat16):
            latents = trajectory(setting.model, noise[rows], part, setting.steps, guidance)[-1]
        with single_frame():
            pictures.append(decode(vae, latents))
    return torch.cat(pictures)


def settings(bench: Bench) -> list[Setting]:
    base, fused = bench.transformer(), fuse(bench.transformer(), {bench.lightning: 1.0})
    return [
        Setting("base @2", base, STEPS),
        Setting("base @4", base, 2 * STEPS),
        Setting(f"base @{TEACHER_STEPS}, CFG {GUIDANCE:g}", base, TEACHER_STEPS, guided=True),
        Setting("fused @2", fused, STEPS),
    ]


def measure(bench: Bench, base_steps: int) -> dict[str, object]:
    """All scores of scores.json."""
    referee, scenes = bench.referee(), drawing.random_scenes(SAMPLES, np.random.default_rng(55))
    prompts, scores = drawing.captions(scenes), dict[str, Score]()
    with single_frame():
        vae = bench.vae()
        pictures, shown = drawn(SAMPLES, np.random.default_rng(31))
        scores["drawn pictures"] = referee.score(pictures, shown)
        scores["drawn pictures through the VAE"] = referee.score(reconstruct(vae, pictures), shown)
        quality = {style: round(psnr(vae, style), 1) for style in drawing.CAPTIONS}
    for setting in settings(bench):
        scores[setting.name] = referee.score(sample(bench, setting, prompts, seed=3), scenes)
        print(setting.name, scores[setting.name], flush=True)
        if setting.guided:
            longer = [f"{prompt}, ink sketch" for prompt in prompts]
            unknown = f"{setting.name}, unknown words behind the prompt"
            scores[unknown] = referee.score(sample(bench, setting, longer, seed=3), scenes)
            print(unknown, scores[unknown], flush=True)
    return {
        "transformer_parameters": sum(value.numel() for value in bench.transformer().parameters()),
        "base_training_steps": base_steps,
        "base_training_pictures": PICTURES,
        "samples_per_score": SAMPLES,
        "vae_psnr_db": quality,
        "scores": {name: score._asdict() for name, score in scores.items()},
    }


def draw_grids(bench: Bench, folder: Path) -> None:
    """grid_fuse.png: base @2, fused @2, base @16 with CFG. grid_night.png: the style LoRA fused."""
    scenes = grid_scenes(COLUMNS)
    prompts = drawing.captions(scenes)
    two, _, teacher, fused = settings(bench)
    rows = [sample(bench, setting, prompts, 4) for setting in (two, fused, teacher)]
    save_grid(rows, folder / "grid_fuse.png")
    if bench.night.exists():
        alone = Setting("", fuse(bench.transformer(), {bench.night: 1.0}), TEACHER_STEPS, guided=True)
        both = Setting("", fuse(bench.transformer(), {bench.lightning: 1.0, bench.night: 0.8}), STEPS)
        rows = [sample(bench, setting, prompts, 4) for setting in (fused, alone, both)]
        save_grid(rows, folder / "grid_night.png")


def encoded_style(bench: Bench, style: str, count: int, seed: int) -> tuple[Tensor, drawing.Scenes]:
    pictures, scenes = drawn(count, np.random.default_rng(seed), style)
    with single_frame():
        return encode(bench.vae(), pictures), scenes
