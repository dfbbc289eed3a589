"""One training and its scores, in a process of its own."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import drawing
import numpy as np
import torch
from diffusers import QwenImageTransformer2DModel
from maker.bench import Bench
from maker.evaluate import Setting, grid_scenes, sample
from maker.lightning import STEPS, TEACHER_STEPS
from maker.pictures import drawn, tensor_from
from maker.vae import reconstruct, single_frame
from safetensors.torch import load_file
from torch import Tensor

from lorafuse_train.samples.health import read_health
from trials.measure import Measure, load_judge
from trials.variants import TrainedOn, Variant, variant_named
from trials.workspace import COMMON, DEMO, Workspace, flags, write_json

LORA = "pytorch_lora_weights.safetensors"
COLUMNS = 10
"""Pictures of each kind that are kept for the grids."""
DOMAINS = ("new", "old")
SCHEDULES = {"few": (STEPS, False), "many": (TEACHER_STEPS, True)}
"""Name -> number of steps, and whether with guidance."""


def run_trial(space: Workspace, name: str) -> None:
    """Train where `name` is `VARIANT-SEED`, and write results.json with all scores."""
    torch.set_num_threads(space.threads)
    folder = space.run_of(name)
    if name == "drawn":
        scores, more = score_drawn(space), {}
    else:
        variant, seed = (None, 0) if name in ("fused", "original") else split(name)
        seconds = train(space, variant, seed, folder / "lora") if variant else 0.0
        base = space.checkpoint(TrainedOn.ORIGINAL if name == "original" else TrainedOn.FUSED)
        scores = score_model(space, base, folder, folder / "lora" / LORA if variant else None)
        more = {"seconds": round(seconds, 1), "health": health(folder / "lora") if variant else None}
    write_json(folder / "results.json", {"scores": scores, **more})


def split(name: str) -> tuple[Variant, int]:
    """The variant and the seed of a training's name."""
    variant, _, seed = name.rpartition("-")
    return variant_named(variant), int(seed)


def train(space: Workspace, variant: Variant, seed: int, out: Path) -> float:
    """Train through the command line, as a user would; returns seconds, with start-up and samples."""
    started = time.monotonic()
    options = {**COMMON, **variant.options, "seed": str(seed), "max_train_steps": str(space.steps)}
    texts = drawing.captions(grid_scenes(COLUMNS), space.style)[:8]
    prompts = [part for text in texts for part in ("--validation_prompt", text)]
    base = space.checkpoint(variant.trained_on)
    unfused = ["--allow_unfused_base"] if variant.trained_on is TrainedOn.ORIGINAL else []
    scaffold = variant.trained_on is TrainedOn.SCAFFOLD
    original = ["--original_model", str(space.checkpoint(TrainedOn.FUSED))] if scaffold else []
    space.call(
        "lorafuse_train", "train", "--fused_model", str(base), "--dataset_base_path", str(space.dataset),
        "--output_path", str(out), "--overwrite_output_dir", *flags(options), *prompts, *unfused, *original,
    )  # fmt: skip
    return time.monotonic() - started


def health(out: Path) -> dict[str, float] | None:
    """The last figures of the few-step health that the training logged; None where its base has no few steps."""
    found = read_health(out)
    return {"agreement": round(found[-1].agreement, 4), "sharpness": round(found[-1].sharpness, 4)} if found else None


@torch.no_grad()
def with_lora(base: Path, lora: Path | None) -> QwenImageTransformer2DModel:
    """The checkpoint in fp32, a LoRA of diffusers' spelling added to its weights."""
    model = QwenImageTransformer2DModel.from_pretrained(base / "transformer").eval().requires_grad_(False)
    state = load_file(lora) if lora else {}
    for name, down in state.items():
        if name.endswith(".lora_A.weight"):
            up = state[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            model.get_submodule(module).weight += up @ down  # the scale is in B
    return model


def score_model(space: Workspace, base: Path, folder: Path, lora: Path | None) -> dict[str, dict[str, Any]]:
    """Every domain at every schedule; keeps some pictures of each."""
    bench = Bench(space.out / "maker", DEMO)
    model, measure = with_lora(base, lora), Measure(load_judge(space.judge))
    scenes = drawing.random_scenes(space.samples, np.random.default_rng(55))
    found: dict[str, dict[str, Any]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        style = space.style if domain == "new" else "plain"
        for schedule, (steps, guided) in SCHEDULES.items():
            setting = Setting("", model, steps, guided)
            pictures = sample(bench, setting, drawing.captions(scenes, style), seed=3)
            found[f"{domain} {schedule}"] = dataclasses.asdict(measure.score(pictures, scenes, style))
            shown = sample(bench, setting, drawing.captions(grid_scenes(COLUMNS), style), seed=4)
            save_pictures(shown, folder / f"{domain}-{schedule}.pt")
    return found


def score_drawn(space: Workspace) -> dict[str, dict[str, Any]]:
    """What no model can beat: drawn pictures through the VAE."""
    bench, measure = Bench(space.out / "maker", DEMO), Measure(load_judge(space.judge))
    found: dict[str, dict[str, Any]] = {}
    for domain in DOMAINS:
        style = space.style if domain == "new" else "plain"
        pictures, scenes = drawn(space.samples, np.random.default_rng(31), style)
        shown = tensor_from(drawing.draw(grid_scenes(COLUMNS), style))
        with single_frame():
            restored = torch.cat([reconstruct(bench.vae(), part) for part in torch.split(pictures, 128)])
            shown = reconstruct(bench.vae(), shown)
        score = dataclasses.asdict(measure.score(restored, scenes, style))
        found |= {f"{domain} {schedule}": score for schedule in SCHEDULES}
        space.run_of("drawn").mkdir(parents=True, exist_ok=True)
        for schedule in SCHEDULES:
            save_pictures(shown, space.run_of("drawn") / f"{domain}-{schedule}.pt")
    return found


def save_pictures(pictures: Tensor, path: Path) -> None:
    """(n, 3, h, w) in -1..1, as bytes."""
    torch.save(((pictures.clamp(-1, 1) + 1) * 127.5).round().byte(), path)
