"""Z-Image: pictures and captions in lists of any length, time counted from noise to picture, and the sign to match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from torch import Tensor, nn

from lorafuse_train.weights import stored_dtype

from .kl import PATCH, EulerShift, KlLatents
from .recipe import Condition, ControlPicture, Encoded, Guidance

TURBO_SHIFT = 3.0
LONGEST_PROMPT = 512
"""Tokens that `ZImagePipeline.__call__` keeps by default, its chat template among them."""


class ZImage(KlLatents, EulerShift):
    """The recipe of Z-Image and Z-Image-Turbo (text to image)."""

    family = name = "z_image"
    pipelines = ("ZImagePipeline",)
    version = 1
    text_parts = ("text_encoder", "tokenizer")
    optional_parts = ()

    def load_text_encoder(self, pipeline: Path, device: torch.device) -> ZImagePipeline:
        """The family's pipeline with nothing but tokenizer and text encoder, so that template and layer are its own."""
        stored = {"text_encoder": stored_dtype(pipeline / "text_encoder")}
        loaded = ZImagePipeline.from_pretrained(pipeline, dtype=stored, scheduler=None, vae=None, transformer=None)
        return loaded.to(device)

    @torch.no_grad()
    def encode_text(self, encoder: ZImagePipeline, caption: str, controls: Sequence[ControlPicture] = ()) -> Encoded:
        """`embeds` (L, D) in the encoder's precision, for the L tokens of the caption in its template."""
        (embeds,), _ = encoder.encode_prompt(
            caption,
            device=encoder.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=LONGEST_PROMPT,
        )
        return {"embeds": embeds.cpu()}

    def is_cut(self, encoded: Encoded) -> bool:
        """Tokens at the limit."""
        return len(encoded["embeds"]) >= LONGEST_PROMPT

    def collate(self, captions: Sequence[Encoded]) -> Condition:
        """`embeds` (B, L, D) padded with zeros, and the `lengths` (B,) to which `predict` cuts them back."""
        embeds = [caption["embeds"] for caption in captions]
        return {
            "embeds": nn.utils.rnn.pad_sequence(embeds, batch_first=True),
            "lengths": torch.tensor([len(item) for item in embeds]),
        }

    def predict(self, transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The model's time is 1 - sigma and its output `x0 - eps`; it pads and masks its lists itself."""
        stored = transformer.all_x_embedder[f"{PATCH}-1"].weight  # not `transformer.dtype`, which a fp32 LoRA changes
        embeds = condition["embeds"].to(stored.device, stored.dtype)
        pictures: list[Tensor] = transformer(
            list(x.to(stored.device, stored.dtype)[:, :, None]),  # (C, 1, h, w) each
            1 - sigma.to(stored.device),
            [item[:length] for item, length in zip(embeds, condition["lengths"].tolist(), strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(pictures)[:, :, 0].float()

    def guidance(self, pipeline: Path, config: Mapping[str, Any]) -> Guidance:
        """By two predictions, for Turbo as well, which is better off without."""
        return Guidance.CFG

    def default_guidance(self, pipeline: Path, config: Mapping[str, Any]) -> float:
        """The pipeline's 5, which is our 6; none for Turbo, known by its scheduler's shift of 3 (the base has 6)."""
        scheduler = FlowMatchEulerDiscreteScheduler.load_config(pipeline / "scheduler")
        return 1.0 if scheduler.get("shift", 1.0) <= TURBO_SHIFT else 6.0

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """n + scale (p - n), which `ZImagePipeline.__call__` writes as p + (scale - 1) (p - n)."""
        return positive + (scale - 1) * (positive - negative)

    def guidance_arguments(self, scale: float) -> str:
        """The pipeline's scale is one less than ours, and 0 is its off."""
        return "guidance_scale=0" if scale == 1 else f'guidance_scale={scale - 1:g}, negative_prompt=" "'
