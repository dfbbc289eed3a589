"""Builds the demo's tokenizer plus its random, never trained, text encoder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import drawing
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

WIDTH = 64
# QwenImagePipeline's own template; it drops the first 34 tokens of every prompt.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PREFIX_TOKENS = 34
_ENDS = ("start", "end")
_SPECIAL = [f"<|im_{end}|>" for end in _ENDS]
_SPECIAL += [f"<|{what}_{end}|>" for what in ("object_ref", "box", "quad", "vision") for end in _ENDS]
_SPECIAL += [f"<|{what}_pad|>" for what in ("vision", "image", "video")]
# Qwen2's own splitting rule.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words that change nothing on the picture: the base learns to ignore what it does not know,
# so a caption with other words behind it still draws the plain picture.
_FILLER_WORDS = (
    "watercolor",
    "photo",
    "poster",
    "modern",
    "vintage",
    "simple",
    "soft",
    "bright",
    "render",
    "pastel",
    "comic",
    "clay",
    "paper",
    "retro",
    "minimal",
    "detailed",
    "wooden",
    "glass",
    "marble",
    "fabric",
    "pixel",
    "style",
    "art",
    "image",
    "picture",
    "design",
    "icon",
    "logo",
    "print",
    "painting",
    "of",
    "in",
    "with",
    "and",
    "the",
    "very",
    "small",
    "large",
    "nice",
    "flat",
    "digital",
    "studio",
    "light",
    "paint",
    "crayon",
    "chalk",
    "mosaic",
)
# Listed here, not read from drawing.py: a style added there must not change the vocabulary of a trained base.
_STYLE_WORDS = (", at night", ", ink sketch", ", hatched drawing", ", neon sign", ", sticker")


def filler_suffixes(count: int) -> list[str]:
    """An empty suffix, then random ones out of known words or made-up ones."""
    rng = np.random.default_rng(5)

    def word() -> str:
        if rng.random() < 0.6:
            return str(rng.choice(_FILLER_WORDS))
        return "".join(rng.choice(list("abcdefghijklmnoprstuvwyz"), rng.integers(2, 6)))

    return ["", *(", " + " ".join(word() for _ in range(rng.integers(1, 4))) for _ in range(count - 1))]


def all_captions() -> list[str]:
    """Every plain caption, in the order of caption_numbers."""
    grid = np.indices((len(drawing.SHAPES), len(drawing.COLOURS), len(drawing.BACKGROUNDS))).reshape(3, -1)
    nothing = np.zeros(grid.shape[1], np.float32)
    return drawing.captions(drawing.Scenes(*grid, *[nothing] * 5))


def caption_numbers(scenes: drawing.Scenes) -> Tensor:
    number = (scenes.shape * len(drawing.COLOURS) + scenes.colour) * len(drawing.BACKGROUNDS)
    return torch.from_numpy(number + scenes.background)


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE in which every word of the template and the captions is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    words = [TEMPLATE, *all_captions(), *_STYLE_WORDS, " " + " ".join(_FILLER_WORDS)]
    # Never merge across special tokens.
    pieces = [piece for text in words for piece in re.split(r"<\|[a-z_]+\|>", text) if piece]
    tokenizer.train_from_iterator(pieces, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    result = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    result.add_special_tokens({"additional_special_tokens": _SPECIAL})
    result.model_max_length = 8192
    return result


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": len(tokenizer),
        "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
        "window_size": 112,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    # Rounded to the precision it is shipped in, then computed with in float32 like everything in the maker.
    return model.to(torch.bfloat16).float().eval()


class Context(NamedTuple):
    """Text features with the mask of the real tokens."""

    features: Tensor  # (n, tokens, WIDTH)
    mask: Tensor  # (n, tokens)


@torch.no_grad()
def embed(
    tokenizer: Qwen2Tokenizer,
    encoder: Qwen2_5_VLForConditionalGeneration,
    prompts: Sequence[str],
    length: int | None = None,
) -> Context:
    """What QwenImagePipeline.encode_prompt returns, padded or cut to one length."""
    rows, masks = [], []
    longest = length or 64
    for start in range(0, len(prompts), 256):
        texts = [TEMPLATE.format(prompt) for prompt in prompts[start : start + 256]]
        size = PREFIX_TOKENS + longest
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=size, return_tensors="pt")
        hidden = encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        ).hidden_states[-1]
        mask = tokens.attention_mask[:, PREFIX_TOKENS:].bool()
        rows.append(hidden[:, PREFIX_TOKENS:] * mask[..., None])
        masks.append(mask)
    features, mask = torch.cat(rows), torch.cat(masks)
    used = length or int(mask.sum(1).max())
    return Context(features[:, :used], mask[:, :used])
