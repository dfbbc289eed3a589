"""How long captions are, as a family's own tokenizer counts, before any text encoder is loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafuse_common.checkpoint import read_json
from lorafuse_train.console import only_errors

QWEN_END = "<|im_end|>\n<|im_start|>assistant\n"
CLIP_PROMPT = 77
"""Tokens that CLIP reads, its two marks among them."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long each caption is."""

    counts: tuple[int, ...]
    unit: str
    """`tokens`, with what the family writes around a caption, or `characters`."""
    longest: int | None = None
    """How many of them are read; None where that is not known."""


@dataclass(frozen=True, slots=True)
class Reader:
    """What reads a family's captions."""

    count: Callable[[Any, str], int]
    """How many tokens a caption is for a tokenizer, with what the family writes around it."""
    longest: Mapping[str, int]
    """Tokens that are read, by the tokenizer's folder in the pipeline; the first folder that is there counts."""


def _with_marks(tokenizer: Any, caption: str) -> int:
    """With those that the tokenizer itself sets."""
    return len(tokenizer(caption).input_ids)


def _qwen(tokenizer: Any, caption: str) -> int:
    """With the end of the template; its beginning is dropped."""
    return len(tokenizer(f"{caption}{QWEN_END}").input_ids)


def _z_image(tokenizer: Any, caption: str) -> int:
    return _chat(tokenizer, caption, enable_thinking=True)


def _flux2(tokenizer: Any, caption: str) -> int:
    return _chat(tokenizer, caption, enable_thinking=False)


def _chat(tokenizer: Any, caption: str, **options: Any) -> int:
    message = [{"role": "user", "content": caption}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **options)
    return len(tokenizer(text).input_ids)


def _flux2_dev(tokenizer: Any, caption: str) -> int:
    from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input

    (messages,) = format_input([caption], SYSTEM_MESSAGE)
    return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])


@functools.cache
def readers() -> Mapping[str, Reader]:
    """By the class in model_index.json; without those that show the text encoder pictures, which are tokens too."""
    from lorafuse_train.recipes import (  # diffusers, for which plain counting need not wait
        flux,
        flux2,
        qwen_image,
        sd3,
        wan,
        z_image,
    )

    wan_reader = Reader(_with_marks, {"tokenizer": wan.LONGEST_PROMPT})
    return {
        "QwenImagePipeline": Reader(_qwen, {"tokenizer": qwen_image.LONGEST_PROMPT}),
        "FluxPipeline": Reader(_with_marks, {"tokenizer_2": flux.LONGEST_PROMPT}),
        "Flux2Pipeline": Reader(_flux2_dev, {"tokenizer": flux2.LONGEST_PROMPT}),
        "Flux2KleinPipeline": Reader(_flux2, {"tokenizer": flux2.LONGEST_PROMPT}),
        "StableDiffusion3Pipeline": Reader(_with_marks, {"tokenizer_3": sd3.LONGEST_PROMPT, "tokenizer": CLIP_PROMPT}),
        "ZImagePipeline": Reader(_z_image, {"tokenizer": z_image.LONGEST_PROMPT}),
        "WanPipeline": wan_reader,
        "WanImageToVideoPipeline": wan_reader,
    }


def measure_captions(captions: Sequence[str], pipeline: Path | None) -> Lengths:
    """In tokens where the pipeline's tokenizer is known and there, else in characters."""
    index = (read_json(pipeline / "model_index.json") if pipeline else None) or {}
    reader = readers().get(str(index.get("_class_name"))) if pipeline else None
    there = [name for name in reader.longest if pipeline and (pipeline / name).is_dir()] if reader else []
    if reader is None or pipeline is None or not there:
        return Lengths(tuple(len(caption) for caption in captions), "characters")
    with only_errors():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(pipeline / there[0])
        counts = tuple(reader.count(tokenizer, caption) for caption in captions)
    return Lengths(counts, "tokens", reader.longest[there[0]])
