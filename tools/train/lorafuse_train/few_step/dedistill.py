"""`lorafuse-train make-dedistill`: an adapter that makes of a few-step base an ordinary one again, for training on.

The recipe of ostris' training adapters, for any fused base: the base draws pictures in its own few steps, and plain
flow matching at a low rate on these teaches it nothing new but to be a flow model again. With the adapter fused into
it as a scaffold, a new LoRA is trained without having to undo the distillation itself; it is then used without.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorafuse_common.errors import ConfigError
from lorafuse_train.atomic import write_atomically
from lorafuse_train.base import Base, check_parts, load_transformer, open_base
from lorafuse_train.console import progress, quiet_libraries, say
from lorafuse_train.dataset.data import Prompt
from lorafuse_train.dataset.pictures import to_picture
from lorafuse_train.encoding.encode import Encodings, fill_cache, free, open_cache
from lorafuse_train.few_step.objective_base import is_few_step
from lorafuse_train.few_step.trajectories import starting_noise
from lorafuse_train.launch import make_accelerator
from lorafuse_train.lora.targets import Targets
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import resolve_config
from lorafuse_train.plan import Plan
from lorafuse_train.precision import Precision, choose_precision
from lorafuse_train.recipes import recipe_for
from lorafuse_train.recipes.recipe import Latent, Recipe, latent_shape
from lorafuse_train.samples.gallery import choose_schedules
from lorafuse_train.samples.prompts import unrelated_prompts
from lorafuse_train.samples.sample import Schedule, count_at_once, denoise
from lorafuse_train.train import run

FOLDER = "pictures"
SIDE = 1024
"""Pixels of a side, unless --height and --width say otherwise."""
RATE = 1e-5
FIXED = {"objective_base": "fused", "preserve_weight": "0"}
"""It is the few-step ability that is to go."""


def make_dedistill(given: Mapping[str, Any]) -> None:
    """Draw the pictures, which `--output_path`/pictures keeps, and train the adapter on them.

    Raises:
        LorafuseError: whatever is wrong with what the user gave.
    """
    quiet_libraries()
    config = _configure(given)
    base = open_base(config)
    recipe = recipe_for(base.family.name, base.pipeline)
    check_parts(base, recipe, None)
    if not is_few_step(base.manifest):
        raise ConfigError(f"--fused_model {base.folder}: is no few-step base, so there is nothing to take off it")
    if recipe.controls[0] or recipe.frame_step or base.expert:
        raise ConfigError(f"make-dedistill: {base.family.title} is not drawn from text alone, one picture at a time")
    texts = unrelated_prompts(base.family.name, config.dedistill_prompts, option="dedistill_prompts")
    accelerator = make_accelerator()
    if accelerator.is_main_process:
        wanted = [texts[number % len(texts)] for number in range(config.dedistill_pictures)]
        _draw(config, base, recipe, wanted, choose_precision(config, base.dtype, accelerator.device))
    accelerator.wait_for_everyone()
    run(config)
    say(
        "use it as a scaffold:\n"
        f"  lorafuse fuse {base.folder} --lora {config.output_path / 'pytorch_lora_weights.safetensors'} "
        "--role scaffold --out DIR\n"
        "and train on DIR; the new LoRA is for the base without it"
    )


def _configure(given: Mapping[str, Any]) -> TrainConfig:
    """The options of the training: the user's, on pictures of our own."""
    taken = [name for name in (*FIXED, "dataset_base_path") if given.get(name) is not None]
    if taken:
        raise ConfigError(f"make-dedistill: --{taken[0]} is decided by what it does; leave it out")
    out = given.get("output_path")
    own = {"dataset_base_path": str(Path(str(out)) / FOLDER)} if out else {}
    sizes = {} if given.get("config") or given.get("height") else {"height": str(SIDE), "width": str(SIDE)}
    rate = {} if given.get("config") or given.get("learning_rate") else {"learning_rate": str(RATE)}
    return resolve_config({**given, **FIXED, **own, **sizes, **rate})


def _draw(config: TrainConfig, base: Base, recipe: Recipe, prompts: Sequence[str], precision: Precision) -> None:
    """A picture for every prompt, and metadata.csv, last; what an interrupted run has drawn is kept."""
    folder = config.dataset_base_path
    latent = latent_shape(recipe, base.pipeline, (1, config.height or SIDE, config.width or SIDE))
    few, *_ = choose_schedules(config, base, recipe, latent)
    paths = [folder / f"{_key(config, base, few, latent, place)}.png" for place in enumerate(prompts)]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    if missing:
        say(f"drawing {len(missing)} of {len(paths)} pictures with the few-step base ({folder})")
        _draw_missing(config, base, recipe, (few, latent), (prompts, paths, missing), precision)

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["image", "prompt"])
            rows.writerows((path.name, prompt) for path, prompt in zip(paths, prompts, strict=True))

    write_atomically(folder / "metadata.csv", write)


def _key(config: TrainConfig, base: Base, few: Schedule, latent: Latent, place: tuple[int, str]) -> str:
    """Number and hash of all that a picture depends on; `place`: its number and its prompt."""
    number, negative = place[0], config.validation_negative_prompt if few.is_guided else ""
    origin = repr((base.fused_sha256, place, few, latent, negative))
    return f"{number:05}-{hashlib.sha256(origin.encode()).hexdigest()[:12]}"


def _draw_missing(
    config: TrainConfig,
    base: Base,
    recipe: Recipe,
    walk: tuple[Schedule, Latent],
    wanted: tuple[Sequence[str], Sequence[Path], Sequence[int]],
    precision: Precision,
) -> None:
    (few, latent), (prompts, paths, missing) = walk, wanted
    plan = Plan(config, base, recipe, Targets((), {}, (), {}), ())
    negative = Prompt(config.validation_negative_prompt)
    cache = open_cache(plan)
    fill_cache(cache, plan, [negative, *(Prompt(prompts[number]) for number in missing)], precision.device)
    encodings = Encodings(cache)
    transformer = load_transformer(base, base.transformer, precision.device)
    vae = recipe.load_vae(base.pipeline, precision.device)
    at_once = count_at_once(latent)
    blocks = [missing[start : start + at_once] for start in range(0, len(missing), at_once)]
    for block in progress(blocks, len(blocks), "drawing"):
        texts = [encodings.caption(prompts[number]) for number in block], encodings.condition(negative)
        noise = torch.stack([starting_noise(number, latent) for number in block])
        drawn = denoise(recipe, transformer, noise, few, texts, precision)
        for number, x0 in zip(block, drawn, strict=True):
            picture = to_picture(recipe.decode(vae, x0))
            write_atomically(paths[number], picture.save)
    del transformer, vae
    free(precision.device)
