"""A complete random `QwenImagePipeline` small enough to train in a test, made offline."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
WORDS = "a red star on a navy background, ink sketch of a blue circle and a green square"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DYNAMIC_SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
"""The real Qwen-Image's scheduler."""


def tokenizer(prefix: str = PREFIX, dropped: int = 34) -> Any:
    """A byte-level BPE in which the pipeline's prompt prefix is exactly the tokens that it drops."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    pieces = [piece for piece in re.split(r"<\|[a-z_]+\|>", prefix + WORDS + SUFFIX) if piece]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(pieces, trainer)
    model = json.loads(bpe.to_str())["model"]
    made = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    assert len(made(prefix).input_ids) == dropped
    return made


def pipeline(*, layers: int = 2, scheduler: dict[str, Any] | None = None, words: Any = None, **options: Any) -> Any:
    """A random pipeline of 4x reduction, whose pictures are multiples of 8 pixels; weights fixed by a seed.

    `words` is its tokenizer, and `options` are further ones of the transformer.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = words or tokenizer()
        text_config = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(words),
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        }
        vision_config = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
        encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=text_config,
                vision_config=vision_config,
                vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
                image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
                video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
            )
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.5, 2.0, 1.0],
        )
        transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
            **options,
        )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler or {"shift": 2.0})),
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=words,
        transformer=transformer.eval(),
    )


def save(made: Any, folder: Path) -> Path:
    """A pipeline of any family written to `folder`, in silence."""
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return folder


def save_pipeline(folder: Path, **options: Any) -> Path:
    """`pipeline(**options)` written to `folder`."""
    return save(pipeline(**options), folder)


def save_dataset(folder: Path, sizes: tuple[tuple[int, int], ...] = ((32, 32),) * 4) -> Path:
    """Pictures of the given (width, height) with captions of different lengths in a `metadata.csv`."""
    folder.mkdir(parents=True)
    rows = []
    for number, size in enumerate(sizes):
        colour = ("red", "blue", "green")[number % 3]
        picture = Image.new("RGB", size, "navy")
        ImageDraw.Draw(picture).ellipse((4 + number, 4, 24, 24), fill=colour)
        picture.save(folder / f"{number}.png")
        rows.append((f"{number}.png", f"a {colour} circle" + " on a navy background" * (number % 2)))
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt"), *rows])
    return folder


def save_lightning(path: Path, *, seed: int = 1) -> Path:
    """A random LoRA for `pipeline`, spelled as the published Lightning LoRAs are."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block in (0, 1):
        for name in ("to_q", "to_v"):
            module = f"transformer_blocks.{block}.attn.{name}"
            tensors[f"{module}.lora_down.weight"] = torch.randn(4, 32, generator=generator) * 0.3
            tensors[f"{module}.lora_up.weight"] = torch.randn(32, 4, generator=generator) * 0.3
            tensors[f"{module}.alpha"] = torch.tensor(8.0)
    save_file(tensors, path)
    return path


def save_lora(path: Path, modules: Iterable[str], *, width: int = 32) -> Path:
    """A random LoRA for square layers of a transformer, as diffusers spells it."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module in modules:
        for factor, shape in (("A", (4, width)), ("B", (width, 4))):
            tensors[f"transformer.{module}.lora_{factor}.weight"] = torch.randn(shape, generator=generator) * 0.3
    save_file(tensors, path)
    return path
