"""FLUX.2: 2x2 patches normalised by a BatchNorm's statistics, captions of one fixed length, guidance by any means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn
from transformers import AutoTokenizer

from lorafuse_train.dataset.pictures import to_pixels
from lorafuse_train.weights import stored_dtype

from .control_latents import MANY, PIPELINES_AREA, control_latents, named_controls, stacked_controls
from .kl import EulerShift, KlLatents, patches_of
from .recipe import Condition, ControlPicture, Encoded, Guidance, Latent, Shape, Size

LONGEST_PROMPT = 512
"""Tokens to which the pipelines pad and cut, their chat templates among them."""
SHORTEST, LONGEST_RATIO = 64, 8
"""What the pipelines ask of a reference picture, in pixels and as a ratio of its sides."""
LARGEST_CROP = 8
"""Pixels at each edge that whole patches of 16 may cost; more is left only where a picture is to be reduced."""


class Flux2(KlLatents, EulerShift):
    """The recipe of FLUX.2 dev and klein: text to image, with reference pictures where the dataset has some.

    x0 is the VAE's latent (C, h, w) and not the pipelines' (4C, h/2, w/2), though the statistics belong to the latter:
    the same numbers in another order, and sizes mean what they mean in other families.
    """

    family = name = "flux2"
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    """dev's and klein's; they differ in the text encoder."""
    version = 1
    text_parts = ("text_encoder", "tokenizer")
    optional_parts = ()
    controls = (0, MANY)

    def control_size(self, pipeline: Path, picture: Size, target: Size, max_pixels: int) -> Size:
        """Its own, reduced to 1024 x 1024 or `max_pixels` where it is larger, and cropped to whole patches.

        Raises:
            ValueError: the pipelines refuse it, for it is too small or too long.
        """
        if min(picture) < SHORTEST or max(picture) > LONGEST_RATIO * min(picture):
            found = f"{picture[1]}x{picture[0]}"
            raise ValueError(
                f"is {found} pixels; FLUX.2 takes {SHORTEST} and more, and no side {LONGEST_RATIO} times the other"
            )
        area, multiple = min(max_pixels, PIPELINES_AREA), self.pixel_multiple(pipeline)
        scale = min(1.0, math.sqrt(area / (picture[0] * picture[1])))
        height, width = (int(side * scale) // multiple * multiple for side in picture)
        return height, width

    def encode_controls(self, vae: Any, controls: Sequence[ControlPicture], shape: Shape) -> Encoded:
        """(C, h, w) each."""
        return named_controls(self.encode_image(vae, _cropped(control)) for control in controls)

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
        """
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
    def encode_text(self, encoder: Any, caption: str, controls: Sequence[ControlPicture] = ()) -> Encoded:
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
        """`embeds` (B, 512, D), nothing to pad or mask; and the latents of reference pictures."""
        return {"embeds": torch.stack([caption["embeds"] for caption in captions]), **stacked_controls(captions)}

    def predict(self, transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The model's timestep is sigma, and its output is `eps - x0` already.

        dev, which has a guidance embedder, learns at guidance 1: what plain pictures are an example of.
        """
        stored = transformer.x_embedder.weight  # not `transformer.dtype`, which a fp32 LoRA changes
        to = {"device": stored.device, "dtype": stored.dtype}
        patches, embeds = patchify(x), condition["embeds"].to(**to)
        references = [patchify(latents) for latents in control_latents(condition)]
        ids = [Flux2Pipeline._prepare_latent_ids(patches)]
        if references:
            own = Flux2Pipeline._prepare_image_ids([reference[:1] for reference in references])
            ids.append(own.expand(len(x), -1, -1))
        guidance = condition.get("guidance", torch.ones(len(x))).to(stored.device)
        packed = transformer(
            hidden_states=torch.cat([Flux2Pipeline._pack_latents(each).to(**to) for each in (patches, *references)], 1),
            encoder_hidden_states=embeds,
            timestep=(1000 * sigma).to(**to) / 1000,  # rounded where the pipelines round
            guidance=guidance if transformer.config.guidance_embeds else None,
            txt_ids=Flux2Pipeline._prepare_text_ids(embeds).to(stored.device),
            img_ids=torch.cat(ids, 1).to(stored.device),
            return_dict=False,
        )[0]
        own_tokens = packed[:, : patches.shape[2] * patches.shape[3]]
        return unpatchify(own_tokens.float().transpose(1, 2).reshape(patches.shape))

    def guidance(self, pipeline: Path, config: Mapping[str, Any]) -> Guidance:
        """dev has a guidance embedder, klein's base predicts twice, and the distilled klein does without."""
        if config.get("guidance_embeds", True):
            return Guidance.EMBEDDED
        is_distilled = DiffusionPipeline.load_config(pipeline).get("is_distilled", False)
        return Guidance.NONE if is_distilled else Guidance.CFG

    def default_guidance(self, pipeline: Path, config: Mapping[str, Any]) -> float:
        """dev's and the base klein's; the distilled klein does without."""
        return 1.0 if self.guidance(pipeline, config) is Guidance.NONE else 4.0

    def guidance_arguments(self, scale: float) -> str:
        """The same for both pipelines; neither takes a negative prompt, and klein's is empty."""
        return f"guidance_scale={scale:g}"

    def mu(self, scheduler: FlowMatchEulerDiscreteScheduler, latent: Latent, steps: int) -> float:
        """By the steps, too."""
        return float(compute_empirical_mu(patches_of(latent), steps))


def patchify(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 4C, h/2, w/2), a position for every 2x2 patch."""
    patches: Tensor = Flux2Pipeline._patchify_latents(x)
    return patches


def unpatchify(patches: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    x: Tensor = Flux2Pipeline._unpatchify_latents(patches)
    return x


def _cropped(control: ControlPicture) -> Tensor:
    """(3, H, W): cropped where it need not be reduced; else reduced to cover its size, and cropped in one direction."""
    picture, (height, width) = control.picture, control.size
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    if max(left, top) < LARGEST_CROP:
        picture = picture.crop((left, top, left + width, top + height))
    return to_pixels(picture, control.size)


def _statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (4C, 1, 1) of the patches."""
    mean, variance = (values[:, None, None] for values in (vae.bn.running_mean, vae.bn.running_var))
    return mean, torch.sqrt(variance + vae.config.batch_norm_eps)
