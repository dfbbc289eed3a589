"""python -m benchmarks.full_pipeline --out FOLDER --size 41

Makes a complete Qwen-Image pipeline whose transformer has the real shape and random weights (41 GB: all 60 layers),
the real VAE's shape, and a text encoder of one layer; beside it a Lightning-style LoRA and a small data set of
pictures. What it draws is noise, but fusing into it and training on it cost what the real ones cost.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path

import torch
from PIL import Image

from benchmarks.inputs import ROOT, TEXT_WIDTH, LoraShape, shape_for
from benchmarks.synthetic import build_base, build_lora

SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""Qwen/Qwen-Image's scheduler/scheduler_config.json."""
PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")


def build_pipeline(out: Path, size_gb: float) -> Path:
    """The pipeline's folder; its transformer is made first, as `benchmarks.synthetic` makes it."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    pipeline = out / "pipeline"
    pipeline.mkdir(parents=True)
    build_base(out, shape_for(size_gb)).rename(pipeline / "transformer")
    demo = ROOT / "examples" / "shapes" / "base"
    shutil.copytree(demo / "tokenizer", pipeline / "tokenizer")
    shutil.copy(demo / "model_index.json", pipeline)
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(pipeline / "scheduler")
    torch.manual_seed(0)
    AutoencoderKLQwenImage().to(torch.bfloat16).save_pretrained(pipeline / "vae")
    text = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": len(AutoTokenizer.from_pretrained(pipeline / "tokenizer")),
        "rope_parameters": {"mrope_section": [16, 24, 24], "rope_type": "default", "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    encoder.to(torch.bfloat16).save_pretrained(pipeline / "text_encoder")
    return pipeline


def build_dataset(folder: Path, count: int, side: int) -> None:
    """Square pictures of soft noise, with captions."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        small = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(small.numpy()).resize((side, side)).save(folder / f"{number}.png")
        rows.append((f"{number}.png", f"a red star and a blue circle, picture {number}"))
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt"), *rows])


def main() -> None:
    """Make all three, and say where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder to make them in")
    parser.add_argument("--size", type=float, default=41, help="GB of the transformer (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA to fuse (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=4, help="of the data set (default: %(default)s)")
    parser.add_argument("--side", type=int, default=1024, help="their height and width (default: %(default)s)")
    args = parser.parse_args()
    shape = shape_for(args.size)
    pipeline = build_pipeline(args.out, args.size)
    lora = build_lora(args.out, LoraShape(shape, args.rank, 0)).rename(args.out / "lightning.safetensors")
    build_dataset(args.out / "dataset", args.pictures, args.side)
    print(json.dumps({"pipeline": str(pipeline), "lora": str(lora), "dataset": str(args.out / "dataset")}))


if __name__ == "__main__":
    main()
