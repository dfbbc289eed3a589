"""Text encoders and tokenizers of the CLIP and T5 kinds, small and random, and the 2-D VAE that goes with them."""

from __future__ import annotations

import json
from typing import Any

from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = ("a red star on a navy background", "ink sketch of a blue circle", "and a green square")


def clip_tokenizer() -> Any:
    """A byte-level BPE; transformers adds CLIP's own splitting, start and end."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),
    )
    model = json.loads(bpe.to_str())["model"]
    pieces = [*model["vocab"], *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]], model_max_length=77)


def t5_tokenizer() -> Any:
    """A unigram model of words and letters; transformers adds T5's own splitting and end."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz"),
        show_progress=False,
    )
    unigram.train_from_iterator(WORDS * 4, trainer)
    vocab = json.loads(unigram.to_str())["model"]["vocab"]
    return T5TokenizerFast(vocab=[tuple(piece) for piece in vocab], extra_ids=0)


def clip(cls: Any, tokenizer: Any, width: int) -> Any:
    """A text encoder of class `cls` with 3 layers, so that its last, its last but one and its first differ."""
    config = CLIPTextConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=width,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=len(tokenizer),
        projection_dim=width,
    )
    return cls(config).eval()


def t5(tokenizer: Any, width: int, cls: Any = T5EncoderModel) -> Any:
    """A T5 encoder of 2 layers, or another `cls` of its kind."""
    config = cls.config_class(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return cls(config).eval()


def vae(channels: int = 4) -> Any:
    """4x reduction, shifted and scaled."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    ).eval()
