"""Where every intermediate result of the maker lies, with the ways to read it back."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from maker.base import TrainingData
from maker.scoring import Judge, Referee
from maker.text import Context, all_captions, build_text_encoder, build_tokenizer, embed


class Bench:
    """Two folders: `work` for what only the maker needs, `out` for what is shipped."""

    def __init__(self, work: Path, out: Path) -> None:
        self.work, self.out = work, out
        for folder in (work, out):
            folder.mkdir(parents=True, exist_ok=True)
        self.base = out / "base"
        self.lightning, self.night = out / "lightning.safetensors", out / "night.safetensors"
        self.vae_folder, self.transformer_folder = work / "vae", work / "transformer"
        self.data_file, self.judge_file = work / "data.pt", work / "judge.pt"
        self.checkpoint = work / "base.pt"

    @cached_property
    def tokenizer(self) -> Qwen2Tokenizer:
        return build_tokenizer()

    @cached_property
    def encoder(self) -> Qwen2_5_VLForConditionalGeneration:
        return build_text_encoder(self.tokenizer)

    def _trained(self, part: str) -> Path:
        # Without a work folder the shipped weights do, so anyone can measure them.
        folder = self.work / part
        return folder if folder.exists() else self.base / part

    def vae(self) -> AutoencoderKLQwenImage:
        """The trained VAE with the rounding of the shipped one."""
        vae = AutoencoderKLQwenImage.from_pretrained(self._trained("vae"), torch_dtype=torch.bfloat16)
        return vae.float().eval().requires_grad_(False)

    def transformer(self) -> QwenImageTransformer2DModel:
        return QwenImageTransformer2DModel.from_pretrained(self._trained("transformer")).eval()

    def data(self) -> TrainingData:
        saved = torch.load(self.data_file, weights_only=False)
        return TrainingData(*saved)

    def plain(self) -> Context:
        """One row per plain caption."""
        return embed(self.tokenizer, self.encoder, all_captions())

    def empty(self) -> Context:
        return embed(self.tokenizer, self.encoder, [" "])

    def referee(self) -> Referee:
        judge = Judge()
        judge.load_state_dict(torch.load(self.judge_file))
        return Referee(judge.eval())


def remove_paths(folder: Path) -> None:
    """Drops the fields in which the libraries note the folder a model was loaded from."""
    for path in sorted(folder.rglob("*.json")):
        if path.name == "tokenizer.json":
            continue
        values = json.loads(path.read_text(encoding="utf-8"))
        for field in ("_name_or_path", "name_or_path"):
            values.pop(field, None)
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
