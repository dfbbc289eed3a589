"""FLUX.1: 2x2-packed latents, T5 embeddings of one fixed length beside CLIP's pooled one, guidance as a model input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from lorafuse_train.weights import stored_dtype

from .control_latents import control_latents, stacked_controls
from .kl import PATCH, EulerShift, KlLatents
from .recipe import Condition, ControlPicture, Encoded, Guidance

LONGEST_PROMPT = 512
"""Tokens that `FluxPipeline.__call__` pads to, for schnell too, and cuts at."""


class Flux(KlLatents, EulerShift):
    """The recipe of FLUX.1 dev (and its variants with the same input) and schnell, text to image."""

    family = name = "flux"
    pipelines = ("FluxPipeline",)
    version = 1
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    optional_parts = ()

    def load_text_encoder(self, pipeline: Path, device: torch.device) -> FluxPipeline:
        """The family's pipeline with nothing but tokenizers and text encoders."""
        stored = {part: stored_dtype(pipeline / part) for part in ("text_encoder", "text_encoder_2")}
        loaded = FluxPipeline.from_pretrained(pipeline, dtype=stored, scheduler=None, vae=None, transformer=None)
        return loaded.to(device)

    @torch.no_grad()
    def encode_text(self, encoder: FluxPipeline, caption: str, controls: Sequence[ControlPicture] = ()) -> Encoded:
        """`embeds` (L, D) of T5 and `pooled` (P,) of CLIP in their own precisions; `room` for more tokens in T5.

        L is the same for every caption: the model attends to the padding, which is thus part of what it is told.
        """
        embeds, pooled, _ = encoder.encode_prompt(
            caption, device=encoder.text_encoder.device, max_sequence_length=LONGEST_PROMPT
        )
        room = torch.tensor(LONGEST_PROMPT - len(encoder.tokenizer_2(caption).input_ids))
        return {"embeds": embeds[0].cpu(), "pooled": pooled[0].cpu(), "room": room}

    def is_cut(self, encoded: Encoded) -> bool:
        """By T5; what CLIP cuts off still reaches the model through T5."""
        return int(encoded["room"]) < 0

    def collate(self, captions: Sequence[Encoded]) -> Condition:
        """`embeds` (B, L, D) and `pooled` (B, P), nothing to pad or mask; and the controls' latents."""
        texts = {name: torch.stack([caption[name] for caption in captions]) for name in ("embeds", "pooled")}
        return {**texts, **stacked_controls(captions)}

    def predict(self, transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The model's timestep is sigma, and its output is `eps - x0` already.

        A model with a guidance embedder learns at guidance 1, which is what plain pictures are an example of.
        """
        batch, _, height, width = x.shape
        pictures = [x, *control_latents(condition)]
        stored = transformer.x_embedder.weight  # not `transformer.dtype`, which a fp32 LoRA changes
        to = {"device": stored.device, "dtype": stored.dtype}
        embeds = condition["embeds"].to(**to)
        guidance = condition.get("guidance", torch.ones(batch)).to(stored.device)
        tokens = [pack(latents).to(**to) for latents in pictures]
        packed = transformer(
            hidden_states=torch.cat(tokens, dim=1),
            encoder_hidden_states=embeds,
            pooled_projections=condition["pooled"].to(**to),
            timestep=(1000 * sigma).to(**to) / 1000,  # rounded where the pipeline rounds
            guidance=guidance if transformer.config.guidance_embeds else None,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=torch.cat([_positions(plane, item).to(**to) for plane, item in enumerate(pictures)]),
            return_dict=False,
        )[0]
        return unpack(packed[:, : tokens[0].shape[1]].float(), height, width)

    def guidance(self, pipeline: Path, config: Mapping[str, Any]) -> Guidance:
        """dev has a guidance embedder; schnell has not, and was distilled to do without."""
        return Guidance.EMBEDDED if config.get("guidance_embeds") else Guidance.NONE

    def default_guidance(self, pipeline: Path, config: Mapping[str, Any]) -> float:
        """dev's and Kontext's; schnell is told none."""
        return 3.5 if config.get("guidance_embeds") else 1.0

    def guidance_arguments(self, scale: float) -> str:
        """What is embedded; schnell's pipeline takes and ignores it."""
        return f"guidance_scale={scale:g}"


def _positions(plane: int, x: Tensor) -> Tensor:
    """(plane, row, column) of every patch of x (B, C, h, w); what is drawn lies in plane 0, its control in 1."""
    rows, columns = (torch.arange(side // PATCH) for side in x.shape[2:])
    return torch.cartesian_prod(torch.tensor([plane]), rows, columns)


def pack(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4C), a token for every 2x2 patch."""
    packed: Tensor = FluxPipeline._pack_latents(x, *x.shape)
    return packed


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of `height` x `width`."""
    x: Tensor = FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)
    return x
