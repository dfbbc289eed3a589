"""python examples/shapes/make_assets.py --out /tmp/shapes

Makes every file of the demo from fixed seeds with fixed step counts; README.md tells how long it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from maker import evaluate, lightning
from maker.base import train_base, training_data
from maker.bench import Bench, remove_paths
from maker.dit import SHIFT
from maker.lora import factors, module_names, save_lightning_layout, save_peft_layout
from maker.scoring import train_judge
from maker.style import StyleRecipe, train_style
from maker.text import Context, caption_numbers
from maker.vae import build_vae, single_frame, train_vae

VAE_STEPS = 4500
BASE_STEPS = 9000
JUDGE_STEPS = 1000
LIGHTNING_STEPS = 900
NIGHT_PICTURES = 512
NIGHT = StyleRecipe(module_names(), rank=8, rate=2e-3, steps=400, batch=32)


def make_vae(bench: Bench) -> None:
    vae = build_vae()
    with single_frame():
        train_vae(vae, VAE_STEPS)
    vae.save_pretrained(bench.vae_folder)


def make_data(bench: Bench) -> None:
    with single_frame():
        torch.save(training_data(bench.vae(), bench.tokenizer, bench.encoder), bench.data_file)


def make_base(bench: Bench) -> None:
    train_base(bench.data(), BASE_STEPS, bench.checkpoint).save_pretrained(bench.transformer_folder)


def make_pipeline(bench: Bench) -> None:
    pipeline = QwenImagePipeline(
        transformer=bench.transformer().to(torch.bfloat16),
        vae=bench.vae().to(torch.bfloat16),
        text_encoder=bench.encoder.to(torch.bfloat16),
        tokenizer=bench.tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    pipeline.save_pretrained(bench.base)
    bench.encoder.float()
    remove_paths(bench.base)


def make_lightning(bench: Bench) -> None:
    plain, model = bench.plain(), bench.transformer()
    lessons = lightning.teach(model, plain, bench.empty())
    lightning.distil(model, lessons, plain, LIGHTNING_STEPS)
    save_lightning_layout(factors(model), lightning.ALPHA, bench.lightning, lightning.schedule())


def make_night(bench: Bench) -> None:
    latents, scenes = evaluate.encoded_style(bench, "night", NIGHT_PICTURES, seed=12)
    # Plain captions: whoever fuses this LoRA wants night everywhere, without a word for it.
    context = Context(*(part[caption_numbers(scenes)] for part in bench.plain()))
    model = bench.transformer()
    train_style(model, latents, context, NIGHT)
    save_peft_layout(factors(model), bench.night)


def make_judge(bench: Bench) -> None:
    torch.save(train_judge(JUDGE_STEPS).state_dict(), bench.judge_file)


def make_scores(bench: Bench) -> None:
    scores = evaluate.measure(bench, BASE_STEPS)
    text = json.dumps(scores, indent=2) + "\n"
    (bench.out / "scores.json").write_text(text, encoding="utf-8")
    print(text)


def make_grids(bench: Bench) -> None:
    evaluate.draw_grids(bench, bench.work)


STAGES: dict[str, Callable[[Bench], None]] = {
    "vae": make_vae,
    "data": make_data,
    "base": make_base,
    "pipeline": make_pipeline,
    "lightning": make_lightning,
    "night": make_night,
    "judge": make_judge,
    "scores": make_scores,
    "grids": make_grids,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        help="folder of the files to ship (default: this one)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "lorafuse-shapes",
        help="folder for what only the maker needs (default: %(default)s)",
    )
    parser.add_argument(
        "--stage",
        choices=list(STAGES),
        action="append",
        help="only this one; repeatable (default: all, in order)",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.work, options.out)
    for stage in options.stage or STAGES:
        print(f"== {stage}", flush=True)
        STAGES[stage](bench)


if __name__ == "__main__":
    main()
