"""Qwen-Image: 2x2-packed latents of a 3-D VAE, one Qwen2.5-VL prompt, velocity predicted in our own sign."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from torch import Tensor, nn

from lorafuse_train.weights import stored_dtype

from .control_latents import control_latents, stacked_controls
from .kl import PATCH, EulerShift
from .recipe import Condition, ControlPicture, Encoded, Guidance, Latent, TextOnly

LONGEST_PROMPT = 512
"""Tokens that `QwenImagePipeline.__call__` keeps by default; a longer caption is cut there too."""


class QwenImage(TextOnly, EulerShift):
    """The recipe of Qwen-Image and Qwen-Image-2512 (text to image)."""

    family = name = "qwen_image"
    pipelines: tuple[str, ...] = ("QwenImagePipeline",)
    version = 1
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    optional_parts = ()

    def pixel_multiple(self, pipeline: Path) -> int:
        """VAE reduction times patch."""
        return _vae_scale(pipeline) * PATCH

    def latent_shape(self, pipeline: Path, height: int, width: int, frames: int = 1) -> Latent:
        """(z_dim, H / reduction, W / reduction)."""
        scale = _vae_scale(pipeline)
        return int(_config(pipeline / "vae")["z_dim"]), height // scale, width // scale

    def load_vae(self, pipeline: Path, device: torch.device) -> nn.Module:
        """In fp32 whatever it is stored in: it is small, and what it encodes is kept for all trainings."""
        vae = AutoencoderKLQwenImage.from_pretrained(pipeline / "vae", dtype=torch.float32)
        return vae.to(device).eval()  # type: ignore[no-any-return]  # diffusers is untyped

    @torch.no_grad()
    def encode_image(self, vae: AutoencoderKLQwenImage, pixels: Tensor) -> Tensor:
        """x0 = (mode - latents_mean) / latents_std per channel; the VAE sees one frame of a video."""
        moments = vae.encode(pixels[None, :, None].to(vae.device, vae.dtype)).latent_dist
        mean, std = _statistics(vae)
        x0: Tensor = (moments.mode()[0, :, 0].float() - mean) / std
        return x0.cpu()

    @torch.no_grad()
    def decode(self, vae: AutoencoderKLQwenImage, x0: Tensor) -> Tensor:
        """The inverse of `encode_image`."""
        mean, std = _statistics(vae)
        latents = x0.to(vae.device, torch.float32) * std + mean
        pixels: Tensor = vae.decode(latents[None, :, None].to(vae.dtype)).sample[0, :, 0]
        return pixels.float().cpu()

    def load_text_encoder(self, pipeline: Path, device: torch.device) -> QwenImagePipeline:
        """The family's pipeline with nothing but tokenizer and text encoder, so that the template is its own."""
        return QwenImagePipeline(**load_text_parts(pipeline, device), scheduler=None, vae=None, transformer=None)

    @torch.no_grad()
    def encode_text(self, encoder: QwenImagePipeline, caption: str, controls: Sequence[ControlPicture] = ()) -> Encoded:
        """`embeds` (L, D) in the encoder's precision; a lone caption has no padding, so no mask either."""
        embeds, _ = encoder.encode_prompt(
            caption, device=encoder.text_encoder.device, max_sequence_length=LONGEST_PROMPT
        )
        return {"embeds": embeds[0].cpu()}

    def is_cut(self, encoded: Encoded) -> bool:
        """Tokens at the limit."""
        return len(encoded["embeds"]) >= LONGEST_PROMPT

    def collate(self, captions: Sequence[Encoded]) -> Condition:
        """`embeds` (B, L, D) padded with zeros and `mask` (B, L), 1 where a token is real; the controls' latents."""
        embeds = [caption["embeds"] for caption in captions]
        lengths = torch.tensor([len(item) for item in embeds])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        padded = nn.utils.rnn.pad_sequence(embeds, batch_first=True)
        return {"embeds": padded, "mask": mask.long(), **stacked_controls(captions)}

    def predict(self, transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The model's timestep is sigma itself, and its output is `eps - x0` already, also at the controls' tokens."""
        batch, _, height, width = x.shape
        stored = transformer.img_in.weight  # not `transformer.dtype`, which a fp32 LoRA changes
        to = {"device": stored.device, "dtype": stored.dtype}
        mask, pictures = condition["mask"], [x, *control_latents(condition)]
        tokens = [pack(latents).to(**to) for latents in pictures]
        packed = transformer(
            hidden_states=torch.cat(tokens, dim=1),
            encoder_hidden_states=condition["embeds"].to(**to),
            encoder_hidden_states_mask=None if bool(mask.all()) else mask.to(stored.device),
            timestep=(1000 * sigma).to(**to) / 1000,  # rounded where the pipelines round
            img_shapes=[[(1, item.shape[2] // PATCH, item.shape[3] // PATCH) for item in pictures]] * batch,
            return_dict=False,
        )[0]
        return unpack(packed[:, : tokens[0].shape[1]].float(), height, width)

    def guidance(self, pipeline: Path, config: Mapping[str, Any]) -> Guidance:
        """By two predictions."""
        return Guidance.CFG

    def default_guidance(self, pipeline: Path, config: Mapping[str, Any]) -> float:
        """The `true_cfg_scale` of its pipelines."""
        return 4.0

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """n + scale (p - n), brought back to the length of p in every packed token (`QwenImagePipeline.__call__`)."""
        height, width = positive.shape[-2:]
        p, n = pack(positive), pack(negative)
        combined = n + scale * (p - n)
        combined = combined * (p.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
        return unpack(combined, height, width)

    def guidance_arguments(self, scale: float) -> str:
        """Only a negative prompt, though it be a blank, switches the pipeline's guidance on."""
        return "true_cfg_scale=1" if scale == 1 else f'true_cfg_scale={scale:g}, negative_prompt=" "'


def load_text_parts(pipeline: Path, device: torch.device) -> dict[str, Any]:
    """Tokenizer and text encoder, as the pipelines' classes take them."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    folder = pipeline / "text_encoder"
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=stored_dtype(folder))
    return {
        "text_encoder": encoder.to(device).eval(),
        "tokenizer": Qwen2Tokenizer.from_pretrained(pipeline / "tokenizer"),
    }


def pack(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4C), a token for every 2x2 patch."""
    batch, channels, height, width = x.shape
    packed: Tensor = QwenImagePipeline._pack_latents(x, batch, channels, height, width)
    return packed


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of `height` x `width`."""
    x: Tensor = QwenImagePipeline._unpack_latents(packed, height, width, vae_scale_factor=1)
    return x[:, :, 0]


def _statistics(vae: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, device=vae.device)[:, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def _vae_scale(pipeline: Path) -> int:
    return int(2 ** len(_config(pipeline / "vae")["temperal_downsample"]))


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
