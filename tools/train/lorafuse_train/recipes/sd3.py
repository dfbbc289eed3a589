"""Stable Diffusion 3 and 3.5: plain latents, two CLIPs and a T5 that may be missing, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from lorafuse_train.base import absent_parts
from lorafuse_train.lora.targets import meta_model
from lorafuse_train.weights import stored_dtype

from .kl import EulerShift, KlLatents
from .recipe import Condition, ControlPicture, Encoded, Guidance

LONGEST_PROMPT = 256
"""Tokens of T5 that `StableDiffusion3Pipeline.__call__` pads to and cuts at."""


class Sd3(KlLatents, EulerShift):
    """The recipe of Stable Diffusion 3 medium, 3.5 medium, 3.5 large and its turbo."""

    family = name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    version = 1
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    optional_parts = ("text_encoder_3", "tokenizer_3")
    evenly_spaced = False

    def load_text_encoder(self, pipeline: Path, device: torch.device) -> StableDiffusion3Pipeline:
        """The family's pipeline with tokenizers, text encoders, and where T5 is missing the transformer's shape."""
        left_out = dict.fromkeys((*absent_parts(pipeline, self), "scheduler", "vae", "transformer"))
        encoders = {"text_encoder", "text_encoder_2", "text_encoder_3"} - {*left_out}
        stored = {part: stored_dtype(pipeline / part) for part in encoders}
        loaded = StableDiffusion3Pipeline.from_pretrained(pipeline, dtype=stored, **left_out).to(device)
        if loaded.text_encoder_3 is None:  # its width is then asked of the transformer
            shape = SD3Transformer2DModel.load_config(pipeline / "transformer")
            loaded.transformer = meta_model("SD3Transformer2DModel", shape)
        return loaded

    @torch.no_grad()
    def encode_text(
        self, encoder: StableDiffusion3Pipeline, caption: str, controls: Sequence[ControlPicture] = ()
    ) -> Encoded:
        """`embeds` (77 + L, D): both CLIPs side by side, then T5; `pooled` (P,) of both CLIPs; `room` for more tokens.

        The lengths are the same for every caption: the model attends to the padding, which is thus part of its input.
        """
        embeds, _, pooled, _ = encoder.encode_prompt(
            caption,
            None,
            None,
            device=encoder.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=LONGEST_PROMPT,
        )
        last, longest = (
            (encoder.tokenizer_3, LONGEST_PROMPT)
            if encoder.tokenizer_3
            else (encoder.tokenizer, encoder.tokenizer_max_length)
        )
        room = torch.tensor(longest - len(last(caption).input_ids))
        return {"embeds": embeds[0].cpu(), "pooled": pooled[0].cpu(), "room": room}

    def is_cut(self, encoded: Encoded) -> bool:
        """By T5, or where there is none by CLIP; what CLIP alone cuts off still reaches the model."""
        return int(encoded["room"]) < 0

    def collate(self, captions: Sequence[Encoded]) -> Condition:
        """`embeds` (B, 77 + L, D) and `pooled` (B, P); nothing to pad or mask."""
        return {name: torch.stack([caption[name] for caption in captions]) for name in ("embeds", "pooled")}

    def predict(self, transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The model's timestep is 1000 sigma in fp32, and its output is `eps - x0` already."""
        stored = transformer.context_embedder.weight  # not `transformer.dtype`, which a fp32 LoRA changes
        predicted: Tensor = transformer(
            hidden_states=x.to(stored.device, stored.dtype),
            encoder_hidden_states=condition["embeds"].to(stored.device, stored.dtype),
            pooled_projections=condition["pooled"].to(stored.device, stored.dtype),
            timestep=1000 * sigma.to(stored.device),
            return_dict=False,
        )[0]
        return predicted.float()

    def guidance(self, pipeline: Path, config: Mapping[str, Any]) -> Guidance:
        """By two predictions."""
        return Guidance.CFG

    def default_guidance(self, pipeline: Path, config: Mapping[str, Any]) -> float:
        """7 for SD3; 4.5 for 3.5, which has norms in its attention, and whose turbo nothing tells from it."""
        return 4.5 if config.get("qk_norm") else 7.0

    def guidance_arguments(self, scale: float) -> str:
        """The negative prompt is empty where none is given, which a blank is to its tokenizers too."""
        return f"guidance_scale={scale:g}"
