"""FLUX.2: 2x2 patches normalised by a BatchNorm's statistics, captions of one fixed length, guidance by any means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, retrieve_timesteps
from torch import Tensor, nn
from transformers import AutoTokenizer

from lorafuse_common.errors import CheckpointError
from lorafuse_train.weights import stored_dtype

from .kl import PATCH, KlLatents
from .recipe import Condition, Encoded, Guidance

LONGEST_PROMPT = 512
"""Tokens to which the pipelines pad and cut, their chat templates among them."""
PIPELINES = ("Flux2Pipeline", "Flux2KleinPipeline")
"""dev's and klein's; they differ in the text encoder."""
MANY_STEPS = 200
"""Where `compute_empirical_mu` ends to make up for a small number of steps, for which training has no need."""


class Flux2(KlLatents):
    """The recipe of FLUX.2 dev and klein (text to image).

    x0 is the VAE's latent (C, h, w) and not the pipelines' (4C, h/2, w/2), though the statistics belong to the latter:
    the same numbers in another order, and sizes mean what they mean in other families.
    """

    family = "flux2"
    version = 1
    text_parts = ("text_encoder", "tokenizer")
    optional_parts = ()

    def load_vae(self, pipeline: Path, device: torch.device) -> nn.Module:
        """In fp32 whatever it is stored in: it is small, and what it encodes is kept for all trainings."""
        vae = AutoencoderKLFlux2.from_pretrained(pipeline / "vae", dtype=torch.float32)
        return vae.to(device).eval()  # type: ignore[no-any-return]  # diffusers is untyped

    @torch.no_grad()
    def encode_image(self, vae: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
        """x0 = (mode - running_mean) / sqrt(running_var + eps), per channel of its 2x2 patches."""
        mode: Tensor = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode().float()
        mean, std = _statistics(vae)
        return unpatchify((patchify(mode) - mean) / std)[0].cpu()

    @torch.no_grad()
    def decode(self, vae: AutoencoderKLFlux2, x0: Tensor) -> Tensor:
        """The inverse of `encode_image`."""
        mean, std = _statistics(vae)
        latents = unpatchify(patchify(x0[None].to(vae.device, torch.float32)) * std + mean)
        pixels: Tensor = vae.decode(latents.to(vae.dtype)).sample[0]
        return pixels.float().cpu()

    def load_text_encoder(self, pipeline: Path, device: torch.device) -> Any:
        """dev's or klein's pipeline with nothing but tokenizer and text encoder: template and layers are its own.

        dev's processor is left out for its tokenizer: of a text it makes the same tokens, but it needs torchvision.

        Raises:
            CheckpointError: the pipeline is neither of the two.
        """
        name = DiffusionPipeline.load_config(pipeline)["_class_name"]
        if name not in PIPELINES:
            raise CheckpointError(f"{pipeline}: is a {name}; FLUX.2 is trained on a {' or a '.join(PIPELINES)}")
        loaded = DiffusionPipeline.from_pretrained(
            pipeline,
            dtype={"text_encoder": stored_dtype(pipeline / "text_encoder")},
            tokenizer=None,
            scheduler=None,
            vae=None,
            transformer=None,
        )
        loaded.register_modules(tokenizer=AutoTokenizer.from_pretrained(pipeline / "tokenizer"))
        return loaded.to(device)

    @torch.no_grad()
    def encode_text(self, encoder: Any, caption: str) -> Encoded:
        """`embeds` (512, D) in the encoder's precision, and how many `tokens` () of them are no padding.

        The padding stays: no pipeline of the family masks it, so that it is part of what the model is told.
        """
        masks: list[Tensor] = []
        hook = encoder.text_encoder.register_forward_pre_hook(
            lambda _, arguments, named: masks.append(named["attention_mask"]), with_kwargs=True
        )
        embeds, _ = encoder.encode_prompt(
            caption, device=encoder.text_encoder.device, max_sequence_length=LONGEST_PROMPT
        )
        hook.remove()
        return {"embeds": embeds[0].cpu(), "tokens": masks[0].sum().cpu()}

    def is_cut(self, encoded: Encoded) -> bool:
        """Tokens at the limit."""
        return int(encoded["tokens"]) >= LONGEST_PROMPT

    def collate(self, captions: Sequence[Encoded]) -> Condition:
        """`embeds` (B, 512, D); nothing to pad or mask."""
        return {"embeds": torch.stack([caption["embeds"] for caption in captions])}

    def predict(self, transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The model's timestep is sigma, and its output is `eps - x0` already.

        dev, which has a guidance embedder, learns at guidance 1: what plain pictures are an example of.
        """
        stored = transformer.x_embedder.weight  # not `transformer.dtype`, which a fp32 LoRA changes
        to = {"device": stored.device, "dtype": stored.dtype}
        patches, embeds = patchify(x), condition["embeds"].to(**to)
        guidance = condition.get("guidance", torch.ones(len(x))).to(stored.device)
        packed = transformer(
            hidden_states=Flux2Pipeline._pack_latents(patches).to(**to),
            encoder_hidden_states=embeds,
            timestep=(1000 * sigma).to(**to) / 1000,  # rounded where the pipelines round
            guidance=guidance if transformer.config.guidance_embeds else None,
            txt_ids=Flux2Pipeline._prepare_text_ids(embeds).to(stored.device),
            img_ids=Flux2Pipeline._prepare_latent_ids(patches).to(stored.device),
            return_dict=False,
        )[0]
        return unpatchify(packed.float().transpose(1, 2).reshape(patches.shape))

    def guidance(self, pipeline: Path, config: Mapping[str, Any]) -> Guidance:
        """dev has a guidance embedder, klein's base predicts twice, and the distilled klein does without."""
        if config.get("guidance_embeds", True):
            return Guidance.EMBEDDED
        is_distilled = DiffusionPipeline.load_config(pipeline).get("is_distilled", False)
        return Guidance.NONE if is_distilled else Guidance.CFG

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """n + scale (p - n) (`Flux2KleinPipeline.__call__`)."""
        return negative + scale * (positive - negative)

    def guidance_arguments(self, scale: float) -> str:
        """The same for both pipelines; neither takes a negative prompt, and klein's is empty."""
        return f"guidance_scale={scale:g}"

    def sigmas(self, pipeline: Path, steps: int, latent: tuple[int, int, int]) -> tuple[float, ...]:
        """As the pipelines ask the scheduler for them."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline / "scheduler")
        even = [1 - k / steps for k in range(steps)]
        retrieve_timesteps(scheduler, steps, "cpu", sigmas=even, mu=_mu(latent, steps))
        return tuple(float(sigma) for sigma in scheduler.sigmas[:-1])

    def shift(self, pipeline: Path, latent: tuple[int, int, int]) -> float:
        """exp(mu) or mu where the scheduler shifts by size, else its fixed shift; mu is that of many steps."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline / "scheduler")
        if not scheduler.config.use_dynamic_shifting:
            return float(scheduler.config.shift)
        mu = _mu(latent, MANY_STEPS)
        return math.exp(mu) if scheduler.config.time_shift_type == "exponential" else mu


def patchify(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 4C, h/2, w/2), a position for every 2x2 patch."""
    patches: Tensor = Flux2Pipeline._patchify_latents(x)
    return patches


def unpatchify(patches: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    x: Tensor = Flux2Pipeline._unpatchify_latents(patches)
    return x


def _mu(latent: tuple[int, int, int], steps: int) -> float:
    return float(compute_empirical_mu((latent[1] // PATCH) * (latent[2] // PATCH), steps))


def _statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (4C, 1, 1) of the patches."""
    mean, variance = (values[:, None, None] for values in (vae.bn.running_mean, vae.bn.running_var))
    return mean, torch.sqrt(variance + vae.config.batch_norm_eps)
